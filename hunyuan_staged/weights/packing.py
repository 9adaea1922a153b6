"""Tensors side by side in one piece of memory: one allocation for a block of a model."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

ALIGNMENT = 256  # bytes; every weight starts where a kernel may load whole vectors
_BLOCK = re.compile(r".*?\.\d+(?=\.)")


@dataclass(frozen=True)
class PackedLayout:
    """Where tensors lie in a piece of memory: name, shape, dtype and first byte of each; the size of all."""

    pieces: tuple[tuple[str, tuple[int, ...], torch.dtype, int], ...]
    size: int

    def views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """The tensors in memory of `size` bytes, uint8."""
        views = []
        for _, shape, dtype, start in self.pieces:
            length = torch.Size(shape).numel() * dtype.itemsize
            views.append(flat[start : start + length].view(dtype).view(shape))
        return views


def pack(tensors: Iterable[tuple[str, tuple[int, ...], torch.dtype]]) -> PackedLayout:
    """Lay tensors (name, shape, dtype) one after the other."""
    pieces, start = [], 0
    for name, shape, dtype in tensors:
        pieces.append((name, shape, dtype, start))
        start += -(-torch.Size(shape).numel() * dtype.itemsize // ALIGNMENT) * ALIGNMENT
    return PackedLayout(tuple(pieces), start)


def block_memory(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, device: torch.device
) -> dict[str, torch.Tensor]:
    """Memory for a model's tensors by name, to be filled: one allocation for each of its numbered blocks, which is freed
    with the last of its tensors, and one for what is in none.
    """
    blocks: dict[str, list[tuple[str, tuple[int, ...], torch.dtype]]] = {}
    for name, shape in shapes.items():
        block = _BLOCK.match(name)
        blocks.setdefault(block[0] if block else "", []).append((name, tuple(shape), dtype))
    found: dict[str, torch.Tensor] = {}
    for tensors in blocks.values():
        layout = pack(tensors)
        flat = torch.empty(layout.size, dtype=torch.uint8, device=device)
        found |= {name: view for (name, *_), view in zip(layout.pieces, layout.views(flat), strict=True)}
    return found
