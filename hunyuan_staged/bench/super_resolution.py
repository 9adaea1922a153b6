"""bench stage2 --super_resolution: the latent upsampler of full size, and the seconds of the whole run."""

import argparse
import statistics
import time
from typing import Any

import torch

from hunyuan_staged import geometry
from hunyuan_staged.bench.step import Setup
from hunyuan_staged.models.upsampler import build_upsampler
from hunyuan_staged.sampling import conditions, schedule
from hunyuan_staged.weights.published import UPSAMPLERS


def prepare(args: argparse.Namespace, setup: Setup) -> tuple[torch.Tensor, dict[str, Any]]:
    """(what the transformer sees of random base latents [1, 32, T, H, W], seconds and peak of the upsampler).

    The transformer's weights are in the peak, as in a run. Of demo_hd, which is not published, the upsampler of 720p runs.
    """
    run, device = setup.run, setup.world.device
    assert run.enlarges is not None
    kind = run.enlarges.resolution if run.enlarges.resolution in UPSAMPLERS else "720p"
    with device:
        upsampler = build_upsampler(kind, UPSAMPLERS[kind])
    size = geometry.size_for_ratio(run.enlarges.base, args.aspect_ratio)
    shape = geometry.latent_shape(run.video_length, *size, geometry.LATENT_CHANNELS)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    setup.reset_peak()
    seconds = []
    for _ in range(1 + args.steps):
        started = time.perf_counter()
        enlarged = conditions.upsample_latents(upsampler, latents, *run.shape[-2:], torch.bfloat16)
        if setup.cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    found = {
        "upsampler_seconds": round(statistics.median(seconds[1:]), 3),
        "first_upsampler_extra_seconds": round(seconds[0] - statistics.median(seconds[1:]), 2),
        "upsampler_peak_gib": setup.peak_gib(),
    }
    del upsampler
    if setup.cuda:
        torch.cuda.empty_cache()
    setup.reset_peak()
    _, noise = schedule.super_resolution_noise(run.shape, 0, torch.bfloat16)
    return conditions.augment(enlarged, noise), found


def whole_run(setup: Setup, seconds: float, share: float | None) -> dict[str, Any]:
    """The run's passes and their seconds, computed from one pass; share: of one rank's, None: not timed."""
    assert setup.run.enlarges is not None
    passes = setup.run.enlarges.num_inference_steps
    found = {"super_resolution": setup.run.enlarges.name, "passes": passes, "run_seconds": round(passes * seconds, 2)}
    return found if share is None else found | {"share_run_seconds": round(passes * share, 2)}
