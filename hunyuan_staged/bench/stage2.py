"""bench stage2: a denoising step of the full-size transformer, timed."""

import argparse
import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

from hunyuan_staged.attention import modes
from hunyuan_staged.bench import parts, super_resolution
from hunyuan_staged.bench.step import Setup, Step, set_up
from hunyuan_staged.compare import measures
from hunyuan_staged.errors import InputError
from hunyuan_staged.memory.operations import PEAK_TFLOPS, TEXT_TOKENS, attention_flops, linear_flops
from hunyuan_staged.sampling import cache, cache_settings, calibration


def cached_seconds(
    args: argparse.Namespace, step: Callable[..., float], layout: Any, forward: Any, layers: int, plain: float
) -> dict[str, Any]:
    """What a feature cache makes of a run of CACHE_STEPS steps: seconds of its computed and reused steps, and its state.

    step(cache) runs a guided step and gives its seconds; plain: of one without a cache. The schedule of a type that
    adapts is fixed by a threshold that lets everything pass, so that random weights do not decide; what it costs to look
    is in the seconds. Some 3 intervals are run, of which the first of each kind of step is not counted.
    """
    flags = {"cache_start_step": args.cache_start_step, "cache_end_step": args.cache_end_step}
    flags |= {"cache_step_interval": args.cache_step_interval, "no_cache_block_id": args.no_cache_block_id}
    steps = cache_settings.CACHE_STEPS
    if args.cache_type in ("firstblock", "magcache"):
        flags["cache_threshold"] = float("inf")
    if args.cache_type == "magcache":  # as the others
        flags |= {name: flags[name] or value for name, value in cache_settings.CACHE_FLAGS.items()}
    settings = cache_settings.resolve(args.cache_type, flags, steps, layers, calibration.flat(steps), [1.0] * steps)
    cached = cache.Cache(settings, layout, forward.total)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for number in range(settings.first_kept, min(settings.start + 3 * settings.interval, settings.last_reuse)):
        before = cached.counts[1]

        def run_blocks(branch: int, _: int, *rest: Any, number: int = number) -> Any:
            return cached(branch, number, *rest)

        taken = step(run_blocks)
        seconds[cached.counts[1] > before].append(taken)
    computed, reused = (statistics.median(seconds[kind][1:] or seconds[kind]) for kind in (False, True))
    # Of a type that adapts, as many as the interval allows.
    fixed = dataclasses.replace(settings, threshold=None)
    count = sum(fixed.may_reuse(number) for number in range(settings.steps))
    whole = (settings.steps - count) * computed + count * reused
    return {
        "cache": settings.record(),
        "computed_step_seconds": round(computed, 4),
        "reused_step_seconds": round(reused, 4),
        "reused_share_of_computed": round(reused / computed, 4),
        "steps_computed_and_reused": [settings.steps - count, count],
        "run_seconds": round(whole, 2),
        "run_seconds_without": round(settings.steps * plain, 2),
        "times_as_fast": round(settings.steps * plain / whole, 3),
        "state_gib_per_rank": round(cached.state_bytes / 2**30, 3),
    }


def described(args: argparse.Namespace, setup: Setup, tokens: int) -> dict[str, Any]:
    """What was run, and where."""
    import torch

    return {
        "bench": "stage2",
        "device": torch.cuda.get_device_name() if setup.cuda else "cpu",
        "torch": torch.__version__,
        "ranks": setup.world.size,
        "layout": setup.layout.describe(),
        "resolution": f"{setup.run.width}x{setup.run.height}",
        "video_length": args.video_length,
        "tokens": tokens,
        "layers": setup.model.config.num_layers,
        "attn_mode": setup.attention.name,
        "compiled": setup.compile,
        "offloaded": setup.offloaded,
        "weights_dtype": args.weights_dtype or ("the file's" if args.transformer else str(torch.bfloat16)),
        "fp8_matmul": args.fp8_matmul,
        "guidance_branches": setup.run.branches,
        **setup.loading,
    }


def speed(setup: Setup, video_tokens: int, warmup: list[float], timed: list[float]) -> dict[str, Any]:
    """Seconds of a step, the median of those timed, and TFLOP/s."""
    config = setup.model.config
    attention = attention_flops(video_tokens + TEXT_TOKENS, config.num_attention_heads, config.attention_head_dim)
    linear = linear_flops(video_tokens, TEXT_TOKENS, setup.inner, config.mlp_ratio)
    seconds = statistics.median(timed)
    flops = setup.run.branches * config.num_layers * (attention + linear)
    return {
        "step_seconds": round(seconds, 4),
        "first_step_extra_seconds": round(warmup[0] - seconds, 2) if warmup else None,
        "all_steps": [round(t, 4) for t in timed],
        "warmup_seconds": [round(t, 4) for t in warmup],
        "tflops_per_gpu": round(flops / seconds / 1e12 / setup.world.size, 1),
        "share_of_peak": round(flops / seconds / 1e12 / setup.world.size / PEAK_TFLOPS, 3),
    }


