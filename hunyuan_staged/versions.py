"""Transformer versions and the defaults of a run: guidance, shift, steps, sizes. The only home of every default.

Shapes: T frames, H x W pixels; a latent has (T-1)/4+1 frames of H/16 x W/16.
"""

import math
import re
from dataclasses import dataclass
from functools import cache
from typing import Any

from hunyuan_staged import InputError

DEFAULT_OUTPUT_DIR = "./stage_outputs"
DEFAULT_PROMPT = "a red circle moves left over a dark blue background"
DEFAULT_NEGATIVE_PROMPT = ""
DEFAULT_RESOLUTION = "720p"
DEFAULT_DTYPE = "auto"  # bf16 on a GPU, fp32 on a CPU
DEFAULT_ASPECT_RATIO = "16:9"
DEFAULT_SEED = 42
ATTN_MODES = ("flash", "flash2", "flash3", "flash4", "cudnn", "sageattn", "flex-block-attn", "torch")
SPARSE_ATTN_MODE = "flex-block-attn"
DEFAULT_ATTN_MODE = "flash"
CFG_PARALLEL = ("auto", "on", "off")
DEFAULT_CFG_PARALLEL = "auto"
WEIGHTS_DTYPES = ("fp8",)  # of the blocks, where it is not that of the run
LAYERS = 54
DEFAULT_SAGE_BLOCKS = "0-53"  # of the 54, as in the official code: all
# Of a run of CACHE_STEPS steps, as in the official code; other schedules keep their share of it (cache.settle).
CACHE_STEPS = 50
CACHE_FLAGS = {"cache_start_step": 11, "cache_end_step": 45, "cache_step_interval": 4}
# Which further flags a type of cache has, with their defaults. The thresholds are diffusers' (FirstBlockCacheConfig and
# MagCacheConfig); the block is the last of the 54, as in the official code.
CACHE_TYPES: dict[str, dict[str, Any]] = {
    "deepcache": {"no_cache_block_id": "53"},
    "teacache": {},
    "taylorcache": {},
    "firstblock": {"cache_threshold": 0.05},
    "magcache": {"cache_threshold": 0.06},
}
DEFAULT_CACHE_TYPE = "deepcache"
TAYLOR_ORDER = 1
DEFAULT_FPS = 24
DEFAULT_TILE_SIZE = 256
SMALL_TILE_SIZE = 128  # where the default one does not fit
DEFAULT_TILE_OVERLAP = 0.25
# Latent frames of a chunk in the VAE decoder: the first by default, less where memory asks for it. Changes the rounding.
CHUNK_SIZES = (8, 4, 2, 1)
SCORES_AT_ONCE = 2**27  # of the VAE's attention
DEFAULT_COMPARISON_DIR = "./comparison"
DEFAULT_AMPLIFY = 8.0
DEFAULT_CHECKPOINT_EVERY = 5  # steps; 0: never

# What a flag may ask for at most: far beyond what the models were made for, and short of what no memory holds.
MAX_STEPS = 1000
MAX_VIDEO_LENGTH = 2401  # 100 s at 24 frames per second
MAX_TILE_SIZE = 8192

MAX_TEXT_TOKENS = 1000
MAX_GLYPH_BYTES = 256
SKIPPED_LAYERS = 2  # of the language model; hidden_states[-3]: the output of the third layer from the end

LATENT_CHANNELS = 32
SPATIAL_RATIO = 16
TEMPORAL_RATIO = 4

# The side of the square whose area a resolution keeps at every aspect ratio (official code: target_size_config).
BUCKET_BASE = {"demo": 128, "360p": 480, "480p": 640, "720p": 960, "1080p": 1440}
MAX_RATIO = 4.0

STEP_DISTILLED_STEPS = (8, 12)
TASKS = ("t2v", "i2v")
_NAME = re.compile(
    r"(?P<resolution>[A-Za-z0-9]+)_(?P<task>t2v|i2v)(?P<step>_step)?(?P<cfg>_distilled)?(?P<sparse>_sparse)?"
)


@dataclass(frozen=True)
class Version:
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


def version(
    resolution: str, task: str, *, cfg_distilled: bool = False, step_distilled: bool = False, sparse: bool = False
) -> Version:
    """The version that these choices name. Sparse weights exist only distilled, so sparse implies cfg_distilled.

    Raises InputError for a resolution or task that is unknown, and for choices that exclude each other.
    """
    if resolution not in BUCKET_BASE:
        raise InputError(f"resolution {resolution!r} is unknown; known: {', '.join(BUCKET_BASE)}")
    if task not in TASKS:
        raise InputError(f"task {task!r} is unknown; known: {', '.join(TASKS)}")
    if step_distilled and (cfg_distilled or sparse):
        raise InputError("step-distilled weights exclude CFG-distilled and sparse ones; choose one of them")
    return Version(resolution, task, cfg_distilled or sparse, step_distilled, sparse)


