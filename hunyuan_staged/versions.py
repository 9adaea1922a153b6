"""Transformer versions: guidance, shift, steps that each was trained for."""

import re
from dataclasses import dataclass

from hunyuan_staged.errors import InputError
from hunyuan_staged.geometry import BUCKET_BASE

DEFAULT_RESOLUTION = "720p"
LAYERS = 54

MAX_TEXT_TOKENS = 1000
MAX_GLYPH_BYTES = 256
SKIPPED_LAYERS = 2  # of the language model; hidden_states[-3]: the output of the third layer from the end

STEP_DISTILLED_STEPS = (8, 12)
TASKS = ("t2v", "i2v")
_NAME = re.compile(
    r"(?P<resolution>[A-Za-z0-9]+)_(?P<task>t2v|i2v)(?P<step>_step)?(?P<cfg>_distilled)?(?P<sparse>_sparse)?"
)


@dataclass(frozen=True)
class TransformerVersion:
    """One set of transformer weights: what it was trained for, and the settings that follow from that."""

    resolution: str
    task: str
    cfg_distilled: bool = False
    step_distilled: bool = False
    sparse: bool = False

    @property
    def name(self) -> str:
        """The folder name under transformer/, e.g. 720p_t2v_distilled_sparse."""
        distilled = "_step_distilled" if self.step_distilled else "_distilled" if self.cfg_distilled else ""
        return f"{self.resolution}_{self.task}{distilled}{'_sparse' if self.sparse else ''}"

    @property
    def use_meanflow(self) -> bool:
        return self.step_distilled

    @property
    def guidance_scale(self) -> float:
        """Classifier-free guidance; 1 means that the negative row is not run."""
        return 1.0 if self.cfg_distilled or self.step_distilled else 6.0

    @property
    def flow_shift(self) -> float:
        """Shift of the sigma schedule (facts.md, "Versions, guidance and shift")."""
        if self.step_distilled:
            return 7.0
        if self.resolution == "720p":
            return 9.0 if self.task == "t2v" else 7.0
        return 5.0

    @property
    def num_inference_steps(self) -> int:
        """The default; step-distilled weights were made for 8 or 12 steps."""
        if self.step_distilled:
            return STEP_DISTILLED_STEPS[-1]
        return 30 if self.resolution == "demo" else 50

    @property
    def video_length(self) -> int:
        """Frames; 4n + 1."""
        return 33 if self.resolution == "demo" else 121

    def warnings(self, guidance_scale: float, num_inference_steps: int) -> list[str]:
        """What to tell a user whose settings these weights were not made for; each names the right value."""
        told = []
        if self.guidance_scale == 1 and guidance_scale != 1:
            told.append(
                f"{self.name} has guidance distilled into it: --guidance_scale 1 is right, not {guidance_scale:g}"
            )
        if self.guidance_scale != 1 and guidance_scale == 1:
            told.append(f"{self.name} needs guidance: --guidance_scale {self.guidance_scale:g} is right, not 1")
        if self.step_distilled and num_inference_steps not in STEP_DISTILLED_STEPS:
            told.append(
                f"{self.name} was made for {' or '.join(map(str, STEP_DISTILLED_STEPS))} steps, not {num_inference_steps}"
            )
        return told


def make_version(
    resolution: str, task: str, *, cfg_distilled: bool = False, step_distilled: bool = False, sparse: bool = False
) -> TransformerVersion:
    """The version that these choices name. Sparse weights exist only distilled, so sparse implies cfg_distilled.

    Raises InputError for a resolution or task that is unknown, and for choices that exclude each other.
    """
    if resolution not in BUCKET_BASE:
        raise InputError(f"resolution {resolution!r} is unknown; known: {', '.join(BUCKET_BASE)}")
    if task not in TASKS:
        raise InputError(f"task {task!r} is unknown; known: {', '.join(TASKS)}")
    if step_distilled and (cfg_distilled or sparse):
        raise InputError("step-distilled weights exclude CFG-distilled and sparse ones; choose one of them")
    return TransformerVersion(resolution, task, cfg_distilled or sparse, step_distilled, sparse)


