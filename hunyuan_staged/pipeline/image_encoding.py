"""Stage 1's image: SigLIP's embeddings of it, and its latents at each size that they are needed in."""

from functools import partial
from typing import TYPE_CHECKING

import torch

from hunyuan_staged import geometry, versions
from hunyuan_staged.encoders import image
from hunyuan_staged.files import contract
from hunyuan_staged.pipeline.loaded_encoders import LoadedEncoders
from hunyuan_staged.runtime.progress import SILENT, Reporter
from hunyuan_staged.weights import components, encoder_components

if TYPE_CHECKING:
    from hunyuan_staged.pipeline.encoding import EncodeSetup


def larger_sizes(base: str, target: str | None, height: int, width: int) -> dict[str, tuple[int, int]]:
    """(height, width) by the resolutions that lead from a base run's size to a larger one; none where there is none.

    InputError where none does, and for a size that is no bucket of the base.
    """
    sizes = {}
    for version in versions.super_resolution_chain(base, target) if target else ():
        height, width = sizes[version.resolution] = geometry.enlarged_size(
            version.base, version.resolution, height, width
        )
    return sizes


def encode_image(setup: "EncodeSetup", encoders: LoadedEncoders, report: Reporter = SILENT) -> dict[str, torch.Tensor]:
    """image_embeds and image_latents; nothing without an image.

    Where super resolution is to follow, also the image's latents at each of its sizes.
    """
    picture, folder, device, dtype = setup.picture, setup.folder, setup.world.device, setup.dtypes.image
    if picture is None:
        return {}
    sizes = setup.image_sizes
    height, width = sizes.pop(setup.version.resolution)
    fitted = image.resize_and_center_crop(picture, height, width)
    report.info(f"image {picture.width}x{picture.height} → {width}x{height}")
    with report.timed("load"):
        load = partial(encoder_components.load_image_encoder, folder, device=device, dtype=dtype)
        processor, model = encoders.get("image", (folder.identity, dtype), load)
    with report.timed("compute"):
        embeds = image.encode_image(processor, model, fitted)
    del processor, model
    encoders.release("image")
    with report.timed("load"):
        load_vae = partial(components.load_vae_encoder, folder, device=device, dtype=dtype, progress=report.progress)
        encoder, config = encoders.get("vae", (folder.path, dtype), load_vae)
    with report.timed("compute"):
        latents = image.encode_first_frame(encoder, fitted, config["scaling_factor"])
        larger = {}
        for resolution, size in sizes.items():
            enlarged = image.resize_and_center_crop(picture, *size)
            name = contract.large_image_latents(resolution)
            larger[name] = image.encode_first_frame(encoder, enlarged, config["scaling_factor"])
    del encoder
    encoders.release("vae")
    return {"image_embeds": embeds, "image_latents": latents, **larger}
