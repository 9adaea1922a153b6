"""How long a decoding takes on a card: as just such a one was measured, else estimated; and what would fit instead."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from hunyuan_staged.decoding import tiling
from hunyuan_staged.decoding.planning import Decoding, Request
from hunyuan_staged.decoding.rows import row_ranks
from hunyuan_staged.decoding.tiling import DEFAULT_TILE_OVERLAP, SMALL_TILE_SIZE
from hunyuan_staged.errors import InputError
from hunyuan_staged.memory.budget import gib
from hunyuan_staged.memory.cards import Card
from hunyuan_staged.memory.expected import Expected, estimated, measured
from hunyuan_staged.memory.operations import decoder_flops
from hunyuan_staged.memory.timings import measured_decoding
from hunyuan_staged.models.vae_constants import is_published

# What a further band of rows adds at most, of all operations: a level's convolutions reach so far into its neighbours.
BAND_OVERLAP = 0.15

Size = tuple[int, int, int]  # (T, H, W) of a video


def decoding_time(
    card: Card, config: Mapping[str, Any], size: tuple[int, int, int], decoding: Decoding, overlap: float, ranks: int
) -> Expected | None:
    """Seconds of a decoding on a card: as just such a one was measured, else estimated."""
    seconds = decoding_seconds(card.name, config, size, decoding, overlap, ranks)
    if seconds is not None:
        return measured(seconds)
    return estimated(*decoding_flops(config, size, decoding, overlap, ranks), card)


def decoding_seconds(
    gpu: str | None,
    config: Mapping[str, Any],
    size: tuple[int, int, int],
    decoding: Decoding,
    overlap: float,
    ranks: int,
) -> float | None:
    """Seconds of a decoding where one just like it has been measured, else None: nothing is guessed."""
    if gpu is None or not is_published(config) or ranks != 1 or decoding.bands != 1:
        return None
    if decoding.tile_size is not None and overlap != DEFAULT_TILE_OVERLAP:
        return None
    chunk = decoding.latent_frames_per_chunk
    piece = decoding.frames_per_piece
    if piece is not None and piece >= min(size[0], chunk * int(config["temporal_compression_ratio"])):
        piece = None  # a chunk's
    return measured_decoding(gpu, size, decoding.tile_size, chunk, piece)


def decoding_flops(
    config: Mapping[str, Any], size: tuple[int, int, int], decoding: Decoding, overlap: float, ranks: int
) -> tuple[float, float]:
    """Operations of a decoding on the process that has most of it, at least and at most: what overlaps is done twice."""
    frames, height, width = size
    ratio, temporal = int(config["spatial_compression_ratio"]), int(config["temporal_compression_ratio"])
    rows, columns = height // ratio, width // ratio
    plain = decoder_flops(dict(config), (frames - 1) // temporal + 1, rows, columns)
    if decoding.tile_size is not None:
        cut = tiling.tile_plan(rows, columns, tile_size=decoding.tile_size, tile_overlap=overlap, spatial_ratio=ratio)
        tiles = len(cut.rows) * len(cut.columns)
        area = sum(span.size for span in cut.rows) * sum(span.size for span in cut.columns)
        done = plain * area / (rows * columns) * -(-tiles // ranks) / tiles
        return done, done
    alone = row_ranks(rows, ranks)
    return plain / alone, plain / alone * (1 + BAND_OVERLAP * (decoding.bands - 1))


def what_fits(
    fit: Callable[[Size, Request], Decoding],
    size: Size,
    asked: Request,
    temporal_ratio: int,
) -> list[tuple[str, Size, Decoding]]:
    """What to change for a decoding to fit that does not, each with the size (T, H, W) and how that is decoded: other
    tiles; where none do, fewer frames. fit: fit_decoding of a size."""
    free_choice, small = (replace(asked, tile_size=tile, whole=False) for tile in (None, SMALL_TILE_SIZE))
    found: dict[int | None, tuple[str, Size, Decoding]] = {}
    for flag, request in (("no flag about tiles", free_choice), (f"--tile_size {SMALL_TILE_SIZE}", small)):
        with suppress(InputError):
            how = fit(size, request)
            found.setdefault(how.tile_size, (flag, size, how))
    frames, height, width = size
    for fewer in range(frames - temporal_ratio, 0, -temporal_ratio) if not found else ():
        with suppress(InputError):
            shorter = fewer, height, width
            return [(f"--video_length {fewer} or less in stage 2", shorter, fit(shorter, free_choice))]
    return list(found.values())


def remedies(
    fit: Callable[[Size, Request], Decoding], size: Size, asked: Request, config: Mapping[str, Any], card: Card | None
) -> list[str]:
    """What what_fits finds, each with its memory and its time on a card, the fastest first."""
    told = []
    for flags, fitting, how in what_fits(fit, size, asked, int(config["temporal_compression_ratio"])):
        time = card and decoding_time(card, config, fitting, how, asked.overlap, asked.ranks)
        told.append((time.most if time else 0.0, f"{flags} ({gib(how.total)}{f', {time}' if time else ''})"))
    return [text for _, text in sorted(told)]
