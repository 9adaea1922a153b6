"""bench stage3: decoding."""

import argparse
import collections
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from hunyuan_staged import geometry, options
from hunyuan_staged.bench.flops import PEAK_TFLOPS, decoder_flops


def bench_stage3(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds, TFLOP/s and memory of decoding a video with the full-size VAE, and of one full tile of it alone."""
    import resource

    import torch

    from hunyuan_staged.decoding import planning, tiled
    from hunyuan_staged.files import video
    from hunyuan_staged.memory import available
    from hunyuan_staged.models.vae_decoder import Decoder
    from hunyuan_staged.models.vae_modules import VaeConfig, VaeDecoder
    from hunyuan_staged.parallel.world import start_world, stop_world

    world = start_world()
    device = world.device
    cuda = device.type == "cuda"
    dtype = torch.float16 if cuda else torch.float32
    vae = VaeConfig(block_out_channels=args.channels) if args.channels else VaeConfig()
    config = asdict(vae)
    with torch.device("meta"):
        module: Any = VaeDecoder(vae)
    module = module.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for tensor in module.parameters():
        # Convolutions keep the size of what goes through them; gammas and biases are about one and nothing.
        spread = (tensor[0].numel() if tensor.ndim == 5 else 2500) ** -0.5
        tensor.normal_(0, spread, generator=generator).add_(1.0 if tensor.ndim == 4 else 0.0)
    height, width = geometry.size_for_ratio(args.resolution, args.aspect_ratio)
    shape = geometry.latent_shape(args.video_length, height, width, config["latent_channels"])
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * config["scaling_factor"]
    weights = sum(tensor.nbytes for tensor in module.parameters())
    size = (args.video_length, height, width)
    decoding = planning.fit_decoding(
        config,
        weights,
        dtype.itemsize,
        size,
        available.free_memory(device),
        asked=args.tile_size,
        whole=args.disable_tiling,
        overlap=args.tile_overlap,
    )
    at_once = args.at_once or decoding.at_once
    tiling = {"tile_size": decoding.tile_size, "tile_overlap": args.tile_overlap}
    tiles = tiled.plan_decode(latents, config, **tiling)

    def timed(work: Callable[[], Any]) -> float:
        started = time.perf_counter()
        work()
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - started

    def decode() -> None:
        blocks = tiled.decode_frames(module, latents, config, **tiling, at_once=at_once, world=world)
        if args.output_video and world.is_main:
            frames = (frame for block in blocks for frame in block.frames.numpy())
            video.write_video(args.output_video, frames, options.DEFAULT_FPS, height, width)
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
    stop_world(world)
    return result if world.is_main else {}
