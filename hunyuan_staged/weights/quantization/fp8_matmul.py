"""Products computed in float8: activations quantised a token at a time, weights with a scale a row (torch._scaled_mm).

torch's kernels with scales by row are for compute capability 9.0 and newer, and give bf16.
"""

from collections.abc import Iterable

import torch
from torch import nn

from hunyuan_staged.attention.packages import HOPPER
from hunyuan_staged.errors import InputError
from hunyuan_staged.weights.quantization.stored import FLOAT8, LARGEST, StoredLinear

OPTION = "fp8_matmul"
_SMALLEST = 2.0**-100  # of a scale: rows of zeros stay zeros


def check(capability: tuple[int, int] | None, dtype: torch.dtype) -> None:
    """InputError where the products cannot be computed. capability: of the GPU; None without one, or where unknown."""
    if capability is None:
        raise InputError("needs a GPU of compute capability 9.0 (Hopper) or newer", option=OPTION)
    if capability < HOPPER:
        major, minor = capability
        raise InputError(
            f"needs a GPU of compute capability 9.0 (Hopper) or newer; this one has {major}.{minor}", option=OPTION
        )
    if dtype != torch.bfloat16:
        raise InputError(f"computes with --dtype bf16, not {str(dtype).removeprefix('torch.')}", option=OPTION)


def quantise_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(float8 [n, in], scale [n, 1] in float32) with x ≈ float8 x scale, whose largest value is LARGEST in each row."""
    scale = (x.abs().amax(dim=1, keepdim=True).float() / LARGEST).clamp(min=_SMALLEST)
    return (x.float() / scale).clamp(-LARGEST, LARGEST).to(FLOAT8), scale


def product(x: torch.Tensor, stored: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [..., in] times a weight, stored [out, in] in float8 with its scale [out, 1], plus bias [out] → [..., out] in x's
    dtype."""
    rows, row_scale = quantise_rows(x.reshape(-1, x.shape[-1]))
    out = torch._scaled_mm(
        rows, stored.t(), scale_a=row_scale, scale_b=scale.t(), bias=bias, out_dtype=x.dtype, use_fast_accum=True
    )
    return out.view(*x.shape[:-1], -1)


class RowScaledLinear(StoredLinear):
    """A layer whose weight is float8 with a scale a row. fp8_matmul: whether it computes in float8, too."""

    fp8_matmul = False

    @property
    def row_scale(self) -> torch.Tensor:
        """[out, 1], float32."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.fp8_matmul:
            return product(x, self.stored, self.row_scale, self.bias)
        return super().forward(x)


def compute_in_float8(blocks: Iterable[nn.Module], on: bool = True) -> int:
    """Have all layers of some blocks that can compute in float8 do so, or no longer; how many there are."""
    layers = [layer for block in blocks for layer in block.modules() if isinstance(layer, RowScaledLinear)]
    for layer in layers:
        layer.fp8_matmul = on
    return len(layers)
