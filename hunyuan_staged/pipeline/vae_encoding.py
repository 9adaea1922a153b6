"""The VAE's encoder in a run: what it takes, and a whole video through it, by rows over ranks as in decoding."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hunyuan_staged.decoding.planning import mid_block_working
from hunyuan_staged.decoding.rows import row_ranks
from hunyuan_staged.decoding.whole import RowShard
from hunyuan_staged.errors import InputError
from hunyuan_staged.geometry import SPATIAL_RATIO, TEMPORAL_RATIO, chunk_spans, latent_shape
from hunyuan_staged.memory import expected as times
from hunyuan_staged.memory.budget import FreeMemory, gib, refusal
from hunyuan_staged.memory.cards import Card
from hunyuan_staged.memory.expected import Expected
from hunyuan_staged.memory.operations import encoder_flops
from hunyuan_staged.memory.timings import measured_encoding
from hunyuan_staged.models.vae_constants import VAE_LAYERS, is_published, level_widths
from hunyuan_staged.models.vae_encoder import Encoder
from hunyuan_staged.parallel.exchange import exchange
from hunyuan_staged.parallel.layout import split_evenly
from hunyuan_staged.parallel.world import World
from hunyuan_staged.weights import components
from hunyuan_staged.weights.folder import ModelFolder

# So many frames of latents at a time: what the encoder needs does not grow with the video.
LATENT_FRAMES_PER_CHUNK = 1
# Tensors of the first level's width for each frame of a chunk, at its peak, in the downsampler: what goes in, its product,
# both with channels for positions, the means. Counted: tests/unit/decoding/test_decoder_memory.py.
ENCODER_TENSORS = 4


def encoder_working(size: tuple[int, int, int], config: Mapping[str, Any], itemsize: int, ranks: int = 1) -> int:
    """Bytes beside the weights while a video (T, H, W) is encoded chunk by chunk: at most, of all ranks."""
    frames, _, width = size
    channels = level_widths(config)
    # Of a level: its resnets', and the downsampler's.
    convolutions = 2 * int(config.get("layers_per_block") or VAE_LAYERS) + 1
    remembered = sum(2 * convolutions * wide / 4**level for level, wide in enumerate(channels)) if frames > 1 else 0
    _, _, latent_frames, rows, columns = latent_shape(*size, 1)
    own = -(-rows // ranks)
    chunk = min(frames, LATENT_FRAMES_PER_CHUNK * TEMPORAL_RATIO)
    levels = ((ENCODER_TENSORS * chunk + 2) * channels[0] + remembered) * own * SPATIAL_RATIO * width * itemsize
    latents = channels[-1] * latent_frames * own * columns * itemsize
    inside = mid_block_working(channels[-1], latent_frames, (own * columns, rows * columns), itemsize)
    return int(max(levels, inside) + latents)


@dataclass(frozen=True)
class EncodingPlan:
    """What encoding a video, or an image, of (T, H, W) takes on each process that has rows of it, in bytes, by part."""

    size: tuple[int, int, int]
    ranks: int
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def what(self) -> str:
        frames, height, width = self.size
        return f"{frames} frame{'s' * (frames > 1)} of {width}x{height}"

    @property
    def method(self) -> str:
        """One phrase on how, e.g. "4 frames at a time, rows over 2 processes"."""
        over = f", rows over {self.ranks} processes" if self.ranks > 1 else ""
        return f"{LATENT_FRAMES_PER_CHUNK * TEMPORAL_RATIO} frames at a time{over}"

    @property
    def memory(self) -> str:
        """What it takes, for a plan."""
        return f"{gib(self.total)}: {', '.join(f'{part} {gib(size)}' for part, size in self.parts.items())}"

    def rows(self, free: FreeMemory) -> dict[str, object]:
        """The rows that --dry_run prints of a video."""
        frames, height, width = self.size
        video = {"video": f"{width}x{height}, {frames} frames", "encoding": self.method}
        return {**video, "memory": self.memory, "free": free.describe(), "ranks": self.ranks}


def plan_encoding(
    size: tuple[int, int, int],
    config: Mapping[str, Any],
    weights: int,
    itemsize: int,
    free: FreeMemory,
    processes: int = 1,
) -> EncodingPlan:
    """How a video (T, H, W), or with T = 1 an image, is encoded; InputError where a GPU has less memory than that takes.

    weights: of the encoder, in bytes. What it takes on a CPU was never measured, so that nothing is refused there.
    """
    ranks = row_ranks(size[1] // SPATIAL_RATIO, processes)
    working = encoder_working(size, config, itemsize, ranks)
    plan = EncodingPlan(size, ranks, {"weights": weights, "working memory": working})
    if free.device is not None and plan.total > free.device:
        remedies, option = ["a GPU with more memory", "a smaller --resolution"], "image_path"
        if size[0] > 1:
            remedies, option = [remedies[0], "a --super_resolution that starts from smaller frames"], "input_video"
        what = f"encoding {plan.what}{', ' * (ranks > 1)}{plan.method.partition(', ')[2]}"
        raise InputError(refusal(what, f"{gib(plan.total)} of GPU memory", plan.parts, free, remedies), option=option)
    return plan


def plan_for_model(
    size: tuple[int, int, int], folder: ModelFolder, dtype: torch.dtype, free: FreeMemory, processes: int = 1
) -> EncodingPlan:
    """The same with the VAE of a model."""
    config, skeleton = components.vae_config(folder), components.vae_skeleton(folder, "encoder")
    weights = sum(tensor.numel() for tensor in skeleton.parameters()) * dtype.itemsize
    return plan_encoding(size, config, weights, dtype.itemsize, free, processes)


def encoding_time(plan: EncodingPlan, config: Mapping[str, Any], card: Card) -> Expected | None:
    """Seconds of encoding on a card: as just such a video was measured, else estimated."""
    if is_published(config) and plan.ranks == 1 and (found := measured_encoding(card.name, plan.size)) is not None:
        return times.measured(found)
    flops = encoder_flops(dict(config), *plan.size) / plan.ranks
    return times.estimated(flops, flops, card)


@torch.no_grad()
def encode_video(
    module: torch.nn.Module | None,
    video: torch.Tensor | None,
    size: tuple[int, int, int],
    world: World,
    latent_frames_per_chunk: int = LATENT_FRAMES_PER_CHUNK,
) -> torch.Tensor | None:
    """The posterior's mode [1, C, t, h, w] of a video [1, 3, T, H, W] in [-1, 1], on rank 0; None on the others.

    Every rank calls it. Rank 0 has the video, and sends the others their rows of it, chunk by chunk. The result has the
    same bits for any number of ranks.

    Args:
        module: the VAE's encoder on the rank's device; None where the rank has no row (see row_ranks).
        video: on rank 0, in host memory or on its device; not looked at elsewhere.
        size: (T, H, W).
    """
    height = size[1] // SPATIAL_RATIO
    ranks = row_ranks(height, world.size)
    if world.rank >= ranks:
        return None
    assert module is not None, f"rank {world.rank} has rows to encode and no encoder"
    encoder = Encoder(module)
    if ranks == 1:
        assert video is not None
        return encoder(video, latent_frames_per_chunk)[:, : encoder.latent_channels]
    shard = RowShard(world.rank, split_evenly(height, ranks), exchange)
    own = (shard.counts[world.rank] * SPATIAL_RATIO, size[2], 3)

    def take(now: slice) -> torch.Tensor:
        if video is not None and world.is_main:
            return shard.scatter_rows(encoder.frames(video, now))
        arriving = torch.empty(now.stop - now.start, *own, dtype=encoder.dtype, device=encoder.device)
        return shard.scatter_rows(arriving)

    spans = chunk_spans((size[0] - 1) // TEMPORAL_RATIO + 1, latent_frames_per_chunk, TEMPORAL_RATIO)
    mean = shard.on_first(encoder.of_chunks(take, spans, shard)[..., : encoder.latent_channels])
    return mean.permute(3, 0, 1, 2)[None] if world.is_main else None
