"""A reference image → what image-to-video needs of it: SigLIP's image_embeds and the VAE's first condition latent.

Pillow and numpy only, the official transforms bit for bit on 8-bit images; torchvision is not needed.
"""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import nn

from hunyuan_staged.errors import InputError
from hunyuan_staged.models.vae_encoder import Encoder
from hunyuan_staged.weights.boundary import refusing, require_regular

# Covering a bucket (1:4 at the narrowest) with an image still narrower than this would fill the memory.
MAX_IMAGE_RATIO = 32
MAX_IMAGE_BYTES = 2**28  # WebP and AVIF are read whole before they are looked at
# Whatever its name, a file is opened as one of these: Pillow would start Ghostscript for an EPS.
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "GIF", "TIFF", "JPEG2000", "PPM")


def load_image(path: str | Path) -> Image.Image:
    """The image file as 8-bit RGB, turned as its EXIF data says; the first frame of an animation.

    As in the official code, alpha is dropped (Pillow's convert("RGB")). 16-bit grey is reduced to its high byte, which
    is what Pillow itself does to 16-bit colour; plain convert("RGB") would clip it to white. InputError for a file that
    is absent, no image, broken, too large for Pillow, in a mode without a conversion to RGB, or a mere strip.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"--image_path {path}: no such file")
    require_regular(path, MAX_IMAGE_BYTES)
    # Each decoder fails in its own way, and warns of what it passes over.
    with refusing(f"--image_path {path}: cannot be read"), warnings.catch_warnings(action="ignore"):
        Image.init()
        try:
            # Not every build of Pillow has all.
            with Image.open(path, formats=[name for name in FORMATS if name in Image.OPEN]) as image:
                rgb = _to_rgb(ImageOps.exif_transpose(image))
        except UnidentifiedImageError:
            raise InputError(
                f"--image_path {path}: not an image that Pillow can open as {', '.join(FORMATS)}"
            ) from None
        except (OSError, ValueError) as error:
            raise InputError(f"--image_path {path}: cannot be read: {error}") from error
    if max(rgb.size) > MAX_IMAGE_RATIO * min(rgb.size):
        raise InputError(
            f"--image_path {path}: {rgb.width}x{rgb.height} is a strip; at most {MAX_IMAGE_RATIO}:1 is allowed"
        )
    return rgb


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range; save it with 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise ValueError(f"its values reach from {values.min()} to {values.max()}; at most 16 bits are allowed")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    return image.convert("RGB")


def resize_and_center_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    """The image resized (LANCZOS) to cover height x width pixels, and centre-cropped to exactly that.

    Source: get_image_condition_latents and resize_and_center_crop in the official code. Both round the resized sides
    and the crop's corner to the nearest whole number, halves to even, as Python's round does.
    """
    scale = max(width / image.width, height / image.height)
    resized = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    left, top = round((resized.width - width) / 2), round((resized.height - height) / 2)
    return resized.crop((left, top, left + width, top + height))


@torch.no_grad()
def encode_image(processor: Any, model: nn.Module, image: Image.Image) -> torch.Tensor:
    """SigLIP's last_hidden_state [1, N, W] on the CPU, in the model's dtype, of what resize_and_center_crop gave.

    processor: a SiglipImageProcessor; the one of Pillow gives the official numbers, torchvision's rounds differently.
    """
    weight = next(model.parameters())
    pixels = processor(images=image, do_resize=True, do_convert_rgb=True, return_tensors="pt")["pixel_values"]
    return model(pixel_values=pixels.to(weight.device, weight.dtype)).last_hidden_state.cpu()


@torch.no_grad()
def encode_first_frame(encoder: nn.Module, image: Image.Image, scaling_factor: float) -> torch.Tensor:
    """The first condition latent [1, C, 1, H/16, W/16] on the CPU: the mode of the VAE's posterior x scaling_factor.

    encoder: the VAE's, giving mean and log-variance as 2 C channels; its dtype is the latent's.
    """
    mean, _ = Encoder(encoder)(pixels_of(image)[None, :, None]).chunk(2, dim=1)
    return (mean * scaling_factor).cpu()


def pixels_of(image: Image.Image) -> torch.Tensor:
    """An RGB image as [3, H, W] float32 in [-1, 1]; torchvision's ToTensor, then Normalize(0.5, 0.5), to the bit."""
    pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    return ((pixels.float() / 255 - 0.5) / 0.5).contiguous()
