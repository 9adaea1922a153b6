"""The contract between stages: file names, tensors, metadata.

Letters: T frames, H x W px; t = (T-1)/4+1, h = H/16, w = W/16 of the latents; L tokens; W widths of the encoders.
"""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from hunyuan_staged.errors import InputError
from hunyuan_staged.geometry import BUCKET_BASE, LATENT_CHANNELS
from hunyuan_staged.versions import SUPER_RESOLUTION

EMBEDDINGS_FILE = "stage1_embeddings.safetensors"
LATENTS_FILE = "stage2_latents.safetensors"
FRAMES_FILE = "stage3_frames.safetensors"
CONFIG_FILE = "generation_config.json"
VIDEO_FILE = "output_video.mp4"
PREVIEW_VIDEO, PREVIEW_PICTURE = "preview.mp4", "preview.png"  # of stage 2, while it denoises
BASE = "base"  # what the latents of a run without super resolution are called where there are others
INPUT = "input"  # what they are called that a video of the user's was encoded to
# Where a stopped stage 2 goes on from; removed when the latents are there.
STATE_FILE = "stage2_state.safetensors"
LOCK_FILE = ".lock"
# Of many jobs: what one asks for, and why it failed; both JSON.
JOB_FILE = "job.json"
FAILURE_FILE = "failure.json"


def at_resolution(name: str, resolution: str | None) -> str:
    """What a file of stage 2 or 3 is called for super resolution to a resolution: output_video.mp4 → output_video_720p.mp4.

    None is the base run, whose files have the plain name.
    """
    stem, _, kind = name.rpartition(".")
    return name if resolution is None else f"{stem}_{resolution}.{kind}"


def resolution_asked(latents: str | None) -> str | None:
    """The resolution of super resolution that stage 3's option names; None: that of the base run, or none is named."""
    return None if latents == BASE else latents


# What each stage writes into its folder.
STAGE_FILES = {
    1: (EMBEDDINGS_FILE, CONFIG_FILE, JOB_FILE, FAILURE_FILE),
    2: (STATE_FILE, LATENTS_FILE, CONFIG_FILE, PREVIEW_VIDEO, PREVIEW_PICTURE, FAILURE_FILE),
    3: (FRAMES_FILE, VIDEO_FILE, CONFIG_FILE, FAILURE_FILE),
}
# What each needs, and what it is done with: how a folder shows which stage is next.
STAGE_INPUTS = {1: (JOB_FILE,), 2: (EMBEDDINGS_FILE, CONFIG_FILE), 3: (LATENTS_FILE, CONFIG_FILE)}
STAGE_OUTPUT = {1: EMBEDDINGS_FILE, 2: LATENTS_FILE, 3: VIDEO_FILE}


# What a run can do without: it warns where such a file cannot be written.
MAY_FAIL = frozenset(
    at_resolution(name, size)
    for size in (None, *SUPER_RESOLUTION)
    for name in (STATE_FILE, PREVIEW_VIDEO, PREVIEW_PICTURE)
)


def larger_files(stage: int) -> tuple[str, ...]:
    """What a stage writes besides where there is super resolution."""
    names = [name for name in STAGE_FILES[stage] if name not in (CONFIG_FILE, JOB_FILE, FAILURE_FILE)]
    return tuple(at_resolution(name, larger) for larger in SUPER_RESOLUTION for name in names)


# Of what is read whole: far above what the largest video has, far below what a host holds.
MAX_BYTES = {
    EMBEDDINGS_FILE: 2**30,
    **{at_resolution(LATENTS_FILE, name): 2**33 for name in (None, *SUPER_RESOLUTION)},
}

# Metadata: the dtypes; the hash of everything that a file was made from; the hash of the file that it was made from, and
# of latents that super resolution has made, that file's name.
DTYPE_INFO = "dtype_info"
MADE_FROM = "made_from_sha256"
EMBEDDINGS_HASH = "embeddings_sha256"
LATENTS_HASH = "latents_sha256"
ENLARGED_FROM = "enlarged_from"
VIDEO_MADE_FROM = "video_made_from_sha256"  # in the config, of one of many jobs: a video has no metadata of ours


