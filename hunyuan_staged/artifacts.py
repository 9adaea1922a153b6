"""The contract between stages: file names, tensors, config, metadata, and writes that are whole or not at all.

Letters: T frames, H x W px; t = (T-1)/4+1, h = H/16, w = W/16 of the latents; L tokens; W widths of the encoders.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import re
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hunyuan_staged import InputError, printable
from hunyuan_staged.versions import LATENT_CHANNELS, SPATIAL_RATIO, TEMPORAL_RATIO

EMBEDDINGS_FILE = "stage1_embeddings.safetensors"
LATENTS_FILE = "stage2_latents.safetensors"
FRAMES_FILE = "stage3_frames.safetensors"
CONFIG_FILE = "generation_config.json"
VIDEO_FILE = "output_video.mp4"
# Where a stopped stage 2 goes on from; removed when the latents are there.
STATE_FILE = "stage2_state.safetensors"
LOCK_FILE = ".lock"

# What each stage writes into its folder.
STAGE_FILES = {
    1: (EMBEDDINGS_FILE, CONFIG_FILE),
    2: (STATE_FILE, LATENTS_FILE, CONFIG_FILE),
    3: (FRAMES_FILE, VIDEO_FILE, CONFIG_FILE),
}

# Metadata: the dtypes; the hash of everything that a file was made from; the hash of the file that it was made from.
DTYPE_INFO = "dtype_info"
MADE_FROM = "made_from_sha256"
EMBEDDINGS_HASH = "embeddings_sha256"
LATENTS_HASH = "latents_sha256"
# Those that a folder may give its tensors; torch has more, which no stage can compute with.
DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")

# Which stage decides which key of generation_config.json, and what its value is; any may be null. A stage that runs
# again replaces its own keys, no others.
NUMBER = (int, float)
CONFIG_KEYS: dict[int, dict[str, type | tuple[type, ...]]] = {
    1: {
        "prompt": str,
        "negative_prompt": str,
        "model_path": str,
        "resolution": str,
        "transformer_version": str,
        "task_type": str,
        "image_path": str,
        "dtype": str,
        EMBEDDINGS_HASH: str,
    },
    2: {
        "aspect_ratio": str,
        "video_length": int,
        "num_inference_steps": int,
        "guidance_scale": NUMBER,
        "flow_shift": NUMBER,
        "seed": int,
        "height": int,
        "width": int,
        "stage2_elapsed_time": NUMBER,
    },
    3: {"stage3_decode_time": NUMBER, "output_video": str, LATENTS_HASH: str},
}
MAX_CONFIG_BYTES = 2**20
# How the sibling suite calls what we call otherwise.
SIBLING_KEYS = {"model_id": "model_path", "num_frames": "video_length"}


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


EMBEDDINGS_RULES = {
    **_text_rules(),
    "image_embeds": TensorRule((1, "N", "W3"), required=False),
    "image_latents": TensorRule((1, LATENT_CHANNELS, 1, "h", "w"), required=False),
}
LATENTS_RULES = {"latents": TensorRule((1, "C", "t", "h", "w"))}
FRAMES_RULES = {"frames": TensorRule((1, 3, "T", "H", "W"))}
# The state of a feature cache, by guidance row: numbers, text tokens, and all else over the video's tokens.
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
    FRAMES_FILE: "stage3_vae_decoder.py --save_frames",
    CONFIG_FILE: "stage1_text_encoder.py",
}


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`, with its ending, that takes its place when the block ends well.

    A reader sees the old file or the new one, whole. If the block fails, nothing on disk has changed. The folder is
    made if it is absent. Raises InputError where the folder cannot be written, and where the disk is full.
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
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        raise InputError(f"cannot write {path}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


# The machine's or the user's, not a fault of ours: no space, over the quota or the limit, read-only, no right, broken.
UNWRITABLE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO),
    *(errno.EISDIR, errno.ENOTEMPTY, errno.ENAMETOOLONG),
)


def remove_leftovers(path: str | Path) -> None:
    """Remove what `replacing` left beside `path` in a process that was killed. Only for who alone may write there."""
    path = Path(path)
    pattern = re.compile(rf"\.{re.escape(path.stem)}\.[a-z0-9_]{{8}}{re.escape(path.suffix)}")
    for beside in path.parent.iterdir():
        if pattern.fullmatch(beside.name):
            beside.unlink(missing_ok=True)


@contextlib.contextmanager
def claimed(lock: str | Path, files: Sequence[str]) -> Iterator[None]:
    """Be the only run that writes `files` into the folder of `lock`, a path, while the block runs.

    The folder is made if it is absent, and removed again if it is then empty; what a killed process left half-written of
    the files is removed. InputError where another run is at it, with its process id, and where the folder cannot be
    written. The kernel drops a killed process's lock, so that none is left behind; on a file system without locks there
    is none.
    """
    lock = Path(lock)
    made: list[Path] = []
    folder = lock.parent
    try:
        while not folder.exists():
            made.append(folder)
            folder = folder.parent
        lock.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {lock.parent}: {error.strerror}") from error
    try:
        handle = _lock(lock)
        try:
            for name in files:
                remove_leftovers(lock.parent / name)
            yield
        finally:
            # Once more, for an ffmpeg that outlived its killed parent.
            for name in files:
                remove_leftovers(lock.parent / name)
            lock.unlink(missing_ok=True)  # before it is let go: see _lock
            os.close(handle)
    finally:
        with contextlib.suppress(OSError):  # not empty: the run wrote its files
            for folder in made:
                folder.rmdir()


def _lock(path: Path) -> int:
    """An open file that is locked, with this process's id in it; InputError where another process has it."""
    while True:
        try:
            # O_NOFOLLOW: the folder may be someone else's, and a link in it could lead anywhere.
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise InputError(f"cannot write to {path.parent}: {error.strerror} ({path.name})") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(handle, 300).decode(errors="replace").strip()
            os.close(handle)
            raise InputError(
                f"{path.parent} is being written by another run ({owner or 'which is just starting'}); "
                "wait for it, or give another folder"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                os.close(handle)
                raise
        # Its last owner may have removed it between the two calls: then it is no lock any more.
        if path.exists() and os.path.samestat(os.fstat(handle), os.lstat(path)):
            os.ftruncate(handle, 0)
            os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
            return handle
        os.close(handle)


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


def require_file(path: Path) -> None:
    """InputError where a stage's file is absent, with the stage that writes it, or is no file."""
    if not path.is_file():
        where = path if path.parent.is_dir() else path.parent
        if where.exists():
            raise InputError(f"{where} is not a {'file' if where == path else 'folder'}")
        raise InputError(f"{where} does not exist; run {WRITTEN_BY.get(path.name, 'the stage that writes it')} first")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """safe_open, whose complaints become InputError."""
    require_file(path)
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
    tensors, metadata = load_tensors(path)
    rules = rules(tensors) if callable(rules) else rules
    check_tensors(path, tensors, rules)
    check_values(path, tensors, rules)
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


def save_state(folder: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> Path:
    """Write what a stopped stage 2 goes on from (state_rules) and return the path."""
    return _save(folder, STATE_FILE, tensors, state_rules(tensors), metadata)


def load_state(folder: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(tensors, metadata) of a stopped stage 2; InputError where they break the contract."""
    return _load(folder, STATE_FILE, state_rules)


def read_config(folder: str | Path) -> dict[str, Any]:
    """generation_config.json of a folder, the sibling suite's keys under our names; keys that are missing stay so.

    Raises InputError where the folder or the file is absent, where the file is not a JSON object, and for a key that is
    unknown or has a value of the wrong kind.
    """
    path = Path(folder) / CONFIG_FILE
    require_file(path)
    try:
        size = path.stat().st_size
        if size > MAX_CONFIG_BYTES:
            raise InputError(f"{path} has {size} bytes; at most {MAX_CONFIG_BYTES} are allowed")
        config = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
    except InputError:
        raise
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error})") from error
    if not isinstance(config, dict):
        raise InputError(f"{path} holds a JSON {type(config).__name__}, not an object")
    for theirs, ours in SIBLING_KEYS.items():
        if theirs in config:
            theirs_value = config.pop(theirs)
            config.setdefault(ours, theirs_value)
    known = {name: kind for keys in CONFIG_KEYS.values() for name, kind in keys.items()}
    for name, value in config.items():
        if name not in known:
            raise InputError(f"{path}: {name!a} is unknown; known: {', '.join((*known, *SIBLING_KEYS))}")
        _check_entry(path, name, value, known[name])
    return config


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is not a number that JSON has")


def _check_entry(path: Path, name: str, value: Any, kind: type | tuple[type, ...]) -> None:
    """InputError where an entry of the config is of another kind, or text that cannot be written as UTF-8."""
    # In Python a bool is an int.
    fits = isinstance(value, kind) and not isinstance(value, bool) and value not in (math.inf, -math.inf)
    if value is not None and not fits:
        wanted = {str: "text", int: "a whole number"}.get(kind, "a number") if isinstance(kind, type) else "a number"
        shown = ascii(value)
        raise InputError(f"{path}: {name} is {shown[:60]}{'…' * (len(shown) > 60)}; allowed is {wanted}")
    if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise InputError(f"{path}: {name} is not UTF-8 text")


def update_config(folder: str | Path, additions: Mapping[str, Any], source: str | Path | None = None) -> Path:
    """Write one stage's keys into generation_config.json, and return its path. Other stages' keys stay as they are.

    Which stage it is follows from the keys (CONFIG_KEYS); what it wrote in an earlier run is dropped. source: the
    folder whose config is added to, where it is not `folder` itself. Raises InputError where that config is broken, or
    absent although the stage is not the first.
    """
    stages = [stage for stage, keys in CONFIG_KEYS.items() if additions.keys() <= keys.keys()]
    assert len(stages) == 1, f"no one stage decides {list(additions)}"
    source = Path(source or folder)
    first = stages[0] == 1 and not (source / CONFIG_FILE).is_file()
    kept = {} if first else {k: v for k, v in read_config(source).items() if k not in CONFIG_KEYS[stages[0]]}
    path = Path(folder) / CONFIG_FILE
    with replacing(path) as temporary:
        text = json.dumps({**kept, **additions}, indent=2, ensure_ascii=False)
        # JSON escapes what is below a space; the other control characters would act on a terminal that shows the file.
        text = re.sub(r"[\x7f-\x9f]", lambda match: f"\\u{ord(match[0]):04x}", text)
        temporary.write_text(text + "\n", encoding="utf-8")
    return path


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(facts: Mapping[str, Any]) -> str:
    """The SHA-256 of a JSON object, in hexadecimal; the order of its keys does not count."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


# What embeddings and config say of the same thing, under the names that each gives it.
SAID_TWICE = {"prompt": "prompt", "negative_prompt": "negative_prompt", "version": "transformer_version"}


def doubt_embeddings(
    folder: str | Path, config: Mapping[str, Any], metadata: Mapping[str, str], embeddings_hash: str
) -> str | None:
    """Why the embeddings in a folder are not those that its config describes; None where they are, or nothing tells.

    metadata and embeddings_hash are the embeddings' own. The sibling suite records no hash.
    """
    embeddings, described = Path(folder) / EMBEDDINGS_FILE, Path(folder) / CONFIG_FILE
    recorded = config.get(EMBEDDINGS_HASH)
    if recorded == embeddings_hash:
        return None
    if recorded is not None:
        return (
            f"{embeddings} (sha256 {embeddings_hash[:12]}…) does not belong to {described}, "
            f"which was written with sha256 {printable(recorded[:12])}…"
        )
    for theirs, ours in SAID_TWICE.items():
        # Version and prompts may be absent on either side.
        if config.get(ours) is not None and metadata.get(theirs, printable(config[ours])) != printable(config[ours]):
            return (
                f"{embeddings} ({theirs} {metadata[theirs][:60]!a}) does not belong to {described} "
                f"({ours} {config[ours][:60]!a})"
            )
    return None


def doubt_latents(folder: str | Path, config: Mapping[str, Any], metadata: Mapping[str, str]) -> str | None:
    """Why the latents in a folder do not belong to its embeddings; None where they do, or nothing tells.

    metadata is the latents' own. Where stage 2 wrote to another folder than stage 1, the config tells of the embeddings.
    """
    latents, embeddings = Path(folder) / LATENTS_FILE, Path(folder) / EMBEDDINGS_FILE
    recorded = metadata.get(EMBEDDINGS_HASH)
    if recorded is None:
        return None
    present, source = config.get(EMBEDDINGS_HASH), Path(folder) / CONFIG_FILE
    if embeddings.is_file():
        present, source = sha256(embeddings), embeddings
    if present is None or present == recorded:
        return None
    return (
        f"{latents} was made from embeddings with sha256 {recorded[:12]}…, "
        f"which {source} has since replaced (sha256 {printable(present[:12])}…)"
    )
