"""Reading and writing the stages' safetensors files, checked against the contract."""

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hunyuan_staged.errors import InputError, printable
from hunyuan_staged.files.atomic import replacing
from hunyuan_staged.files.contract import (
    DTYPE_INFO,
    EMBEDDINGS_FILE,
    EMBEDDINGS_RULES,
    FRAMES_FILE,
    FRAMES_RULES,
    LATENTS_FILE,
    LATENTS_RULES,
    MADE_FROM,
    MAX_BYTES,
    STATE_FILE,
    TensorRule,
    at_resolution,
    require_file,
    state_rules,
)
from hunyuan_staged.geometry import SPATIAL_RATIO, TEMPORAL_RATIO

# Those that a folder may give its tensors; torch has more, which no stage can compute with.
DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")


def save_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> Path:
    """Write a safetensors file whole, each tensor in its own dtype, which dtype_info also records.

    The same contents give the same bytes. Control characters in the metadata are replaced by their escapes. Raises
    InputError where the file cannot be written.
    """
    dtype_info = json.dumps({name: str(tensor.dtype) for name, tensor in tensors.items()})
    noted = {name: printable(value) for name, value in metadata.items()} | {DTYPE_INFO: dtype_info}
    with replacing(path) as temporary:
        try:
            save_file(
                {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
                temporary,
                metadata=noted,
            )
        except SafetensorError as error:
            raise InputError(f"cannot write {path}: {error}") from error
        _order_metadata(temporary)
    return Path(path)


def _order_metadata(path: Path) -> None:
    """Sort the metadata of a safetensors file in place: the library writes them in an order that changes every time."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        assert len(ordered) == length, "the same entries in another order are as long"
        file.seek(8)
        file.write(ordered)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """safe_open, whose complaints become InputError. Files of a name that has a limit may not be larger."""
    require_file(path)
    largest, size = MAX_BYTES.get(path.name), path.stat().st_size
    if largest is not None and size > largest:
        raise InputError(f"{path} has {size} bytes; at most {largest} are allowed")
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a whole safetensors file ({error})") from error
    except InputError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        # How safetensors fails on a dtype that this torch does not have, or does not read from a file.
        raise InputError(f"{path} holds a tensor that torch cannot take ({error})") from error


def load_tensors(
    path: str | Path, check_shapes: Callable[[Mapping[str, torch.Tensor]], None] = lambda tensors: None
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(tensors, metadata) of a safetensors file, on the CPU, in the dtype that dtype_info records.

    check_shapes is given the tensors without their numbers before any of these is read. Raises InputError for a file that
    is absent, cut short or no safetensors file, that is larger than it can be, and for an unknown recorded dtype.
    """
    path = Path(path)
    with opened(path) as file:
        metadata = dict(file.metadata() or {})
        names = list(file.keys())
        check_shapes({name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name in names})
        tensors = {name: file.get_tensor(name) for name in names}
    for name, dtype in _dtypes(path, metadata).items():
        if name in tensors:
            tensors[name] = tensors[name].to(dtype)
    return tensors, metadata


def read_made_from(path: str | Path) -> str | None:
    """The hash of what a stage's file was made from; None where it does not say, is broken, or not there."""
    try:
        with opened(Path(path)) as file:
            return (file.metadata() or {}).get(MADE_FROM)
    except InputError:
        return None


def _dtypes(path: Path, metadata: Mapping[str, str]) -> dict[str, torch.dtype]:
    """The dtypes that dtype_info records, none where it is absent.

    Two spellings are about: "torch.bfloat16" (latents) and "bfloat16" (the TPU suite's embeddings).
    """
    try:
        recorded = json.loads(metadata.get(DTYPE_INFO, "{}"))
        found = {name: text.removeprefix("torch.") for name, text in recorded.items()}
    except (ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: its {DTYPE_INFO} is not a JSON object of dtype names ({error})") from error
    for name, dtype in found.items():
        if dtype not in DTYPES:
            raise InputError(
                f"{path}: {DTYPE_INFO} gives {name} the dtype {recorded[name]!r}; allowed are {', '.join(DTYPES)}"
            )
    return {name: getattr(torch, dtype) for name, dtype in found.items()}


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


def check_values(path: str | Path, tensors: Mapping[str, torch.Tensor], rules: Mapping[str, TensorRule]) -> None:
    """InputError for a tensor whose dtype is not what its rule says, for NaN and Inf, and for a mask that masks all."""
    for name, tensor in tensors.items():
        least = rules[name].mask
        if str(tensor.dtype).removeprefix("torch.") not in DTYPES:
            raise InputError(f"{path}: {name} is {tensor.dtype}; allowed are {', '.join(DTYPES)}")
        if least is None:
            if not tensor.is_floating_point():
                raise InputError(f"{path}: {name} is {tensor.dtype}; allowed are floating-point numbers")
            if not torch.isfinite(tensor).all():
                raise InputError(f"{path}: {name} holds NaN or Inf")
        elif not ((tensor == 0) | (tensor == 1)).all():
            raise InputError(f"{path}: {name} holds other numbers than 0 and 1")
        elif int(tensor.sum()) < least:
            raise InputError(f"{path}: {name} marks no token")


def _save(folder: str | Path, name: str, tensors: Mapping, rules: Mapping, metadata: Mapping[str, str]) -> Path:
    path = Path(folder) / name
    check_tensors(path, tensors, rules)
    return save_tensors(path, tensors, metadata)


def _load(
    folder: str | Path, name: str, rules: Mapping[str, TensorRule] | Callable[[Iterable[str]], Mapping[str, TensorRule]]
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """A stage's file, checked. rules: the tensors', or what gives them for the names that the file holds."""
    path = Path(folder) / name

    def own(names: Iterable[str]) -> Mapping[str, TensorRule]:
        return rules(names) if callable(rules) else rules

    tensors, metadata = load_tensors(path, lambda empty: check_tensors(path, empty, own(empty)))
    check_values(path, tensors, own(tensors))
    return tensors, metadata


def save_embeddings(folder: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> Path:
    """Write stage 1's tensors (EMBEDDINGS_RULES) and return the path."""
    return _save(folder, EMBEDDINGS_FILE, tensors, EMBEDDINGS_RULES, metadata)


def load_embeddings(folder: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(tensors, metadata) of stage 1; InputError where they break the contract."""
    return _load(folder, EMBEDDINGS_FILE, EMBEDDINGS_RULES)


def save_latents(
    folder: str | Path, latents: torch.Tensor, metadata: Mapping[str, str], resolution: str | None = None
) -> Path:
    """Write stage 2's latents [1, C, t, h, w], of super resolution where a resolution is given, and return the path."""
    return _save(folder, at_resolution(LATENTS_FILE, resolution), {"latents": latents}, LATENTS_RULES, metadata)


def load_latents(folder: str | Path, resolution: str | None = None) -> tuple[torch.Tensor, dict[str, str]]:
    """(latents [1, C, t, h, w], metadata) of stage 2; InputError where they break the contract.

    The TPU suite records no height and width (and not always num_frames): they are then filled in from the shape.
    """
    tensors, metadata = _load(folder, at_resolution(LATENTS_FILE, resolution), LATENTS_RULES)
    latents = tensors["latents"]
    frames, height, width = latents.shape[2:]
    size = {
        "num_frames": (frames - 1) * TEMPORAL_RATIO + 1,
        "height": height * SPATIAL_RATIO,
        "width": width * SPATIAL_RATIO,
    }
    return latents, {name: str(value) for name, value in size.items()} | metadata


def latents_metadata(folder: str | Path, resolution: str | None = None) -> dict[str, str]:
    """The metadata of stage 2's latents, which are not read; InputError where they are absent or no safetensors file."""
    with opened(Path(folder) / at_resolution(LATENTS_FILE, resolution)) as file:
        return dict(file.metadata() or {})


def save_frames(
    folder: str | Path, frames: torch.Tensor, metadata: Mapping[str, str], resolution: str | None = None
) -> Path:
    """Write stage 3's frames [1, 3, T, H, W] in [0, 1], of latents of a resolution, and return the path."""
    return _save(folder, at_resolution(FRAMES_FILE, resolution), {"frames": frames}, FRAMES_RULES, metadata)


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
    with opened(path) as file:
        metadata = dict(file.metadata() or {})
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (no iterator)
    check_tensors(path, {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}, FRAMES_RULES)
    num_frames, height, width = shapes["frames"][2:]

    def frames() -> Iterator[torch.Tensor]:
        with opened(path) as file:
            stored = file.get_slice("frames")
            for number in range(num_frames):
                frame = stored[:, :, number : number + 1][0, :, 0]
                if not (frame.min() >= 0 and frame.max() <= 1):
                    raise InputError(f"{path}: frame {number} is not in [0, 1]")
                yield frame

    return (num_frames, height, width), metadata, frames()


def save_state(
    folder: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], resolution: str | None = None
) -> Path:
    """Write what a stopped stage 2 goes on from (state_rules) and return the path."""
    return _save(folder, at_resolution(STATE_FILE, resolution), tensors, state_rules(tensors), metadata)


def load_state(folder: str | Path, resolution: str | None = None) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(tensors, metadata) of a stopped stage 2; InputError where they break the contract."""
    return _load(folder, at_resolution(STATE_FILE, resolution), state_rules)
