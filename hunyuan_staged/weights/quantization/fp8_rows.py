"""Linear weights stored in float8 and multiplied in the run's dtype: half the memory of bf16."""

from collections.abc import Container, Iterable, Iterator, Sequence

import torch
from torch import nn

from hunyuan_staged.weights.quantization.fp8_matmul import RowScaledLinear
from hunyuan_staged.weights.quantization.stored import FLOAT8, LARGEST


def quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(weight [out, in] in float8, scale [out, 1] in weight's dtype), with weight ≈ float8 x scale.

    A scale for each row, because rows differ in size by more than what float8 holds without losing the small ones to its
    subnormals; a power of two, so that scaling rounds nothing, here or in bf16 on the way back. Rows of zeros get 1.
    """
    if weight.is_meta:  # the arithmetic would import torch's compiler
        return weight.new_empty(weight.shape, dtype=FLOAT8), weight.new_empty(len(weight), 1)
    largest = weight.float().abs().amax(dim=1, keepdim=True)
    # largest <= 448 x 2^e, for the smallest such e
    exponent = torch.ceil(torch.log2(largest.clamp(min=2.0**-100) / LARGEST))
    scale = torch.where(largest > 0, torch.exp2(exponent), torch.ones_like(largest))
    return (weight.float() / scale).to(FLOAT8), scale.to(weight.dtype)


def dequantise(stored: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The weight [out, in] in scale's dtype.

    For a compiler an op of its own: its kernels read this float8 only on GPUs from compute capability 8.9 on, torch's own
    everywhere. Eager calls pass the op by, because calling one imports the compiler.
    """
    return (_dequantise_op if torch.compiler.is_compiling() else _dequantise)(stored, scale)


def _dequantise(stored: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return stored.to(scale.dtype).mul_(scale)


_dequantise_op = torch.library.custom_op("hunyuan_staged::dequantise", _dequantise, mutates_args=())


@_dequantise_op.register_fake
def _(stored: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(stored, dtype=scale.dtype)


class Float8Linear(RowScaledLinear):
    """A linear layer that keeps its weight in float8, with a scale [out, 1] of our own in the run's dtype."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        stored, scale = quantise(linear.weight.detach())
        self.stored = nn.Parameter(stored, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)

    @property
    def weight(self) -> torch.Tensor:
        return dequantise(self.stored, self.scale)

    @property
    def row_scale(self) -> torch.Tensor:
        return self.scale.float()


def quantise_linears(blocks: Sequence[nn.Module] | nn.ModuleList) -> None:
    """Replace every nn.Linear in some blocks by a Float8Linear, in place; modules on the meta device, too."""
    for block in blocks:
        for name, module in list(block.named_modules()):
            if isinstance(module, nn.Linear):
                parent, _, leaf = name.rpartition(".")
                setattr(block.get_submodule(parent), leaf, Float8Linear(module))


def stored_name(name: str, names: Container[str]) -> str:
    """Where a tensor of a plain model is in one that has Float8Linear's, whose tensors have these names."""
    stored = f"{name.removesuffix('.weight')}.stored"
    return stored if stored in names else name


def quantised(
    tensors: Iterable[tuple[str, torch.Tensor]], names: Container[str], dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """Named tensors with each weight of a Float8Linear in two parts. names: those of the module; dtype: the run's."""
    for name, tensor in tensors:
        stored_as = stored_name(name, names)
        if stored_as == name or tensor.ndim != 2:
            yield name, tensor
            continue
        # As the run would have it, so that a checkpoint in float32 and its copy in bf16 give the same numbers.
        stored, scale = quantise(tensor.to(dtype))
        yield stored_as, stored
        yield f"{stored_as.removesuffix('.stored')}.scale", scale
