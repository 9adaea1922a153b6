"""bench stage3: decoding."""

import argparse
import collections
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from hunyuan_staged import geometry, options
from hunyuan_staged.decoding import planning, tiling
from hunyuan_staged.errors import InputError
from hunyuan_staged.memory.operations import PEAK_TFLOPS, decoder_flops

if TYPE_CHECKING:
    import numpy as np
    import torch

    from hunyuan_staged.decoding.frames import FrameBatch
    from hunyuan_staged.decoding.whole import Transfers
    from hunyuan_staged.parallel.world import World


def random_coder(
    coder: str, channels: list[int] | None, device: "torch.device", dtype: "torch.dtype"
) -> tuple[Any, dict]:
    """(the VAE's "encoder" or "decoder" with random weights, its config), of full size or of so many channels a level."""
    import torch

    from hunyuan_staged.models.vae_modules import VaeConfig, VaeDecoder, VaeEncoder

    config = VaeConfig(block_out_channels=tuple(channels)) if channels else VaeConfig()
    with torch.device("meta"):
        module: Any = {"encoder": VaeEncoder, "decoder": VaeDecoder}[coder](config)
    module = module.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for tensor in module.parameters():
        # Convolutions keep the size of what goes through them; gammas and biases are about one and nothing.
        spread = (tensor[0].numel() if tensor.ndim == 5 else 2500) ** -0.5
        tensor.normal_(0, spread, generator=generator).add_(1.0 if tensor.ndim == 4 else 0.0)
    return module, asdict(config)


def copies(outgoing: "Transfers", incoming: "Transfers") -> None:
    """whole.exchange of a rank that is alone: what it would receive is copied from what it would send."""
    for number, (into, _) in enumerate(incoming):
        source = outgoing[min(number, len(outgoing) - 1)][0].flatten()
        count = min(source.numel(), into.numel())
        into.view(-1)[:count].copy_(source[:count])
        into.view(-1)[count:].zero_()


def tiling_of(args: argparse.Namespace, decoding: planning.Decoding) -> tiling.Tiling:
    """The tiles of a decoding."""
    return tiling.Tiling(decoding.tile_size, args.tile_overlap, decoding.latent_frames_per_chunk)


def decode(
    args: argparse.Namespace,
    module: Any,
    config: dict[str, Any],
    latents: "torch.Tensor",
    decoding: planning.Decoding,
    world: "World",
) -> "Iterator[FrameBatch]":
    """The frames of one decoding as args ask for it; with --share_of none, but all that one rank does."""
    from hunyuan_staged.decoding import tiled, whole
    from hunyuan_staged.decoding.frames import DecodeContext
    from hunyuan_staged.parallel.layout import split_evenly

    context = DecodeContext(world)
    if decoding.tile_size is not None:
        yield from tiled.decode_frames(module, latents, config, tiling_of(args, decoding), context)
    elif args.share_of is None:
        yield from whole.decode_whole(module, latents, config, decoding, context)
    else:
        forward, scaled, spans = context.begin(module, latents, config, decoding.latent_frames_per_chunk)
        # The second rank: it has as many rows as any, and from three ranks on two neighbours.
        shard = whole.RowShard(1, split_evenly(latents.shape[3], args.share_of), copies)
        chunks = whole.over_ranks(forward, scaled, spans, decoding, shard, as_float=False)
        collections.deque(chunks, maxlen=0)


def tile_result(
    args: argparse.Namespace, module: Any, latents: "torch.Tensor", decoding: planning.Decoding, config: dict[str, Any]
) -> tuple[float, dict[str, Any]]:
    """(how many times the positions of one full tile all tiles have, what the result says of one alone)."""
    from hunyuan_staged.decoding import tiled
    from hunyuan_staged.models.vae_decoder import Decoder

    plan = tiled.plan_decode(latents, config, tiling_of(args, decoding))
    tile, forward = plan.tiles[0], Decoder(module)
    part = latents[..., : tile.y.size, : tile.x.size]
    seconds = statistics.median(
        timed(lambda: collections.deque(forward(part, decoding.latent_frames_per_chunk), maxlen=0))
        for _ in range(args.steps + 1)
    )
    flops = decoder_flops(config, latents.shape[2], tile.y.size, tile.x.size)
    return sum(one.cost for one in plan.tiles) / tile.cost * flops, {
        "tiles": len(plan.tiles),
        "tile_seconds": round(seconds, 4),
        "tile_share_of_peak": round(flops / seconds / 1e12 / PEAK_TFLOPS, 3),
    }


def timed(work: Callable[[], Any]) -> float:
    """Seconds of work(), to the end of what it started on a GPU."""
    import torch

    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def write(path: str, batches: "Iterator[FrameBatch]", sides: tuple[int, int], world: "World") -> float:
    """Encode frames as stage 3 does by default; the seconds from the last frame to the end of the file."""
    from hunyuan_staged.files import encoding, video
    from hunyuan_staged.runtime.processes import cores

    ended = 0.0

    def frames() -> "Iterator[np.ndarray]":
        nonlocal ended
        for batch in batches:
            yield from batch.frames.numpy()
        ended = time.perf_counter()

    preset = encoding.default_preset(cores(), world.size if world.device.type == "cuda" else 0)
    video.write_video(path, frames(), options.DEFAULT_FPS, *sides, encoding.Encoding(preset=preset))
    return time.perf_counter() - ended


