"""The commands that finish a job. What a file says gets into them as the value of a known flag alone, quoted."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hunyuan_staged.errors import InputError, printable
from hunyuan_staged.flags import options_of
from hunyuan_staged.options import DenoiseOptions

ROOT = Path(__file__).absolute().parents[2]


def denoise_command(folder: Path, given: Mapping[str, Any], *, resume: bool) -> str:
    """Stage 2 on a folder. given: options by name, as a state records them; what is no option of stage 2 is left out."""
    words = [f"--input_dir={Path(str(given.get('input_dir') or folder))}"]
    if given.get("input_dir"):
        words.append(f"--output_dir={folder}")
    words += ["--resume"] if resume else []
    for option in options_of(DenoiseOptions):
        value = given.get(option.name)
        if option.name in ("input_dir", "output_dir", "resume") or value is None:
            continue
        if option.kind is bool:
            words += [f"--{option.name}"] if value is True else []
        elif option.several:
            words += [f"--{option.name}={one}" for one in value] if isinstance(value, list) else []
        elif isinstance(value, str | int | float):
            words.append(f"--{option.name}={value}")
    return _command(2, words)


def decode_command(folder: Path) -> str:
    """Stage 3 on a folder."""
    return _command(3, [f"--input_dir={folder}"])


def _command(stage: int, words: list[str]) -> str:
    for word in words:
        if printable(word) != word:  # pasted into a terminal they could end the paste
            raise InputError(f"control characters in {printable(word)[:200]}: no command is given")
        if any("\ud800" <= letter <= "\udfff" for letter in word):
            raise InputError(f"{word[:200]!a} is not UTF-8 text: no command is given")
    return shlex.join(["bash", str(ROOT / f"run_stage{stage}.sh"), *words])
