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
from hunyuan_staged.memory.budget import gib
from hunyuan_staged.options import DenoiseOptions
from hunyuan_staged.parallel.world import World
from hunyuan_staged.pipeline import vae_encoding
from hunyuan_staged.pipeline.common import free_memory
from hunyuan_staged.pipeline.jobs import INPUT_LATENTS, output_dir
from hunyuan_staged.run_options import MAX_FPS
from hunyuan_staged.runtime.progress import Reporter
from hunyuan_staged.versions import SUPER_RESOLUTION
from hunyuan_staged.weights import components
from hunyuan_staged.weights.folder import ModelFolder

MAX_SIDE = 8192  # px, of a video that is read
DEFAULT_FRAMES = 121  # that are taken at most: as many as the published versions make


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

    @property
    def size(self) -> tuple[int, int, int]:
        """(T, H, W)."""
        return self.frames, self.height, self.width

    def pixels(self, dtype: torch.dtype, report: Reporter) -> torch.Tensor:
        """All frames that are taken, [1, 3, T, H, W] in [-1, 1]."""
        pictures = report.progress(self.pictures(), desc="reading video", unit="frame", total=self.frames)
        # In the encoder's dtype, which it would be brought to: of 121 frames of 720p 0.6 GiB.
        pixels = torch.empty(1, 3, *self.size, dtype=dtype)
        for number, picture in enumerate(pictures):
            pixels[0, :, number] = picture
        return pixels

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


def encoder_dtype(device: torch.device) -> torch.dtype:
    """What a video is encoded in."""
    return torch.float16 if device.type == "cuda" else torch.float32


def write_latents(
    video: InputVideo, options: DenoiseOptions, open_model: OpenModel, world: World, report: Reporter
) -> None:
    """Encode a video into the folder's latents for super resolution, unless they are there already.

    Every process calls it, and encodes rows of it; the first one reads and writes. open_model: gives what has the VAE.
    """
    folder, dtype = open_model(), encoder_dtype(world.device)
    path = output_dir(options) / INPUT_LATENTS
    made_from = _made_from(video, folder, dtype, world.device) if world.is_main else ""
    if world.from_main("input video", "there" if made_from and _is_made_from(path, made_from) else "to do") == "there":
        report.info(f"{path} is there, made from the same: taken as it is")
        return
    plan = vae_encoding.plan_for_model(video.size, folder, dtype, free_memory(world), world.size)
    report.info(f"{video.path} is encoded {plan.method}: {gib(plan.total)}{' each' * (plan.ranks > 1)}")
    encoder = None
    if world.rank < plan.ranks:
        with report.timed("load"):
            load = components.load_vae_encoder
            encoder, _ = load(folder, device=world.device, dtype=dtype, progress=report.progress)
    with report.timed("compute"):
        pixels = video.pixels(dtype, report) if world.is_main else None
        world.barrier("input video read")
        mean = vae_encoding.encode_video(encoder, pixels, video.size, world)
    if mean is not None:
        latents = (mean * components.vae_config(folder)["scaling_factor"]).float().cpu()
        about = {"height": str(video.height), "width": str(video.width), "num_frames": str(video.frames)}
        if 1 <= video.info.fps <= MAX_FPS:
            about["fps"] = f"{video.info.fps:g}"
        tensors.save_latents(path.parent, latents, about | {contract.MADE_FROM: made_from}, contract.INPUT)
    world.barrier("video encoded")


def is_encoded(video: InputVideo, options: DenoiseOptions, open_model: OpenModel, device: torch.device) -> bool:
    """Whether the latents that write_latents would write are there. The model is opened where there are some."""
    path = output_dir(options) / INPUT_LATENTS
    return path.is_file() and _is_made_from(path, _made_from(video, open_model(), encoder_dtype(device), device))


def _made_from(video: InputVideo, folder: ModelFolder, dtype: torch.dtype, device: torch.device) -> str:
    """The hash of all that determines a video's latents."""
    return provenance.digest(
        {
            "video": provenance.sha256(video.path),
            "shape": video.shape,
            "vae": folder.fingerprint(["vae"]),
            "dtype": str(dtype),
            "device": device.type,
        }
    )


def _is_made_from(path: Path, made_from: str) -> bool:
    """Whether latents are there, and say that this is what they were made from."""
    return path.is_file() and tensors.latents_metadata(path.parent, contract.INPUT).get(contract.MADE_FROM) == made_from
