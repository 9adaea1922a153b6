"""Blocks whose weights are stored in different forms, brought into one, so that a compiler takes all of them for the same.

It compiles anew for each mixture of forms that it meets, and fails after 8 (torch._dynamo.config.recompile_limit). GGUF's
mixed types differ from block to block, and so do files and adapters that leave some layers wide.
"""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from hunyuan_staged.weights.quantization.fp8_matmul import RowScaledLinear
from hunyuan_staged.weights.quantization.stored import StoredLinear


class RowsLinear(RowScaledLinear):
    """A layer that computes in float8, whatever form its scales were kept in: `scale` [out, 1], float32."""

    fp8_matmul = True
    scale: nn.Parameter

    @property
    def row_scale(self) -> torch.Tensor:
        return self.scale


def are_mixed(blocks: Sequence[nn.Module] | nn.ModuleList) -> bool:
    """Whether some layers are stored in one form in one block, and in another, or plain, in the next."""
    return len({tuple(_form(module) for module in block.modules()) for block in blocks}) > 1


def _form(module: nn.Module) -> tuple[type, str | None]:
    return type(module), getattr(module, "kind", None)


class OneKind:
    """Blocks of which each stands, in its turn, in one block whose layers are the same for all: plain ones, into which
    stored weights are made wide, or such that compute in float8."""

    def __init__(self, blocks: Any) -> None:
        """blocks: as of models.transformer.Blocks."""
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, part: slice) -> Iterator[nn.Module]:
        """Iterates over some neighbouring blocks; each is there until the next one comes."""
        stand_in = None
        for block in self.blocks[part]:
            stand_in = stand_in or _like(block)
            _fill(stand_in, block)
            yield stand_in


def _like(block: nn.Module) -> nn.Module:
    """A block with plain layers, or such that compute in float8, where this one has stored ones."""
    own = {id(tensor): tensor for tensor in (*block.parameters(), *block.buffers())}
    made = copy.deepcopy(block, own)  # what is in the memo is not copied
    for name, layer in block.named_modules():
        if isinstance(layer, StoredLinear):
            parent, _, leaf = name.rpartition(".")
            setattr(made.get_submodule(parent), leaf, _plain(layer))
    return made


def _plain(layer: StoredLinear) -> nn.Module:
    if isinstance(layer, RowScaledLinear) and layer.fp8_matmul:
        return RowsLinear(layer)
    with torch.device("meta"):
        return nn.Linear(layer.in_features, layer.out_features)


def _fill(stand_in: nn.Module, block: nn.Module) -> None:
    """Have a stand-in share a block's tensors, but for those of stored layers, which are made anew."""
    pairs: Iterator[tuple[Any, nn.Module]] = zip(stand_in.modules(), block.modules(), strict=True)
    for own, layer in pairs:
        if not isinstance(layer, StoredLinear):
            own._parameters.update(layer._parameters)
            continue
        own.bias = layer.bias
        if isinstance(own, RowsLinear):
            assert isinstance(layer, RowScaledLinear) and layer.fp8_matmul
            own.stored, own.scale = layer.stored, nn.Parameter(layer.row_scale, requires_grad=False)
        else:
            own.weight = nn.Parameter(layer.weight, requires_grad=False)