def parse_version(name: str) -> TransformerVersion:
    """The version that a folder name such as 480p_i2v_step_distilled stands for; InputError if it stands for none."""
    match = _NAME.fullmatch(name)
    if not match or (match["step"] and (not match["cfg"] or match["sparse"])):
        raise InputError(
            f"transformer version {name!r} is not of the form <resolution>_<t2v|i2v>[_step_distilled|_distilled[_sparse]]"
        )
    step = bool(match["step"])
    return make_version(
        match["resolution"],
        match["task"],
        cfg_distilled=bool(match["cfg"]) and not step,
        step_distilled=step,
        sparse=bool(match["sparse"]),
    )


@dataclass(frozen=True)
class SuperResolutionVersion:
    """One set of super-resolution weights, a transformer and a latent upsampler, and the settings they were made for.

    One serves text and image to video, and every variant of the transformers of base.
    """

    base: str
    resolution: str
    num_inference_steps: int
    flow_shift: float = 2.0
    guidance_scale: float = 1.0  # distilled: the negative branch is not run
    use_meanflow: bool = True
    sparse: bool = False

    @property
    def name(self) -> str:
        """The folder name under transformer/ and upsampler/, e.g. 720p_sr_distilled."""
        return f"{self.resolution}_sr_distilled"

    def warnings(self, guidance_scale: float, num_inference_steps: int) -> list[str]:
        """As TransformerVersion.warnings."""
        told = []
        if guidance_scale != self.guidance_scale:
            told.append(f"{self.name} has guidance distilled into it: 1 is right, not {guidance_scale:g}")
        if num_inference_steps != self.num_inference_steps:
            told.append(f"{self.name} was made for {self.num_inference_steps} steps, not {num_inference_steps}")
        return told


Version = TransformerVersion | SuperResolutionVersion

# Source: the official implementation's command line and pipeline configs.
SUPER_RESOLUTION = {
    version.resolution: version
    for version in (
        SuperResolutionVersion("480p", "720p", 6),
        SuperResolutionVersion("720p", "1080p", 8),
        SuperResolutionVersion("demo", "demo_hd", 6),
    )
}


def super_resolution_version(resolution: str) -> SuperResolutionVersion:
    """The version that enlarges to a resolution; InputError where there is none."""
    if resolution not in SUPER_RESOLUTION:
        raise InputError(f"super resolution to {resolution!r} does not exist; allowed: {', '.join(SUPER_RESOLUTION)}")
    return SUPER_RESOLUTION[resolution]


def super_resolution_named(name: str) -> SuperResolutionVersion | None:
    """The version with this folder name, e.g. 720p_sr_distilled; None where it is none of super resolution."""
    return next((version for version in SUPER_RESOLUTION.values() if version.name == name), None)


def super_resolution_chain(base: str, resolution: str) -> list[SuperResolutionVersion]:
    """The versions that lead from the resolution of a base run to a larger one, in order; InputError where none do."""
    chain = [super_resolution_version(resolution)]
    while chain[0].base != base:
        if chain[0].base not in SUPER_RESOLUTION:
            allowed = [name for name in SUPER_RESOLUTION if leads_to(base, name)]
            raise InputError(
                f"super resolution to {resolution} does not start from {base}; allowed: {', '.join(allowed) or 'none'}"
            )
        chain.insert(0, SUPER_RESOLUTION[chain[0].base])
    return chain


def leads_to(base: str, resolution: str) -> bool:
    """Whether super resolution, once or several times, enlarges a base run to a resolution."""
    while resolution in SUPER_RESOLUTION:
        resolution = SUPER_RESOLUTION[resolution].base
        if resolution == base:
            return True
    return False


def parse_block_range(flag: str, text: str) -> range:
    """Which blocks "FIRST-LAST" means, both included, counted from 0; InputError names the flag."""
    match = re.fullmatch(r"(\d{1,4})-(\d{1,4})", text)
    if not match or int(match[1]) > int(match[2]):
        raise InputError(f"{flag} {text!r} is not FIRST-LAST with FIRST <= LAST, e.g. 0-{LAYERS - 1}")
    return range(int(match[1]), int(match[2]) + 1)