def plan_decoding(
    args: argparse.Namespace, config: dict[str, Any], weights: int, itemsize: int, device: "torch.device", ranks: int
) -> planning.Decoding:
    """What stage 3 would choose, but for what the flags say."""
    from hunyuan_staged.memory import available

    height, width = geometry.size_for_ratio(args.resolution, args.aspect_ratio)
    whole = args.disable_tiling or args.bands is not None or args.share_of is not None
    asked = planning.Request(
        args.tile_size, whole, args.tile_overlap, ranks, args.bands, args.at_once, args.frames_per_piece
    )
    size = (args.video_length, height, width)
    return planning.fit_decoding(config, weights, itemsize, size, available.free_memory(device), asked)


def described(args: argparse.Namespace, world: "World", decoding: planning.Decoding, ranks: int) -> dict[str, Any]:
    """What was run, and where."""
    import torch

    height, width = geometry.size_for_ratio(args.resolution, args.aspect_ratio)
    return {
        "bench": "stage3",
        "device": torch.cuda.get_device_name() if world.device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "ranks": world.size,
        "resolution": f"{width}x{height}",
        "video_length": args.video_length,
        "decoding": decoding.describe(ranks),
        "share_of": args.share_of,
        "tile_size": decoding.tile_size,
        "bands": decoding.bands,
        "latent_frames_at_once": decoding.latent_frames_per_chunk,
        "frames_per_piece": decoding.frames_per_piece,
        "with_video": bool(args.output_video),
    }


def bench_encoding(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds and memory of encoding a video with the full-size VAE chunk by chunk.

    With --one_piece also how far the latents are from those of one piece: ||difference|| / ||latents||.
    """
    import torch

    from hunyuan_staged.models.vae_encoder import Encoder
    from hunyuan_staged.parallel.world import lone_world
    from hunyuan_staged.pipeline import vae_encoding

    device = lone_world().device
    cuda = device.type == "cuda"
    dtype = torch.float16 if cuda else torch.float32
    module, config = random_coder("encoder", args.channels, device, dtype)
    height, width = geometry.size_for_ratio(args.resolution, args.aspect_ratio)
    size = (args.video_length, height, width)
    video = torch.empty(1, 3, *size, dtype=dtype).uniform_(-1, 1, generator=torch.Generator().manual_seed(0))
    encoder = Encoder(module)
    weights = sum(tensor.nbytes for tensor in module.parameters())
    chunk = args.at_once or vae_encoding.LATENT_FRAMES_PER_CHUNK
    moments: list[torch.Tensor] = []

    def work() -> None:
        moments[:] = [encoder(video, chunk)]

    first = timed(work)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = statistics.median(timed(work) for _ in range(args.steps))
    result = {
        "bench": "encoding",
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "resolution": f"{width}x{height}",
        "video_length": args.video_length,
        "latent_frames_at_once": chunk,
        "seconds": round(seconds, 3),
        "first_extra_seconds": round(first - seconds, 2),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if cuda else 0,
        "planned_gib": round((weights + vae_encoding.encoder_working(size, config, dtype.itemsize)) / 2**30, 2),
        "finite": bool(torch.isfinite(moments[0]).all()),
    }
    if args.one_piece:
        parts, whole = moments[0].float(), encoder(video).float()
        result["distance_from_one_piece"] = float((parts - whole).norm() / whole.norm())
    return result


def bench_stage3(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds, TFLOP/s and memory of decoding a video with the full-size VAE, and of one full tile of it alone."""
    import resource

    import torch

    from hunyuan_staged.parallel.world import start_world, stop_world

    world = start_world()
    if args.share_of is not None and (args.share_of < 2 or world.size > 1 or args.tile_size or args.output_video):
        raise InputError("--share_of takes 2 or more ranks, and neither --gpus, --tile_size nor --output_video")
    device, cuda = world.device, world.device.type == "cuda"
    dtype = torch.float16 if cuda else torch.float32
    module, config = random_coder("decoder", args.channels, device, dtype)
    height, width = geometry.size_for_ratio(args.resolution, args.aspect_ratio)
    shape = geometry.latent_shape(args.video_length, height, width, config["latent_channels"])
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * config["scaling_factor"]
    weights = sum(tensor.nbytes for tensor in module.parameters())
    ranks = args.share_of or world.size
    decoding = plan_decoding(args, config, weights, dtype.itemsize, device, ranks)

    tails: list[float] = []

    def work() -> None:
        batches = decode(args, module, config, latents, decoding, world)
        if args.output_video and world.is_main:
            tails.append(write(args.output_video, batches, (height, width), world))
        else:
            collections.deque(batches, maxlen=0)

    first = timed(work)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = statistics.median(timed(work) for _ in range(args.steps))
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    about_video = {"tail_seconds": round(statistics.median(tails[1:]), 3)} if tails else {}
    flops = decoder_flops(config, *shape[2:])
    about_tiles: dict[str, Any] = {}
    if decoding.tile_size is not None:
        flops, about_tiles = tile_result(args, module, latents, decoding, config)
    result = described(args, world, decoding, ranks) | {
        "seconds": round(seconds, 3),
        "first_extra_seconds": round(first - seconds, 2),
        "tflops_per_gpu": round(flops / seconds / 1e12 / ranks, 1),
        **about_tiles,
        **about_video,
        "weights_gib": round(weights / 2**30, 2),
        "peak_gib": round(peak / 2**30, 2),
        "planned_gib": round(decoding.total / 2**30, 2),
        "host_peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }
    stop_world(world)
    return result if world.is_main else {}
