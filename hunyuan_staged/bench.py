"""`python -m hunyuan_staged.bench stage2 …`, `… stage3 …`: a stage at any size, with random weights built straight on the
device; `… bench memory CLAIM`: what is said about memory (bench_memory.py).

Warm-up is apart, both sides of every timing are synchronised, the median is printed, and the last line is JSON.
"""

import argparse
import collections
import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from hunyuan_staged import bench_memory, cache, compare, versions

# The practical peak of one H100 in dense bf16 products (../shared/measured.md: 8192^3 at about 790 TFLOP/s).
PEAK_TFLOPS = 790.0
TEXT_TOKENS = 256  # language tokens of a long prompt; the glyph and image rows are empty


def attention_flops(tokens: int, heads: int, width: int) -> float:
    """Multiply-adds of one attention over `tokens`, counted twice: 4 * N^2 * H * D."""
    return 4.0 * tokens**2 * heads * width


def linear_flops(video_tokens: int, text_tokens: int, inner: int, mlp_ratio: float) -> float:
    """Of one double-stream block: q, k, v, out and both feed-forward products, 2 * N * (4 + 2 * ratio) * C^2."""
    return 2.0 * (video_tokens + text_tokens) * (4 + 2 * mlp_ratio) * inner**2


def random_model(config: dict[str, Any], device: Any, dtype: Any) -> Any:
    """A transformer with random weights, built in its dtype on the device, never on the host."""
    import torch
    from diffusers import HunyuanVideo15Transformer3DModel

    with torch.device("meta"):
        model = HunyuanVideo15Transformer3DModel(**config)
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

    from hunyuan_staged import sparse

    attention = sparse.SparseAttention(forward.grid, device, "torch")
    q, k = torch.randn(2, forward.total + TEXT_TOKENS, heads, width, device=device, dtype=dtype)
    q, k = attention.tiles.gather(q), attention.tiles.gather(k)
    times = []
    for _ in range(6):
        watch = Stopwatch()

        def build() -> None:
            mask = sparse.block_mask(q, k, attention.tiles, attention.window, attention.top_k)
            sparse.block_lists(mask, 3, 2, 1)

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
    if "cache_threshold" in versions.CACHE_TYPES[args.cache_type]:
        flags["cache_threshold"] = float("inf")
    settings = cache.settle(args.cache_type, flags, versions.CACHE_STEPS, layers)
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

    from hunyuan_staged import denoise, float8, offload, parallel, plan, schedule, transformer
    from hunyuan_staged.attention import choose_attention

    world = parallel.start_world()
    device, dtype = world.device, torch.bfloat16
    cuda = device.type == "cuda"
    height, width = versions.size_for_ratio(args.resolution, args.aspect_ratio)
    shape = versions.latent_shape(args.video_length, height, width, 32)
    rows = 2 if args.guidance_scale != 1 else 1
    layout = parallel.make_layout(world, rows, args.cfg_parallel)
    sage_blocks = versions.parse_block_range("--sage_blocks_range", args.sage_blocks_range)
    attention = choose_attention(args.attn_mode, device, dtype, sage_blocks)
    model = random_model({"num_layers": args.layers} if args.layers else {}, device, dtype)
    if args.weights_dtype == "fp8":
        float8.quantise_linears(model.transformer_blocks)
    block_weights = offload.weights_of(model, model.transformer_blocks, dtype)
    offloaded = block_weights.count if args.enable_offloading else args.offload_blocks or 0
    blocks = offload.stream_blocks(model, device, offloaded, world=world) if offloaded else None
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    weights = torch.cuda.memory_allocated() / 2**30 if cuda else 0.0
    forward = transformer.Transformer(model, attention, shape[2:], layout, blocks, compile=not args.no_compile)
    text = torch.randn(1, TEXT_TOKENS, model.config.text_embed_dim, generator=torch.Generator().manual_seed(1))
    empty = torch.zeros(1, 0, 0, device=device, dtype=dtype)
    conditioning = [transformer.Conditioning(text.to(device, dtype), empty, empty)] * rows
    noise = denoise.draw_noise(shape, 0, dtype).to(device)
    condition = denoise.condition_channels(noise, None)

    def latents_after(through: Any = None) -> Any:
        # One step of a one-step schedule is the whole work of any step: every guidance row, guidance, Euler.
        return denoise.denoise(
            forward,
            noise,
            condition,
            conditioning,
            schedule.flow_sigmas(1, 1.0),
            guidance_scale=args.guidance_scale,
            layout=layout,
            cache=through,
        )

    def step(through: Any = None) -> float:
        started = time.perf_counter()
        latents_after(through)
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
    planned = plan.Denoising(
        forward.total,
        TEXT_TOKENS,
        inner,
        dtype.itemsize,
        attention.name,
        not args.no_compile,
        layout.shards,
        offload.widened_bytes(model.transformer_blocks[0], dtype),
    )
    planned_bytes = sum(plan.device_parts(block_weights, planned.working, offloaded).values())
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
    if args.cache_type:
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        result |= cached_seconds(args, step, layout, forward, config.num_layers, seconds)
        result["peak_gib_with_cache"] = round(torch.cuda.max_memory_allocated() / 2**30, 2) if cuda else None
    if args.against:
        velocity = latents_after() - noise
        forward.attention = choose_attention(args.against, device, dtype).kernels(forward.grid, config.num_layers)
        result["against"] = args.against
        result["velocity_error"] = round(compare.latent_errors(latents_after() - noise, velocity)[0], 6)
        forward.attention = attention.kernels(forward.grid, config.num_layers)
    if cuda and not args.no_parts:
        result["seconds_by_part"] = parts_of_a_step(step, forward)
    if cuda and attention.name == versions.SPARSE_ATTN_MODE:
        result["mask_seconds"] = round(
            mask_seconds(forward, config.num_attention_heads, config.attention_head_dim, device, dtype), 5
        )
    parallel.stop_world(world)
    return result if world.is_main else {}


