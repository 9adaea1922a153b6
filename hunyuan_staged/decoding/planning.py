"""Whole frames or tiles, and chunks, that fit the memory; the time a decoding was measured to take. In bytes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hunyuan_staged.decoding import tiling
from hunyuan_staged.decoding.rows import BAND_COUNTS, needed_rows, row_ranks
from hunyuan_staged.decoding.tiling import CHUNK_SIZES, DEFAULT_TILE_OVERLAP, DEFAULT_TILE_SIZE, SMALL_TILE_SIZE
from hunyuan_staged.errors import InputError
from hunyuan_staged.memory.budget import RESERVE, FreeMemory, Remedies, gib, refusal
from hunyuan_staged.models.vae_constants import SCORES_AT_ONCE, VAE_LAYERS, level_widths

# Stage 3's, in tensors of a level's width: behind the mid block, for each px of the last level and each frame of a chunk
# (what goes on, the padded input of a convolution, its product), and in it, for each position. Counted, see
# `bench memory stage3` for the peak.
DECODER_TENSORS = 3
MID_BLOCK_TENSORS = 8
SCORE_BYTES = 4 + 4 + 2  # of the mid block's attention: in float32, after the softmax, and rounded
GATHERED_TENSORS = 4  # of all ranks' keys and values: as they come, and joined
# cuBLAS's, which torch gives to whoever multiplies first and keeps: on a Hopper; 8 MiB on older GPUs. Source: torch,
# aten/src/ATen/cuda/CublasHandlePool.cpp.
WORKSPACE = 32 * 2**20
# A chunk of whole frames gains nothing beyond so many latents: two frames of 1280x720 (README, "Measured").
USEFUL_CHUNK = 2 * 45 * 80


def _remembered(channels: Sequence[int], layers: int, ratio: int) -> float:
    """Values that a decoder's causal convolutions remember for each px: two frames of the input of each.

    channels: of the levels from the smallest to the largest frames, each twice as high and wide as the one before.
    """
    convolutions = 2 * (layers + 1) + 1  # of a level: its resnets', and the upsampler's or conv_out
    return sum(2 * convolutions * width * (min(2**level, ratio) / ratio) ** 2 for level, width in enumerate(channels))


def decoder_working(
    latent_frames_per_chunk: int, tile: tuple[int, int, int], open_px: int, config: Mapping[str, Any], itemsize: int
) -> int:
    """Bytes beside the weights while a tile (T, H, W) is decoded.

    open_px: of all tiles that are begun and not finished, which remember frames.
    """
    frames, height, width = tile
    ratio, temporal = int(config["spatial_compression_ratio"]), int(config["temporal_compression_ratio"])
    channels = level_widths(config)[::-1]
    latent_frames = (frames - 1) // temporal + 1
    chunk = min(frames, latent_frames_per_chunk * temporal) + 2
    positions = height * width // ratio**2
    behind = DECODER_TENSORS * channels[-1] * chunk * height * width
    if chunk - 2 < frames:
        behind += int(_remembered(channels, int(config.get("layers_per_block") or VAE_LAYERS), ratio) * open_px)
    inside = mid_block_working(channels[0], latent_frames, (positions, positions), itemsize)
    return max(behind * itemsize, inside) + channels[0] * latent_frames * open_px // ratio**2 * itemsize


def mid_block_working(channels: int, latent_frames: int, positions: tuple[int, int], itemsize: int) -> int:
    """Bytes beside the weights in a mid block. positions: of a frame of latents, a rank's and all."""
    own, everywhere = positions
    scores = min(SCORES_AT_ONCE, own * everywhere * latent_frames) * SCORE_BYTES
    gathered = GATHERED_TENSORS * everywhere if own < everywhere else 0
    return channels * latent_frames * itemsize * (MID_BLOCK_TENSORS * own + gathered) + scores


def _behind_mid_block(
    chunk: int, piece: int, areas: Sequence[int], padded: Sequence[int], channels: Sequence[int]
) -> int:
    """The most values that levels hold while a chunk of frames goes through them, `piece` at a time through the last.

    areas, padded: positions of a frame of each level, and of a convolution's input, which has one more on every side.
    """
    beside = DECODER_TENSORS - 1  # the padded input, of two frames more, is the third
    # In a piece, the others waiting; in the level before; and between the two, where pieces become of a chunk.
    values = ((beside * piece + chunk - piece) * areas[-1] + (piece + 2) * padded[-1]) * channels[-1]
    if piece == chunk:
        return values
    before = (beside * chunk * areas[-2] + (chunk + 2) * padded[-2]) * channels[-2]
    between = chunk * (channels[-2] * areas[-2] + 2 * channels[-1] * areas[-1])
    return max(values, before, between)


