"""What stage 3 does: latents → mp4, by the VAE's decoder.

job = decode_jobs.read(options)
setup = decoding.resolve(options, job, world)
decoding.run(setup, setup.plan(free_memory(setup.world)))
"""

import collections
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hunyuan_staged.decoding import planning, tiled, timing, whole
from hunyuan_staged.decoding.frames import DecodeContext, FrameBatch, check_latents
from hunyuan_staged.decoding.rows import row_ranks
from hunyuan_staged.decoding.tiling import Tiling
from hunyuan_staged.files import contract, tensors
from hunyuan_staged.files.config import update_config
from hunyuan_staged.files.encoding import ENCODERS, Encoding, default_preset
from hunyuan_staged.files.video import require_encoder, write_video
from hunyuan_staged.memory.budget import FreeMemory, Remedies, gib
from hunyuan_staged.options import DecodeOptions
from hunyuan_staged.parallel.world import World
from hunyuan_staged.pipeline.common import chosen_model
from hunyuan_staged.pipeline.decode_jobs import DecodeJob, video_path
from hunyuan_staged.pipeline.forecast_target import card_of
from hunyuan_staged.pipeline.loaded_decoder import Decoder, LoadedDecoder
from hunyuan_staged.pipeline.opening import open_for
from hunyuan_staged.runtime.processes import cores
from hunyuan_staged.runtime.progress import SILENT, Reporter
from hunyuan_staged.weights import components
from hunyuan_staged.weights.folder import ModelFolder


@dataclass(frozen=True)
class DecodeSetup:
    """A decoding whose options, latents and model have been brought together. world: of the processes that decode."""

    options: DecodeOptions
    job: DecodeJob
    model: ModelFolder
    world: World
    dtype: torch.dtype
    config: dict[str, Any]  # the VAE's

    @property
    def size(self) -> tuple[int, int, int]:
        """(T, H, W) of the video."""
        frames, height, width = self.job.latents.shape[2:]
        ratio, temporal = (int(self.config[f"{kind}_compression_ratio"]) for kind in ("spatial", "temporal"))
        return (frames - 1) * temporal + 1, height * ratio, width * ratio

    def plan(self, free: FreeMemory) -> planning.Decoding:
        """Whole frames or tiles, and chunks, that fit; InputError where nothing does."""
        skeleton = components.vae_skeleton(self.model, "decoder")
        weights = sum(tensor.numel() for tensor in skeleton.parameters()) * self.dtype.itemsize
        options = self.options
        tile_size = None if options.disable_tiling else options.tile_size
        asked = planning.Request(tile_size, options.disable_tiling, options.tile_overlap, self.world.size)

        def fit(size: timing.Size, asked: planning.Request, remedies: Remedies = tuple) -> planning.Decoding:
            return planning.fit_decoding(self.config, weights, self.dtype.itemsize, size, free, asked, remedies)

        card = partial(card_of, options, self.world.device)
        return fit(self.size, asked, lambda: timing.remedies(fit, self.size, asked, self.config, card()))

    def tiling(self, plan: planning.Decoding) -> Tiling:
        """The tiles that a plan decodes in."""
        return Tiling(plan.tile_size, self.options.tile_overlap, plan.latent_frames_per_chunk)

    def owners(self, plan: planning.Decoding) -> list[int]:
        """Which rank decodes each tile; of whole frames, the ranks that decode rows."""
        if plan.tile_size is None:
            return list(range(row_ranks(self.job.latents.shape[3], self.world.size)))
        tiles = tiled.plan_decode(self.job.latents, self.config, self.tiling(plan))
        return tiled.tile_owners(tiles, self.world.size)

    def method(self, plan: planning.Decoding) -> str:
        """One phrase on how the frames are decoded, and why."""
        return f"{plan.describe(len(set(self.owners(plan))))} ({plan.reason})"

    def load(self, decoders: LoadedDecoder, report: Reporter = SILENT) -> Decoder:
        """(decoder, the VAE's config), loaded unless it is among the decoders."""
        load = partial(components.load_vae_decoder, self.model, device=self.world.device, dtype=self.dtype)
        return decoders.get((self.model.identity, self.dtype), partial(load, progress=report.progress))

    def rows(self, plan: planning.Decoding, free: FreeMemory, ranks: int) -> dict[str, object]:
        """The rows that --dry_run prints."""
        held = ", ".join(f"{part} {gib(number)}" for part, number in plan.parts.items())
        frames, height, width = self.size
        return {
            "video": f"{width}x{height}, {frames} frames",
            "decoding": self.method(plan),
            "latent frames at once": min(plan.latent_frames_per_chunk, self.job.latents.shape[2]),
            "memory": f"{gib(plan.total)}: {held}",
            "free": free.describe(),
            **({} if plan.tile_size is None else {"tiles": len(self.owners(plan))}),
            "ranks": ranks,
        }


