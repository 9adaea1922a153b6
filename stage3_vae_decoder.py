#!/usr/bin/env python3
"""Stage 3: video latents → mp4, by the VAE's decoder."""

from __future__ import annotations

import argparse
import collections
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import utils
from hunyuan_staged import geometry, options
from hunyuan_staged.decoding import planning
from hunyuan_staged.decoding.tiling import (
    DEFAULT_TILE_OVERLAP,
    DEFAULT_TILE_SIZE,
    MAX_OVERLAP,
    SMALL_TILE_SIZE,
    check_tiling,
)
from hunyuan_staged.errors import InputError
from hunyuan_staged.files.atomic import check_output_dir
from hunyuan_staged.memory import available, budget

if TYPE_CHECKING:
    import numpy as np
    import torch

    from hunyuan_staged.decoding import blending
    from hunyuan_staged.weights.folder import ModelFolder

MAX_NAME_BYTES = 200  # of a file: file systems take 255, some of which a temporary name beside it needs

EXAMPLE = """\
examples:
  python stage3_vae_decoder.py --input_dir stage_outputs
  torchrun --nproc-per-node 8 stage3_vae_decoder.py --output_video cat.mp4 --tile_overlap 0.125
"""


def build_parser() -> argparse.ArgumentParser:
    """All flags of stage 3, with their defaults."""
    parser = utils.make_parser("stage3_vae_decoder.py", __doc__ or "", EXAMPLE)
    files = parser.add_argument_group("files")
    files.add_argument(
        "--input_dir", default=options.DEFAULT_OUTPUT_DIR, help="folder that stage 2 wrote (default: %(default)s)"
    )
    files.add_argument("--model_path", help="model folder or hub id (default: the one that stage 1 recorded)")
    files.add_argument("--output_video", help="the mp4 to write (default: output_video.mp4 in --input_dir)")
    files.add_argument("--save_frames", action="store_true", help="also write stage3_frames.safetensors to --input_dir")
    utils.add_strict_flag(files)
    video = parser.add_argument_group("video")
    video.add_argument(
        "--fps", type=float, default=options.DEFAULT_FPS, help="frames per second (default: %(default)s)"
    )
    tiling = parser.add_argument_group("tiles")
    tiling.add_argument(
        "--tile_size",
        type=int,
        help=f"side of a tile in px (default: {DEFAULT_TILE_SIZE}; {SMALL_TILE_SIZE} where less memory is free)",
    )
    tiling.add_argument(
        "--tile_overlap",
        type=float,
        default=DEFAULT_TILE_OVERLAP,
        help=f"share of a tile that blends with its neighbour, 0 to {MAX_OVERLAP} (default: %(default)s)",
    )
    tiling.add_argument(
        "--disable_tiling", action="store_true", help="decode whole frames: no seams, and far more memory"
    )
    tiling.add_argument(
        "--disable_tile_parallelism", action="store_true", help="the first process decodes alone, the others wait"
    )
    utils.add_run_flags(parser)
    return parser


def check(args: argparse.Namespace) -> None:
    """Refuse every flag value that can be judged without reading a file."""
    utils.check_paths(args)
    if not 1 <= args.fps <= 240:
        raise InputError(f"--fps {args.fps:g} is outside 1 to 240")
    if not args.disable_tiling:
        check_tiling(tile_size_or_default(args), args.tile_overlap, geometry.SPATIAL_RATIO)
    if args.output_video is not None:
        target = Path(args.output_video)
        if target.suffix != ".mp4" or target.is_dir():
            raise InputError(f"--output_video {args.output_video} is not the name of an .mp4 file")
        if len(target.name.encode()) > MAX_NAME_BYTES:
            raise InputError(f"--output_video {args.output_video} is a name of more than {MAX_NAME_BYTES} bytes")
        check_output_dir("--output_video", target.parent)
        if not target.parent.exists():
            raise InputError(f"--output_video {args.output_video}: {target.parent} does not exist")


def tile_size_or_default(args: argparse.Namespace) -> int:
    """--tile_size, or what it is where there is memory enough."""
    return DEFAULT_TILE_SIZE if args.tile_size is None else args.tile_size


def plan_memory(
    run: utils.Run, args: argparse.Namespace, latents: torch.Tensor, folder: ModelFolder, itemsize: int
) -> tuple[planning.Decoding, dict[str, object]]:
    """Tiles and chunks, and the rows that --dry_run prints; InputError where they do not fit."""
    import torch

    config = folder.vae_config()
    frames, height, width = latents.shape[2:]
    ratio = int(config["spatial_compression_ratio"])
    size = ((frames - 1) * int(config["temporal_compression_ratio"]) + 1, height * ratio, width * ratio)
    weights = sum(tensor.numel() for tensor in folder.vae_skeleton("decoder").parameters()) * itemsize
    # With --disable_tile_parallelism the first process alone decodes, and no other's memory matters.
    free = available.free_memory(run.device) if args.disable_tile_parallelism else run.free_memory()
    decoding = planning.fit_decoding(
        config,
        weights,
        itemsize,
        size,
        free,
        asked=args.tile_size,
        whole=args.disable_tiling,
        overlap=args.tile_overlap,
    )
    held = ", ".join(f"{part} {budget.gib(number)}" for part, number in decoding.parts.items())
    ranks = 1 if args.disable_tile_parallelism else run.world.size
    gpu = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else None
    seconds = planning.decoding_seconds(gpu, config, size, decoding, args.tile_overlap, ranks)
    return decoding, {
        "video": f"{size[2]}x{size[1]}, {size[0]} frames",
        "tile size": f"{decoding.tile_size or 'whole frames'} ({decoding.reason})",
        "latent frames at once": min(decoding.at_once, frames),
        "memory": f"{budget.gib(decoding.total)}: {held}",
        "free": free.describe(),
        "expected time": "unknown: not measured" if seconds is None else f"{seconds:.1f} s",
    }


