"""Where a user's files meet code that trusts them: JSON, constructors of others, anything that may be no plain file."""

import contextlib
import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from hunyuan_staged.errors import InputError

MAX_JSON_BYTES = 2**24  # the largest published one, an index, has a quarter of a megabyte


def require_regular(path: Path, largest: int | None = None) -> Path:
    """The path itself; InputError where it is no plain file (a FIFO would never end) or holds more than `largest` bytes."""
    try:
        about = path.stat()
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if not stat.S_ISREG(about.st_mode):
        raise InputError(f"{path} is not a file")
    if not os.access(path, os.R_OK):
        raise InputError(f"{path} cannot be read (Permission denied)")
    if largest is not None and about.st_size > largest:
        raise InputError(f"{path} has {about.st_size} bytes; at most {largest} are allowed")
    return path


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number that JSON has")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's object; InputError where it is no plain file, is too large, or holds something else."""
    try:
        text = require_regular(path, MAX_JSON_BYTES).read_text(encoding="utf-8")
        content = json.loads(text, parse_constant=_no_constant)
    except InputError:
        raise
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a JSON {type(content).__name__}, not an object")
    return content


@contextlib.contextmanager
def refusing(what: str) -> Iterator[None]:
    """The boundary round code of others that is given a user's files: whatever it raises becomes an InputError.

    what: the file, and what is wrong with it if that code fails; the reason follows in parentheses.
    """
    try:
        yield
    except InputError:
        raise
    except BaseException as error:
        # A panic of the tokenizers' Rust is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(f"{what} ({reason})") from error


def describing(origin: Path) -> contextlib.AbstractContextManager[None]:
    """InputError where what `origin` says, a config, makes no model."""
    return refusing(f"{origin} does not describe a model that this suite can build")


def on_meta(build: Callable[[], Any], origin: Path) -> Any:
    """A module that has shapes but no memory yet; origin: the config that it is built from."""
    with describing(origin), torch.device("meta"):
        return build()
