"""bench stage2: a denoising step, taken apart."""

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from hunyuan_staged import geometry, versions
from hunyuan_staged.attention import modes
from hunyuan_staged.bench.flops import PEAK_TFLOPS, TEXT_TOKENS, attention_flops, linear_flops
from hunyuan_staged.compare import measures
from hunyuan_staged.sampling import cache, cache_settings


def random_model(config: dict[str, Any], device: Any, dtype: Any) -> Any:
    """A transformer with random weights, built in its dtype on the device, never on the host."""
    import torch

    from hunyuan_staged.models.modules import TransformerConfig, TransformerModules

    with torch.device("meta"):
        model = TransformerModules(TransformerConfig(**config))
    model = model.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for name, tensor in model.state_dict().items():
        fan = tensor[0].numel() if tensor.ndim > 1 else 64
        tensor.normal_(0, 0.7 / fan**0.5, generator=generator)
        if tensor.ndim == 1 and "norm" in name and name.endswith("weight"):
            tensor.add_(1.0)
    return model


class Stopwatch:
    """Device seconds spent in some calls, by CUDA events, so that nothing waits while the work goes on."""

    def __init__(self) -> None:
        self.spans: list[tuple[Any, Any]] = []

    def watch(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its calls on the clock from now on."""
        import torch

        def watched(*args: Any) -> Any:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            result = function(*args)
            end.record()
            self.spans.append((start, end))
            return result

        return watched

    def seconds(self) -> float:
        """The sum so far; waits for the device."""
        import torch

        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in self.spans) / 1000


def parts_of_a_step(step: Callable[[], Any], forward: Any) -> dict[str, float]:
    """Device seconds of one more step: attention by events, products and communication by their kernels' names."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    watch, kernels = Stopwatch(), forward.attention
    forward.attention = [watch.watch(kernel) for kernel in kernels]
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        step()
    forward.attention = kernels
    attention = watch.seconds()
    sums = {"linear": 0.0, "communication": 0.0, "all": 0.0}
    for event in profiled.events():
        if event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        name, seconds = event.name.lower(), event.self_device_time_total / 1e6
        sums["all"] += seconds
        if "nccl" in name:
            sums["communication"] += seconds
        elif any(word in name for word in ("gemm", "nvjet", "cutlass_80", "cublas")):
            sums["linear"] += seconds
    rest = sums["all"] - attention - sums["linear"] - sums["communication"]
    parts = {"attention": attention, "linear": sums["linear"], "communication": sums["communication"], "rest": rest}
    return {name: round(seconds, 3) for name, seconds in parts.items()}


def mask_seconds(forward: Any, heads: int, width: int, device: Any, dtype: Any) -> float:
    """Device seconds of one of SSTA's masks with its lists, without the attention: the median of five."""
    import torch

    from hunyuan_staged.attention import ssta

    attention = ssta.SparseAttention(forward.grid, device, "torch")
    q, k = torch.randn(2, forward.total + TEXT_TOKENS, heads, width, device=device, dtype=dtype)
    q, k = attention.tiles.gather(q), attention.tiles.gather(k)
    times = []
    for _ in range(6):
        watch = Stopwatch()

        def build() -> None:
            mask = ssta.block_mask(q, k, attention.tiles, attention.window, attention.top_k)
            ssta.block_lists(mask, 3, 2, 1)

        watch.watch(build)()
        times.append(watch.seconds())
    return statistics.median(times[1:])


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
    if "cache_threshold" in cache_settings.CACHE_TYPES[args.cache_type]:
        flags["cache_threshold"] = float("inf")
    settings = cache_settings.resolve(args.cache_type, flags, cache_settings.CACHE_STEPS, layers)
    cached = cache.Cache(settings, layout, forward.total)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for number in range(settings.first_kept, min(settings.start + 3 * settings.interval, settings.last_reuse)):
        before = cached.counts[1]

        def through(row: int, _: int, *rest: Any, number: int = number) -> Any:
            return cached(row, number, *rest)

        taken = step(through)
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


def bench_stage2(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds, TFLOP/s and memory of a denoising step of the full-size transformer, over whole guided steps."""
    import torch

    from hunyuan_staged.attention.choose import choose_attention
    from hunyuan_staged.bench.share import describe_share, lone_share
    from hunyuan_staged.memory import budget, estimates, offloading
    from hunyuan_staged.models import embeddings, modulations, transformer
    from hunyuan_staged.parallel.layout import make_layout
    from hunyuan_staged.parallel.world import start_world, stop_world
    from hunyuan_staged.sampling import conditions, loop, precompute, schedule
    from hunyuan_staged.weights.quantization import fp8_rows

    world = start_world()
    if args.share_of and world.size > 1:
        sys.exit(f"error: --share_of {args.share_of} takes one process, and there are {world.size}")
    device, dtype = world.device, torch.bfloat16
    cuda = device.type == "cuda"
    height, width = geometry.size_for_ratio(args.resolution, args.aspect_ratio)
    shape = geometry.latent_shape(args.video_length, height, width, 32)
    rows = 2 if args.guidance_scale != 1 else 1
    layout = make_layout(world, rows, args.cfg_parallel)
    sage_blocks = versions.parse_block_range("--sage_blocks_range", args.sage_blocks_range)
    attention = choose_attention(args.attn_mode, device, dtype, sage_blocks)
    model = random_model({"num_layers": args.layers} if args.layers else {}, device, dtype)
    sigmas = schedule.flow_sigmas(1, 1.0)
    table = modulations.hoist(model, precompute.step_times(sigmas))
    if args.weights_dtype == "fp8":
        fp8_rows.quantise_linears(model.transformer_blocks)
    block_weights = offloading.weights_of(model, model.transformer_blocks, dtype)
    offloaded = block_weights.count if args.enable_offloading else args.offload_blocks or 0
    blocks = offloading.stream_blocks(model, device, offloaded, world=world) if offloaded else None
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    weights = torch.cuda.memory_allocated() / 2**30 if cuda else 0.0
    forward = transformer.Transformer(
        model, attention, shape[2:], layout, blocks, modulations=table, compile=not args.no_compile
    )
    text = torch.randn(1, TEXT_TOKENS, model.config.text_embed_dim, generator=torch.Generator().manual_seed(1))
    empty = torch.zeros(1, 0, 0, device=device, dtype=dtype)
    conditioning = [embeddings.Conditioning(text.to(device, dtype), empty, empty)] * rows
    noise = schedule.initial_noise(shape, 0, dtype).to(device)
    condition = conditions.condition_channels(noise, None)

    def latents_after(through: Any = None, forward: Any = forward, layout: Any = layout) -> Any:
        # One step of a one-step schedule is the whole work of any step: every guidance row, guidance, Euler.
        return loop.denoise(
            forward,
            noise,
            condition,
            conditioning,
            sigmas,
            loop.Sampling(args.guidance_scale, layout=layout, cache=through),
        )

    def step(*which: Any) -> float:
        started = time.perf_counter()
        latents_after(*which)
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - started

    times = [step() for _ in range(args.warmup + args.steps)]
    warmup, timed = times[: args.warmup], times[args.warmup :]
    config, tokens = model.config, forward.total + TEXT_TOKENS
    inner = config.num_attention_heads * config.attention_head_dim
    flops = (
        rows
        * config.num_layers
        * (
            attention_flops(tokens, config.num_attention_heads, config.attention_head_dim)
            + linear_flops(forward.total, TEXT_TOKENS, inner, config.mlp_ratio)
        )
    )
    seconds = statistics.median(timed)
    planned = estimates.DenoisingSize(
        forward.total,
        TEXT_TOKENS,
        inner,
        dtype.itemsize,
        attention.name,
        not args.no_compile,
        layout.shards,
        offloading.widened_bytes(model.transformer_blocks[0], dtype),
        table.table.nbytes,
    )
    planned_bytes = sum(budget.device_parts(block_weights, planned.working, offloaded).values())
    result = {
        "bench": "stage2",
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "torch": torch.__version__,
        "ranks": world.size,
        "layout": layout.describe(),
        "resolution": f"{width}x{height}",
        "video_length": args.video_length,
        "tokens": tokens,
        "layers": config.num_layers,
        "attn_mode": attention.name,
        "compiled": not args.no_compile,
        "offloaded": offloaded,
        "weights_dtype": args.weights_dtype or str(dtype),
        "guidance_rows": rows,
        "step_seconds": round(seconds, 4),
        "first_step_extra_seconds": round(warmup[0] - seconds, 2) if warmup else None,
        "all_steps": [round(t, 4) for t in timed],
        "warmup_seconds": [round(t, 4) for t in warmup],
        "tflops_per_gpu": round(flops / seconds / 1e12 / world.size, 1),
        "share_of_peak": round(flops / seconds / 1e12 / world.size / PEAK_TFLOPS, 3),
        "weights_gib": round(weights, 2),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if cuda else None,
        "planned_gib": round(planned_bytes / 2**30, 2),
    }
    if args.share_of:
        share = lone_share(args.share_of, rows, args.cfg_parallel)
        part = transformer.Transformer(
            model, attention, shape[2:], share, blocks, modulations=table, compile=not args.no_compile
        )
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        shares = [step(None, part, share) for _ in range(args.warmup + args.steps)]
        result |= describe_share(share, seconds, shares[args.warmup :], len(shares))
        result["share_peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2) if cuda else None
    if args.cache_type:
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        result |= cached_seconds(args, step, layout, forward, config.num_layers, seconds)
        result["peak_gib_with_cache"] = round(torch.cuda.max_memory_allocated() / 2**30, 2) if cuda else None
    if args.against:
        velocity = latents_after() - noise
        forward.attention = choose_attention(args.against, device, dtype).kernels(forward.grid, config.num_layers)
        result["against"] = args.against
        result["velocity_error"] = round(measures.latent_errors(latents_after() - noise, velocity)[0], 6)
        forward.attention = attention.kernels(forward.grid, config.num_layers)
    if cuda and not args.no_parts:
        result["seconds_by_part"] = parts_of_a_step(step, forward)
    if cuda and attention.name == modes.SPARSE_ATTN_MODE:
        result["mask_seconds"] = round(
            mask_seconds(forward, config.num_attention_heads, config.attention_head_dim, device, dtype), 5
        )
    stop_world(world)
    return result if world.is_main else {}
