"""Which linear map of latents to colours belongs to which VAE: the published one's, and files with those of others."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from hunyuan_staged.errors import InputError
from hunyuan_staged.files.atomic import replacing
from hunyuan_staged.sampling.preview import Factors

MAX_FILE_BYTES = 2**20

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


@dataclass(frozen=True)
class FittedFactors:
    """What was fitted for one VAE. vae: the fingerprint of its files; explained: the share of the colours' variance, on
    latent frames left out of the fit."""

    vae: str
    explained: float
    factors: Factors


def save(path: Path, fitted: FittedFactors) -> None:
    """Write it as JSON, whole or not at all."""
    rows = [[round(value, 5) for value in row] for row in fitted.factors]
    content = asdict(fitted) | {"explained": round(fitted.explained, 4), "factors": rows}
    text = json.dumps(content).replace("[[", "[\n[").replace("], [", "],\n[")  # a row a line
    with replacing(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def load(path: Path) -> FittedFactors:
    """What `save` wrote. InputError where the file is no such table."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ValueError(f"more than {MAX_FILE_BYTES} bytes")
        content = json.loads(path.read_text(encoding="utf-8"))
        rows = tuple(tuple(float(value) for value in row) for row in content["factors"])
        found = FittedFactors(str(content["vae"]), float(content["explained"]), rows)
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(f"{path} holds no preview factors ({error!r}); remove it, or fit them anew") from error
    if not rows or any(len(row) != 3 or not all(abs(value) < 1e6 for value in row) for row in rows):
        raise InputError(f"{path}: the factors are not rows of 3 finite numbers; remove it, or fit them anew")
    return found
