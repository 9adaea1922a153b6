"""The reference image: every mode that Pillow opens, the official resize, and both encoders."""

import numpy as np
import pytest
import torch
from PIL import Image

from hunyuan_staged.demo.tiny import TINY, build_modules
from hunyuan_staged.encoders.image import (
    encode_first_frame,
    encode_image,
    load_image,
    pixels_of,
    resize_and_center_crop,
)
from hunyuan_staged.errors import InputError
from hunyuan_staged.weights import components, encoder_components
from hunyuan_staged.weights.folder import open_model

CPU = torch.device("cpu")


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


@pytest.fixture(scope="module")
def model(tiny_official):
    return open_model(tiny_official, ("image", "vae"))


@pytest.fixture(scope="module")
def modules():
    return build_modules(versions=())


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "YCbCr"])
def test_eight_bit_modes_convert_as_pillow_does(tmp_path, mode):
    image = Image.fromarray(noise(9, 7, 4), "RGBA").convert("RGB").convert(mode)
    if mode == "RGBA":
        image.putalpha(Image.fromarray(noise(9, 7, 1, seed=1)[..., 0]))
    path = tmp_path / ("image.jpg" if mode in ("CMYK", "YCbCr") else "image.png")
    image.save(path)
    with Image.open(path) as saved:
        expected = np.asarray(saved.convert("RGB"))
    loaded = load_image(path)
    assert loaded.mode == "RGB"
    assert np.array_equal(np.asarray(loaded), expected)


def test_alpha_is_dropped_as_in_the_official_code(tmp_path):
    pixels = noise(4, 5, 4)
    Image.fromarray(pixels, "RGBA").save(tmp_path / "image.png")
    assert np.array_equal(np.asarray(load_image(tmp_path / "image.png")), pixels[..., :3])


@pytest.mark.parametrize("name", ["image.png", "image.tif"])
def test_sixteen_bit_grey_keeps_its_high_byte(tmp_path, name):
    values = np.array([[0, 255, 256], [0x1234, 0x8000, 0xFFFF]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / name)
    expected = np.array([[0, 0, 1], [0x12, 0x80, 0xFF]])
    assert np.array_equal(np.asarray(load_image(tmp_path / name)), np.stack([expected] * 3, axis=-1))


def test_big_endian_sixteen_bit_grey_reads_alike(tmp_path):
    header = b"P5 2 1 65535\n"
    (tmp_path / "image.pgm").write_bytes(header + bytes([0x12, 0x34, 0xFF, 0xFF]))
    assert np.asarray(load_image(tmp_path / "image.pgm"))[..., 0].tolist() == [[0x12, 0xFF]]


@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (3, 2), (6, 3), (8, 1)])
def test_exif_rotation_is_applied(tmp_path, orientation, turns):
    pixels = noise(4, 6)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "image.png", exif=exif)
    assert np.array_equal(np.asarray(load_image(tmp_path / "image.png")), np.rot90(pixels, turns))


def test_the_first_frame_of_an_animation_is_taken(tmp_path):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "image.gif", save_all=True, append_images=frames[1:])
    assert load_image(tmp_path / "image.gif").getpixel((0, 0)) == (255, 0, 0)


