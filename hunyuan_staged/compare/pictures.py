"""Side-by-side video and plot."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from hunyuan_staged.compare.clips import Clip, _pairs
from hunyuan_staged.compare.measures import Quality
from hunyuan_staged.runtime.progress import quiet

# -- what is written --


def write_side_by_side(path: Path, a: Clip, b: Clip, amplify: float, progress: Any = quiet) -> None:
    """An mp4 of A | B | abs(A - B) times amplify, at A's frames per second. InputError as video.write_video."""
    import torch

    from hunyuan_staged.decoding.frames import to_8bit
    from hunyuan_staged.files import video

    def frames() -> Iterable[np.ndarray]:
        for frame_a, frame_b in _pairs(a, b, progress, "writing"):
            difference = np.minimum(np.abs(frame_a - frame_b) * np.float32(amplify), 1)
            # three of [H, W, 3] → [H, 3 W, 3]
            yield to_8bit(torch.from_numpy(np.concatenate([frame_a, frame_b, difference], axis=1))).numpy()

    video.write_video(path, frames(), a.fps, a.height, 3 * a.width)


def write_plot(path: Path, quality: Quality) -> None:
    """A PNG of PSNR and SSIM over the frames. Equal frames, whose PSNR is infinite, are gaps in it, and counted."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    from hunyuan_staged.files import atomic

    figure = Figure(figsize=(9, 5), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True)
    equal = sum(map(math.isinf, quality.psnr))
    upper.plot([value if math.isfinite(value) else math.nan for value in quality.psnr], marker=".")
    upper.set_ylabel("PSNR, dB")
    if equal:
        upper.set_title(f"{equal} of {len(quality.psnr)} frames are equal: their PSNR is infinite", fontsize="medium")
    lower.plot(quality.ssim, marker=".", color="tab:orange")
    lower.set(ylabel="SSIM", xlabel="frame")
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    with atomic.replacing(path) as temporary:
        canvas.print_png(str(temporary))