def whole_working(
    latent_frames_per_chunk: int,
    bands: int,
    ranks: int,
    size: tuple[int, int, int],
    config: Mapping[str, Any],
    itemsize: int,
    frames_per_piece: int | None = None,
) -> int:
    """Bytes beside the weights while whole frames of a video (T, H, W) are decoded: at most, of all ranks or bands."""
    frames, height, width = size
    ratio, temporal = int(config["spatial_compression_ratio"]), int(config["temporal_compression_ratio"])
    channels = level_widths(config)[::-1]
    convolutions = 2 * (int(config.get("layers_per_block") or VAE_LAYERS) + 1) + 1
    latent_frames, chunk = (frames - 1) // temporal + 1, min(frames, latent_frames_per_chunk * temporal)
    rows, columns = height // ratio, width // ratio
    if ranks > 1:
        rows = -(-rows // ranks)  # a rank is sent what it needs beyond its own, row by row
    scales = [min(2**level, ratio) for level in range(len(channels))]
    cut = -(-rows // bands)
    piece = min(chunk, frames_per_piece or chunk)
    behind = 0
    for start in range(0, rows, cut):
        own = slice(start, min(start + cut, rows))
        needed = needed_rows(own, rows, [*scales, scales[-1]], [convolutions] * len(channels))
        sides = [(of.stop - of.start, columns * scale) for of, scale in zip(needed, scales, strict=False)]
        padded = [(high + 2) * (wide + 2) for high, wide in sides]
        values = _behind_mid_block(chunk, piece, [high * wide for high, wide in sides], padded, channels)
        if chunk < frames:
            values += sum(2 * convolutions * width * area for width, area in zip(channels, padded, strict=True))
            # The pixels of the chunk before, until this one's are there.
            values += 3 * chunk * (own.stop - own.start) * columns * ratio**2
        behind = max(behind, values)
    positions = height * width // ratio**2
    inside = mid_block_working(channels[0], latent_frames, (rows * columns, positions), itemsize)
    latents = (channels[0] * rows * columns + int(config["latent_channels"]) * positions) * latent_frames
    return max(behind * itemsize, inside) + latents * itemsize


@dataclass(frozen=True)
class Request:
    """What is asked for: the side of tiles in px, or whole frames and nothing else; tiles' overlap; how many ranks; for a
    benchmark the bands, the latent frames at once and the frames of a piece."""

    tile_size: int | None = None
    whole: bool = False
    overlap: float = DEFAULT_TILE_OVERLAP
    ranks: int = 1
    bands: int | None = None
    latent_frames_per_chunk: int | None = None
    frames_per_piece: int | None = None


@dataclass(frozen=True)
class Decoding:
    """How a video is decoded: the side of its tiles in px (None: whole frames), latent frames at once, why, and what
    that takes, by part; whole frames on one process in how many bands of rows, and how many frames go through the last
    level at a time (None: a chunk's)."""

    tile_size: int | None
    latent_frames_per_chunk: int
    reason: str
    parts: Mapping[str, int]
    bands: int = 1
    frames_per_piece: int | None = None

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def resident(self) -> int:
        """Of the weights."""
        return self.parts["weights"]

    def describe(self, ranks: int = 1) -> str:
        """One phrase, e.g. "whole frames in 3 bands of rows" or "tiles of 256 px over 4 processes"."""
        what = "whole frames" if self.tile_size is None else f"tiles of {self.tile_size} px"
        if self.bands > 1:
            what += f" in {self.bands} bands of rows"
        if ranks > 1:
            what += f", {'rows' if self.tile_size is None else 'tiles'} over {ranks} processes"
        return what


def _chunks_of_whole(asked: Request, latents: int, temporal_ratio: int) -> list[tuple[int, int | None]]:
    """(latent frames of a chunk, frames of a piece) to try, the best first; latents: of a frame, that a process has.

    Half a chunk in a piece costs one process little, and a rank has memory to spare: it goes in pieces only where chunks
    cannot be shorter.
    """
    useful = [n for n in CHUNK_SIZES if n * latents <= USEFUL_CHUNK or n == 1]
    chunks = [asked.latent_frames_per_chunk] if asked.latent_frames_per_chunk else useful
    if asked.frames_per_piece:
        return [(chunk, asked.frames_per_piece) for chunk in chunks]
    tried: list[tuple[int, int | None]] = []
    for chunk in chunks:
        half = chunk * temporal_ratio // 2
        tried += [(1, None), (1, half)] if chunk == 1 else [(chunk, half if asked.ranks == 1 else None)]
    return tried


def _frames_held(size: tuple[int, int, int], chunk: int, bands: int) -> int:
    """Bytes of 8-bit frames on the device. Of those that come whole, a chunk's leave while the next one's come; in bands
    all wait, and a chunk's come beside them."""
    frames, height, width = size
    return 3 * (min(frames, 2 * chunk) if bands == 1 else frames + min(frames, chunk)) * height * width


def fit_decoding(
    config: Mapping[str, Any],
    weights: int,
    itemsize: int,
    size: tuple[int, int, int],
    free: FreeMemory,
    asked: Request = Request(),
    remedies: Remedies = tuple,
) -> Decoding:
    """How a video of size (T, H, W) is decoded where nothing, or this, is asked for.

    Whole frames, in the longest chunk that fits and is of use; on one process else in bands of their rows, as few as
    will do; else in tiles of the default size, else in small ones. Before tiles get smaller, chunks get shorter: that
    costs little. Raises InputError where nothing fits, with the remedies (what gives flags that would help).
    """
    frames, height, width = size
    ratio, temporal = int(config["spatial_compression_ratio"]), int(config["temporal_compression_ratio"])
    room, workspace = (free.host, 0) if free.device is None else (free.device, WORKSPACE)
    around = {"weights": weights, "frames": 3 * frames * height * width}
    ranks = row_ranks(height // ratio, asked.ranks)

    def whole(bands: int, chunk: int, reason: str, piece: int | None = None) -> Decoding:
        working = whole_working(chunk, bands, ranks, size, config, itemsize, piece)
        parts = {"frames": _frames_held(size, chunk * temporal, bands), "working memory": working + workspace}
        return Decoding(None, chunk, reason, around | parts, bands, piece)

    def tiled(tile: int, chunk: int, reason: str) -> Decoding:
        cut = tiling.tile_plan(
            height // ratio, width // ratio, tile_size=tile, tile_overlap=asked.overlap, spatial_ratio=ratio
        )
        sides = (cut.rows[0].size * ratio, cut.columns[0].size * ratio)
        last_row = cut.rows[-1].size * sum(span.size for span in cut.columns) * ratio**2
        open_px = max(sides[0] * sides[1], last_row)
        working = decoder_working(chunk, (frames, *sides), open_px, config, itemsize)
        return Decoding(tile, chunk, reason, around | {"working memory": working + workspace})

    # In the order of preference; of each size the longest chunk that fits with the reserve, or else the shortest.
    tried: list[Decoding] = []
    if asked.tile_size is None:
        chunks = _chunks_of_whole(asked, height * width // ratio**2 // ranks, temporal)
        allowed = [n for n in BAND_COUNTS if n <= height // ratio and (n == 1 or ranks == 1)]
        for bands in [asked.bands] if asked.bands else allowed:
            reason = "as asked" if asked.whole else "the default"
            if bands > 1:
                reason = (
                    f"in one piece they would need {gib(whole(1, 1, '', temporal // 2).total)}, {gib(room)} are free"
                )
            tried += [whole(bands, chunk, reason, piece) for chunk, piece in chunks]
    if not asked.whole:
        wanted = [(asked.tile_size, "as asked")]
        if asked.tile_size is None:
            reason = f"{tried[-1].describe(ranks)} would need {gib(tried[-1].total)}, {gib(room)} are free"
            wanted = [(tile, reason) for tile in (DEFAULT_TILE_SIZE, SMALL_TILE_SIZE)]
        sizes = [asked.latent_frames_per_chunk] if asked.latent_frames_per_chunk else CHUNK_SIZES
        tried += [tiled(tile, chunk, reason) for tile, reason in wanted if tile for chunk in sizes]
    chosen = next((one for one in tried if one.total + RESERVE <= room), tried[-1])
    if chosen.total > room:
        what = chosen.describe(ranks if chosen.tile_size is None else 1)
        raise InputError(refusal(f"{what}, {frames} frames,", gib(chosen.total), chosen.parts, free, remedies()))
    return chosen
