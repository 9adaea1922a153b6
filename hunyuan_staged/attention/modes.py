"""The attention modes by name, and by step. Knows no torch."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from hunyuan_staged.errors import InputError

ATTN_MODES = ("flash", "flash2", "flash3", "flash4", "cudnn", "sageattn", "flex-block-attn", "torch")
SPARSE_ATTN_MODE = "flex-block-attn"
DEFAULT_ATTN_MODE = "flash"
ALIASES = {"exact": DEFAULT_ATTN_MODE, "sparse": SPARSE_ATTN_MODE}  # in a schedule
_STRETCH = re.compile(r"(?P<mode>[a-z0-9-]+):(?P<steps>\d{1,4}(-\d{1,4})?)(@(?P<blocks>\d{1,4}(-\d{1,4})?))?")


@dataclass(frozen=True)
class Stretch:
    """Some steps in a row, counted from 0, and the mode that they run; blocks: in those alone, None for all."""

    mode: str
    steps: range
    blocks: range | None = None


def parse_schedule(text: str) -> tuple[Stretch, ...]:
    """--attn_schedule: MODE:STEPS[@BLOCKS], separated by commas, as in exact:0-9,sparse:10-39@2-51.

    InputError for what is none, for an unknown mode, and where two give the same step a mode.
    """
    found: list[Stretch] = []
    for part in text.split(","):
        match = _STRETCH.fullmatch(part.strip())
        if not match:
            raise InputError(
                f"{part!r} is not MODE:FIRST-LAST or MODE:FIRST-LAST@BLOCKS, as in sparse:10-39@2-51",
                option="attn_schedule",
            )
        mode = ALIASES.get(match["mode"], match["mode"])
        if mode not in ATTN_MODES:
            known = ", ".join((*ALIASES, *ATTN_MODES))
            raise InputError(f"mode {match['mode']!r} is unknown; known: {known}", option="attn_schedule")
        stretch = Stretch(mode, _range(match["steps"]), _range(match["blocks"]) if match["blocks"] else None)
        twice = next((step for one in found for step in stretch.steps if step in one.steps), None)
        if twice is not None:
            raise InputError(f"{part.strip()}: step {twice} has a mode already", option="attn_schedule")
        found.append(stretch)
    return tuple(found)


def _range(text: str) -> range:
    first, _, last = text.partition("-")
    if last and int(last) < int(first):
        raise InputError(f"{text} is not FIRST-LAST with FIRST <= LAST", option="attn_schedule")
    return range(int(first), int(last or first) + 1)


def check_schedule(schedule: Sequence[Stretch], steps: int, blocks: int | None = None) -> None:
    """InputError where a schedule names a step or a block that the run does not have. blocks: None, not known yet."""
    for stretch in schedule:
        for what, named, count in (("step", stretch.steps, steps), ("block", stretch.blocks, blocks)):
            if named is not None and count is not None and named[-1] >= count:
                raise InputError(
                    f"{what} {named[-1]} is none of this run's {count}, 0 to {count - 1}", option="attn_schedule"
                )
