"""Super resolution of a finished run's latents: stage 2 once more, with a second transformer at a larger size.

The base run's latents are enlarged, corrected by the latent upsampler, and partly noised; so they become the condition of
a run from fresh noise. docs/super_resolution.md says more.
"""

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from hunyuan_staged.errors import InputError
from hunyuan_staged.files import contract, provenance, tensors
from hunyuan_staged.geometry import (
    BUCKET_BASE,
    LATENT_CHANNELS,
    SPATIAL_RATIO,
    TEMPORAL_RATIO,
    enlarged_size,
    latent_shape,
    resolution_of,
    size_for_ratio,
)
from hunyuan_staged.models.upsampler import LatentUpsampler, build_upsampler
from hunyuan_staged.options import DEFAULT_ASPECT_RATIO, DenoiseOptions
from hunyuan_staged.parallel.world import World
from hunyuan_staged.pipeline import denoising
from hunyuan_staged.pipeline import settings as resolving
from hunyuan_staged.pipeline.common import chosen_model, free_memory
from hunyuan_staged.pipeline.jobs import DenoiseJob, output_dir
from hunyuan_staged.runtime.progress import SILENT, Reporter
from hunyuan_staged.sampling.conditions import LowResolutionCondition, augment, condition_channels, upsample_latents
from hunyuan_staged.sampling.schedule import super_resolution_noise
from hunyuan_staged.versions import SuperResolutionVersion, parse_version, super_resolution_chain
from hunyuan_staged.weights import components
from hunyuan_staged.weights.folder import open_model
from hunyuan_staged.weights.loading import assign_weights
from hunyuan_staged.weights.upsampler import UpsamplerFiles, open_upsampler

Shape = tuple[int, int, int, int, int]


