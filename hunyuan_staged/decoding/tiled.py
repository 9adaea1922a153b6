"""Latents → frames: the decoder over tiles, on one process or many, and what becomes of its pieces.

A piece is what one tile gives of one chunk of frames. All rows of tiles but the last are decoded tile by tile; the last
row chunk by chunk, so that whole frames leave while the rest of them is still being decoded.

Letters: T frames, H x W px of the video; t, h, w the same of a latent; C channels; n frames of a chunk.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from hunyuan_staged.decoding.blending import Blender, Canvas, piece_order
from hunyuan_staged.decoding.frames import DecodeContext, FiniteChecks, FrameBatch, check_latents
from hunyuan_staged.decoding.tiling import Tile, TilePlan, Tiling, assign_by_cost, tile_plan, whole_plan
from hunyuan_staged.errors import InputError
from hunyuan_staged.models.vae_decoder import Decoder
from hunyuan_staged.parallel.exchange import begin_exchange, exchange

# Pieces that a rank keeps while rank 0 has not taken them yet: of a tile of 256 px and 32 frames 12.6 MB each.
SENDS_AHEAD = 8


def plan_decode(latents: torch.Tensor, config: Mapping[str, Any], tiling: Tiling) -> TilePlan:
    """The tiles for latents [1, C, t, h, w]; one where the tile size is None, whole frames.

    Needs no weights, so a caller can ask before it loads any. Raises InputError for latents that this decoder does not
    take and for a tiling that makes no sense.
    """
    check_latents(latents, config)
    height, width = latents.shape[-2:]
    ratio = config["spatial_compression_ratio"]
    if tiling.tile_size is None:
        return whole_plan(height, width, spatial_ratio=ratio)
    return tile_plan(height, width, tile_size=tiling.tile_size, tile_overlap=tiling.tile_overlap, spatial_ratio=ratio)


def tile_owners(plan: TilePlan, ranks: int) -> list[int]:
    """Which rank decodes each of plan.tiles. A rank that is not in the list needs no decoder."""
    return assign_by_cost([tile.cost for tile in plan.tiles], ranks)


# -- decoding, and what to do where memory runs out --


def _pieces(
    decoder: Decoder, ratio: int, tiling: Tiling, warn: Callable[[str], object], latents: torch.Tensor
) -> Iterator[torch.Tensor]:
    """The pieces of a tile's latents. Where memory runs out, the tile is decoded again in tiles of half its side, once."""
    done = 0
    try:
        for piece in decoder(latents, tiling.latent_frames_per_chunk):
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
    plan = tile_plan(height, width, tile_size=half, tile_overlap=tiling.tile_overlap, spatial_ratio=ratio)
    try:
        for number, piece in enumerate(_blended(decoder, latents, plan, tiling.latent_frames_per_chunk)):
            if number >= done:
                yield piece
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"out of memory with tiles of {half} px, too ({str(error).splitlines()[0]}); the latents are on disk: run "
            f"this stage again with --tile_size {max(ratio, half // 2 // ratio * ratio)}, or where more memory is free"
        ) from None


def _blended(
    decoder: Decoder, latents: torch.Tensor, plan: TilePlan, latent_frames_per_chunk: int
) -> Iterator[torch.Tensor]:
    """The pieces of what `plan` cuts into smaller tiles, chunk by chunk."""
    blender = Blender(plan)
    parts = [decoder(_cut(latents, tile), latent_frames_per_chunk) for tile in plan.tiles]
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
    pending: deque[tuple[list[Any], torch.Tensor]] = deque()  # a tensor must outlive its transfer
    for piece in pieces:
        if len(pending) == SENDS_AHEAD:
            _wait(pending.popleft()[0])
        piece = piece.contiguous()
        pending.append((begin_exchange([(piece, 0)], []), piece))
    for transfers, _ in pending:
        _wait(transfers)


def _wait(transfers: list[Any]) -> None:
    for transfer in transfers:
        transfer.wait()


