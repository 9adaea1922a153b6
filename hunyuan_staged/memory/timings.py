"""Measured times of steps and of decoding. benchmarks.json holds them, with what they were measured on; docs/benchmarks.md
shows them."""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hunyuan_staged.geometry import video_tokens
from hunyuan_staged.memory.estimates import DenoisingSize
from hunyuan_staged.versions import LAYERS

BENCHMARKS = Path(__file__).with_name("benchmarks.json")


@dataclass(frozen=True)
class MeasuredStep:
    """Seconds of a guided step (two branches) of the whole model in bf16 on one GPU; extra: of the first step.

    fused: by a compiler or by kernels of our own, which are as fast.
    """

    gpu: str
    tokens: int
    kernel: str
    fused: bool
    offloaded: int
    seconds: float
    extra: float = 0.0


@cache
def benchmarks() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(BENCHMARKS.read_text(encoding="utf-8"))
    return found


@cache
def measured_steps() -> tuple[MeasuredStep, ...]:
    """The steps of benchmarks.json whose time a plan may state."""
    machines = benchmarks()["machines"]
    return tuple(
        MeasuredStep(
            gpu=machines[row["machine"]]["gpu"],
            tokens=video_tokens(row["num_frames"], row["height"], row["width"]),
            kernel=row["attention"],
            fused=row["fused"],
            offloaded=row["offloaded_blocks"],
            seconds=row["seconds"],
            extra=row["first_step_extra"] or 0.0,
        )
        for row in benchmarks()["steps"]
        if row["in_plan"]
    )


def measured_decoding(
    gpu: str,
    size: tuple[int, int, int],
    tile_size: int | None,
    latent_frames_per_chunk: int,
    frames_per_piece: int | None = None,
) -> float | None:
    """Seconds of decoding a video of (T, H, W) with the published VAE in float16 on one GPU, tiles at an overlap of 0.25.

    tile_size: None for whole frames; frames_per_piece: None where a chunk goes through all levels in one. None where just
    that has not been measured.
    """
    for row in benchmarks()["decodings"]:
        video = (row["num_frames"], row["height"], row["width"])
        measured = video, row["tile_size"], row["latent_frames_at_once"], row.get("frames_per_piece")
        on = benchmarks()["machines"][row["machine"]]["gpu"]
        if row["in_plan"] and (on, *measured) == (gpu, size, tile_size, latent_frames_per_chunk, frames_per_piece):
            return float(row["seconds"])
    return None


def measured_encoding(gpu: str | None, size: tuple[int, int, int]) -> float | None:
    """Seconds of encoding a video of (T, H, W), a frame of latents at a time, as measured_decoding."""
    for row in benchmarks()["records"]:
        if row.get("encodes") == list(size) and benchmarks()["machines"][row["machine"]]["gpu"] == gpu:
            return float(row["seconds"])
    return None


def transfer_seconds(size: int) -> float:
    """Of so many bytes from pinned host memory to a GPU, as measured on the fastest link there was; others take longer."""
    rates = (row.get("host_to_device_bytes_per_second", 0.0) for row in benchmarks()["records"])
    return size / max(rates)


@cache
def reused_shares() -> dict[str, float]:
    """Seconds of a reused step of each fixed schedule's cache, of a computed one's.

    What a reused step does was measured with fewer blocks where it does not grow with their number.
    """
    rows = benchmarks()["tables"]["cache_speed"]["rows"]
    return {kind: float(share.split()[0]) / 100 * int(blocks) / LAYERS for kind, blocks, _, share, *_ in rows}


def steps_worth(shares: Sequence[float], cache_type: str | None, reused: Collection[int] | None) -> float | None:
    """How many guided steps take as long as a run; None where that depends on what is computed.

    shares: of a guided step, one for each step, by the guidance branches that it runs. reused: the steps that a cache of
    this type reuses, None where it decides as it goes.
    """
    if cache_type is None:
        return sum(shares)
    kept = reused_shares().get("teacache" if cache_type == "magcache" else cache_type)  # they do the same
    if reused is None or kept is None:
        return None
    return sum(share * (kept if step in reused else 1) for step, share in enumerate(shares))


def expected_seconds(
    gpu: str | None,
    denoising: DenoisingSize,
    offloaded: int,
    *,
    layers: int,
    branches: int,
    ranks: int,
    steps: float | None,
    float8: bool = False,
) -> float | None:
    """Seconds of the denoising loop where a step just like this one has been measured, else None: nothing is guessed.

    steps: what steps_worth gave.
    """
    # All blocks and both guidance branches, in bf16, on one GPU: all that has been measured.
    if steps is None or layers != LAYERS or branches != 2 or ranks != 1 or denoising.itemsize != 2 or float8:
        return None
    asked = (gpu, denoising.video_tokens, denoising.kernel, denoising.fused, offloaded)
    for row in measured_steps():
        if asked == (row.gpu, row.tokens, row.kernel, row.fused, row.offloaded):
            return steps * row.seconds + row.extra
    return None
