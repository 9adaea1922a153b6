"""A linear layer that keeps the float8 of a file with the file's own scales, w = q x scale."""

import torch
from torch import nn

from hunyuan_staged.weights.quantization.fp8_matmul import RowScaledLinear
from hunyuan_staged.weights.quantization.stored import FLOAT8

SCALE_BYTES = 4  # of a float32


def scale_bytes(scale: torch.Tensor) -> torch.Tensor:
    """Scales [out, 1], float32, as bytes [out, 4]: so nothing on the way rounds them to the run's dtype."""
    return scale.contiguous().view(torch.uint8)


def dequantise(stored: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float8 [out, in] x scale (bytes [out, 4]), multiplied in float32. For a compiler an op of its own (fp8_rows)."""
    return (_dequantise_op if torch.compiler.is_compiling() else _dequantise)(stored, scale, dtype)


def _dequantise(stored: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return stored.float().mul_(scale.view(torch.float32)).to(dtype)


_dequantise_op = torch.library.custom_op("hunyuan_staged::dequantise_scaled", _dequantise, mutates_args=())


@_dequantise_op.register_fake
def _(stored: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_like(stored, dtype=dtype)


class ScaledLinear(RowScaledLinear):
    """`stored` [out, in] in float8, `scale` the bytes of float32 [out, 1]."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        new = linear.weight.new_empty
        self.stored = nn.Parameter(new(linear.weight.shape, dtype=FLOAT8), requires_grad=False)
        self.scale = nn.Parameter(new(self.out_features, SCALE_BYTES, dtype=torch.uint8), requires_grad=False)

    @property
    def weight(self) -> torch.Tensor:
        return dequantise(self.stored, self.scale, self.dtype)

    @property
    def row_scale(self) -> torch.Tensor:
        return self.scale.view(torch.float32)