def resolve(options: DecodeOptions, job: DecodeJob, world: World, report: Reporter = SILENT) -> DecodeSetup:
    """Bring options, latents and model together; InputError where they do not fit. Loads no weights."""
    vae = options.vae or (None if options.model_path else job.config.get("vae"))
    path = options.model_path or vae or chosen_model(None, options.input_dir, job.config)
    # Now, rather than after the decoding.
    if options.assume_gpu is None:
        require_encoder(options.video_encoder)
    model = open_for(replace(options, vae=vae), path, ("vae",), report)
    config = components.vae_config(model)
    check_latents(job.latents, config)
    dtype = components.vae_decoder_dtype(model, world.device)
    # With --disable_tile_parallelism the first process alone decodes, and no other's memory matters.
    own = World(world.rank, 1, world.device) if options.disable_tile_parallelism else world
    return DecodeSetup(options, job, model, own, dtype, config)


@dataclass
class Written:
    """What a decoding has written: each file with a few words; seconds of the decoding alone, without the encoder's end;
    frames of the video."""

    files: list[tuple[Path, str]] = field(default_factory=list)
    seconds: float = 0.0
    frames: int = 0


def run(
    setup: DecodeSetup,
    plan: planning.Decoding,
    report: Reporter = SILENT,
    decoders: LoadedDecoder | None = None,
    made_from: str | None = None,
) -> Written:
    """Load the decoder, decode, write the video. Every rank calls it; the first alone writes.

    made_from: the hash of all that determines the video, for the config.
    """
    options, world, latents = setup.options, setup.world, setup.job.latents
    owners = setup.owners(plan)
    if world.rank not in owners:
        return Written()
    with report.timed("load"):
        decoder, config = setup.load(decoders or LoadedDecoder(), report)
    count = "" if plan.tile_size is None else f"{len(owners)} "
    report.info(f"latents {list(latents.shape)}: {count}{setup.method(plan)}, {setup.dtype}")
    context = DecodeContext(world, report.progress, report.warn, options.save_frames)
    if plan.tile_size is None:
        batches = whole.decode_whole(decoder, latents, config, plan, context)
    else:
        batches = tiled.decode_frames(decoder, latents, config, setup.tiling(plan), context)
    with report.timed("compute"):
        if not world.is_main:
            collections.deque(batches, maxlen=0)  # which goes through to their end
            return Written()
        written = write(setup, batches)
    path = written.files[-1][0]
    about: dict[str, Any] = {"stage3_decode_time": round(written.seconds, 3), "output_video": str(path)}
    about |= {contract.VIDEO_MADE_FROM: made_from} if made_from else {}
    update_config(options.input_dir, {**about, contract.LATENTS_HASH: setup.job.latents_hash})
    return written


def encoding_of(setup: DecodeSetup) -> Encoding:
    """How the video is encoded: as asked for, with x264's preset by cores and GPUs, and what it was made from."""
    options, world = setup.options, setup.world
    preset = options.encoder_preset
    if preset is None and options.encoder == ENCODERS[0]:
        preset = default_preset(cores(), world.size if world.device.type == "cuda" else 0)
    names = {"prompt": "prompt", "seed": "seed", "version": "transformer_version"}
    made_from = {name: setup.job.config[key] for name, key in names.items() if key in setup.job.config}
    return Encoding(options.encoder, preset, options.crf, json.dumps(made_from, ensure_ascii=False))


def write(setup: DecodeSetup, batches: Iterator[FrameBatch]) -> Written:
    """Encode frames while they are decoded, and with --save_frames save them; the video is the last of the files."""
    options, (_, height, width) = setup.options, setup.size
    floats: list[torch.Tensor] = []
    written = Written()
    started = time.perf_counter()

    def frames() -> Iterator[np.ndarray]:
        for batch in batches:
            yield from batch.frames.numpy()
            floats.extend([batch.floats] if batch.floats is not None else [])
        written.seconds = time.perf_counter() - started

    path = video_path(options, setup.job.resolution)
    written.frames = count = write_video(path, frames(), setup.job.fps, height, width, encoding_of(setup))
    if floats:
        whole = torch.cat(floats).permute(3, 0, 1, 2)[None].contiguous()  # [T, H, W, 3] → [1, 3, T, H, W]
        about = {"fps": f"{setup.job.fps:g}", contract.LATENTS_HASH: setup.job.latents_hash}
        saved = tensors.save_frames(options.input_dir, whole, about, setup.job.resolution)
        written.files.append((saved, f"frames {list(whole.shape)} {whole.dtype}"))
    written.files.append((path, f"{count} frames of {width}x{height} at {setup.job.fps:g} frames per second"))
    return written