@dataclass(frozen=True)
class TensorRule:
    """What a tensor of a file must look like: its axes, a number where the length is fixed, a letter where it is free.

    A letter stands for one length throughout the file. mask: zeros and ones of any dtype, at least so many of them ones;
    every other tensor is of finite floating-point numbers.
    """

    axes: tuple[int | str, ...]
    required: bool = True
    mask: int | None = None


def _text_rules() -> dict[str, TensorRule]:
    rules: dict[str, TensorRule] = {}
    for prefix in ("", "negative_"):
        rules |= {
            f"{prefix}prompt_embeds": TensorRule((1, "L", "W")),
            # The transformer takes the mean over these tokens.
            f"{prefix}prompt_embeds_mask": TensorRule((1, "L"), mask=1),
            f"{prefix}prompt_embeds_2": TensorRule((1, "L2", "W2")),
            f"{prefix}prompt_embeds_mask_2": TensorRule((1, "L2"), mask=0),
        }
    return rules


def large_image_latents(resolution: str) -> str:
    """What the embeddings call an image's latents at a resolution of super resolution, e.g. image_latents_720p."""
    return f"image_latents_{resolution}"


EMBEDDINGS_RULES = {
    **_text_rules(),
    "image_embeds": TensorRule((1, "N", "W3"), required=False),
    "image_latents": TensorRule((1, LATENT_CHANNELS, 1, "h", "w"), required=False),
    **{
        large_image_latents(name): TensorRule((1, LATENT_CHANNELS, 1, f"h {name}", f"w {name}"), required=False)
        for name in SUPER_RESOLUTION
    },
}
LATENTS_RULES = {"latents": TensorRule((1, "C", "t", "h", "w"))}
FRAMES_RULES = {"frames": TensorRule((1, 3, "T", "H", "W"))}
# The state of a feature cache, by guidance branch: numbers, text tokens, and all else over the video's tokens.
_CACHE_STATE = re.compile(r"cache\.(?P<row>[01])\.(?P<name>\w+)")


def state_rules(names: Iterable[str]) -> dict[str, TensorRule]:
    """The rules of a state file with these tensors: the latents', and those of each that a cache has put there."""
    rules = dict(LATENTS_RULES)
    for match in filter(None, map(_CACHE_STATE.fullmatch, names)):
        row, name = match["row"], match["name"]
        axes: tuple[int | str, ...] = (1, f"L{row}" if name == "text" else "S", "D")
        rules[match[0]] = TensorRule((f"n{row}",) if name == "numbers" else axes)
    return rules


WRITTEN_BY = {
    EMBEDDINGS_FILE: "stage1_text_encoder.py",
    LATENTS_FILE: "stage2_transformer.py",
    **{
        at_resolution(LATENTS_FILE, name): f"stage2_transformer.py --super_resolution {name}"
        for name in SUPER_RESOLUTION
    },
    FRAMES_FILE: "stage3_vae_decoder.py --save_frames",
    CONFIG_FILE: "stage1_text_encoder.py",
}


def require_file(path: Path) -> None:
    """InputError where a stage's file is absent, with the stage that writes it, is no file, or may not be read."""
    if not path.is_file():
        where = path if path.parent.is_dir() else path.parent
        if where.exists():
            raise InputError(f"{where} is not a {'file' if where == path else 'folder'}")
        raise InputError(f"{where} does not exist; run {WRITTEN_BY.get(path.name, 'the stage that writes it')} first")
    if not os.access(path, os.R_OK):
        raise InputError(f"{path} cannot be read (Permission denied)")


def latents_present(folder: str | Path) -> list[str]:
    """The resolutions of super resolution whose latents are in a folder, the largest first."""
    found = [name for name in SUPER_RESOLUTION if (Path(folder) / at_resolution(LATENTS_FILE, name)).is_file()]
    return sorted(found, key=BUCKET_BASE.__getitem__, reverse=True)


def resolution_of_latents(name: str) -> str | None:
    """The resolution that a file of latents of this name has in it; None for the base run's, and for any other file."""
    return next((larger for larger in SUPER_RESOLUTION if name == at_resolution(LATENTS_FILE, larger)), None)
