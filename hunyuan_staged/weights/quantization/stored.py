"""Linear layers whose weight is kept in memory in another form than the run's dtype, and made anew wherever it is used."""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import nn

FLOAT8 = torch.float8_e4m3fn  # 3 bits of mantissa
LARGEST = 448.0  # that FLOAT8 holds
# What such layers hold. These dtypes stay as they are wherever weights take the run's dtype.
KEPT = (FLOAT8, torch.uint8)


class StoredLinear(nn.Module):
    """nn.Linear with its weight [out, in] in `stored`; a subclass says how `weight` follows from that."""

    stored: nn.Parameter
    bias: nn.Parameter | None
    out_features: int
    in_features: int

    def __init__(self, linear: "nn.Linear | StoredLinear") -> None:
        super().__init__()
        self.out_features, self.in_features = linear.out_features, linear.in_features
        self.bias = linear.bias

    @property
    def weight(self) -> torch.Tensor:
        """[out, in] in the dtype of the run."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] → [..., out]."""
        return F.linear(x, self.weight, self.bias)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the run: that of the bias, which every such layer of the transformer has."""
        assert self.bias is not None
        return self.bias.dtype


Replacement = Callable[[nn.Linear], StoredLinear]


def replace_linears(model: nn.Module, kept: Mapping[str, Replacement]) -> None:
    """Put a stored layer in the place of some, in place. kept: what makes one, by the name of the layer's weight."""
    for name, make in kept.items():
        layer = name.removesuffix(".weight")
        parent, _, leaf = layer.rpartition(".")
        linear = model.get_submodule(layer)
        assert isinstance(linear, nn.Linear), layer
        setattr(model.get_submodule(parent), leaf, make(linear))


def wide_elements(block: nn.Module) -> int:
    """How many numbers a block has once its stored weights are made; 0 where it has none that are stored."""
    layers = [module for module in block.modules() if isinstance(module, StoredLinear)]
    if not layers:
        return 0
    others = sum(tensor.numel() for tensor in block.parameters() if tensor.dtype not in KEPT)
    return others + sum(layer.out_features * layer.in_features for layer in layers)
