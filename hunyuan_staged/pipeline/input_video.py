"""A video of the user's as what super resolution enlarges: its frames through the VAE's encoder, in the latents' place."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from hunyuan_staged.encoders.image import pixels_of, resize_and_center_crop
from hunyuan_staged.errors import InputError
from hunyuan_staged.files import contract, provenance, tensors
from hunyuan_staged.files.video import VideoInfo, open_video
from hunyuan_staged.geometry import (
    BUCKET_BASE,
    LATENT_CHANNELS,
    MAX_VIDEO_LENGTH,
    TEMPORAL_RATIO,
    latent_shape,
    nearest_size,
    size_for_ratio,
)
from hunyuan_staged.memory import available
from hunyuan_staged.memory.budget import FreeMemory, gib, refusal
from hunyuan_staged.models.vae_constants import VAE_CHANNELS, VAE_LAYERS
from hunyuan_staged.models.vae_encoder import Encoder
from hunyuan_staged.options import DenoiseOptions
from hunyuan_staged.parallel.world import World
from hunyuan_staged.pipeline.jobs import output_dir
from hunyuan_staged.run_options import MAX_FPS
from hunyuan_staged.runtime.progress import Reporter
from hunyuan_staged.versions import SUPER_RESOLUTION
from hunyuan_staged.weights import components
from hunyuan_staged.weights.folder import ModelFolder

MAX_SIDE = 8192  # px, of a video that is read
DEFAULT_FRAMES = 121  # that are taken at most: as many as the published versions make
# So many frames of latents at a time: what the encoder needs does not grow with the video.
LATENT_FRAMES_PER_CHUNK = 1


# Tensors of the first level's width for each frame of a chunk, at its peak: a sum's two parts, its result, the padded input
# of the next convolution, and what lies in wait. Counted: tests/unit/decoding/test_decoder_memory.py.
ENCODER_TENSORS = 4


def encoder_working(size: tuple[int, int, int], config: Mapping[str, Any], itemsize: int) -> int:
    """Bytes beside the weights while a video (T, H, W) is encoded chunk by chunk."""
    frames, height, width = size
    channels = list(config.get("block_out_channels") or VAE_CHANNELS)
    convolutions = (
        2 * int(config.get("layers_per_block") or VAE_LAYERS) + 1
    )  # of a level: resnets', and the downsampler's
    remembered = sum(2 * convolutions * wide / 4**level for level, wide in enumerate(channels))
    chunk = min(frames, LATENT_FRAMES_PER_CHUNK * TEMPORAL_RATIO)
    values = ((ENCODER_TENSORS * chunk + 2) * channels[0] + remembered) * height * width
    latents = channels[-1] * math.prod(latent_shape(*size, 1))
    return int(values + latents) * itemsize


def plan_encoding(
    size: tuple[int, int, int], config: Mapping[str, Any], weights: int, itemsize: int, free: FreeMemory
) -> dict[str, int]:
    """What encoding a video (T, H, W) takes, by part, in bytes; InputError where a GPU has less.

    What it takes on a CPU was never measured, so that nothing is refused there.
    """
    parts = {"weights": weights, "working memory": encoder_working(size, config, itemsize)}
    total = sum(parts.values())
    if free.device is not None and total > free.device:
        what = f"encoding {size[0]} frames of {size[2]}x{size[1]}"
        remedies = ["a GPU with more memory", "a --super_resolution that starts from smaller frames"]
        raise InputError(refusal(what, f"{gib(total)} of GPU memory", parts, free, remedies), option="input_video")
    return parts


@dataclass(frozen=True)
class InputVideo:
    """A video file, and what is taken of it: `frames` of them (4n + 1), cropped to the size of a resolution."""

    path: Path
    info: VideoInfo
    frames: int
    resolution: str
    height: int
    width: int

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """[1, C, t, h, w] of its latents."""
        return latent_shape(self.frames, self.height, self.width, LATENT_CHANNELS)

    def pictures(self) -> Iterator[torch.Tensor]:
        """The frames that are taken, each [3, H, W] in [-1, 1]."""
        for frame in islice(open_video(self.path)[1], self.frames):
            yield pixels_of(resize_and_center_crop(Image.fromarray(np.array(frame)), self.height, self.width))


def look_at(options: DenoiseOptions, report: Reporter) -> InputVideo:
    """Open the video that the options name and say what is taken of it; InputError where it cannot be read or is too
    short."""
    assert options.input_video is not None and options.super_resolution is not None
    path = Path(options.input_video)
    info, found = open_video(path)
    if max(info.height, info.width) > MAX_SIDE:
        raise InputError(f"{path} is {info.width}x{info.height}; at most {MAX_SIDE} px", option="input_video")
    wanted = options.video_length or DEFAULT_FRAMES
    count = sum(1 for _ in islice(found, MAX_VIDEO_LENGTH))
    if options.video_length and count < options.video_length:
        raise InputError(f"{options.video_length}: {path} has {count} frames", option="video_length")
    frames = (min(count, wanted) - 1) // TEMPORAL_RATIO * TEMPORAL_RATIO + 1
    resolution = nearest_base(options.super_resolution, info.height, info.width)
    if options.aspect_ratio:
        height, width = size_for_ratio(resolution, options.aspect_ratio)
    else:
        height, width = nearest_size(resolution, info.height / info.width)
    report.info(
        f"{path}: {count} frames of {info.width}x{info.height} at {info.fps:g} frames per second; taken are {frames}, "
        f"cropped and resized to {width}x{height} ({resolution})"
    )
    return InputVideo(path, info, frames, resolution, height, width)


def nearest_base(target: str, height: int, width: int) -> str:
    """Of the resolutions that lead to a larger one that whose area is nearest to height x width."""
    bases = []
    while target in SUPER_RESOLUTION:
        target = SUPER_RESOLUTION[target].base
        bases.append(target)
    return min(bases, key=lambda base: abs(math.log(height * width / BUCKET_BASE[base] ** 2)))


OpenModel = Callable[[], ModelFolder]


def write_latents(
    video: InputVideo, options: DenoiseOptions, open_model: OpenModel, world: World, report: Reporter
) -> None:
    """Encode a video into the folder's latents for super resolution, unless they are there already. The first process does
    it, and the others wait. open_model: gives what has the VAE."""
    if world.is_main:
        _write_latents(video, options, open_model(), world, report)
    world.barrier("video encoded")


def _write_latents(
    video: InputVideo, options: DenoiseOptions, folder: ModelFolder, world: World, report: Reporter
) -> None:
    dtype = torch.float16 if world.device.type == "cuda" else torch.float32
    made_from = provenance.digest(
        {
            "video": provenance.sha256(video.path),
            "shape": video.shape,
            "vae": folder.fingerprint(["vae"]),
            "dtype": str(dtype),
            "device": world.device.type,
        }
    )
    name = contract.at_resolution(contract.LATENTS_FILE, contract.INPUT)
    path = output_dir(options) / name
    if path.is_file() and tensors.latents_metadata(path.parent, contract.INPUT).get(contract.MADE_FROM) == made_from:
        report.info(f"{path} is there, made from the same: taken as it is")
        return
    config = components.vae_config(folder)
    weights = sum(tensor.numel() for tensor in components.vae_skeleton(folder, "encoder").parameters()) * dtype.itemsize
    free = available.free_memory(world.device)
    parts = plan_encoding((video.frames, video.height, video.width), config, weights, dtype.itemsize, free)
    report.info(
        f"{video.path} is encoded {LATENT_FRAMES_PER_CHUNK * TEMPORAL_RATIO} frames at a time: {gib(sum(parts.values()))}"
    )
    with report.timed("load"):
        encoder, config = components.load_vae_encoder(
            folder, device=world.device, dtype=dtype, progress=report.progress
        )
    with report.timed("compute"):
        pictures = report.progress(video.pictures(), desc="reading video", unit="frame", total=video.frames)
        # In the encoder's dtype, which it would be brought to: of 121 frames of 720p 0.6 GiB.
        pixels = torch.empty(1, 3, video.frames, video.height, video.width, dtype=dtype)
        for number, picture in enumerate(pictures):
            pixels[0, :, number] = picture
        mean, _ = Encoder(encoder)(pixels, LATENT_FRAMES_PER_CHUNK).chunk(2, dim=1)
        latents = (mean * config["scaling_factor"]).float().cpu()
    about = {"height": str(video.height), "width": str(video.width), "num_frames": str(video.frames)}
    if 1 <= video.info.fps <= MAX_FPS:
        about["fps"] = f"{video.info.fps:g}"
    tensors.save_latents(path.parent, latents, about | {contract.MADE_FROM: made_from}, contract.INPUT)
