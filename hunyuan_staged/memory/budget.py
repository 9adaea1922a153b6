"""What a stage needs in memory, held against what is free, before anything is loaded. Knows no tensors.

Weights are counted from the config, to the byte. Working memory is computed from a few measured figures, which stand
here with their sources; what was never measured says so. All sizes are in bytes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from hunyuan_staged.errors import InputError

GIB = 2**30
SLOTS = 2  # blocks in flight: one computes while the next one's weights arrive
# Beside what is counted: fragments of the allocator, cuBLAS's workspaces, kernels that load late. Not measured.
RESERVE = 3 * GIB // 4

Remedies = Callable[[], Sequence[str]]  # what gives the flags that would help, asked only where something does not fit


def gib(size: float) -> str:
    """Bytes for a reader, e.g. "4.9 GiB"; less than one as MiB."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.0f} MiB"


@dataclass(frozen=True)
class FreeMemory:
    """Bytes that are free: on the GPU (None where the stage computes on the host), and in host memory."""

    device: int | None
    host: int

    def describe(self) -> str:
        """One phrase for the plan."""
        return f"host {gib(self.host)}" if self.device is None else f"GPU {gib(self.device)}, host {gib(self.host)}"


@dataclass(frozen=True)
class BlockWeights:
    """The weights of a model of equal blocks: how many blocks, the bytes of one of them, and of everything else."""

    count: int
    each: int
    rest: int

    @property
    def total(self) -> int:
        return self.count * self.each + self.rest


@dataclass(frozen=True)
class BlockPlan:
    """How a model is laid out: how many of its blocks are offloaded, why, and what that takes, by part.

    tight: it fits only without the reserve.
    """

    offloaded: int
    reason: str
    device: Mapping[str, int]
    host: int
    tight: bool = False

    @property
    def total(self) -> int:
        return sum(self.device.values())

    @property
    def resident(self) -> int:
        """Of the weights that stay on the device."""
        return self.device["weights"]

    def describe(self, count: int, what: str = "blocks") -> str:
        """One line on how many of `count` blocks are offloaded, and why."""
        chosen = f"{self.offloaded} of {count}" if self.offloaded else "none"
        tight = "; that leaves little room" if self.tight else ""
        return f"offloaded {what}: {chosen} ({self.reason}{tight})"

    def rows(self, count: int, free: FreeMemory, what: str = "blocks") -> dict[str, object]:
        """The rows of a plan about memory."""
        name, _, chosen = self.describe(count, what).partition(": ")
        parts = ", ".join(f"{part} {gib(size)}" for part, size in self.device.items() if size)
        host = f"; host: offloaded weights {gib(self.host)}" if self.host else ""
        return {name: chosen, "memory": f"{gib(self.total)}: {parts}{host}", "free": free.describe()}


def device_parts(weights: BlockWeights, working: int, offloaded: int) -> dict[str, int]:
    """What a device holds with so many blocks offloaded, by part: up to SLOTS of those are there at a time."""
    in_flight = min(SLOTS, offloaded) * weights.each
    resident = weights.rest + (weights.count - offloaded) * weights.each
    return {"weights": resident, "blocks in flight": in_flight, "working memory": working}


def plan_blocks(
    what: str,
    weights: BlockWeights,
    working: int,
    free: FreeMemory,
    *,
    asked: int | None = None,
    ranks: int = 1,
    remedies: Remedies = tuple,
) -> BlockPlan:
    """The layout of a model on one device. asked: how many blocks are to be offloaded; None chooses.

    Chosen is the smallest number with which everything and RESERVE fit. ranks: processes of this host, which share one
    copy of the offloaded blocks, and on a CPU have the rest each for itself. Raises InputError, with the numbers and the
    remedies (what gives flags that would help), where that does not fit; what fits but for the reserve is not refused.
    """

    def needed(offloaded: int) -> int:
        return sum(device_parts(weights, working, offloaded).values())

    everything = weights.count
    if asked is not None and asked > everything:
        raise InputError(f"--offload_blocks {asked} is more than the {everything} blocks of {what}")
    if free.device is None:
        # Working memory on a CPU was never measured, so that only what is certain counts.
        offloaded = asked or 0
        parts = device_parts(weights, 0, offloaded)
        host = ranks * sum(parts.values()) + offloaded * weights.each
        if host > free.host:
            raise InputError(refusal(what, f"{gib(host)} of host memory", parts, free, remedies()))
        return BlockPlan(offloaded, "as asked" if asked is not None else "no GPU", parts, offloaded * weights.each)
    chosen, reason = asked, "as asked"
    if chosen is None:
        room = free.device - RESERVE
        chosen = next((n for n in range(everything + 1) if needed(n) <= room), everything)
        reason = f"all of them resident need {gib(needed(0))}, {gib(free.device)} are free"
    parts = device_parts(weights, working, chosen)
    if needed(chosen) > free.device:
        asked_for = f" with {chosen} of {everything} blocks offloaded" if chosen else ""
        raise InputError(refusal(what + asked_for, f"{gib(needed(chosen))} of GPU memory", parts, free, remedies()))
    host = chosen * weights.each
    if host > free.host:
        raise InputError(
            refusal(f"{what} with {chosen} of {everything} blocks offloaded", f"{gib(host)} of host memory", {}, free)
        )
    return BlockPlan(chosen, reason, parts, host, needed(chosen) > free.device - RESERVE)


def refusal(
    what: str, needs: str, parts: Mapping[str, int], free: FreeMemory, remedies: Sequence[str] = ("more memory",)
) -> str:
    held = ", ".join(f"{name} {gib(size)}" for name, size in parts.items() if size)
    return (
        f"{what} needs {needs}{f' ({held})' if held else ''}; free: {free.describe()}. "
        f"What would help: {', '.join(remedies) or 'more memory'}"
    )


# -- cards, computed --

CARDS = (8, 12, 16, 24, 48, 80)  # GB as they are sold
CARD_OVERHEAD = 3 * GIB // 4  # what CUDA itself and a desktop take of a card. Not measured


def card(size: float) -> FreeMemory:
    """What is free on an otherwise idle card of `size` GB, in a host with enough memory."""
    return FreeMemory(max(0, int(size * GIB) - CARD_OVERHEAD), 64 * GIB)
