"""The contract between stages: file names, tensors, config, metadata, and writes that are whole or not at all.

Letters: T frames, H x W px; t = (T-1)/4+1, h = H/16, w = W/16 of the latents; L tokens; W widths of the encoders.
"""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hunyuan_staged import InputError
from hunyuan_staged.versions import LATENT_CHANNELS, SPATIAL_RATIO, TEMPORAL_RATIO

EMBEDDINGS_FILE = "stage1_embeddings.safetensors"
LATENTS_FILE = "stage2_latents.safetensors"
FRAMES_FILE = "stage3_frames.safetensors"
CONFIG_FILE = "generation_config.json"
VIDEO_FILE = "output_video.mp4"

DTYPE_INFO = "dtype_info"

# Which stage decides which key of generation_config.json. A stage that runs again replaces its own keys, no others.
CONFIG_KEYS = {
    1: (
        "prompt",
        "negative_prompt",
        "model_path",
        "resolution",
        "transformer_version",
        "task_type",
        "image_path",
        "dtype",
    ),
    2: (
        "aspect_ratio",
        "video_length",
        "num_inference_steps",
        "guidance_scale",
        "flow_shift",
        "seed",
        "height",
        "width",
        "stage2_elapsed_time",
    ),
    3: ("stage3_decode_time", "output_video"),
}
# How the sibling suite calls what we call otherwise.
SIBLING_KEYS = {"model_id": "model_path", "num_frames": "video_length"}


@dataclass(frozen=True)
class TensorRule:
    """What a tensor of a file must look like: its axes, a number where the length is fixed, a letter where it is free.

    A letter stands for one length throughout the file.
    """

    axes: tuple[int | str, ...]
    required: bool = True


def _text_rules() -> dict[str, TensorRule]:
    rules: dict[str, TensorRule] = {}
    for prefix in ("", "negative_"):
        rules |= {
            f"{prefix}prompt_embeds": TensorRule((1, "L", "W")),
            f"{prefix}prompt_embeds_mask": TensorRule((1, "L")),
            f"{prefix}prompt_embeds_2": TensorRule((1, "L2", "W2")),
            f"{prefix}prompt_embeds_mask_2": TensorRule((1, "L2")),
        }
    return rules


EMBEDDINGS_RULES = {
    **_text_rules(),
    "image_embeds": TensorRule((1, "N", "W3"), required=False),
    "image_latents": TensorRule((1, LATENT_CHANNELS, 1, "h", "w"), required=False),
}
LATENTS_RULES = {"latents": TensorRule((1, "C", "t", "h", "w"))}
FRAMES_RULES = {"frames": TensorRule((1, 3, "T", "H", "W"))}

