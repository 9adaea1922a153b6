"""What super resolution starts from: its size, the latent upsampler, the condition of its transformer."""

from collections.abc import Mapping
from typing import Any

import torch

from hunyuan_staged.errors import InputError
from hunyuan_staged.files import contract
from hunyuan_staged.geometry import SPATIAL_RATIO, enlarged_size
from hunyuan_staged.models.upsampler import LatentUpsampler, build_upsampler
from hunyuan_staged.parallel.world import World
from hunyuan_staged.sampling.conditions import LowResolutionCondition, augment, condition_channels, upsample_latents
from hunyuan_staged.sampling.schedule import super_resolution_noise
from hunyuan_staged.versions import SuperResolutionVersion, super_resolution_chain
from hunyuan_staged.weights.folder import ModelFolder
from hunyuan_staged.weights.loading import assign_weights
from hunyuan_staged.weights.upsampler import UpsamplerFiles

Shape = tuple[int, int, int, int, int]


def enlarged_shape(version: SuperResolutionVersion, shape: tuple[int, ...]) -> Shape:
    """[1, 32, T, H, W] for the base run's [1, 32, T, h, w]; InputError where that is no size that the version enlarges."""
    height, width = (side * SPATIAL_RATIO for side in shape[-2:])
    height, width = enlarged_size(version.base, version.resolution, height, width)
    return (1, shape[1], shape[2], height // SPATIAL_RATIO, width // SPATIAL_RATIO)


def missing_weights(folder: ModelFolder, base: str, target: str) -> str | None:
    """What a model lacks that enlarges a base run to a resolution; None: nothing, or it is on a hub."""
    for version in super_resolution_chain(base, target) if not folder.repo else ():
        for part in ("upsampler", "transformer"):
            try:
                folder.super_resolution_folder(part, version.name)
            except InputError as error:
                return str(error)
    return None


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
