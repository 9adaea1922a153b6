"""What a safetensors file holds, and the pieces that it is read in."""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

LENGTH_BYTES = 8  # in front of the header, its length

# https://github.com/huggingface/safetensors: the names of dtypes in a file's header
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: its name, dtype and shape, and its bytes from `start` to `end` in the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


def entries(header: Any, file: int) -> dict[str, Entry]:
    """What a safetensors file holds, by name, in the order in which it lies there.

    header: what safe_open gave of it, which has made sure that the tensors lie without gaps, to the file's end; file: the
    descriptor of the same file. Raises ValueError for a dtype that torch cannot hold.
    """
    start = LENGTH_BYTES + int.from_bytes(os.pread(file, LENGTH_BYTES, 0), "little")
    found = {}
    for name in header.offset_keys():
        tensor = header.get_slice(name)
        stored, shape = tensor.get_dtype(), tuple(tensor.get_shape())
        if stored not in DTYPES:
            raise ValueError(f"{name} is of dtype {stored}; read are {', '.join(DTYPES)}")
        dtype = DTYPES[stored]
        end = start + math.prod(shape) * dtype.itemsize
        found[name] = Entry(name, dtype, shape, start, end)
        start = end
    return found


def pieces(wanted: Sequence[Entry], size: int) -> Iterator[tuple[int, int, list[Entry]]]:
    """(start, end, the tensors that have bytes between) over all wanted bytes of a file, `size` at most at a time.

    Tensors that lie side by side share a piece; one that is larger than a piece has several. With a size that is a
    multiple of 8, no number is cut in two, and each lies in its piece as it must to be read as one.
    """
    start = end = 0
    inside: list[Entry] = []
    for entry in sorted(wanted, key=lambda entry: (entry.start, entry.end)):
        if inside and (entry.start != end or (entry.start - start) % entry.dtype.itemsize):
            yield start, end, inside
            inside = []
        if not inside:
            start = entry.start
        end = entry.end
        inside.append(entry)
        while end - start > size:
            yield start, start + size, [entry for entry in inside if entry.start < start + size]
            start += size
            inside = [entry for entry in inside if entry.end > start or entry.start >= start]  # the latter: empty ones
    if inside:
        yield start, end, inside
