"""Super resolution of a finished run's latents: stage 2 once more, with a second transformer at a larger size.

The base run's latents are enlarged, corrected by the latent upsampler, and partly noised; so they become the condition of
a run from fresh noise. docs/super_resolution.md says more.
"""

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hunyuan_staged.errors import InputError
from hunyuan_staged.files import contract, provenance, tensors
from hunyuan_staged.files.config import LARGER_KEY
from hunyuan_staged.geometry import (
    BUCKET_BASE,
    LATENT_CHANNELS,
    SPATIAL_RATIO,
    TEMPORAL_RATIO,
    latent_shape,
    resolution_of,
    size_for_ratio,
)
from hunyuan_staged.options import DEFAULT_ASPECT_RATIO, DenoiseOptions
from hunyuan_staged.parallel.world import World
from hunyuan_staged.pipeline import denoising, input_video, low_resolution
from hunyuan_staged.pipeline import settings as resolving
from hunyuan_staged.pipeline.common import chosen_model, free_memory
from hunyuan_staged.pipeline.input_video import InputVideo
from hunyuan_staged.pipeline.jobs import DenoiseJob, output_dir
from hunyuan_staged.pipeline.opening import open_for, open_recorded
from hunyuan_staged.run_options import LARGER_FILES
from hunyuan_staged.runtime.progress import SILENT, Reporter
from hunyuan_staged.sampling.conditions import LowResolutionCondition
from hunyuan_staged.versions import SuperResolutionVersion, parse_version, super_resolution_chain
from hunyuan_staged.weights import components
from hunyuan_staged.weights.folder import ModelFolder
from hunyuan_staged.weights.hub import PUBLISHED_SUPER_RESOLUTION
from hunyuan_staged.weights.published import PublishedModel
from hunyuan_staged.weights.single_file import open_transformer
from hunyuan_staged.weights.upsampler import UpsamplerFiles, open_upsampler


@dataclass(frozen=True)
class Source:
    """The latents [1, 32, T, h, w] that are enlarged, the file's name and its hash; about: metadata that stays."""

    latents: torch.Tensor
    name: str
    hash: str
    about: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class UpscaleSetup(denoising.DenoiseSetup):
    """A denoising that enlarges. source: None in a plan, and before the run that it comes from. upsampler: None in a plan
    where it is not on disk."""

    version: SuperResolutionVersion
    upsampler: UpsamplerFiles | None
    image_latents: torch.Tensor | None
    source: Source | None = None

    @property
    def enlarges_to(self) -> str | None:
        return self.version.resolution

    @property
    def made_from(self) -> dict[str, str]:
        assert self.source is not None
        larger = {contract.LATENTS_HASH: self.source.hash, contract.ENLARGED_FROM: self.source.name}
        return super().made_from | larger | self.source.about

    def fingerprint(self) -> str:
        assert self.upsampler is not None
        transformer = self.folder.fingerprint(["transformer"], self.version.name)
        return provenance.digest({"transformer": transformer, "upsampler": self.upsampler.fingerprint()})

    def inputs(self) -> tuple[torch.Tensor, LowResolutionCondition]:
        assert self.source is not None and self.upsampler is not None
        return low_resolution.prepare(
            self.upsampler,
            self.source.latents,
            self.image_latents,
            self.shape,
            seed=self.options.seed,
            dtype=self.dtype,
            world=self.world,
        )


def resolve(
    options: DenoiseOptions,
    job: DenoiseJob,
    world: World,
    version: SuperResolutionVersion,
    shape: tuple[int, ...],
    report: Reporter = SILENT,
) -> UpscaleSetup:
    """Bring options, embeddings and model together for latents of a shape; InputError where they do not fit."""
    folder, path, upsampler = _weights(options, job, version, report)
    low_resolution.check_config(version, components.transformer_config(folder, version.name))
    larger = low_resolution.enlarged_shape(version, shape)
    height, width = (side * SPATIAL_RATIO for side in larger[-2:])
    frames = (shape[2] - 1) * TEMPORAL_RATIO + 1
    sampling = resolving.resolve_sampling(options, version, version.flow_shift)
    dtype = resolving.resolve_dtype(options, job.config)
    settings = resolving.Settings(version, height, width, frames, *sampling, dtype)
    image = low_resolution.image_latents_at(version, job.embeddings, larger)
    more = {"version": version, "upsampler": upsampler, "image_latents": image}
    return denoising.assemble(UpscaleSetup, options, job, world, (folder, path, settings), report, **more)


def _with_recorded_files(options: DenoiseOptions, config: Mapping[str, Any]) -> DenoiseOptions:
    """The options, with the files that stage 1 recorded for this super resolution where they name none."""
    given: dict[str, Any] = {}
    for name in LARGER_FILES if config.get(LARGER_KEY) == options.super_resolution else ():
        file = config.get(name)
        if not file or getattr(options, name):
            continue
        if not Path(file).is_file():
            place = Path(options.input_dir) / contract.CONFIG_FILE
            raise InputError(f"{place} records {name} {file}, which does not exist; give --{name}")
        given[name] = file
    return replace(options, **given)


