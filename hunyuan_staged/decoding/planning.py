"""Tiles and chunks that fit the memory, and the time a decoding was measured to take. In bytes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hunyuan_staged.decoding import tiling
from hunyuan_staged.decoding.tiling import CHUNK_SIZES, DEFAULT_TILE_OVERLAP, DEFAULT_TILE_SIZE, SMALL_TILE_SIZE
from hunyuan_staged.errors import InputError
from hunyuan_staged.memory.budget import RESERVE, FreeMemory, gib, refusal
from hunyuan_staged.memory.timings import measured_decoding
from hunyuan_staged.models.vae_constants import SCORES_AT_ONCE, VAE_CHANNELS, VAE_LAYERS

# Stage 3's, in tensors of a level's width: behind the mid block, for each px of the last level and each frame of a chunk
# (what goes on, the padded input of a convolution, its product), and in it, for each position. Counted, see
# `bench memory stage3` for the peak.
DECODER_TENSORS = 3
MID_BLOCK_TENSORS = 8
SCORE_BYTES = 4 + 4 + 2  # of the mid block's attention: in float32, after the softmax, and rounded


# -- stage 3 --


def _remembered(channels: Sequence[int], layers: int, ratio: int) -> float:
    """Values that a decoder's causal convolutions remember for each px: two frames of the input of each.

    channels: of the levels from the smallest to the largest frames, each twice as high and wide as the one before.
    """
    convolutions = 2 * (layers + 1) + 1  # of a level: its resnets', and the upsampler's or conv_out
    return sum(2 * convolutions * width * (min(2**level, ratio) / ratio) ** 2 for level, width in enumerate(channels))


def decoder_working(
    at_once: int, tile: tuple[int, int, int], open_px: int, config: Mapping[str, Any], itemsize: int
) -> int:
    """Bytes beside the weights while a tile (T, H, W) is decoded in chunks of at_once latent frames.

    open_px: of all tiles that are begun and not finished, which remember frames.
    """
    frames, height, width = tile
    ratio, temporal = int(config["spatial_compression_ratio"]), int(config["temporal_compression_ratio"])
    channels = list(config.get("block_out_channels") or VAE_CHANNELS)[::-1]
    latent_frames = (frames - 1) // temporal + 1
    chunk = min(frames, at_once * temporal) + 2
    positions = height * width // ratio**2
    behind = DECODER_TENSORS * channels[-1] * chunk * height * width
    if chunk - 2 < frames:
        behind += int(_remembered(channels, int(config.get("layers_per_block") or VAE_LAYERS), ratio) * open_px)
    scores = min(SCORES_AT_ONCE, positions * positions * latent_frames) * SCORE_BYTES
    inside = MID_BLOCK_TENSORS * channels[0] * latent_frames * positions * itemsize + scores
    return max(behind * itemsize, inside) + channels[0] * latent_frames * open_px // ratio**2 * itemsize


@dataclass(frozen=True)
class Decoding:
    """How a video is decoded: the side of its tiles in px (None: whole frames), latent frames at once, why, and what
    that takes, by part."""

    tile_size: int | None
    at_once: int
    reason: str
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def fit_decoding(
    config: Mapping[str, Any],
    weights: int,
    itemsize: int,
    size: tuple[int, int, int],
    free: FreeMemory,
    *,
    asked: int | None,
    whole: bool = False,
    overlap: float = DEFAULT_TILE_OVERLAP,
) -> Decoding:
    """Tiles and chunks for a video of size (T, H, W). asked: --tile_size; whole: --disable_tiling; else the default
    size, or the small one where less is free. Before tiles get smaller, chunks get shorter: that costs little.

    Raises InputError where the tiles do not fit, with the flags that would help.
    """
    frames, height, width = size
    ratio = int(config["spatial_compression_ratio"])
    room = free.host if free.device is None else free.device

    def decoding(tile: int | None, at_once: int, reason: str) -> Decoding:
        if tile is None:
            sides, open_px = (height, width), height * width
        else:
            cut = tiling.tile_plan(
                height // ratio, width // ratio, tile_size=tile, tile_overlap=overlap, spatial_ratio=ratio
            )
            sides = (cut.rows[0].size * ratio, cut.columns[0].size * ratio)
            last_row = cut.rows[-1].size * sum(span.size for span in cut.columns) * ratio**2
            open_px = max(sides[0] * sides[1], last_row)
        working = decoder_working(at_once, (frames, *sides), open_px, config, itemsize)
        parts = {"weights": weights, "frames": 3 * frames * height * width, "working memory": working}
        return Decoding(tile, at_once, reason, parts)

    # Of each size the longest chunk that fits with the reserve, or else the shortest.
    wanted: list[tuple[int | None, str]] = [(None if whole else asked, "as asked")]
    if not whole and asked is None:
        first = decoding(DEFAULT_TILE_SIZE, 1, "")
        small = f"{DEFAULT_TILE_SIZE} px would need {gib(first.total)}, {gib(room)} are free"
        wanted = [(DEFAULT_TILE_SIZE, "the default"), (SMALL_TILE_SIZE, small)]
    tried = [decoding(tile, at_once, reason) for tile, reason in wanted for at_once in CHUNK_SIZES]
    chosen = next((one for one in tried if one.total + RESERVE <= room), tried[-1])
    if chosen.total > room:
        what = "whole frames" if chosen.tile_size is None else f"a tile of {chosen.tile_size} px"
        fits = decoding(SMALL_TILE_SIZE, 1, "").total <= room
        remedies = [f"--tile_size {SMALL_TILE_SIZE}" if fits else "fewer frames"]
        raise InputError(refusal(f"{what}, {frames} frames,", gib(chosen.total), chosen.parts, free, remedies))
    return chosen


def decoding_seconds(
    gpu: str | None,
    config: Mapping[str, Any],
    size: tuple[int, int, int],
    decoding: Decoding,
    overlap: float,
    ranks: int,
) -> float | None:
    """Seconds of a decoding where one just like it has been measured, else None: nothing is guessed."""
    published = list(config.get("block_out_channels") or VAE_CHANNELS) == list(VAE_CHANNELS)
    if gpu is None or not published or overlap != DEFAULT_TILE_OVERLAP or ranks != 1:
        return None
    return measured_decoding(gpu, size, decoding.tile_size, decoding.at_once)
