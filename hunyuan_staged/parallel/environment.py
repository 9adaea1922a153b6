"""Which process of a run this one is, as the environment that its launcher made says. Knows no torch."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from hunyuan_staged.errors import InputError

# The variable with the number of the listening socket that rank 0 inherits to serve the store on: so no port is guessed,
# and none lost to another program. For launchers that set it beside torchrun's variables.
STORE_SOCKET = "HUNYUAN_STAGED_STORE_SOCKET"
MAX_RANKS = 65536  # what is above is a slip: the largest clusters have fewer


@dataclass(frozen=True)
class RankInfo:
    """This process's number of how many, and the same among those of its machine; local_size None: not told."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int | None = None


def rank_info(environment: Mapping[str, str] | None = None) -> RankInfo:
    """RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE, as torchrun and other launchers set them.

    InputError names what is no number, out of range, or there without the rest: such are left over from another run, and
    a process that believed them would wait for ever, or write nothing.
    """
    given = os.environ if environment is None else environment
    if not any(name in given for name in ("RANK", "WORLD_SIZE")):
        return RankInfo()
    for name, other in (("RANK", "WORLD_SIZE"), ("WORLD_SIZE", "RANK")):
        if other not in given:
            raise InputError(f"{name} is set without {other}: a launcher such as torchrun sets both; unset {name}")
    size = _number(given, "WORLD_SIZE", 1, MAX_RANKS)
    rank = _number(given, "RANK", 0, size - 1)
    local_size = _number(given, "LOCAL_WORLD_SIZE", 1, size) if "LOCAL_WORLD_SIZE" in given else None
    local_rank = _number(given, "LOCAL_RANK", 0, (local_size or size) - 1) if "LOCAL_RANK" in given else 0
    if size > 1:
        if not given.get("MASTER_ADDR"):
            raise InputError(f"WORLD_SIZE is {size} without MASTER_ADDR: a launcher such as torchrun sets both")
        if "MASTER_PORT" not in given:
            raise InputError(f"WORLD_SIZE is {size} without MASTER_PORT: a launcher such as torchrun sets both")
        _number(given, "MASTER_PORT", 1, 65535)
    return RankInfo(rank, size, local_rank, local_size)


def _number(given: Mapping[str, str], name: str, least: int, most: int) -> int:
    text = given[name]
    if not re.fullmatch(r"[0-9]{1,9}", text) or not least <= int(text) <= most:
        raise InputError(f"{name} is {text!r} in the environment; allowed: {least} to {most}")
    return int(text)
