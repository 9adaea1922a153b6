"""--lora FILE[:WEIGHT]: which adapters, and how much of each. Knows no torch."""

from collections.abc import Sequence
from pathlib import Path

from hunyuan_staged.errors import InputError
from hunyuan_staged.files.sniffing import require_weights

MAX_LORA_WEIGHT = 1000  # either way: far beyond the largest in use, which are some 10


def parse_adapters(texts: Sequence[str]) -> list[tuple[Path, float]]:
    """(file or folder, weight) of each adapter; InputError where it holds no weights, or the weight is no number."""
    found = []
    for text in texts:
        path, _, last = text.rpartition(":")
        try:
            file, weight = (text, 1.0) if not path or Path(text).exists() else (path, float(last))
        except ValueError:
            file, weight = text, 1.0
        if not Path(file).exists():
            raise InputError(f"{text}: there is no file {file}; allowed is FILE[:WEIGHT]", option="lora")
        if Path(file).is_file():  # and no folder of peft
            require_weights("lora", Path(file))
        if not abs(weight) <= MAX_LORA_WEIGHT:  # nor is NaN
            allowed = f"allowed is -{MAX_LORA_WEIGHT} to {MAX_LORA_WEIGHT}"
            raise InputError(f"{text}: the weight is {last}; {allowed}", option="lora")
        found.append((Path(file), weight))
    return found
