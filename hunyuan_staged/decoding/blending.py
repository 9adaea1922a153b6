"""Decoded tiles → frames: which comes when, and how neighbours blend."""

import torch

from hunyuan_staged.decoding.frames import FrameBuffer, to_8bit
from hunyuan_staged.decoding.tiling import Tile, TilePlan


def piece_order(plan: TilePlan, chunks: int) -> list[tuple[Tile, int]]:
    """(tile, number of the chunk) in the order in which the pieces are decoded and put together."""
    last = len(plan.rows) - 1
    above = [(tile, chunk) for tile in plan.tiles if tile.row < last for chunk in range(chunks)]
    return above + [(tile, chunk) for chunk in range(chunks) for tile in plan.tiles if tile.row == last]


def blend(before: torch.Tensor, tile: torch.Tensor, dim: int) -> None:
    """Fade from `before` into the head of `tile`, in place, linearly along dim.

    before is the tail of the neighbour above or to the left. Position y of e gets before * (1 - y/e) + tile * (y/e), e
    being the shorter of both: a last tile can be narrower than the overlap. (Official code: blend_v, blend_h.)
    """
    extent = min(before.shape[dim], tile.shape[dim])
    shape = [1] * tile.ndim
    shape[dim] = extent
    ramp = (torch.arange(extent, device=tile.device, dtype=tile.dtype) / extent).view(shape)
    head = tile.narrow(dim, 0, extent)
    head.mul_(ramp).add_(before.narrow(dim, before.shape[dim] - extent, extent) * (1 - ramp))


class Blender:
    """Fades tiles into each other; keeps of each only what neighbours blend with: its last rows and its last columns.

    Of every chunk it must be given the tiles in raster order; which chunk comes when does not matter.
    """

    def __init__(self, plan: TilePlan) -> None:
        self.plan = plan
        self._above: dict[tuple[int, int], torch.Tensor] = {}
        self._left: dict[int, torch.Tensor] = {}

    def __call__(self, tile: Tile, chunk: int, piece: torch.Tensor) -> torch.Tensor:
        """What a tile shows of a chunk, float32 [n, y, x, 3], from its piece [n, h * ratio, w * ratio, 3]."""
        ratio, overlap = self.plan.spatial_ratio, self.plan.blend_px
        # A copy even where the piece is float32 already: blending writes into it.
        values = piece.to(torch.float32, copy=True)
        above, left = self._above.pop((chunk, tile.column), None), self._left.pop(chunk, None)
        if above is not None:
            blend(above, values, dim=1)
        if left is not None:
            blend(left, values, dim=2)
        # Tails of the blended tile, not of the decoded one: so blends chain as in the official code.
        if overlap and tile.row < len(self.plan.rows) - 1:
            self._above[chunk, tile.column] = values[:, -overlap:].clone()
        if overlap and tile.column < len(self.plan.columns) - 1:
            self._left[chunk] = values[:, :, -overlap:].clone()
        return values[:, : tile.y.kept * ratio, : tile.x.kept * ratio]

    def place(self, tile: Tile) -> tuple[slice, slice]:
        """(rows, columns) in px of what a tile shows."""
        ratio = self.plan.spatial_ratio
        return tuple(slice(span.start * ratio, (span.start + span.kept) * ratio) for span in (tile.y, tile.x))  # type: ignore[return-value]


class Canvas(FrameBuffer):
    """The video while its tiles come in."""

    def __init__(self, blender: Blender, num_frames: int, device: torch.device, floats: torch.dtype | None) -> None:
        height, width = (
            spans[-1].stop * blender.plan.spatial_ratio for spans in (blender.plan.rows, blender.plan.columns)
        )
        super().__init__((num_frames, height, width), device, floats)
        self.blender = blender

    def draw(self, tile: Tile, chunk: int, now: slice, piece: torch.Tensor) -> None:
        """Blend a tile's piece of frames `now` and take what it shows."""
        pixels = (self.blender(tile, chunk, piece) / 2 + 0.5).clamp_(0, 1)
        self.put((now, *self.blender.place(tile)), to_8bit(pixels), None if self.floats is None else pixels)
