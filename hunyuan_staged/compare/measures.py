"""Distances between latents and frames."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hunyuan_staged.decoding import tiling

if TYPE_CHECKING:
    import torch


# Half of one of 255 levels: less does not show, and a flat picture must not divide by nothing.
INVISIBLE = 0.5 / 255


# -- latents --


def latent_errors(a: "torch.Tensor", b: "torch.Tensor") -> tuple[float, list[float]]:
    """‖A-B‖/‖A‖ in float32 of latents [1, C, t, h, w]: of the whole, and of each latent frame.

    0 where both are zero, infinite where only A is.
    """
    reference = a.float()
    difference = reference - b.float()
    # [1, C, t, h, w] → [t], the norm of each frame
    above, below = (x.square().sum(dim=(0, 1, 3, 4), dtype=x.dtype).sqrt() for x in (difference, reference))
    return _share(float(above.norm()), float(below.norm())), list(map(_share, above.tolist(), below.tolist()))


def _share(part: float, whole: float) -> float:
    if whole:
        return part / whole
    return math.inf if part else 0.0


# -- frames --


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two frames float32 [H, W, 3] in [0, 1]: -10 log10 of the mean squared error.

    Infinite for equal frames.
    """
    from skimage.metrics import peak_signal_noise_ratio

    with np.errstate(divide="ignore"):
        return float(peak_signal_noise_ratio(a, b, data_range=1.0))


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Structural similarity of two frames float32 [H, W, 3] in [0, 1], mean over the channels; 1 for equal frames.

    With the window and the constants of Wang et al. 2004, "Image Quality Assessment: From Error Visibility to Structural
    Similarity": a Gaussian of sigma 1.5 px, cut to 11 x 11.
    """
    from skimage.metrics import structural_similarity

    return float(
        structural_similarity(
            a, b, data_range=1.0, channel_axis=-1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
    )


class Seams:
    """Whether the borders of a plan's tiles show in a video whose frames are added one by one.

    Energy is the mean absolute second difference across a line, at the two px that meet there: a step and a kink have it,
    a slope does not. It is averaged over 16 px along the line before its sign goes: texture evens out there, and a seam,
    which is what it is over a stretch, stays. Lines are compared with lines of the same kind: the borders lie on the
    grid of the latents, where decoder and H.264 leave traces of their own, so "elsewhere" is every other line of that
    grid, of the same direction.
    """

    def __init__(self, plan: tiling.TilePlan) -> None:
        self._ratio = plan.spatial_ratio
        # By axis of a frame [H, W, 3]; the name is that of the coordinate in which a border has a place.
        self._axes = {"y": plan.rows, "x": plan.columns}
        self._borders = {name: plan.borders_px(spans) for name, spans in self._axes.items()}
        self._energy = {name: np.zeros(len(self._lines(name))) for name in self._axes}
        self._count = 0

    def _lines(self, name: str) -> np.ndarray:
        return np.arange(self._ratio, self._axes[name][-1].stop * self._ratio, self._ratio)

    def add(self, frame: np.ndarray) -> None:
        """The next frame, float32 [H, W, 3] in [0, 1]."""
        self._count += 1
        for axis, name in enumerate(self._axes):
            lines = self._lines(name)
            # Four px, two on each side of every line: [lines, H or W, 3] each
            p0, p1, p2, p3 = (np.moveaxis(frame.take(lines + i, axis), axis, 0) for i in (-2, -1, 0, 1))
            for curvature in (p0 - 2 * p1 + p2, p1 - 2 * p2 + p3):
                stretches = curvature.reshape(len(lines), -1, self._ratio, 3).mean(axis=2)
                self._energy[name] += np.abs(stretches).mean(axis=(1, 2)) / 2

    def result(self) -> dict[str, Any] | None:
        """ratio: energy at all borders against elsewhere, about 1 where no seam shows; worst: the same of the worst border,
        and worst_at its place, e.g. "x=192". None where there is no border, or no line that is none.
        """
        found: dict[str, float] = {}
        for name, borders in self._borders.items():
            at_border = np.isin(self._lines(name), borders)
            if at_border.any() and not at_border.all():
                energy = self._energy[name] / self._count + INVISIBLE
                shares = energy[at_border] / energy[~at_border].mean()
                found |= {f"{name}={px}": float(share) for px, share in zip(borders, shares, strict=True)}
        if not found:
            return None
        worst = max(found, key=lambda place: found[place])
        return {"ratio": float(np.mean(list(found.values()))), "worst": found[worst], "worst_at": worst}


class Flicker:
    """How unsteady a video is, whose frames are added one by one: the mean absolute second difference in time.

    Even motion over an even ground has little of it, a brightness that goes up and down much. Of two videos of the same
    scene the larger number flickers more.
    """

    def __init__(self) -> None:
        self._before: list[np.ndarray] = []
        self._sum, self._count = 0.0, 0

    def add(self, frame: np.ndarray) -> None:
        """The next frame, float32 [H, W, 3] in [0, 1]."""
        if len(self._before) == 2:
            first, second = self._before
            self._sum += float(np.abs(first - 2 * second + frame).mean())
            self._count += 1
        self._before = [*self._before[-1:], frame]

    def result(self) -> float | None:
        """The mean over all frames but the outermost two; None for fewer than three frames."""
        return self._sum / self._count if self._count else None


@dataclass(frozen=True)
class Quality:
    """PSNR (dB), SSIM and LPIPS (empty where it is not at hand) of each frame; of both videos the seams as Seams.result
    gives them, and the flicker."""

    psnr: list[float]
    ssim: list[float]
    lpips: list[float]
    seams: dict[str, dict[str, Any] | None]
    flicker: dict[str, float | None]