def enlarged_shape(version: SuperResolutionVersion, shape: tuple[int, ...]) -> Shape:
    """[1, 32, T, H, W] for the base run's [1, 32, T, h, w]; InputError where that is no size that the version enlarges."""
    height, width = (side * SPATIAL_RATIO for side in shape[-2:])
    height, width = enlarged_size(version.base, version.resolution, height, width)
    return (1, shape[1], shape[2], height // SPATIAL_RATIO, width // SPATIAL_RATIO)


def check_config(version: SuperResolutionVersion, config: Mapping[str, Any]) -> None:
    """InputError where a transformer (diffusers' arguments) is none of super resolution."""
    channels = config["out_channels"]
    wanted = {"in_channels": 3 * channels + 2, "use_meanflow": version.use_meanflow}
    for name, value in wanted.items():
        if config.get(name) != value:
            raise InputError(
                f"transformer {version.name}: {name} is {config.get(name)!r}; super resolution has {value!r}"
            )


def image_latents_at(
    version: SuperResolutionVersion, embeddings: Mapping[str, torch.Tensor], shape: Shape
) -> torch.Tensor | None:
    """The image's latents [1, 32, 1, H, W] at the large size, None for text to video.

    Raises InputError where stage 1 has made those of the base run alone, or at another size.
    """
    if "image_latents" not in embeddings:
        return None
    name = contract.large_image_latents(version.resolution)
    latents = embeddings.get(name)
    again = f"run stage 1 again with --super_resolution {version.resolution}"
    if latents is None:
        raise InputError(f"the embeddings hold an image and no {name}, which super resolution needs; {again}")
    if latents.shape[-2:] != shape[-2:]:
        raise InputError(f"{name} is {list(latents.shape)}; the latents to make are {list(shape)}: {again}")
    return latents


def load_upsampler(found: UpsamplerFiles, device: torch.device) -> LatentUpsampler:
    """The upsampler that lies on disk, on a device, in float32, without gradients.

    Raises InputError where its config makes none, and where the weights do not fit the config.
    """
    try:
        with torch.device("meta"):
            upsampler = build_upsampler(found.kind, found.config)
    except InputError as error:
        raise InputError(f"{found.origin}: {error}") from error
    assign_weights(upsampler, found.tensors(device), torch.float32, device, found.files[0].parent)
    return upsampler


def prepare(
    found: UpsamplerFiles,
    latents: torch.Tensor,
    image_latents: torch.Tensor | None,
    shape: Shape,
    *,
    seed: int,
    dtype: torch.dtype,
    world: World,
) -> tuple[torch.Tensor, LowResolutionCondition]:
    """(starting noise [1, 32, T, H, W], condition by step), on the device of every process of the run.

    latents: the base run's [1, 32, T, h, w], as its loop left them. The first process alone loads the upsampler and lets
    go of it; the others get what it gave, so that all have the same bits.
    """
    noise, second = super_resolution_noise(shape, seed, dtype)
    upsampled = torch.empty(shape, dtype=dtype)
    if world.is_main:
        upsampler = load_upsampler(found, world.device)
        upsampled = upsample_latents(upsampler, latents, shape[-2], shape[-1], dtype).cpu()
    upsampled = world.broadcast(upsampled)
    noise = noise.to(world.device)
    image = condition_channels(noise, image_latents)
    return noise, LowResolutionCondition(image, augment(upsampled.to(world.device), second))


@dataclass(frozen=True)
class Source:
    """The latents [1, 32, T, h, w] that are enlarged, the file's name and its hash."""

    latents: torch.Tensor
    name: str
    hash: str


@dataclass(frozen=True, kw_only=True)
class UpscaleSetup(denoising.DenoiseSetup):
    """A denoising that enlarges. source: None in a plan, and before the run that it comes from."""

    version: SuperResolutionVersion
    upsampler: UpsamplerFiles
    image_latents: torch.Tensor | None
    source: Source | None = None

    @property
    def enlarges_to(self) -> str | None:
        return self.version.resolution

    @property
    def made_from(self) -> dict[str, str]:
        assert self.source is not None
        larger = {contract.LATENTS_HASH: self.source.hash, contract.ENLARGED_FROM: self.source.name}
        return super().made_from | larger

    def fingerprint(self) -> str:
        return self.folder.fingerprint(["transformer", "upsampler"], self.version.name)

    def inputs(self) -> tuple[torch.Tensor, LowResolutionCondition]:
        assert self.source is not None
        return prepare(
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
    path = chosen_model(options.model_path, options.input_dir, job.config)
    folder = open_model(path, ("transformer", "upsampler"), report.progress)
    upsampler = open_upsampler(folder.super_resolution_folder("upsampler", version.name))
    check_config(version, components.transformer_config(folder, version.name))
    larger = enlarged_shape(version, shape)
    height, width = (side * SPATIAL_RATIO for side in larger[-2:])
    frames = (shape[2] - 1) * TEMPORAL_RATIO + 1
    sampling = resolving.resolve_sampling(options, version, version.flow_shift)
    dtype = resolving.resolve_dtype(options, job.config)
    settings = resolving.Settings(version, height, width, frames, *sampling, dtype)
    image = image_latents_at(version, job.embeddings, larger)
    more = {"version": version, "upsampler": upsampler, "image_latents": image}
    return denoising.assemble(UpscaleSetup, options, job, world, (folder, path, settings), report, **more)


def enlarge(
    options: DenoiseOptions,
    job: DenoiseJob,
    world: World,
    denoise: Callable[[UpscaleSetup, bool], None],
    report: Reporter = SILENT,
) -> None:
    """Enlarge the latents of a folder to what the options ask for, by as many runs as that takes.

    denoise(setup, reuse) does one and writes its latents, or shows its plan; reuse: latents that are there already and were
    made so will do. Of several runs all are planned before the first begins. Every rank calls it.
    """
    assert options.super_resolution is not None
    shape = base_shape(options, job)
    base = resolution_of(*(side * SPATIAL_RATIO for side in shape[-2:]))
    if base is None:
        raise InputError(f"latents {list(shape)} are of no resolution; known: {', '.join(BUCKET_BASE)}")
    chain = super_resolution_chain(base, options.super_resolution)
    larger = shape
    for version in chain if len(chain) > 1 and not options.dry_run else ():
        planned = resolve(options, job, world, version, larger)
        planned.plan(free_memory(world))
        larger = planned.shape
    for version in chain:
        setup = resolve(options, job, world, version, shape, report)
        if not options.dry_run:
            setup = _with_source(setup, None if version.base == base else version.base, shape)
        denoise(setup, version is not chain[-1])
        shape = setup.shape
        del setup  # and with it the transformer, before the next one is loaded
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
    job, source = setup.job, Source(latents, name, provenance.sha256(folder / name))
    mismatch = provenance.latents_mismatch(folder, job.config, metadata, resolution)
    return replace(setup, source=source, job=replace(job, mismatch=job.mismatch or mismatch))