def _weights(
    options: DenoiseOptions, job: DenoiseJob, version: SuperResolutionVersion, report: Reporter
) -> tuple[ModelFolder, str, UpsamplerFiles | None]:
    """(what holds the transformer, its path or hub id, the upsampler): the files that are given, else the model's.

    A plan goes by the published model where this one has none; then there is no upsampler.
    """
    file, upsampler = options.super_resolution_transformer, options.super_resolution_upsampler
    found: ModelFolder
    if file and upsampler:
        path = file
    else:
        path = chosen_model(options.model_path, options.input_dir, job.config)
        parts = ("transformer",) if options.dry_run else ("transformer", "upsampler")
        found = open_for(options, path, parts, report, version.name)
        if isinstance(found, PublishedModel) and not upsampler:
            return found, path, None
    opened = open_upsampler(Path(upsampler) if upsampler else found.super_resolution_folder("upsampler", version.name))
    if version.resolution in PUBLISHED_SUPER_RESOLUTION and opened.kind != version.resolution:
        raise InputError(
            f"{opened.files[0]} is the latent upsampler of {opened.kind}; allowed is {version.resolution}'s"
        )
    if file:
        found, path = open_transformer(Path(file), lambda _: version, "--super_resolution_transformer"), file
        report.info(found.describe())
    return found, path, opened


def enlarge(
    options: DenoiseOptions,
    job: DenoiseJob,
    world: World,
    denoise: Callable[[UpscaleSetup, bool], object],
    report: Reporter = SILENT,
    encode: Callable[[InputVideo], object] | None = None,
) -> None:
    """Enlarge the latents of a folder to what the options ask for, by as many runs as that takes.

    denoise(setup, reuse) does one and writes its latents, or shows its plan; reuse: latents that are there already and were
    made so will do. encode(video): what is done with a video of the user's instead of encoding it. Of several runs all are
    planned before the first begins. Every rank calls it.
    """
    options = _with_recorded_files(options, job.config)
    assert options.super_resolution is not None
    video = input_video.look_at(options, report) if options.input_video else None
    shape: tuple[int, ...] = video.shape if video else base_shape(options, job)
    base = resolution_of(*(side * SPATIAL_RATIO for side in shape[-2:]))
    if base is None:
        raise InputError(f"latents {list(shape)} are of no resolution; known: {', '.join(BUCKET_BASE)}")
    chain = super_resolution_chain(base, options.super_resolution)
    if len(chain) > 1 and (options.super_resolution_transformer or options.super_resolution_upsampler):
        raise InputError(
            f"{base} to {options.super_resolution} takes two runs, each with files of its own: one at a time"
        )
    larger = shape
    for version in chain if len(chain) > 1 and not options.dry_run else ():
        planned = resolve(options, job, world, version, larger)
        planned.plan(free_memory(world))
        larger = planned.shape
    if video and encode:
        encode(video)
    elif video:
        model_path = chosen_model(options.model_path, options.input_dir, job.config)
        input_video.write_latents(video, options, partial(open_recorded, model_path, job.config, report), world, report)
    first = contract.INPUT if video else None
    for version in chain:
        setup = resolve(options, job, world, version, shape, report)
        if not options.dry_run:
            setup = _with_source(setup, first if version.base == base else version.base, shape)
        denoise(setup, version is not chain[-1])
        shape = setup.shape
        del setup  # and with it the transformer, before the next one is loaded
        if version is not chain[-1]:
            gc.collect()
        world.barrier("enlarged")


def base_shape(options: DenoiseOptions, job: DenoiseJob) -> tuple[int, ...]:
    """Of the latents to enlarge: those in the folder, and in a plan those that the options ask for if there are none.

    InputError where there are none, and where they are not what the options say.
    """
    folder = output_dir(options)
    path = folder / contract.LATENTS_FILE
    if options.dry_run and (options.aspect_ratio or options.video_length or not path.is_file()):
        return _planned_shape(options, job)
    contract.require_file(path)
    shape = tuple(tensors.load_latents(folder)[0].shape)
    height, width = (side * SPATIAL_RATIO for side in shape[-2:])
    frames, resolution = (shape[2] - 1) * TEMPORAL_RATIO + 1, resolution_of(height, width)
    if options.video_length not in (None, frames):
        raise InputError(f"{options.video_length}: {path} has {frames} frames", option="video_length")
    ratio = options.aspect_ratio
    if ratio and resolution and size_for_ratio(resolution, ratio) != (height, width):
        raise InputError(f"{ratio}: {path} is {width}x{height}", option="aspect_ratio")
    return shape


def _planned_shape(options: DenoiseOptions, job: DenoiseJob) -> tuple[int, ...]:
    """Of the latents that the base run will make."""
    name = job.config.get("transformer_version")
    if name is None:
        raise InputError(
            f"{options.input_dir} holds neither latents nor the version that makes them; run stage 2 first"
        )
    version, image = parse_version(name), job.embeddings.get("image_latents")
    size = size_for_ratio(version.resolution, options.aspect_ratio or DEFAULT_ASPECT_RATIO)
    if image is not None:
        size = (image.shape[-2] * SPATIAL_RATIO, image.shape[-1] * SPATIAL_RATIO)
    return latent_shape(options.video_length or version.video_length, *size, LATENT_CHANNELS)


def _with_source(setup: UpscaleSetup, resolution: str | None, shape: tuple[int, ...]) -> UpscaleSetup:
    """A setup with the latents of a resolution in its folder, None: of the base run."""
    folder, name = output_dir(setup.options), contract.at_resolution(contract.LATENTS_FILE, resolution)
    latents, metadata = tensors.load_latents(folder, resolution)
    if latents.shape != shape:
        raise InputError(f"{folder / name} is {list(latents.shape)}; it was {list(shape)} when this run began")
    about = {"fps": metadata["fps"]} if "fps" in metadata else {}
    job, source = setup.job, Source(latents, name, provenance.sha256(folder / name), about)
    mismatch = provenance.latents_mismatch(folder, job.config, metadata, resolution)
    return replace(setup, source=source, job=replace(job, mismatch=job.mismatch or mismatch))
