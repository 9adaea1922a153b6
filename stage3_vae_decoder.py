#!/usr/bin/env python3
"""Stage 3: video latents → mp4, by the VAE's decoder."""

from __future__ import annotations

import collections
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import utils
from hunyuan_staged.decoding import planning
from hunyuan_staged.decoding.tiling import (
    DEFAULT_TILE_SIZE,
)
from hunyuan_staged.errors import InputError
from hunyuan_staged.memory import available, budget
from hunyuan_staged.options import DecodeOptions
from hunyuan_staged.parsing import Parser, make_parser, parse

if TYPE_CHECKING:
    import numpy as np
    import torch

    from hunyuan_staged.decoding import blending
    from hunyuan_staged.weights.folder import ModelFolder


EXAMPLE = """\
examples:
  python stage3_vae_decoder.py --input_dir stage_outputs
  torchrun --nproc-per-node 8 stage3_vae_decoder.py --output_video cat.mp4 --tile_overlap 0.125
"""

OPTIONS = DecodeOptions


def build_parser() -> Parser:
    """The parser of DecodeOptions."""
    return make_parser(DecodeOptions, "stage3_vae_decoder.py", __doc__ or "", EXAMPLE)


def plan_memory(
    run: utils.Run, options: DecodeOptions, latents: torch.Tensor, folder: ModelFolder, itemsize: int
) -> tuple[planning.Decoding, dict[str, object]]:
    """Tiles and chunks, and the rows that --dry_run prints; InputError where they do not fit."""
    import torch

    config = folder.vae_config()
    frames, height, width = latents.shape[2:]
    ratio = int(config["spatial_compression_ratio"])
    size = ((frames - 1) * int(config["temporal_compression_ratio"]) + 1, height * ratio, width * ratio)
    weights = sum(tensor.numel() for tensor in folder.vae_skeleton("decoder").parameters()) * itemsize
    # With --disable_tile_parallelism the first process alone decodes, and no other's memory matters.
    free = available.free_memory(run.device) if options.disable_tile_parallelism else run.free_memory()
    decoding = planning.fit_decoding(
        config,
        weights,
        itemsize,
        size,
        free,
        asked=options.tile_size,
        whole=options.disable_tiling,
        overlap=options.tile_overlap,
    )
    held = ", ".join(f"{part} {budget.gib(number)}" for part, number in decoding.parts.items())
    ranks = 1 if options.disable_tile_parallelism else run.world.size
    gpu = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else None
    seconds = planning.decoding_seconds(gpu, config, size, decoding, options.tile_overlap, ranks)
    return decoding, {
        "video": f"{size[2]}x{size[1]}, {size[0]} frames",
        "tile size": f"{decoding.tile_size or 'whole frames'} ({decoding.reason})",
        "latent frames at once": min(decoding.at_once, frames),
        "memory": f"{budget.gib(decoding.total)}: {held}",
        "free": free.describe(),
        "expected time": "unknown: not measured" if seconds is None else f"{seconds:.1f} s",
    }


def body(run: utils.Run, options: DecodeOptions) -> None:
    """Read the latents, load the decoder, decode, write the video."""
    import torch

    from hunyuan_staged.decoding import tiled
    from hunyuan_staged.files import contract, provenance, tensors
    from hunyuan_staged.files.config import read_config, update_config
    from hunyuan_staged.files.video import ffmpeg_path
    from hunyuan_staged.parallel.world import World
    from hunyuan_staged.weights.folder import open_model

    input_dir = Path(options.input_dir)
    output_video = Path(options.output_video or input_dir / contract.VIDEO_FILE)
    contract.require_file(input_dir / contract.LATENTS_FILE)
    if not options.dry_run:
        run.lock(input_dir / contract.LOCK_FILE, contract.STAGE_FILES[3])
    if options.output_video and not options.dry_run:
        run.lock(output_video.with_name(f".{output_video.name}{contract.LOCK_FILE}"), [output_video.name])
    latents, metadata = tensors.load_latents(input_dir)
    config = read_config(input_dir)
    run.warn_or_refuse(provenance.latents_mismatch(input_dir, config, metadata), strict=options.strict)
    latents_hash = provenance.sha256(input_dir / contract.LATENTS_FILE)
    model_path = options.model_path or config.get("model_path")
    if not model_path:
        raise InputError(f"{options.input_dir} records no model_path; give --model_path")
    ffmpeg_path()  # now, rather than after the decoding

    folder = open_model(model_path, ("vae",), run.progress)
    world = World(run.world.rank, 1, run.device) if options.disable_tile_parallelism else run.world
    tiled.plan_decode(latents, folder.vae_config(), tile_size=None, tile_overlap=0)  # latents of another model
    dtype = torch.float16 if run.device.type == "cuda" else torch.float32
    decoding, rows = plan_memory(run, options, latents, folder, dtype.itemsize)
    tiling: dict[str, Any] = {"tile_size": decoding.tile_size, "tile_overlap": options.tile_overlap}
    tile_plan = tiled.plan_decode(latents, folder.vae_config(), **tiling)
    count = len(tile_plan.tiles)
    if options.dry_run:
        run.show_plan({**rows, "tiles": count, "ranks": run.world.size})
        return
    if world.rank not in tiled.tile_owners(tile_plan, world.size):
        return
    if options.tile_size is None and decoding.tile_size != DEFAULT_TILE_SIZE:
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
        as_float=options.save_frames,
    )
    with run.part("compute"):
        if not world.is_main:
            collections.deque(blocks, maxlen=0)  # which goes through to their end
            return
        size = tuple(side * tile_plan.spatial_ratio for side in latents.shape[3:])
        about = write(run, options, blocks, output_video, size, latents_hash)
    update_config(input_dir, {**about, contract.LATENTS_HASH: latents_hash})


def write(
    run: utils.Run,
    options: DecodeOptions,
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

    count = write_video(output_video, frames(), options.fps, *size)
    if floats:
        whole = torch.cat(floats).permute(3, 0, 1, 2)[None].contiguous()  # [T, H, W, 3] → [1, 3, T, H, W]
        about = {"fps": f"{options.fps:g}", contract.LATENTS_HASH: latents_hash}
        run.add_output(
            tensors.save_frames(options.input_dir, whole, about), f"frames {list(whole.shape)} {whole.dtype}"
        )
    run.add_output(output_video, f"{count} frames of {size[1]}x{size[0]} at {options.fps:g} frames per second")
    return {"stage3_decode_time": round(decoded - started, 3), "output_video": str(output_video)}


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(DecodeOptions, build_parser(), argv)
    return utils.run_stage("stage 3", options, check=DecodeOptions.check, body=lambda run, _: body(run, options))


if __name__ == "__main__":
    sys.exit(main())