WRITTEN_BY = {
    EMBEDDINGS_FILE: "stage1_text_encoder.py",
    LATENTS_FILE: "stage2_transformer.py",
    FRAMES_FILE: "stage3_vae_decoder.py --save_frames",
    CONFIG_FILE: "stage1_text_encoder.py",
}


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`, with its ending, that takes its place when the block ends well.

    A reader sees the old file or the new one, whole. If the block fails, nothing on disk has changed. The folder is
    made if it is absent. Raises InputError where the folder cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
    except OSError as error:
        raise InputError(f"cannot write to {path.parent}: {error.strerror}") from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp's file is the owner's alone; a new file gets what the user's umask leaves.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def save_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> Path:
    """Write a safetensors file whole, each tensor in its own dtype, which dtype_info also records."""
    dtype_info = json.dumps({name: str(tensor.dtype) for name, tensor in tensors.items()})
    with replacing(path) as temporary:
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            temporary,
            metadata={**metadata, DTYPE_INFO: dtype_info},
        )
    return Path(path)


def _require_file(path: Path) -> None:
    """InputError where a stage's file is absent, with the stage that writes it."""
    if not path.is_file():
        where = path if path.parent.is_dir() else path.parent
        raise InputError(f"{where} does not exist; run {WRITTEN_BY.get(path.name, 'the stage that writes it')} first")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """safe_open, whose complaints become InputError."""
    _require_file(path)
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a whole safetensors file ({error})") from error


def load_tensors(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(tensors, metadata) of a safetensors file, on the CPU, in the dtype that dtype_info records.

    Raises InputError for a file that is absent, cut short or no safetensors file, and for an unknown recorded dtype.
    """
    path = Path(path)
    with _opened(path) as file:
        metadata = dict(file.metadata() or {})
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iterator)
    for name, dtype in _dtypes(path, metadata).items():
        if name in tensors:
            tensors[name] = tensors[name].to(dtype)
    return tensors, metadata


def _dtypes(path: Path, metadata: Mapping[str, str]) -> dict[str, torch.dtype]:
    """The dtypes that dtype_info records, none where it is absent.

    Two spellings are about: "torch.bfloat16" (latents) and "bfloat16" (the sibling suite's embeddings).
    """
    try:
        recorded = json.loads(metadata.get(DTYPE_INFO, "{}"))
        found = {name: getattr(torch, text.removeprefix("torch."), None) for name, text in recorded.items()}
    except (ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: its {DTYPE_INFO} is not a JSON object of dtype names ({error})") from error
    dtypes = {name: dtype for name, dtype in found.items() if isinstance(dtype, torch.dtype)}
    for name in found.keys() - dtypes.keys():
        raise InputError(f"{path}: {DTYPE_INFO} gives {name} the dtype {recorded[name]!r}, which torch does not have")
    return dtypes


def check_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor], rules: Mapping[str, TensorRule]) -> None:
    """Hold tensors against a file's rules; InputError names the first that is missing, unknown or of another shape."""
    missing = [name for name, rule in rules.items() if rule.required and name not in tensors]
    if missing:
        raise InputError(f"{path} lacks {', '.join(missing)}")
    unknown = [name for name in tensors if name not in rules]
    if unknown:
        raise InputError(f"{path} holds unknown tensors {', '.join(unknown[:3])}; known: {', '.join(rules)}")
    lengths: dict[str, int] = {}
    for name, rule in rules.items():
        if name not in tensors:
            continue
        shape = tuple(tensors[name].shape)
        wanted = tuple(lengths.get(axis, axis) if isinstance(axis, str) else axis for axis in rule.axes)
        fits = len(shape) == len(wanted) and all(
            have > 0 and (isinstance(want, str) or have == want) for have, want in zip(shape, wanted, strict=True)
        )
        if not fits:
            allowed = ", ".join(map(str, wanted))
            raise InputError(f"{path}: {name} has shape {list(shape)}; allowed is [{allowed}]")
        lengths |= {axis: size for axis, size in zip(rule.axes, shape, strict=True) if isinstance(axis, str)}


def _save(folder: str | Path, name: str, tensors: Mapping, rules: Mapping, metadata: Mapping[str, str]) -> Path:
    path = Path(folder) / name
    check_tensors(path, tensors, rules)
    return save_tensors(path, tensors, metadata)


def _load(
    folder: str | Path, name: str, rules: Mapping[str, TensorRule]
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    path = Path(folder) / name
    tensors, metadata = load_tensors(path)
    check_tensors(path, tensors, rules)
    return tensors, metadata


def save_embeddings(folder: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> Path:
    """Write stage 1's tensors (EMBEDDINGS_RULES) and return the path."""
    return _save(folder, EMBEDDINGS_FILE, tensors, EMBEDDINGS_RULES, metadata)


def load_embeddings(folder: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(tensors, metadata) of stage 1; InputError where they break the contract."""
    return _load(folder, EMBEDDINGS_FILE, EMBEDDINGS_RULES)


def save_latents(folder: str | Path, latents: torch.Tensor, metadata: Mapping[str, str]) -> Path:
    """Write stage 2's latents [1, C, t, h, w] and return the path."""
    return _save(folder, LATENTS_FILE, {"latents": latents}, LATENTS_RULES, metadata)


def load_latents(folder: str | Path) -> tuple[torch.Tensor, dict[str, str]]:
    """(latents [1, C, t, h, w], metadata) of stage 2; InputError where they break the contract.

    The sibling suite records no height and width (and not always num_frames): they are then filled in from the shape.
    """
    tensors, metadata = _load(folder, LATENTS_FILE, LATENTS_RULES)
    latents = tensors["latents"]
    frames, height, width = latents.shape[2:]
    size = {
        "num_frames": (frames - 1) * TEMPORAL_RATIO + 1,
        "height": height * SPATIAL_RATIO,
        "width": width * SPATIAL_RATIO,
    }
    return latents, {name: str(value) for name, value in size.items()} | metadata


def save_frames(folder: str | Path, frames: torch.Tensor, metadata: Mapping[str, str]) -> Path:
    """Write stage 3's frames [1, 3, T, H, W] in [0, 1] and return the path."""
    return _save(folder, FRAMES_FILE, {"frames": frames}, FRAMES_RULES, metadata)


def load_frames(folder: str | Path) -> tuple[torch.Tensor, dict[str, str]]:
    """(frames [1, 3, T, H, W] in [0, 1], metadata) of stage 3; InputError where they break the contract."""
    tensors, metadata = _load(folder, FRAMES_FILE, FRAMES_RULES)
    return tensors["frames"], metadata


def open_frames(folder: str | Path) -> tuple[tuple[int, int, int], dict[str, str], Iterator[torch.Tensor]]:
    """((T, H, W), metadata, frames) of stage 3, one frame [3, H, W] at a time, in the dtype that is stored.

    For what need not have the whole video in memory. InputError where the file breaks the contract, from the call, and
    where a frame is not in [0, 1], from the iterator.
    """
    path = Path(folder) / FRAMES_FILE
    with _opened(path) as file:
        metadata = dict(file.metadata() or {})
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (no iterator)
    check_tensors(path, {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}, FRAMES_RULES)
    num_frames, height, width = shapes["frames"][2:]

    def frames() -> Iterator[torch.Tensor]:
        with _opened(path) as file:
            stored = file.get_slice("frames")
            for number in range(num_frames):
                frame = stored[:, :, number : number + 1][0, :, 0]
                if not (frame.min() >= 0 and frame.max() <= 1):
                    raise InputError(f"{path}: frame {number} is not in [0, 1]")
                yield frame

    return (num_frames, height, width), metadata, frames()


def read_config(folder: str | Path) -> dict[str, Any]:
    """generation_config.json of a folder, the sibling suite's keys under our names; keys that are missing stay so.

    Raises InputError where the folder or the file is absent, or the file is not a JSON object.
    """
    path = Path(folder) / CONFIG_FILE
    _require_file(path)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error})") from error
    if not isinstance(config, dict):
        raise InputError(f"{path} holds a JSON {type(config).__name__}, not an object")
    for theirs, ours in SIBLING_KEYS.items():
        if theirs in config:
            config.setdefault(ours, config.pop(theirs))
    return config


def update_config(folder: str | Path, additions: Mapping[str, Any], source: str | Path | None = None) -> Path:
    """Write one stage's keys into generation_config.json, and return its path. Other stages' keys stay as they are.

    Which stage it is follows from the keys (CONFIG_KEYS); what it wrote in an earlier run is dropped. source: the
    folder whose config is added to, where it is not `folder` itself. Raises InputError where that config is broken, or
    absent although the stage is not the first.
    """
    stages = [stage for stage, keys in CONFIG_KEYS.items() if all(name in keys for name in additions)]
    assert len(stages) == 1, f"no one stage decides {list(additions)}"
    source = Path(source or folder)
    first = stages[0] == 1 and not (source / CONFIG_FILE).is_file()
    kept = {} if first else {k: v for k, v in read_config(source).items() if k not in CONFIG_KEYS[stages[0]]}
    path = Path(folder) / CONFIG_FILE
    with replacing(path) as temporary:
        text = json.dumps({**kept, **additions}, indent=2, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8")
    return path


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