def parse_version(name: str) -> Version:
    """The version that a folder name such as 480p_i2v_step_distilled stands for; InputError if it stands for none."""
    match = _NAME.fullmatch(name)
    if not match or (match["step"] and (not match["cfg"] or match["sparse"])):
        raise InputError(
            f"transformer version {name!r} is not of the form <resolution>_<t2v|i2v>[_step_distilled|_distilled[_sparse]]"
        )
    step = bool(match["step"])
    return version(
        match["resolution"],
        match["task"],
        cfg_distilled=bool(match["cfg"]) and not step,
        step_distilled=step,
        sparse=bool(match["sparse"]),
    )


@cache
def size_buckets(base: int, max_ratio: float = MAX_RATIO) -> tuple[tuple[int, int], ...]:
    """All (height, width) in pixels whose area comes nearest to base x base from below, in patches of 16.

    The order and the walk are the official code's (generate_crop_size_list), so ties fall as they do there.
    """
    patches = round((base / SPATIAL_RATIO) ** 2)
    sizes = []
    height, width = patches, 1
    while height > 0:
        if max(height, width) / min(height, width) <= max_ratio:
            sizes.append((height * SPATIAL_RATIO, width * SPATIAL_RATIO))
        if height * (width + 1) <= patches:
            width += 1
        else:
            height -= 1
    return tuple(sizes)


def nearest_size(resolution: str, ratio: float) -> tuple[int, int]:
    """The (height, width) bucket of a resolution whose height / width is nearest to ratio."""
    if resolution not in BUCKET_BASE:
        raise InputError(f"resolution {resolution!r} is unknown; known: {', '.join(BUCKET_BASE)}")
    return min(size_buckets(BUCKET_BASE[resolution]), key=lambda size: abs(size[0] / size[1] - ratio))


def size_for_ratio(resolution: str, aspect_ratio: str) -> tuple[int, int]:
    """(height, width) in pixels for an aspect ratio given as width:height, e.g. 16:9. InputError if it is neither."""
    parts = aspect_ratio.split(":")
    try:
        width, height = (float(part) for part in parts)
    except ValueError:
        width = height = 0.0
    if not (0 < width < math.inf and 0 < height < math.inf):
        raise InputError(f"--aspect_ratio {aspect_ratio!r} is not width:height with two positive numbers, e.g. 16:9")
    return nearest_size(resolution, height / width)


def check_aspect_ratio(aspect_ratio: str) -> str:
    """A ratio itself where it is width:height and no more oblong than the buckets are, else InputError.

    size_for_ratio takes any, as the official code does, and gives the most oblong bucket.
    """
    size_for_ratio(DEFAULT_RESOLUTION, aspect_ratio)
    width, height = (float(part) for part in aspect_ratio.split(":"))
    if not 1 / MAX_RATIO <= width / height <= MAX_RATIO:
        raise InputError(f"--aspect_ratio {aspect_ratio} is outside 1:{MAX_RATIO:g} to {MAX_RATIO:g}:1")
    return aspect_ratio


def check_video_length(num_frames: int) -> int:
    """The frame count itself where it is 4n + 1 with n >= 0 and not too large, else InputError with what is allowed."""
    if num_frames < 1 or (num_frames - 1) % TEMPORAL_RATIO:
        below = max(1, (num_frames - 1) // TEMPORAL_RATIO * TEMPORAL_RATIO + 1)
        raise InputError(
            f"--video_length {num_frames} is not 4n+1; the nearest are {below} and {below + TEMPORAL_RATIO}"
        )
    if num_frames > MAX_VIDEO_LENGTH:
        raise InputError(f"--video_length {num_frames} is more than {MAX_VIDEO_LENGTH}")
    return num_frames


def latent_shape(num_frames: int, height: int, width: int, channels: int) -> tuple[int, int, int, int, int]:
    """[1, C, (T-1)/4+1, H/16, W/16], the shape of a video's latents."""
    return (1, channels, (num_frames - 1) // TEMPORAL_RATIO + 1, height // SPATIAL_RATIO, width // SPATIAL_RATIO)


def parse_block_range(flag: str, text: str) -> range:
    """Which blocks "FIRST-LAST" means, both included, counted from 0; InputError names the flag."""
    match = re.fullmatch(r"(\d{1,4})-(\d{1,4})", text)
    if not match or int(match[1]) > int(match[2]):
        raise InputError(f"{flag} {text!r} is not FIRST-LAST with FIRST <= LAST, e.g. {DEFAULT_SAGE_BLOCKS}")
    return range(int(match[1]), int(match[2]) + 1)
