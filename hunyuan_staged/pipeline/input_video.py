"""A video of the user's as what super resolution enlarges: its frames through the VAE's encoder, in the latents' place."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

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
    with report.timed("load"):
        encoder, config = components.load_vae_encoder(
            folder, device=world.device, dtype=dtype, progress=report.progress
        )
    with report.timed("compute"):
        pictures = report.progress(video.pictures(), desc="reading video", unit="frame", total=video.frames)
        pixels = torch.stack(list(pictures), dim=1)[None]
        mean, _ = Encoder(encoder)(pixels, LATENT_FRAMES_PER_CHUNK).chunk(2, dim=1)
        latents = (mean * config["scaling_factor"]).float().cpu()
    about = {"height": str(video.height), "width": str(video.width), "num_frames": str(video.frames)}
    if 1 <= video.info.fps <= MAX_FPS:
        about["fps"] = f"{video.info.fps:g}"
    tensors.save_latents(path.parent, latents, about | {contract.MADE_FROM: made_from}, contract.INPUT)
