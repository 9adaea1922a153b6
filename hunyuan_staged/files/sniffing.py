"""Whether a file can hold weights, by its first bytes and its size. Knows no torch, so that a run's flags are judged by it
before the first stage starts, rather than by the stage that reads the file."""

import json
from functools import lru_cache
from pathlib import Path

from hunyuan_staged.errors import InputError

READ = "safetensors in float32, bfloat16, float16, or float8 with scales"
GGUF_MAGIC = b"GGUF"
MAX_HEADER = 100_000_000  # bytes, the safetensors library's own limit

# The first bytes of files that are no safetensors files.
_MAGIC = {
    b"PK\x03\x04": "a pickled PyTorch file",
    b"\x80\x02": "a pickled PyTorch file",
    b"\x80\x04": "a pickled PyTorch file",
}


def require_weights(option: str, path: Path, *, gguf: bool = False) -> None:
    """InputError where a file that an option names is not there, or no whole safetensors file. gguf: or a GGUF file."""
    if not path.exists():
        raise InputError(f"{path} does not exist", option=option)
    if not path.is_file() and not path.is_dir():  # a pipe would keep whoever opens it waiting
        raise InputError(f"{path} is no file", option=option)
    if not is_gguf(f"--{option}", path, gguf=gguf) and not is_whole_safetensors(path):
        raise InputError(f"{path} is not a whole safetensors file", option=option)


def is_gguf(flag: str, path: Path, *, gguf: bool = True) -> bool:
    """Whether a file is GGUF; InputError for a folder, for a pickled file, for one that cannot be read, and for GGUF where
    the model's part does not take it. flag: that named the file, for messages."""
    if path.is_dir():
        kind = "a DCP checkpoint (torch.distributed.checkpoint)" if _is_dcp(path) else "a folder"
        raise InputError(f"{flag} {path} is {kind}; read is one file: {READ}")
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise InputError(f"{flag} {path} cannot be read ({error.strerror})") from error
    if start == GGUF_MAGIC and not gguf:
        raise InputError(f"{flag} {path} is a GGUF file, which is read for the transformer alone; read here is {READ}")
    for magic, kind in _MAGIC.items():
        if start.startswith(magic):
            raise InputError(f"{flag} {path} is {kind}; read is {READ}")
    return start == GGUF_MAGIC


def is_whole_safetensors(path: Path) -> bool:
    """Whether a file has the header of a safetensors file, and is as long as that says. OSError: it cannot be read."""
    now = path.stat()
    return _is_whole(path, now.st_size, now.st_mtime_ns)


@lru_cache(maxsize=64)  # each of many jobs may name the same file
def _is_whole(path: Path, size: int, _: int) -> bool:
    with path.open("rb") as file:
        left = size - 8
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(left, MAX_HEADER):
            return False
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            return bool(max(ends, default=0) == left - length)
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            return False


def _is_dcp(path: Path) -> bool:
    return (path / ".metadata").is_file() or any(path.glob("*.distcp"))
