"""What the folder of a job is called: safe on every file system, by prompt and seed."""

import hashlib
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

from hunyuan_staged.errors import InputError

NAME = "name"  # the one key of a job that is no option
MAX_NAME = 80
MAX_SLUG = 48
RESERVED = frozenset(["con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(10))])
_NAME = re.compile(rf"[A-Za-z0-9_]([A-Za-z0-9._-]{{0,{MAX_NAME - 2}}}[A-Za-z0-9_-])?")


def slug(text: str) -> str:
    """A prompt as part of a file name: lower-case ASCII words with dashes; where that leaves anything out, with a hash."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    words = re.findall(r"[a-z0-9]+", plain)
    short = ""
    for word in words:
        if len(short) + 1 + len(word) > MAX_SLUG:
            break
        short = f"{short}-{word}" if short else word
    if short.replace("-", " ") == text and short not in RESERVED:
        return short
    hashed = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{short}-{hashed}" if short else hashed


def default_name(values: Mapping[str, Any], number: int) -> str:
    """A job's name by prompt and seed; of one that gives neither, by its number."""
    parts = [slug(values["prompt"])] if values.get("prompt") else []
    parts += [f"seed{values['seed']}"] if "seed" in values else []
    return "-".join(parts) or f"job{number}"


def check_name(name: Any) -> str:
    """A name that every file system takes; InputError for any other."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name.lower().partition(".")[0] in RESERVED:
        raise InputError(
            f"{str(name)[:100]!a} is no name of a folder; allowed are 1 to {MAX_NAME} letters, digits, '-', '_' and '.'",
            option=NAME,
        )
    return name
