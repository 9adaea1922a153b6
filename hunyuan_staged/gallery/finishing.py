"""The commands that finish jobs. What a file says gets into them as the value of a known flag alone, quoted."""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hunyuan_staged.errors import InputError, printable
from hunyuan_staged.files import contract
from hunyuan_staged.flags import options_of
from hunyuan_staged.jobs.names import NAME, check_name
from hunyuan_staged.jobs.values import check_values
from hunyuan_staged.options import DecodeOptions, DenoiseOptions
from hunyuan_staged.stage_flags import base_and_larger

ROOT = Path(__file__).absolute().parents[2]
OF_THE_COMMAND = ("input_dir", "output_dir", "output_video", "resume")
JOBS_FILE = "finish.jsonl"  # that a command for several jobs writes beside their folders


def denoise_command(folder: Path, given: Mapping[str, Any], *, resume: bool) -> str:
    """Stage 2 on a folder. given: options by name, as a state records them; what is no option of stage 2 is left out."""
    return _denoise_command(folder, given, _flags(DenoiseOptions, given), resume=resume)


def enlarge_command(folder: Path, given: Mapping[str, Any], resolution: str, *, resume: bool) -> str:
    """Super resolution after denoise_command, as in a whole run. given: the options of the base run."""
    words = _flags(DenoiseOptions, {**given, "super_resolution": resolution})
    return _denoise_command(folder, given, base_and_larger(words)[-1], resume=resume)


def _denoise_command(folder: Path, given: Mapping[str, Any], flags: list[str], *, resume: bool) -> str:
    words = [f"--input_dir={Path(str(given.get('input_dir') or folder))}"]
    if given.get("input_dir"):
        words.append(f"--output_dir={folder}")
    words += ["--resume"] if resume else []
    return _command(2, [*words, *flags])


def decode_command(folder: Path, given: Mapping[str, Any]) -> str:
    """Stage 3 on a folder. given: as of denoise_command."""
    return _command(3, [f"--input_dir={folder}", *_flags(DecodeOptions, given)])


def _flags(cls: type, given: Mapping[str, Any]) -> list[str]:
    words: list[str] = []
    for option in options_of(cls):
        value = given.get(option.name)
        if option.name in OF_THE_COMMAND or value is None:
            continue
        if option.kind is bool:
            words += [f"--{option.name}"] if value is True else []
        elif option.several:
            words += [f"--{option.name}={one}" for one in value] if isinstance(value, list | tuple) else []
        elif isinstance(value, str | int | float):
            words.append(f"--{option.name}={value}")
    return words


def _command(stage: int, words: list[str]) -> str:
    for word in words:
        if printable(word) != word:  # pasted into a terminal they could end the paste
            raise InputError(f"control characters in {printable(word)[:200]}: no command is given")
        if any("\ud800" <= letter <= "\udfff" for letter in word):
            raise InputError(f"{word[:200]!a} is not UTF-8 text: no command is given")
    return shlex.join(["bash", str(ROOT / f"run_stage{stage}.sh"), *words])


def job_line(folder: Path, given: Mapping[str, Any]) -> str | None:
    """The job as a line of a job file for the folder above it; None where it must have a command of its own."""
    shared = given.get("input_dir")
    own = folder if shared is None else folder.parent
    # Where embeddings lie in the folder above, a job file's jobs take those.
    if (folder.parent / contract.EMBEDDINGS_FILE).is_file() != (shared is not None) or str(shared or own) != str(own):
        return None
    try:
        values = check_values({name: value for name, value in given.items() if name != "input_dir"})
        return json.dumps({NAME: check_name(folder.name), **values})
    except InputError:
        return None


def batch(parent: Path) -> tuple[str, str]:
    """What comes before and after the lines of several jobs of a folder, for one command that loads each model once."""
    file = parent / JOBS_FILE
    words = [f"--jobs={file}", f"--input_dir={parent}"]
    return (
        f"cat > {shlex.quote(str(file))} <<'END'",
        "\n".join(["END", _command(2, [*words, "--resume"]), _command(3, words)]),
    )
