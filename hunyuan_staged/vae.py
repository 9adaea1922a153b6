"""Latents → frames: the decoder over tiles, on one process or many, and what becomes of its pieces.

A piece is what one tile gives of one chunk of frames. All rows of tiles but the last are decoded tile by tile; the last
row chunk by chunk, so that whole frames leave while the rest of them is still being decoded.

Letters: T frames, H x W px of the video; t, h, w the same of a latent; C channels; n frames of a chunk.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from hunyuan_staged import InputError, quiet
from hunyuan_staged.decoder import Decoder, prepare_decoder
from hunyuan_staged.parallel import World
from hunyuan_staged.tiles import Tile, TilePlan, deal, tile_plan, whole_plan
from hunyuan_staged.versions import CHUNK_SIZES

__all__ = ["Block", "decode_frames", "plan_decode", "prepare_decoder", "tile_owners", "tile_plan"]

# Pieces that a rank keeps while rank 0 has not taken them yet: of a tile of 256 px and 32 frames 12.6 MB each.
SENDS_AHEAD = 8
BLOCK_FRAMES = 8  # that leave the device together: of 720p 22 MB


def plan_decode(
    latents: torch.Tensor, config: Mapping[str, Any], *, tile_size: int | None, tile_overlap: float
) -> TilePlan:
    """The tiles for latents [1, C, t, h, w]; tile_size (px) None decodes whole frames.

    Needs no weights, so a caller can ask before it loads any. Raises InputError for latents that this decoder does not
    take and for a tiling that makes no sense.
    """
    channels = config["latent_channels"]
    if latents.ndim != 5 or latents.shape[0] != 1 or latents.shape[1] != channels:
        raise InputError(f"latents {list(latents.shape)} do not fit this VAE, which takes [1, {channels}, t, h, w]")
    height, width = latents.shape[-2:]
    ratio = config["spatial_compression_ratio"]
    if tile_size is None:
        return whole_plan(height, width, spatial_ratio=ratio)
    return tile_plan(height, width, tile_size=tile_size, tile_overlap=tile_overlap, spatial_ratio=ratio)


def tile_owners(plan: TilePlan, ranks: int) -> list[int]:
    """Which rank decodes each of plan.tiles. A rank that is not in the list needs no decoder."""
    return deal([tile.cost for tile in plan.tiles], ranks)


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
class Block:
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
        self._leaving: deque[tuple[Block, torch.cuda.Event | None]] = deque()

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
            self._leaving.append((Block(frames, None if self.floats is None else self.floats[some]), event))

    def arrived(self) -> Iterator[Block]:
        """The blocks that are under way, each once it is there."""
        while self._leaving:
            block, event = self._leaving.popleft()
            if event is not None:
                event.synchronize()
            yield block


# -- decoding, and what to do where memory runs out --


def _pieces(
    decoder: Decoder,
    latents: torch.Tensor,
    ratio: int,
    at_once: int,
    tile_overlap: float,
    warn: Callable[[str], object],
) -> Iterator[torch.Tensor]:
    """A tile's pieces. Where memory runs out, the tile is decoded again in tiles of half its side, once."""
    done = 0
    try:
        for piece in decoder(latents, at_once):
            yield piece
            done += 1
        return
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0]
    # Out here nothing holds the failed try's memory any more.
    height, width = latents.shape[-2:]
    half = -(-max(height, width) // 2) * ratio
    shape = f"{width * ratio}x{height * ratio} px"
    if max(height, width) == 1:
        raise InputError(f"a tile of {shape} does not fit in memory ({reason}), and there is none that is smaller")
    warn(f"out of memory with a tile of {shape}: it is decoded in tiles of {half} px instead ({reason})")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    plan = tile_plan(height, width, tile_size=half, tile_overlap=tile_overlap, spatial_ratio=ratio)
    try:
        for number, piece in enumerate(_blended(decoder, latents, plan, at_once)):
            if number >= done:
                yield piece
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"out of memory with tiles of {half} px, too ({str(error).splitlines()[0]}); the latents are on disk: run "
            f"this stage again with --tile_size {max(ratio, half // 2 // ratio * ratio)}, or where more memory is free"
        ) from None


def _blended(decoder: Decoder, latents: torch.Tensor, plan: TilePlan, at_once: int) -> Iterator[torch.Tensor]:
    """The pieces of what `plan` cuts into smaller tiles, chunk by chunk."""
    blender = Blender(plan)
    parts = [decoder(_cut(latents, tile), at_once) for tile in plan.tiles]
    for chunk, pieces in enumerate(zip(*parts, strict=True)):
        height, width = (spans[-1].stop * plan.spatial_ratio for spans in (plan.rows, plan.columns))
        whole = pieces[0].new_empty(len(pieces[0]), height, width, 3)
        for tile, piece in zip(plan.tiles, pieces, strict=True):
            rows, columns = blender.place(tile)
            whole[:, rows, columns] = blender(tile, chunk, piece).to(whole.dtype)
        yield whole