def body(run: utils.Run, args: argparse.Namespace) -> None:
    """Read the latents, load the decoder, decode, write the video."""
    import torch

    from hunyuan_staged.decoding import tiled
    from hunyuan_staged.files import contract, provenance, tensors
    from hunyuan_staged.files.config import read_config, update_config
    from hunyuan_staged.files.video import ffmpeg_path
    from hunyuan_staged.parallel.world import World
    from hunyuan_staged.weights.folder import open_model

    input_dir = Path(args.input_dir)
    output_video = Path(args.output_video or input_dir / contract.VIDEO_FILE)
    contract.require_file(input_dir / contract.LATENTS_FILE)
    if not args.dry_run:
        run.lock(input_dir / contract.LOCK_FILE, contract.STAGE_FILES[3])
    if args.output_video and not args.dry_run:
        run.lock(output_video.with_name(f".{output_video.name}{contract.LOCK_FILE}"), [output_video.name])
    latents, metadata = tensors.load_latents(input_dir)
    config = read_config(input_dir)
    run.warn_or_refuse(provenance.latents_mismatch(input_dir, config, metadata), strict=args.strict)
    latents_hash = provenance.sha256(input_dir / contract.LATENTS_FILE)
    model_path = args.model_path or config.get("model_path")
    if not model_path:
        raise InputError(f"{args.input_dir} records no model_path; give --model_path")
    ffmpeg_path()  # now, rather than after the decoding

    folder = open_model(model_path, ("vae",), run.progress)
    world = World(run.world.rank, 1, run.device) if args.disable_tile_parallelism else run.world
    tiled.plan_decode(latents, folder.vae_config(), tile_size=None, tile_overlap=0)  # latents of another model
    dtype = torch.float16 if run.device.type == "cuda" else torch.float32
    decoding, rows = plan_memory(run, args, latents, folder, dtype.itemsize)
    tiling = {"tile_size": decoding.tile_size, "tile_overlap": args.tile_overlap}
    tile_plan = tiled.plan_decode(latents, folder.vae_config(), **tiling)
    count = len(tile_plan.tiles)
    if args.dry_run:
        run.show_plan({**rows, "tiles": count, "ranks": run.world.size})
        return
    if world.rank not in tiled.tile_owners(tile_plan, world.size):
        return
    if args.tile_size is None and decoding.tile_size != DEFAULT_TILE_SIZE:
        run.log.info(f"tiles of {decoding.tile_size} px: {decoding.reason}")

    with run.part("load"):
        decoder, vae_config = folder.load_vae_decoder(device=run.device, dtype=dtype, progress=run.progress)
    run.log.info(
        f"latents {list(latents.shape)}: {count} tile{'s' * (count > 1)} on "
        f"{world.size} process{'es' * (world.size > 1)}, {dtype}"
    )
    blocks = tiled.decode_frames(
        decoder,
        latents,
        vae_config,
        **tiling,
        world=world,
        at_once=decoding.at_once,
        progress=run.progress,
        warn=run.log.warning,
        as_float=args.save_frames,
    )
    with run.part("compute"):
        if not world.is_main:
            collections.deque(blocks, maxlen=0)  # which goes through to their end
            return
        size = tuple(side * tile_plan.spatial_ratio for side in latents.shape[3:])
        about = write(run, args, blocks, output_video, size, latents_hash)
    update_config(input_dir, {**about, contract.LATENTS_HASH: latents_hash})


def write(
    run: utils.Run,
    args: argparse.Namespace,
    blocks: Iterator[blending.FrameBatch],
    output_video: Path,
    size: tuple[int, ...],
    latents_hash: str,
) -> dict[str, object]:
    """Encode frames (H, W) = size while they are decoded, and with --save_frames save them; what the config is to say."""
    import torch

    from hunyuan_staged.files import contract, tensors
    from hunyuan_staged.files.video import write_video

    floats: list[torch.Tensor] = []
    started = decoded = time.perf_counter()

    def frames() -> Iterator[np.ndarray]:
        nonlocal decoded
        for block in blocks:
            yield from block.frames.numpy()
            floats.extend([block.floats] if block.floats is not None else [])
        decoded = time.perf_counter()

    count = write_video(output_video, frames(), args.fps, *size)
    if floats:
        whole = torch.cat(floats).permute(3, 0, 1, 2)[None].contiguous()  # [T, H, W, 3] → [1, 3, T, H, W]
        about = {"fps": f"{args.fps:g}", contract.LATENTS_HASH: latents_hash}
        run.add_output(tensors.save_frames(args.input_dir, whole, about), f"frames {list(whole.shape)} {whole.dtype}")
    run.add_output(output_video, f"{count} frames of {size[1]}x{size[0]} at {args.fps:g} frames per second")
    return {"stage3_decode_time": round(decoded - started, 3), "output_video": str(output_video)}


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    return utils.run_stage("stage 3", args, check=check, body=lambda run, _: body(run, args))


if __name__ == "__main__":
    sys.exit(main())
