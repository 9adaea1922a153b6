"""The options of super resolution, which is stage 2 once more: see options.py. Knows no torch."""

from dataclasses import dataclass
from typing import ClassVar

from hunyuan_staged.errors import InputError
from hunyuan_staged.flags import flag
from hunyuan_staged.run_options import LARGER, RunOptions
from hunyuan_staged.versions import SUPER_RESOLUTION


@dataclass(frozen=True, kw_only=True)
class UpscaleOptions(RunOptions):
    """Super resolution: a run's latents → larger ones."""

    super_resolution: str | None = flag(
        "enlarge the latents in the folder to this resolution (default: denoise anew)",
        group=LARGER,
        choices=tuple(SUPER_RESOLUTION),
    )

    # Options of stage 2 that shape the latents to enlarge, and cannot shape the larger ones.
    of_the_base: ClassVar[tuple[str, ...]] = (
        "transformer",
        "transformer_version",
        "lora",
        "four_steps",
        "sparse_attn",
        "enable_cache",
    )
    # Options that each of the two has a value of its own for: those of a whole run are the base run's.
    of_its_own: ClassVar[tuple[str, ...]] = ("num_inference_steps", "guidance_scale", "flow_shift")

    def check(self) -> None:
        super().check()
        if self.super_resolution is None:
            return
        for name in self.of_the_base:
            if getattr(self, name, None):
                raise InputError("is for the run whose latents --super_resolution enlarges", option=name)
