"""Measured times of steps."""

from dataclasses import dataclass

from hunyuan_staged.memory.estimates import DenoisingSize
from hunyuan_staged.versions import LAYERS


@dataclass(frozen=True)
class MeasuredStep:
    """Seconds of a guided step (two rows) on one GPU, as README's table "Measured" has it; extra: of the first step."""

    gpu: str
    tokens: int
    kernel: str
    compiled: bool
    offloaded: int
    seconds: float
    extra: float = 0.0


H100 = "NVIDIA H100 80GB HBM3"
MEASURED_STEPS = (
    MeasuredStep(H100, 111_600, "flash4", True, 0, 17.94, 17.7),
    MeasuredStep(H100, 46_800, "flash4", True, 0, 3.72, 17.8),
    MeasuredStep(H100, 49_290, "flash4", True, 0, 4.19, 15.5),
    MeasuredStep(H100, 111_600, "cudnn", True, 0, 21.69, 14.4),
    MeasuredStep(H100, 111_600, "cudnn", True, LAYERS, 21.54, 11.9),
    MeasuredStep(H100, 46_800, "cudnn", True, 0, 4.35, 14.4),
    MeasuredStep(H100, 46_800, "cudnn", True, LAYERS, 4.38, 14.4),
    MeasuredStep(H100, 46_800, "cudnn", False, 0, 5.33),
)


def expected_seconds(
    gpu: str | None,
    denoising: DenoisingSize,
    offloaded: int,
    *,
    layers: int,
    rows: int,
    ranks: int,
    steps: int,
    float8: bool = False,
) -> float | None:
    """Seconds of the denoising loop where a step just like this one has been measured, else None: nothing is guessed."""
    # All blocks and both guidance rows, in bf16, on one GPU: all that has been measured.
    if layers != LAYERS or rows != 2 or ranks != 1 or denoising.itemsize != 2 or float8:
        return None
    asked = (gpu, denoising.video_tokens, denoising.kernel, denoising.compiled, offloaded)
    for row in MEASURED_STEPS:
        if asked == (row.gpu, row.tokens, row.kernel, row.compiled, row.offloaded):
            return steps * row.seconds + row.extra
    return None