def decoder_flops(config: dict[str, Any], latent_frames: int, height: int, width: int) -> float:
    """Of the VAE decoder's convolutions for latents of t x h x w: 2 * 27 * C * C' for each position of the product."""
    channels = list(config["block_out_channels"])[::-1]
    frames, positions = latent_frames, height * width
    spatial, temporal = config["spatial_compression_ratio"], config["temporal_compression_ratio"]
    total = (config["latent_channels"] + 4 * channels[0]) * channels[0] * frames * positions  # conv_in, the mid block
    for level, width_here in enumerate(channels):
        total += 2 * (config["layers_per_block"] + 1) * width_here**2 * frames * positions
        if 2**level < spatial:
            longer = 2 if 2**level < temporal else 1
            total += width_here * channels[level + 1] * 4 * longer * frames * positions
            frames, positions = (frames - 1) * longer + 1, positions * 4
    return 2.0 * 27 * (total + channels[-1] * config["out_channels"] * frames * positions)


def bench_stage3(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds, TFLOP/s and memory of decoding a video with the full-size VAE, and of one full tile of it alone."""
    import resource

    import torch
    from diffusers import AutoencoderKLHunyuanVideo15

    from hunyuan_staged import parallel, plan, vae, video
    from hunyuan_staged.decoder import Decoder

    world = parallel.start_world()
    device = world.device
    cuda = device.type == "cuda"
    dtype = torch.float16 if cuda else torch.float32
    with torch.device("meta"):
        whole = AutoencoderKLHunyuanVideo15(**({"block_out_channels": args.channels} if args.channels else {}))
    config = dict(whole.config)
    module = whole.decoder.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for tensor in module.parameters():
        # Convolutions keep the size of what goes through them; gammas and biases are about one and nothing.
        spread = (tensor[0].numel() if tensor.ndim == 5 else 2500) ** -0.5
        tensor.normal_(0, spread, generator=generator).add_(1.0 if tensor.ndim == 4 else 0.0)
    height, width = versions.size_for_ratio(args.resolution, args.aspect_ratio)
    shape = versions.latent_shape(args.video_length, height, width, config["latent_channels"])
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * config["scaling_factor"]
    weights = sum(tensor.nbytes for tensor in module.parameters())
    size = (args.video_length, height, width)
    decoding = plan.fit_decoding(
        config,
        weights,
        dtype.itemsize,
        size,
        plan.free_memory(device),
        asked=args.tile_size,
        whole=args.disable_tiling,
        overlap=args.tile_overlap,
    )
    at_once = args.at_once or decoding.at_once
    tiling = {"tile_size": decoding.tile_size, "tile_overlap": args.tile_overlap}
    tiles = vae.plan_decode(latents, config, **tiling)

    def timed(work: Callable[[], Any]) -> float:
        started = time.perf_counter()
        work()
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - started

    def decode() -> None:
        blocks = vae.decode_frames(module, latents, config, **tiling, at_once=at_once, world=world)
        if args.output_video and world.is_main:
            frames = (frame for block in blocks for frame in block.frames.numpy())
            video.write_video(args.output_video, frames, versions.DEFAULT_FPS, height, width)
        else:
            collections.deque(blocks, maxlen=0)

    first = timed(decode)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = statistics.median(timed(decode) for _ in range(args.steps))
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    tile, forward = tiles.tiles[0], Decoder(module)
    part = latents[..., : tile.y.size, : tile.x.size]
    tile_seconds = statistics.median(
        timed(lambda: collections.deque(forward(part, at_once), maxlen=0)) for _ in range(args.steps + 1)
    )
    flops = decoder_flops(config, shape[2], tile.y.size, tile.x.size)
    area = sum(one.cost for one in tiles.tiles) / tile.cost
    result = {
        "bench": "stage3",
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "torch": torch.__version__,
        "ranks": world.size,
        "resolution": f"{width}x{height}",
        "video_length": args.video_length,
        "tile_size": decoding.tile_size,
        "tiles": len(tiles.tiles),
        "latent_frames_at_once": at_once,
        "with_video": bool(args.output_video),
        "seconds": round(seconds, 3),
        "first_extra_seconds": round(first - seconds, 2),
        "tflops_per_gpu": round(flops * area / seconds / 1e12 / world.size, 1),
        "tile_seconds": round(tile_seconds, 4),
        "tile_share_of_peak": round(flops / tile_seconds / 1e12 / PEAK_TFLOPS, 3),
        "weights_gib": round(weights / 2**30, 2),
        "peak_gib": round(peak / 2**30, 2),
        "planned_gib": round((decoding.total if at_once == decoding.at_once else 0) / 2**30, 2),
        "host_peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }
    parallel.stop_world(world)
    return result if world.is_main else {}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m hunyuan_staged.bench", description=__doc__, allow_abbrev=False)
    stages = parser.add_subparsers(dest="stage", required=True)
    stage2 = stages.add_parser("stage2", help="a denoising step of the full-size transformer")
    stage2.add_argument("--resolution", default=versions.DEFAULT_RESOLUTION, choices=tuple(versions.BUCKET_BASE))
    stage2.add_argument("--aspect_ratio", default=versions.DEFAULT_ASPECT_RATIO)
    stage2.add_argument("--video_length", type=int, default=121)
    stage2.add_argument("--guidance_scale", type=float, default=6.0)
    stage2.add_argument("--attn_mode", default=versions.DEFAULT_ATTN_MODE, choices=versions.ATTN_MODES)
    stage2.add_argument("--sage_blocks_range", default=versions.DEFAULT_SAGE_BLOCKS)
    stage2.add_argument(
        "--cfg_parallel",
        default=versions.DEFAULT_CFG_PARALLEL,
        choices=versions.CFG_PARALLEL,
        help="guidance rows apart",
    )
    stage2.add_argument(
        "--cache_type", choices=tuple(versions.CACHE_TYPES), help="also time a cache, over a run of 50 steps"
    )
    for flag in versions.CACHE_FLAGS:
        stage2.add_argument(f"--{flag}", type=int, help="as in stage 2")
    stage2.add_argument("--no_cache_block_id", help="as in stage 2")
    stage2.add_argument(
        "--against",
        choices=versions.ATTN_MODES,
        help="also how far a step's velocity is from this mode's: ||difference|| / ||velocity||",
    )
    stage2.add_argument("--gpus", type=int, default=1, help="processes, one a GPU (default: %(default)s)")
    stage2.add_argument("--no_parts", action="store_true", help="without the step that is taken apart")
    stage2.add_argument("--layers", type=int, help="fewer blocks than the full 54, for a quick look")
    stage2.add_argument("--no_compile", action="store_true", help="run the blocks eagerly")
    offload = stage2.add_mutually_exclusive_group()
    offload.add_argument("--enable_offloading", action="store_true", help="stream all blocks from host memory")
    offload.add_argument("--disable_offloading", action="store_true", help="all weights on the device (default)")
    offload.add_argument("--offload_blocks", type=int, help="stream so many blocks from host memory")
    stage2.add_argument("--weights_dtype", choices=versions.WEIGHTS_DTYPES, help="store the blocks' weights so")
    stage2.add_argument("--steps", type=int, default=3, help="timed steps (default: %(default)s)")
    stage2.add_argument("--warmup", type=int, default=1, help="steps before them (default: %(default)s)")
    stage2.set_defaults(run=bench_stage2)
    stage3 = stages.add_parser("stage3", help="the full-size VAE's decoding of a video")
    stage3.add_argument("--resolution", default=versions.DEFAULT_RESOLUTION, choices=tuple(versions.BUCKET_BASE))
    stage3.add_argument("--aspect_ratio", default=versions.DEFAULT_ASPECT_RATIO)
    stage3.add_argument("--video_length", type=int, default=121)
    stage3.add_argument("--tile_size", type=int, help="as in stage 3")
    stage3.add_argument("--tile_overlap", type=float, default=versions.DEFAULT_TILE_OVERLAP)
    stage3.add_argument("--disable_tiling", action="store_true", help="as in stage 3")
    stage3.add_argument("--at_once", type=int, help="latent frames of a chunk (default: what fits)")
    stage3.add_argument("--channels", type=int, nargs=5, help="narrower levels than the real ones, for a quick look")
    stage3.add_argument("--output_video", help="also encode the frames, to this mp4")
    stage3.add_argument("--gpus", type=int, default=1, help="processes, one a GPU (default: %(default)s)")
    stage3.add_argument("--steps", type=int, default=2, help="timed decodings (default: %(default)s)")
    stage3.set_defaults(run=bench_stage3)
    bench_memory.add_parser(stages)
    return parser


def main() -> None:
    args = build_parser().parse_args()
    if args.gpus > 1 and "RANK" not in os.environ:
        from torch.distributed.run import main as torchrun

        words = ["--standalone", "--nproc-per-node", str(args.gpus), "-m", "hunyuan_staged.bench", *sys.argv[1:]]
        torchrun(words)
        return
    result = args.run(args)
    if result:
        width = max(map(len, result))
        for name, value in result.items():
            print(f"{name:{width}}  {value}")
        print(json.dumps(result))


if __name__ == "__main__":
    main()
