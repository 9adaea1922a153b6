"""What a check says, and how far two results of the same computation may be apart."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from hunyuan_staged.memory.available import free_memory


@dataclass(frozen=True)
class Bound:
    """The largest relative error, ||ours - reference|| / ||reference||, and why it is that."""

    value: float
    why: str


_SUMS = "the same sums in another order"
FLOAT32 = Bound(1e-4, f"float32: {_SUMS}")
# Rounding of 2^-9 a value, which tens of layers carry on; the demo's transformers are 1.1 to 1.4 % off in bf16.
BOUNDS = {torch.float32: FLOAT32, torch.bfloat16: Bound(3e-2, f"bf16: {_SUMS}, each value rounded to 2^-9")}


@dataclass(frozen=True)
class Check:
    """One line of the table. value and bound: of an error; note: what was found, or what is wrong."""

    part: str
    what: str
    ok: bool
    note: str
    value: float | None = None
    bound: float | None = None


def relative_error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """||ours - reference|| / ||reference||, in float64 on the CPU; infinite where the shapes differ."""
    if ours.shape != reference.shape:
        return float("inf")
    a, b = ours.double().cpu(), reference.double().cpu()
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


def compared(part: str, what: str, ours: torch.Tensor, reference: torch.Tensor, bound: Bound) -> Check:
    """A check of two results; NaN is never within a bound."""
    error = relative_error(ours, reference)
    return Check(part, what, error <= bound.value, bound.why, error, bound.value)


def within_rounding(part: str, what: str, ours: torch.Tensor, theirs: torch.Tensor, precise: torch.Tensor) -> Check:
    """A check against the published class in float32 on the same weights, where that fits into memory: ours may be twice
    as far from it as the published class is in the run's dtype, and never needs to be nearer than float32's bound."""
    limit = max(FLOAT32.value, 2 * relative_error(theirs, precise))
    why = FLOAT32.why if ours.dtype == torch.float32 else "twice what the published class is off in this dtype"
    return compared(part, what, ours, precise, Bound(limit, why))


def finite(part: str, module: nn.Module) -> Check:
    """Whether all weights of a module are finite numbers; else the first that is not."""
    names = [name for name, tensor in module.named_parameters() if not torch.isfinite(tensor).all()]
    count = sum(tensor.numel() for tensor in module.parameters())
    note = f"{count / 1e6:.1f} M weights" if not names else f"{names[0]} and {len(names) - 1} more are not finite"
    return Check(part, "names, shapes, finite", not names, note)


def place_for(needed: int, device: torch.device) -> torch.device:
    """The device where it has so many bytes free, else the CPU."""
    free = free_memory(device).device
    return device if free is None or free >= needed else torch.device("cpu")


def weight_bytes(module: nn.Module, dtype: torch.dtype) -> int:
    """What a module's weights take in a dtype."""
    return sum(tensor.numel() for tensor in module.parameters()) * dtype.itemsize


def drawn(shape: Iterable[int], seed: int) -> torch.Tensor:
    """Standard normal numbers in float32 on the CPU, the same for a seed on every machine."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))