def _cut(latents: torch.Tensor, tile: Tile) -> torch.Tensor:
    return latents[..., tile.y.start : tile.y.stop, tile.x.start : tile.x.stop].contiguous()


def _send(pieces: Iterator[torch.Tensor]) -> None:
    """A rank other than 0: hand each piece to rank 0 while the next ones are decoded."""
    pending: deque[tuple[Any, torch.Tensor]] = deque()  # a tensor must outlive its transfer
    for piece in pieces:
        if len(pending) == SENDS_AHEAD:
            pending.popleft()[0].wait()
        pending.append((dist.isend(piece.contiguous(), dst=0), piece))
    for transfer, _ in pending:
        transfer.wait()


@torch.no_grad()
def decode_frames(
    decoder: torch.nn.Module | None,
    latents: torch.Tensor,
    config: Mapping[str, Any],
    *,
    tile_size: int | None,
    tile_overlap: float,
    world: World,
    at_once: int = CHUNK_SIZES[0],
    progress: Callable[..., Any] = quiet,
    warn: Callable[[str], object] = str,
    as_float: bool = False,
) -> Iterator[Block]:
    """Decode latents [1, C, t, h, w] to Blocks of frames, in order, on rank 0; the other ranks yield nothing.

    Every rank of `world` calls this with the same arguments and goes through to the end. decoder: diffusers'
    HunyuanVideo15Decoder3D on the rank's device; None where tile_owners gives the rank no tile. config: scaling_factor,
    latent_channels, spatial_compression_ratio and temporal_compression_ratio of the VAE. tile_size is in px, None for
    whole frames. at_once: latent frames of a chunk. warn(line) is told where memory ran out and what was done.
    The result has the same bits for any number of ranks: they only decode, and rank 0 does all later arithmetic.

    Raises InputError as plan_decode does, and where memory runs out at half the tile size, too; FloatingPointError
    where a tile decodes to NaN or Inf.
    """
    plan = plan_decode(latents, config, tile_size=tile_size, tile_overlap=tile_overlap)
    owners = dict(zip(plan.tiles, tile_owners(plan, world.size), strict=True))
    if world.rank not in owners.values():
        return
    assert decoder is not None, f"rank {world.rank} has tiles to decode and no decoder"
    forward = Decoder(decoder)
    scaled = (latents.float() / config["scaling_factor"]).to(forward.device, forward.dtype)
    spans = chunk_spans(latents.shape[2], at_once, config["temporal_compression_ratio"])
    order = piece_order(plan, len(spans))
    start = partial(_pieces, forward, ratio=plan.spatial_ratio, at_once=at_once, tile_overlap=tile_overlap, warn=warn)

    def mine() -> Iterator[torch.Tensor]:
        begun: dict[Tile, Iterator[torch.Tensor]] = {}
        for tile, chunk in order:
            if owners[tile] != world.rank:
                continue
            if chunk == 0:
                begun[tile] = start(latents=_cut(scaled, tile))
            yield next(begun[tile])
            if chunk == len(spans) - 1:
                del begun[tile]

    if not world.is_main:
        _send(mine())
        return

    def receive(tile: Tile, chunk: int) -> torch.Tensor:
        sides = (side * plan.spatial_ratio for side in (tile.y.size, tile.x.size))
        frames = spans[chunk].stop - spans[chunk].start
        incoming = torch.empty(frames, *sides, 3, dtype=forward.dtype, device=forward.device)
        dist.recv(incoming, src=owners[tile])
        return incoming

    floats = forward.dtype if as_float else None
    canvas = Canvas(Blender(plan), spans[-1].stop, forward.device, floats)
    doubts: deque[tuple[Tile, torch.Tensor]] = deque()
    # Its own next piece is under way before rank 0 waits for others' that come earlier: it never idles with work left.
    own = mine()
    ahead = next(own, None)
    for tile, chunk in progress(order, desc="decoding", total=len(order), unit="piece"):
        if owners[tile] == 0:
            assert ahead is not None
            piece, ahead = ahead, next(own, None)
        else:
            piece = receive(tile, chunk)
        doubts.append((tile, torch.isfinite(piece).all()))
        canvas.draw(tile, chunk, spans[chunk], piece)
        # Read one piece late, so that the device has the next one to work on meanwhile.
        _settle(doubts, 1, forward.dtype)
        if (tile.row, tile.column) == (len(plan.rows) - 1, len(plan.columns) - 1):
            # The chunk before this one: the device works on the next meanwhile.
            yield from canvas.arrived()
            canvas.leave(spans[chunk])
    _settle(doubts, 0, forward.dtype)
    yield from canvas.arrived()


def _settle(doubts: deque[tuple[Tile, torch.Tensor]], keep: int, dtype: torch.dtype) -> None:
    while len(doubts) > keep:
        tile, finite = doubts.popleft()
        if not finite:
            raise FloatingPointError(f"tile {tile.row},{tile.column} decoded to NaN or Inf in {dtype}")
