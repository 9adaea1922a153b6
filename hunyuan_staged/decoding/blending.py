"""Decoded tiles → frames: blending, 8-bit conversion, in the order of time."""

import itertools
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from hunyuan_staged.decoding.tiling import Tile, TilePlan

BLOCK_FRAMES = 8  # that leave the device together: of 720p 22 MB


def chunk_spans(latent_frames: int, at_once: int, temporal_ratio: int) -> list[slice]:
    """The frames of each chunk: the first latent frame is one frame, any other temporal_ratio of them."""
    stops = [*range(at_once, latent_frames, at_once), latent_frames]
    edges = [0, *((stop - 1) * temporal_ratio + 1 for stop in stops)]
    return [slice(start, stop) for start, stop in itertools.pairwise(edges)]


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


def to_8bit(pixels: torch.Tensor) -> torch.Tensor:
    """[0, 1] → uint8, rounded to the nearest of 256 levels, a half upwards."""
    return (pixels * 255 + 0.5).to(torch.uint8)


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


@dataclass(frozen=True)
class FrameBatch:
    """Successive frames of a video in host memory: uint8 [n, H, W, 3], and where asked for, floats of it in [0, 1].

    floats have the decoder's dtype: half precision is still eight times finer than 8 bits.
    """

    frames: torch.Tensor
    floats: torch.Tensor | None = None


class Canvas:
    """The video while its tiles come in, as 8-bit frames on the device, and where asked for as floats on the host."""

    def __init__(self, blender: Blender, num_frames: int, device: torch.device, floats: torch.dtype | None) -> None:
        height, width = (
            spans[-1].stop * blender.plan.spatial_ratio for spans in (blender.plan.rows, blender.plan.columns)
        )
        size = (num_frames, height, width, 3)
        self.blender = blender
        self.frames = torch.empty(size, dtype=torch.uint8, device=device)
        self.floats = None if floats is None else torch.empty(size, dtype=floats)
        self._leaving: deque[tuple[FrameBatch, torch.cuda.Event | None]] = deque()

    def draw(self, tile: Tile, chunk: int, now: slice, piece: torch.Tensor) -> None:
        rows, columns = self.blender.place(tile)
        pixels = (self.blender(tile, chunk, piece) / 2 + 0.5).clamp_(0, 1)
        self.frames[now, rows, columns] = to_8bit(pixels)
        if self.floats is not None:
            self.floats[now, rows, columns] = pixels.to(self.floats.dtype).cpu()

    def leave(self, now: slice) -> None:
        """These frames are complete: they start for the host, and nothing waits for them."""
        for start in range(now.start, now.stop, BLOCK_FRAMES):
            some = slice(start, min(start + BLOCK_FRAMES, now.stop))
            frames, event = self.frames[some], None
            if frames.is_cuda:
                host = torch.empty(frames.shape, dtype=frames.dtype, pin_memory=True)
                frames, event = host.copy_(frames, non_blocking=True), torch.cuda.Event()
                event.record()
            self._leaving.append((FrameBatch(frames, None if self.floats is None else self.floats[some]), event))

    def arrived(self) -> Iterator[FrameBatch]:
        """The blocks that are under way, each once it is there."""
        while self._leaving:
            block, event = self._leaving.popleft()
            if event is not None:
                event.synchronize()
            yield block
