"""Sigmas that a user gives: `--sigmas 1,0.94,0.8`. Knows no torch."""

import itertools
import math
import re

from hunyuan_staged.errors import InputError

OPTION = "sigmas"
MAX_COUNT = 1000


def parse_sigmas(text: str) -> tuple[float, ...]:
    """The noise level of each step: from 1 down, above 0, which follows by itself. InputError for anything else."""
    numbers = []
    for word in text.split(","):
        try:
            numbers.append(float(word) if re.fullmatch(r"\s*[0-9.eE+-]+\s*", word) else math.nan)
        except ValueError:
            numbers.append(math.nan)
    wrong = next((word for word, number in zip(text.split(","), numbers, strict=True) if not 0 < number <= 1), None)
    if wrong is not None:
        raise InputError(f"{text}: {wrong.strip()!r} is not a number above 0 and up to 1", option=OPTION)
    if numbers[0] != 1:
        raise InputError(f"{text} begins at {numbers[0]:g}, not at 1", option=OPTION)
    for before, after in itertools.pairwise(numbers):
        if after >= before:
            raise InputError(f"{text}: {after:g} is not below {before:g}", option=OPTION)
    if len(numbers) > MAX_COUNT:
        raise InputError(f"has {len(numbers)} numbers; at most {MAX_COUNT} are allowed", option=OPTION)
    return tuple(numbers)
