"""What a video will look like, from latents alone: a linear map of each latent to the mean colour of its 16 x 16 px.

Letters: C latent channels; t, h, w of the latents.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from hunyuan_staged.errors import InputError

Factors = Sequence[Sequence[float]]  # [C + 1][3]: red, green and blue in [-1, 1] of each channel, and of none

SCALE = 8  # px of the preview for each latent


def as_weights(factors: Factors, channels: int, device: torch.device) -> torch.Tensor:
    """Factors as a tensor [C + 1, 3] on the device; InputError where they are for another number of channels."""
    weights = torch.tensor(factors, dtype=torch.float32)
    if weights.shape != (channels + 1, 3):
        raise InputError(f"preview factors are {list(weights.shape)}; {channels} latent channels need one more row")
    return weights.to(device)


def colors(latents: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Colours [t, 3, h, w] in [-1, 1], about, of latents [1, C, t, h, w], on their device; weights [C + 1, 3]."""
    return torch.einsum("cthw,cr->trhw", latents[0].float(), weights[:-1]) + weights[-1, :, None, None]


def frames_of(colors: torch.Tensor) -> np.ndarray:
    """Frames uint8 [t, 8 h, 8 w, 3] of colours [t, 3, h, w] on the CPU; what is not finite is grey."""
    large = F.interpolate(colors.nan_to_num(0, 0, 0), scale_factor=SCALE, mode="bilinear", align_corners=False)
    return large.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


@dataclass(frozen=True)
class Samples:
    """What factors are fitted to: latents and a one [N, C + 1], the mean colours of what they decode to [N, 3], and
    whether each is of an odd latent frame [N]. N = t h w."""

    latents: torch.Tensor
    colors: torch.Tensor
    odd: torch.Tensor


def samples(latents: torch.Tensor, frames: Iterable[np.ndarray]) -> Samples:
    """Samples of one clip: latents [1, C, t, h, w] as the denoising loop leaves them; frames uint8 [H, W, 3], decoded.

    The first latent frame belongs to the first frame, each other one to the mean of the 4 (or as many as there are) after
    it. ValueError where the frames cannot be shared out so.
    """
    _, _, count, height, width = latents.shape
    means = torch.stack([_means(frame, height, width) for frame in frames])
    if (len(means) - 1) % max(1, count - 1) or len(means) < count:
        raise ValueError(f"{len(means)} frames do not belong to {count} latent frames")
    later = means[1:].unflatten(0, (count - 1, -1)).mean(dim=1) if count > 1 else means[:0]
    colors = torch.cat([means[:1], later]).reshape(-1, 3).double()
    inputs = latents[0].double().flatten(1).T  # [t * h * w, C]
    inputs = torch.cat([inputs, torch.ones(len(inputs), 1, dtype=inputs.dtype)], dim=1)
    return Samples(inputs, colors, (torch.arange(count) % 2 == 1).repeat_interleave(height * width))


def _means(frame: np.ndarray, height: int, width: int) -> torch.Tensor:
    """Mean colours [h, w, 3] in [-1, 1] of a frame."""
    blocks = frame.reshape(height, frame.shape[0] // height, width, frame.shape[1] // width, 3)
    return torch.from_numpy(blocks.mean(axis=(1, 3), dtype=np.float32) / 127.5 - 1)


def fit_factors(clips: Sequence[Samples]) -> tuple[list[list[float]], float]:
    """(factors, share of the variance that they explain), by least squares over clips of one VAE.

    The share is that of the odd latent frames by the factors that fit the even ones; of all where no frame is odd.
    """
    inputs, target, odd = (torch.cat([getattr(clip, name) for clip in clips]) for name in ("latents", "colors", "odd"))
    left_out, used = (odd, ~odd) if odd.any() else (~odd, ~odd)
    trial = torch.linalg.lstsq(inputs[used], target[used]).solution
    found = target[left_out]
    error = (inputs[left_out] @ trial - found).square().sum() / (found - found.mean(dim=0)).square().sum()
    return torch.linalg.lstsq(inputs, target).solution.tolist(), 1 - float(error)
