"""What a video will look like, from latents alone: a linear map of each latent to the mean colour of its 16 x 16 px.

Letters: C latent channels; t, h, w of the latents.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from hunyuan_staged.errors import InputError

# [C + 1][3]: red, green and blue in [-1, 1] of each channel, and of none; or [9 C + 1][3] with the eight neighbours of a
# latent, row by row from above left, the channels of each together.
Factors = Sequence[Sequence[float]]

SCALE = 8  # px of the preview for each latent
NEAR = 3  # latents in height and width that a colour may come from
ENOUGH = 0.9  # of the variance for a map of each latent alone: the published VAE's explains 0.976
RIDGE = 1e-6


def as_weights(factors: Factors, channels: int, device: torch.device) -> torch.Tensor:
    """Factors as a tensor on the device; InputError where they are for another number of channels."""
    weights = torch.tensor(factors, dtype=torch.float32)
    if tuple(weights.shape) not in ((channels + 1, 3), (NEAR**2 * channels + 1, 3)):
        raise InputError(
            f"preview factors are {list(weights.shape)}; {channels} latent channels need {channels + 1} rows, "
            f"or {NEAR**2 * channels + 1} with their neighbours"
        )
    return weights.to(device)


def colors(latents: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Colours [t, 3, h, w] in [-1, 1], about, of latents [1, C, t, h, w], on their device; weights as of as_weights."""
    frames = latents[0].float().transpose(0, 1)  # [t, C, h, w]
    near = 1 if len(weights) == frames.shape[1] + 1 else NEAR
    kernel = weights[:-1].unflatten(0, (near, near, -1)).permute(3, 2, 0, 1)  # [3, C, near, near]
    return F.conv2d(_padded(frames) if near > 1 else frames, kernel, weights[-1])


def _padded(frames: torch.Tensor) -> torch.Tensor:
    """Frames [t, C, h, w] with the latents at their edges repeated, for NEAR."""
    edge = NEAR // 2
    return F.pad(frames, (edge, edge, edge, edge), mode="replicate")


def frames_of(colors: torch.Tensor) -> np.ndarray:
    """Frames uint8 [t, 8 h, 8 w, 3] of colours [t, 3, h, w] on the CPU; what is not finite is grey."""
    large = F.interpolate(colors.nan_to_num(0, 0, 0), scale_factor=SCALE, mode="bilinear", align_corners=False)
    return large.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


@dataclass(frozen=True)
class Moments:
    """What factors are fitted to: sums of products of inputs, one, and colours, [9 C + 4, 9 C + 4] in float64, over the
    even and over the odd latent frames."""

    even: torch.Tensor
    odd: torch.Tensor


def moments(latents: torch.Tensor, frames: Iterable[np.ndarray]) -> Moments:
    """Moments of one clip: latents [1, C, t, h, w] as the denoising loop leaves them; frames uint8 [H, W, 3], decoded.

    The first latent frame belongs to the first frame, each other one to the mean of the 4 (or as many as there are) after
    it. ValueError where the frames cannot be shared out so.
    """
    _, channels, count, height, width = latents.shape
    means = torch.stack([_means(frame, height, width) for frame in frames])
    if (len(means) - 1) % max(1, count - 1) or len(means) < count:
        raise ValueError(f"{len(means)} frames do not belong to {count} latent frames")
    later = means[1:].unflatten(0, (count - 1, -1)).mean(dim=1) if count > 1 else means[:0]
    found = [torch.zeros(NEAR**2 * channels + 4, NEAR**2 * channels + 4, dtype=torch.float64) for _ in range(2)]
    for index, target in enumerate(torch.cat([means[:1], later])):
        near = F.unfold(_padded(latents[0, None, :, index].double()), NEAR)[0]  # [C * 9, h * w], a channel's 9 together
        inputs = near.unflatten(0, (channels, NEAR**2)).transpose(0, 1).flatten(0, 1).T
        rows = torch.cat(
            [inputs, torch.ones(len(inputs), 1, dtype=inputs.dtype), target.reshape(-1, 3).double()], dim=1
        )
        found[index % 2] += rows.T @ rows
    return Moments(*found)


def _means(frame: np.ndarray, height: int, width: int) -> torch.Tensor:
    """Mean colours [h, w, 3] in [-1, 1] of a frame."""
    blocks = frame.reshape(height, frame.shape[0] // height, width, frame.shape[1] // width, 3)
    return torch.from_numpy(blocks.mean(axis=(1, 3), dtype=np.float32) / 127.5 - 1)


def fit_factors(clips: Sequence[Moments]) -> tuple[list[list[float]], float]:
    """(factors, share of the variance that they explain), by least squares over clips of one VAE.

    From each latent alone, where that explains ENOUGH or no less than with its neighbours. The share is that of the odd
    latent frames by the factors that fit the even ones; of all where no frame is odd.
    """
    even, odd = (torch.stack([getattr(clip, name) for clip in clips]).sum(dim=0) for name in ("even", "odd"))
    whole = even + odd
    last = len(whole) - 4  # of the one
    middle = NEAR**2 // 2 * (last // NEAR**2)
    alone = [*range(middle, middle + last // NEAR**2), last]
    left_out = odd if odd.any() else even
    shares = {
        len(rows): (_explained(left_out, rows, _solve(even, rows)), rows) for rows in (alone, list(range(last + 1)))
    }
    share, rows = shares[len(alone)]
    if share < ENOUGH:
        share, rows = max(shares.values())
    return _solve(whole, rows).tolist(), share


def _solve(products: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """Factors [rows, 3] of these inputs. A little is added to the diagonal: nothing else tells equal inputs apart."""
    own = products[rows][:, rows]
    ridge = RIDGE * own.diagonal().mean() * torch.eye(len(rows), dtype=own.dtype)
    return torch.linalg.solve(own + ridge, products[rows, -3:])


def _explained(products: torch.Tensor, rows: list[int], factors: torch.Tensor) -> float:
    """The share of the colours' variance that factors explain."""
    colors, crossed, own = products[-3:, -3:], products[rows, -3:], products[rows][:, rows]
    error = (colors.diagonal() - 2 * (factors * crossed).sum(dim=0) + (factors * (own @ factors)).sum(dim=0)).sum()
    spread = (colors.diagonal() - products[-4, -3:].square() / products[-4, -4]).sum()
    return 1 - float(error / spread)