@torch.no_grad()
def decode_frames(
    decoder: torch.nn.Module | None,
    latents: torch.Tensor,
    config: Mapping[str, Any],
    tiling: Tiling,
    context: DecodeContext,
) -> Iterator[FrameBatch]:
    """Decode latents [1, C, t, h, w] to batches of frames, in order, on rank 0; the other ranks yield nothing.

    Every rank of context.world calls this with the same arguments and goes through to the end. The result has the same
    bits for any number of ranks: they only decode, and rank 0 does all later arithmetic.

    Args:
        decoder: a VaeDecoder on the rank's device; None where tile_owners gives the rank no tile.
        config: scaling_factor, latent_channels, spatial_compression_ratio and temporal_compression_ratio of the VAE.

    Raises InputError as plan_decode does, and where memory runs out at half the tile size, too; FloatingPointError
    where a tile decodes to NaN or Inf.
    """
    plan, world = plan_decode(latents, config, tiling), context.world
    owners = dict(zip(plan.tiles, tile_owners(plan, world.size), strict=True))
    if world.rank not in owners.values():
        return
    forward, scaled, spans = context.begin(decoder, latents, config, tiling.latent_frames_per_chunk)
    order = piece_order(plan, len(spans))
    start = partial(_pieces, forward, plan.spatial_ratio, tiling, context.warn)
    mine = _own_pieces([place for place in order if owners[place[0]] == world.rank], len(spans), scaled, start)
    if not world.is_main:
        _send(mine)
        return
    canvas = Canvas(Blender(plan), spans[-1].stop, forward.device, context.floats_in(forward))
    checks = FiniteChecks(forward.dtype)
    places = context.progress(order, desc="decoding", total=len(order), unit="piece")
    for tile, chunk, piece in _all_pieces(places, owners, mine, partial(_receive, plan.spatial_ratio, spans, forward)):
        checks.add(f"tile {tile.row},{tile.column}", torch.isfinite(piece).all())
        canvas.draw(tile, chunk, spans[chunk], piece)
        # Read one piece late, so that the device has the next one to work on meanwhile.
        checks.read(keep=1)
        if (tile.row, tile.column) == (len(plan.rows) - 1, len(plan.columns) - 1):
            # The chunk before this one: the device works on the next meanwhile.
            yield from canvas.arrived()
            canvas.leave(spans[chunk])
    checks.read()
    yield from canvas.arrived()


def _own_pieces(
    places: Sequence[tuple[Tile, int]], chunks: int, latents: torch.Tensor, start: Callable[..., Iterator[torch.Tensor]]
) -> Iterator[torch.Tensor]:
    """A rank's pieces in the order of `places`, (tile, chunk) each; a tile's decoding stays open until its last chunk."""
    begun: dict[Tile, Iterator[torch.Tensor]] = {}
    for tile, chunk in places:
        if chunk == 0:
            begun[tile] = start(_cut(latents, tile))
        yield next(begun[tile])
        if chunk == chunks - 1:
            del begun[tile]


def _all_pieces(
    places: Iterable[tuple[Tile, int]],
    owners: Mapping[Tile, int],
    mine: Iterator[torch.Tensor],
    receive: Callable[[Tile, int, int], torch.Tensor],
) -> Iterator[tuple[Tile, int, torch.Tensor]]:
    """Rank 0: (tile, chunk, piece) of all ranks, in order.

    Its own next piece is under way before it waits for others' that come earlier: it never idles with work left.
    """
    ahead = next(mine, None)
    for tile, chunk in places:
        if owners[tile] == 0:
            assert ahead is not None
            piece, ahead = ahead, next(mine, None)
        else:
            piece = receive(tile, chunk, owners[tile])
        yield tile, chunk, piece


def _receive(ratio: int, spans: Sequence[slice], forward: Decoder, tile: Tile, chunk: int, source: int) -> torch.Tensor:
    sides = (side * ratio for side in (tile.y.size, tile.x.size))
    frames = spans[chunk].stop - spans[chunk].start
    incoming = torch.empty(frames, *sides, 3, dtype=forward.dtype, device=forward.device)
    exchange([], [(incoming, source)])
    return incoming