def test_files_that_are_no_usable_image_are_refused_by_name(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    Image.fromarray(noise(64, 64)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(tmp_path / "float.tif")
    Image.fromarray(np.full((4, 4), 70000, dtype=np.int32)).save(tmp_path / "wide.tif")
    Image.new("RGB", (3300, 100)).save(tmp_path / "strip.png")
    for name, reason in (
        ("absent.png", "no such file"),
        (".", "no such file"),
        ("text.png", "not an image that Pillow can open"),
        ("cut.png", "cannot be read: "),
        ("float.tif", "cannot be read: floating-point pixels have no known range; save it with 8 or 16 bits"),
        ("wide.tif", "cannot be read: its values reach from 70000 to 70000; at most 16 bits are allowed"),
        ("strip.png", "3300x100 is a strip; at most 32:1 is allowed"),
    ):
        with pytest.raises(InputError) as error:
            load_image(tmp_path / name)
        assert str(error.value).startswith(f"--image_path {tmp_path / name}: {reason}")


def official_fit(pixels: np.ndarray, target_width: int, target_height: int) -> np.ndarray:
    """The official resize_and_center_crop, as a plain reference: Pillow itself rounds the fractional box."""
    image = Image.fromarray(pixels)
    scale = max(target_width / image.width, target_height / image.height)
    width, height = round(image.width * scale), round(image.height * scale)
    resized = image.resize((width, height), Image.LANCZOS)
    box = ((width - target_width) / 2, (height - target_height) / 2)
    box += ((width + target_width) / 2, (height + target_height) / 2)
    return np.array(resized.crop(box))


@pytest.mark.parametrize(
    "size",
    [(96, 160), (200, 333), (37, 41), (333, 100), (97, 163), (96, 161), (96, 163), (99, 160), (1, 1), (50, 1000)],
)
def test_fit_is_the_official_resize_to_the_bit(size):
    pixels = noise(*size)
    fitted = resize_and_center_crop(Image.fromarray(pixels), 96, 160)
    assert fitted.size == (160, 96)
    assert np.array_equal(np.asarray(fitted), official_fit(pixels, 160, 96))


def test_fit_leaves_an_image_of_the_size_alone():
    pixels = noise(96, 160)
    assert np.array_equal(np.asarray(resize_and_center_crop(Image.fromarray(pixels), 96, 160)), pixels)


def test_pixels_are_channels_first_from_minus_one_to_one():
    pixels = pixels_of(Image.fromarray(np.array([[[0, 51, 255], [255, 128, 0]]], dtype=np.uint8)))
    assert pixels.dtype == torch.float32
    assert pixels.is_contiguous()
    expected = torch.tensor([[[-1.0, 1.0]], [[-0.6, 1 / 255]], [[1.0, -1.0]]])
    assert (pixels - expected).abs().max() < 1e-6


def test_image_embeds_are_siglips_of_the_bicubic_image(model, modules):
    processor, encoder = encoder_components.load_image_encoder(model, device=CPU, dtype=torch.float32)
    image = Image.fromarray(noise(96, 160))
    side = TINY.image_size
    small = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))
    pixels = torch.from_numpy((small / 255 - 0.5) / 0.5).float().permute(2, 0, 1)[None]
    expected = modules.image_encoder(pixel_values=pixels).last_hidden_state
    embeds = encode_image(processor, encoder, image)
    assert embeds.shape == (1, (side // TINY.image_patch) ** 2, TINY.image_width)
    assert (embeds - expected).abs().max() < 1e-5
    assert embeds.std() > 0.1


def test_image_embeds_follow_the_encoder_dtype(model):
    processor, encoder = encoder_components.load_image_encoder(model, device=CPU, dtype=torch.bfloat16)
    assert encode_image(processor, encoder, Image.fromarray(noise(32, 32))).dtype == torch.bfloat16


def test_the_first_latent_is_the_scaled_mode_of_the_posterior(model, modules):
    encoder, config = components.load_vae_encoder(model, device=CPU, dtype=torch.float32)
    image = Image.fromarray(noise(32, 48))
    with torch.no_grad():
        mode = modules.vae.encoder(pixels_of(image)[None, :, None]).chunk(2, dim=1)[0]
    latent = encode_first_frame(encoder, image, config["scaling_factor"])
    assert latent.shape == (1, TINY.latent_channels, 1, 2, 3)
    # Channels last, hence sums in another order than in the modules' own forward.
    torch.testing.assert_close(latent, mode * 1.03682, rtol=1e-4, atol=1e-5)
    assert not latent.requires_grad
