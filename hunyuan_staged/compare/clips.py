"""Opening the clips of two runs."""

from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hunyuan_staged import geometry, options
from hunyuan_staged.errors import InputError


@dataclass(frozen=True)
class Clip:
    """A run's frames, to be gone through as often as needed, never whole in memory."""

    path: Path
    num_frames: int
    height: int
    width: int
    fps: float
    frames: Callable[[], Generator[np.ndarray]]  # float32 [H, W, 3] in [0, 1] each, from the first

    @property
    def shape(self) -> str:
        return f"{self.num_frames} frames of {self.width}x{self.height}"


def open_clip(folder: Path, name: str) -> Clip:
    """The clip in a run's FRAMES_FILE or VIDEO_FILE; InputError where it cannot be read."""
    from hunyuan_staged.files import contract, tensors, video

    path = folder / name
    if name == contract.FRAMES_FILE:
        (count, height, width), metadata, _ = tensors.open_frames(folder)
        try:
            fps = float(metadata.get("fps", options.DEFAULT_FPS))
        except ValueError as error:
            raise InputError(f"{path}: its fps {metadata['fps']!r} is not a number") from error

        def exact() -> Generator[np.ndarray]:
            for frame in tensors.open_frames(folder)[2]:
                yield frame.float().permute(1, 2, 0).contiguous().numpy()  # [3, H, W] → [H, W, 3]

        return Clip(path, count, height, width, fps, exact)

    def decoded() -> Generator[np.ndarray]:
        for frame in video.open_video(path)[1]:
            yield frame / np.float32(255)

    info, frames = video.open_video(path)
    # A video file does not say reliably how many frames it holds.
    return Clip(path, sum(1 for _ in frames), info.height, info.width, info.fps, decoded)


def open_pair(a: Path, b: Path, name: str) -> tuple[Clip, Clip]:
    """Both runs' clips; InputError where they cannot be laid on each other, or are of no size that the decoder makes."""
    clips = open_clip(a, name), open_clip(b, name)
    if clips[0].shape != clips[1].shape:
        raise InputError(f"{name} differs in shape: {clips[0].shape} px in {a}, {clips[1].shape} px in {b}")
    ratio = geometry.SPATIAL_RATIO
    if clips[0].height % ratio or clips[0].width % ratio:
        raise InputError(f"{clips[0].path} has {clips[0].shape} px; allowed are multiples of {ratio} px")
    return clips


def _pairs(a: Clip, b: Clip, progress: Any, desc: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    with closing(a.frames()) as first, closing(b.frames()) as second:
        yield from progress(zip(first, second, strict=True), desc=desc, total=a.num_frames, unit="frame")