def memory_use(setup: Setup, video_tokens: int) -> dict[str, Any]:
    """GiB of weights, the peak so far, and the peak that stage 2 would plan with."""
    import torch

    from hunyuan_staged.memory import budget, estimates, offloading
    from hunyuan_staged.parallel.heads import split_heads

    dtype, heads = torch.bfloat16, setup.model.config.num_attention_heads
    planned = estimates.DenoisingSize(
        video_tokens,
        TEXT_TOKENS,
        setup.inner,
        dtype.itemsize,
        setup.attention.name,
        setup.cuda,
        setup.layout.shards,
        offloading.widened_bytes(setup.model.transformer_blocks, dtype),
        setup.modulations.table.nbytes,
        left=split_heads(heads, setup.layout.shards, by_queries=setup.attention.any_queries).left / heads,
    )
    planned_bytes = sum(budget.device_parts(setup.block_weights, planned.working, setup.offloaded).values())
    return {
        "weights_gib": round(setup.weights_bytes / 2**30, 2),
        "peak_gib": setup.peak_gib(),
        "planned_gib": round(planned_bytes / 2**30, 2),
    }


def share_of_a_step(args: argparse.Namespace, setup: Setup, seconds: float) -> dict[str, Any]:
    """One rank's share of a step, timed alone; seconds: of the whole step."""
    from hunyuan_staged.bench.share import describe_share, lone_share

    layout = lone_share(args.share_of, setup.run.branches, args.cfg_parallel)
    step = Step(setup, setup.forward(layout), layout)
    setup.reset_peak()
    times = [step() for _ in range(args.warmup + args.steps)]
    return describe_share(layout, seconds, times[args.warmup :], len(times)) | {"share_peak_gib": setup.peak_gib()}


def velocity_error(against: str, setup: Setup, step: Step) -> float:
    """How far another attention mode's velocity is from this one's: ||difference|| / ||velocity||."""
    import torch

    from hunyuan_staged.attention.choose import choose_attention

    forward, layers = step.forward, setup.model.config.num_layers
    velocity = step.latents() - step.inputs.noise
    other = choose_attention(against, setup.world.device, torch.bfloat16)
    forward.attention = other.kernels(forward.grid, layers)
    error = measures.latent_errors(step.latents() - step.inputs.noise, velocity)[0]
    forward.attention = setup.attention.kernels(forward.grid, layers)
    return error


def float8_error(setup: Setup, step: Step) -> float:
    """How far the velocity of products in float8 is from that of the same weights made wide: ||difference|| / ||wide||.

    Random weights average nothing out, as trained ones do: an upper bound rather than what a video loses.
    """
    from hunyuan_staged.weights.quantization.fp8_matmul import compute_in_float8

    found = step.latents() - step.inputs.noise
    compute_in_float8(setup.model.transformer_blocks, on=False)
    wide = step.latents() - step.inputs.noise
    compute_in_float8(setup.model.transformer_blocks)
    return measures.latent_errors(found, wide)[0]


def bench_stage2(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds, TFLOP/s and memory of a denoising step of the full-size transformer, over whole guided steps."""
    import torch

    from hunyuan_staged.parallel.world import start_world, stop_world

    world = start_world()
    if args.share_of and world.size > 1:
        raise InputError(f"{args.share_of} takes one process, and there are {world.size}", option="share_of")
    setup = set_up(args, world)
    forward, config = setup.forward(setup.layout), setup.model.config
    enlarged, about_enlarging = super_resolution.prepare(args, setup) if setup.run.enlarges else (None, {})
    step = Step(setup, forward, setup.layout, enlarged)
    times = [step() for _ in range(args.warmup + args.steps)]
    warmup, timed = times[: args.warmup], times[args.warmup :]
    seconds = statistics.median(timed)
    result = described(args, setup, forward.total + TEXT_TOKENS)
    result |= speed(setup, forward.total, warmup, timed) | memory_use(setup, forward.total)
    if args.share_of:
        result |= share_of_a_step(args, setup, seconds)
    if setup.run.enlarges:
        result |= about_enlarging | super_resolution.whole_run(setup, seconds, result.get("share_seconds"))
    if args.cache_type:
        setup.reset_peak()
        result |= cached_seconds(args, step, setup.layout, forward, config.num_layers, seconds)
        result["peak_gib_with_cache"] = setup.peak_gib()
    if args.against:
        result["against"] = args.against
        result["velocity_error"] = round(velocity_error(args.against, setup, step), 6)
    if args.fp8_matmul:
        result["fp8_matmul_velocity_error"] = round(float8_error(setup, step), 6)
    if setup.cuda and not args.no_parts:
        result["seconds_by_part"] = parts.parts_of_a_step(step, forward)
    if setup.cuda and setup.attention.name == modes.SPARSE_ATTN_MODE:
        heads, width = config.num_attention_heads, config.attention_head_dim
        result["mask_seconds"] = round(parts.mask_seconds(forward, heads, width, world.device, torch.bfloat16), 5)
    stop_world(world)
    return result if world.is_main else {}
