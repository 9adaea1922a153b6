"""What a video will look like, from latents alone: a linear map of each latent to the mean colour of its 16 x 16 px.

Letters: C latent channels; t, h, w of the latents.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from hunyuan_staged.errors import InputError
from hunyuan_staged.files.atomic import replacing

Factors = Sequence[Sequence[float]]  # [C + 1][3]: red, green and blue in [-1, 1] of each channel, and of none

FACTORS_FILE = "preview_factors.json"  # in a VAE's folder
SCALE = 8  # px of the preview for each latent

# Of the published VAE, by least squares over a decoded video of 720p: 13 latent frames, each against the mean of the
# frames that it becomes. Fitted on half of the latent frames it explains 0.976 of the variance of the other half.
PUBLISHED: Factors = (
    (0.0331, -0.0241, -0.0048),
    (-0.0084, -0.0147, -0.0150),
    (0.0013, 0.0188, 0.0073),
    (-0.0251, -0.0168, 0.0284),
    (0.0386, 0.0600, 0.0461),
    (0.0352, 0.0377, -0.0285),
    (0.0199, 0.0278, 0.0159),
    (0.0069, -0.0146, -0.0158),
    (0.0349, -0.0433, -0.0099),
    (-0.0120, 0.0005, -0.0059),
    (-0.0017, 0.0132, -0.0035),
    (-0.0093, 0.0178, 0.0304),
    (0.0394, 0.0584, 0.0599),
    (0.0055, 0.0077, -0.0535),
    (0.0093, 0.0027, 0.0129),
    (-0.0120, -0.0254, -0.0140),
    (0.0424, -0.0209, 0.0148),
    (-0.0052, -0.0337, -0.0304),
    (0.0167, 0.0464, 0.0287),
    (0.0046, -0.0017, 0.0377),
    (0.0470, 0.0530, 0.0466),
    (0.0113, 0.0050, -0.0528),
    (0.0040, 0.0209, 0.0089),
    (-0.0066, -0.0268, -0.0078),
    (0.0618, -0.0346, -0.0042),
    (-0.0013, 0.0036, -0.0029),
    (0.0191, 0.0546, 0.0198),
    (-0.0197, -0.0230, 0.0171),
    (0.0527, 0.0534, 0.0460),
    (0.0241, 0.0411, -0.0182),
    (-0.0067, 0.0071, 0.0074),
    (0.0030, -0.0199, -0.0148),
    (0.0460, -0.0286, -0.0601),
)


def clean_estimate(latents: torch.Tensor, velocity: torch.Tensor, sigma: float) -> torch.Tensor:
    """The noiseless latents that a velocity points to: x - sigma v, since x = (1 - sigma) x0 + sigma noise."""
    return latents - sigma * velocity


def preview_frames(latents: torch.Tensor, factors: Factors) -> np.ndarray:
    """Frames uint8 [t, 8 h, 8 w, 3] of latents [1, C, t, h, w], one for each latent frame."""
    weights = torch.tensor(factors, dtype=torch.float32, device=latents.device)
    if weights.shape != (latents.shape[1] + 1, 3):
        raise InputError(
            f"preview factors are {list(weights.shape)}; {latents.shape[1]} latent channels need one more row"
        )
    colors = torch.einsum("cthw,cr->trhw", latents[0].float(), weights[:-1]) + weights[-1, :, None, None]
    large = F.interpolate(colors, scale_factor=SCALE, mode="bilinear", align_corners=False)
    return large.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def fit_factors(latents: torch.Tensor, frames: np.ndarray) -> tuple[list[list[float]], float]:
    """(factors, share of the variance that they explain), by least squares over one clip.

    latents [1, C, t, h, w] as the denoising loop leaves them; frames uint8 [T, H, W, 3] that they decode to. The first
    latent frame belongs to the first frame, each other one to the mean of the 4 (or as many as there are) after it.
    """
    _, channels, count, height, width = latents.shape
    pixels = torch.from_numpy(np.ascontiguousarray(frames)).float() / 127.5 - 1
    rows, columns = pixels.shape[1] // height, pixels.shape[2] // width
    means = pixels.view(len(pixels), height, rows, width, columns, 3).mean(dim=(2, 4))
    later = means[1:].unflatten(0, (count - 1, -1)).mean(dim=1) if count > 1 else means[:0]
    target = torch.cat([means[:1], later]).reshape(-1, 3).double()
    inputs = latents[0].double().flatten(1).T  # [t * h * w, C]
    inputs = torch.cat([inputs, torch.ones(len(inputs), 1, dtype=inputs.dtype)], dim=1)
    solution = torch.linalg.lstsq(inputs, target).solution
    error = (inputs @ solution - target).square().sum() / (target - target.mean(dim=0)).square().sum()
    assert solution.shape == (channels + 1, 3)
    return solution.tolist(), 1 - float(error)


def save_factors(path: Path, factors: Factors) -> None:
    """Write factors as JSON, whole or not at all."""
    with replacing(path) as temporary:
        rows = [[round(value, 5) for value in row] for row in factors]
        temporary.write_text(json.dumps(rows) + "\n", encoding="utf-8")


def load_factors(vae_folder: Path) -> Factors:
    """The factors in a VAE's folder, else those of the published VAE. InputError where the file is no such table."""
    path = vae_folder / FACTORS_FILE
    if not path.is_file():
        return PUBLISHED
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        weights = torch.tensor(rows, dtype=torch.float32)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{path} is no table of numbers ({error})") from error
    if weights.ndim != 2 or weights.shape[1] != 3 or not torch.isfinite(weights).all():
        raise InputError(f"{path} is {list(weights.shape)}; allowed are rows of 3 finite numbers")
    return weights.tolist()
