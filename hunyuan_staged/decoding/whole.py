"""Latents → whole frames, without seams: by rows over ranks, or on one process by bands of rows where memory is short.

Rows over ranks: each rank owns rows of latents. Before a convolution it gets one row of that level from each neighbour,
and the mid block's attention sees all ranks' keys and values. Nothing is computed twice.

Bands: one after the other, each through the whole video, since what its convolutions remember is what fills memory. A
band starts with the rows that its convolutions need beyond its own, and after each level drops those of no more use.

Either way a value is computed from the same numbers as on one process in one piece: the same bits.

Letters: T frames, H x W px of the video; t, h, w the same of a latent; n frames of a chunk.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from hunyuan_staged.decoding.frames import (
    DecodeContext,
    FiniteChecks,
    FrameBatch,
    FrameBuffer,
    check_latents,
    to_8bit,
)
from hunyuan_staged.decoding.planning import Decoding
from hunyuan_staged.decoding.rows import BAND_COUNTS, needed_rows, row_ranks, row_slices
from hunyuan_staged.decoding.tiling import SMALL_TILE_SIZE
from hunyuan_staged.errors import InputError
from hunyuan_staged.models.vae_decoder import ALL_ROWS, Decoder, FrameLayout
from hunyuan_staged.parallel.exchange import Transfers, exchange
from hunyuan_staged.parallel.layout import split_evenly


class RowShard(FrameLayout):
    """One rank's rows of latents, counts[rank] of them, its neighbours' being the next ranks'."""

    has_halo = True

    def __init__(self, rank: int, counts: Sequence[int], exchange: Callable[[Transfers, Transfers], None]) -> None:
        self.rank, self.counts, self.exchange = rank, list(counts), exchange
        self.rows = row_slices(counts)
        self._others = [peer for peer in range(len(counts)) if peer != rank]

    def fill_halo(self, inputs: torch.Tensor, *, first: bool) -> None:
        # (neighbour, my row that it needs, where its row goes)
        edges = [(self.rank - 1, 1, 0), (self.rank + 1, -2, -1)]
        edges = [edge for edge in edges if edge[0] in self._others]
        outgoing = [(inputs[2:, own].contiguous(), peer) for peer, own, _ in edges]
        incoming = [(torch.empty_like(tensor), peer) for tensor, peer in outgoing]
        self.exchange(outgoing, incoming)
        for (_, _, place), (row, _) in zip(edges, incoming, strict=True):
            inputs[2:, place] = row
            if first:
                inputs[:2, place] = row[:1]

    def gather_rows(self, x: torch.Tensor) -> torch.Tensor:
        parts = [x.new_empty(x.shape[0], count, *x.shape[2:]) for count in self.counts]
        parts[self.rank] = x.contiguous()
        self.exchange(
            [(parts[self.rank], peer) for peer in self._others], [(parts[peer], peer) for peer in self._others]
        )
        return torch.cat(parts, dim=1)

    def scatter_rows(self, x: torch.Tensor) -> torch.Tensor:
        """The own rows of rank 0's [n, y, ..], y being the same multiple of all rows; elsewhere x, in which they arrive."""
        if self.rank:
            self.exchange([], [(x, 0)])
            return x
        parts = [
            part.contiguous() for part in x.split([x.shape[1] // sum(self.counts) * n for n in self.counts], dim=1)
        ]
        self.exchange([(parts[peer], peer) for peer in self._others], [])
        return parts[0]

    def on_first(self, x: torch.Tensor) -> torch.Tensor:
        """On rank 0 all ranks' [n, y, ..] joined, y being the same multiple of their rows; elsewhere x, which is sent."""
        x = x.contiguous()
        if self.rank:
            self.exchange([(x, 0)], [])
            return x
        scale = x.shape[1] // self.counts[0]
        parts = [x, *(x.new_empty(x.shape[0], scale * count, *x.shape[2:]) for count in self.counts[1:])]
        self.exchange([], [(parts[peer], peer) for peer in self._others])
        return torch.cat(parts, dim=1)


class RowBand(FrameLayout):
    """Rows `own` of latents of `height`, with what the convolutions behind the mid block need around them."""

    def __init__(self, module: Any, own: slice, height: int) -> None:
        blocks = list(module.up_blocks)
        assert all(block.upsamplers for block in blocks[:-1]), "crop is called behind upsamplers"
        self.scales = [1]
        for block in blocks:
            self.scales.append(self.scales[-1] * (2 if block.upsamplers else 1))
        # The last convolution of a block is its upsampler's, or conv_out.
        self.needed = needed_rows(own, height, self.scales, [2 * len(block.resnets) + 1 for block in blocks])

    def crop(self, x: torch.Tensor, level: int) -> torch.Tensor:
        start = 0
        if level:
            start = self.needed[level - 1].start * (self.scales[level] // self.scales[level - 1])
        wanted = self.needed[level]
        return x[:, wanted.start - start : wanted.stop - start].contiguous()


def bands_of(module: Any, height: int, count: int) -> list[FrameLayout]:
    """`count` bands of frames of `height` latents; one band is the whole frame."""
    if count == 1:
        return [ALL_ROWS]
    return [RowBand(module, own, height) for own in row_slices(split_evenly(height, count))]


# -- the pixels of a chunk --


@dataclass(frozen=True)
class Pixels:
    """Rows of a chunk's frames: uint8 [n, y, W, 3]; where kept, floats in [0, 1]; uint8 [1, 1], nought if not finite."""

    frames: torch.Tensor
    floats: torch.Tensor | None
    finite: torch.Tensor


def pack(decoded: torch.Tensor, *, as_float: bool) -> Pixels:
    """What leaves, from what the decoder gave: [n, y, W, 3] in about [-1, 1]."""
    values = (decoded.float() / 2 + 0.5).clamp_(0, 1)
    finite = torch.isfinite(decoded).all().to(torch.uint8).view(1, 1)
    return Pixels(to_8bit(values), values.to(decoded.dtype) if as_float else None, finite)


def _chunks(forward: Decoder, values: torch.Tensor, decoding: Decoding, layout: FrameLayout) -> Iterator[torch.Tensor]:
    return forward.chunks(values, decoding.latent_frames_per_chunk, layout, decoding.frames_per_piece)


def in_bands(
    forward: Decoder, latents: torch.Tensor, spans: Sequence[slice], decoding: Decoding, *, as_float: bool
) -> Iterator[tuple[slice, slice, Pixels]]:
    """(rows in latents, frames, pixels) on one process: band after band, each from the first chunk to the last."""
    values = forward.before_chunks(latents)
    height = latents.shape[3]
    rows = row_slices(split_evenly(height, decoding.bands))
    for own, layout in zip(rows, bands_of(forward.module, height, decoding.bands), strict=True):
        for now, decoded in zip(spans, _chunks(forward, values, decoding, layout), strict=True):
            yield own, now, pack(decoded, as_float=as_float)


def over_ranks(
    forward: Decoder,
    latents: torch.Tensor,
    spans: Sequence[slice],
    decoding: Decoding,
    shard: RowShard,
    *,
    as_float: bool,
) -> Iterator[tuple[slice, slice, Pixels]]:
    """The same of whole frames on rank 0, chunk after chunk; on any other rank of its own rows, which rank 0 gets."""
    values = forward.before_chunks(latents[:, :, :, shard.rows[shard.rank]], shard)
    for now, decoded in zip(spans, _chunks(forward, values, decoding, shard), strict=True):
        own = pack(decoded, as_float=as_float)
        yield (
            slice(0, latents.shape[3]),
            now,
            Pixels(
                shard.on_first(own.frames),
                None if own.floats is None else shard.on_first(own.floats),
                shard.on_first(own.finite.expand(1, shard.counts[shard.rank])).amin(),
            ),
        )


# -- frames --


def _more_bands(decoding: Decoding, ranks: int, height: int, reason: str) -> Decoding:
    """What to try where memory ran out; InputError where nothing is left to try."""
    bands = min(2 * decoding.bands, height, BAND_COUNTS[-1])
    if ranks > 1 or bands == decoding.bands:
        how = f"on {ranks} processes" if ranks > 1 else f"in {bands} band{'s' * (bands > 1)} of rows"
        raise InputError(
            f"out of memory with whole frames {how} ({reason}); the latents are on disk: run this stage again with "
            f"--tile_size {SMALL_TILE_SIZE}, or where more memory is free"
        )
    return replace(decoding, bands=bands)


def _pieces(
    forward: Decoder, latents: torch.Tensor, spans: Sequence[slice], decoding: Decoding, ranks: int, *, as_float: bool
) -> Iterator[tuple[slice, slice, Pixels]]:
    """What rank 0 gets, alone or of `ranks`: (rows in latents, frames, pixels)."""
    if ranks == 1:
        return in_bands(forward, latents, spans, decoding, as_float=as_float)
    shard = RowShard(0, split_evenly(latents.shape[3], ranks), exchange)
    return over_ranks(forward, latents, spans, decoding, shard, as_float=as_float)


def _complete(
    pieces: Iterator[tuple[slice, slice, Pixels]], buffer: FrameBuffer, checks: FiniteChecks, height: int, ratio: int
) -> Iterator[FrameBatch]:
    """Put pieces into the buffer, and give the frames that have all their rows and have left it."""
    for rows, now, pixels in pieces:
        checks.add(f"frames {now.start} to {now.stop - 1}", pixels.finite)
        buffer.put((now, slice(rows.start * ratio, rows.stop * ratio)), pixels.frames, pixels.floats)
        # Read one late, so that the device works on the next meanwhile.
        checks.read(keep=1)
        if rows.stop == height and now.start >= buffer.left:
            yield from buffer.arrived()
            buffer.leave(now)


@torch.no_grad()
def decode_whole(
    decoder: torch.nn.Module | None,
    latents: torch.Tensor,
    config: Mapping[str, Any],
    decoding: Decoding,
    context: DecodeContext,
) -> Iterator[FrameBatch]:
    """Decode latents [1, C, t, h, w] to batches of frames, in order, on rank 0; the other ranks yield nothing.

    Every rank of context.world calls this with the same arguments and goes through to the end. The result has the same bits
    for any number of ranks, of bands and, up to rounding, of latent frames at once.

    Args:
        decoder: diffusers' HunyuanVideo15Decoder3D on the rank's device; None where the rank has no row (see row_ranks).
        config: scaling_factor, latent_channels, spatial_compression_ratio and temporal_compression_ratio of the VAE.
        decoding: latent frames at once, and bands on one process.

    Raises InputError for latents that this decoder does not take, and where memory runs out for good;
    FloatingPointError where frames decode to NaN or Inf.
    """
    check_latents(latents, config)
    ratio, height, width = int(config["spatial_compression_ratio"]), *latents.shape[3:]
    world, as_float = context.world, context.as_float
    ranks = row_ranks(height, world.size)
    if world.rank >= ranks:
        return
    forward, scaled, spans = context.begin(decoder, latents, config, decoding.latent_frames_per_chunk)
    if world.rank:
        shard = RowShard(world.rank, split_evenly(height, ranks), exchange)
        deque(over_ranks(forward, scaled, spans, decoding, shard, as_float=as_float), maxlen=0)
        return
    size = (spans[-1].stop, height * ratio, width * ratio)
    buffer = FrameBuffer(size, forward.device, context.floats_in(forward))
    checks = FiniteChecks(forward.dtype)

    while True:
        try:
            coming = _pieces(forward, scaled, spans, decoding, ranks, as_float=as_float)
            coming = context.progress(coming, desc="decoding", total=len(spans) * decoding.bands, unit="chunk")
            yield from _complete(coming, buffer, checks, height, ratio)
            break
        except torch.OutOfMemoryError as error:
            reason = str(error).splitlines()[0]
        del coming
        # Out here nothing holds the failed try's memory any more.
        decoding = _more_bands(decoding, ranks, height, reason)
        context.warn(f"out of memory: decoded again in {decoding.bands} bands of rows ({reason})")
        if forward.device.type == "cuda":
            torch.cuda.empty_cache()
    checks.read()
    yield from buffer.arrived()
