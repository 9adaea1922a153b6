"""GGUF files: what they hold, and the bytes of a tensor.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The header is walked here, within bounds that no broken
or hostile file can pass; the gguf package knows ggml's types by number, with their block sizes.
"""

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from hunyuan_staged.errors import InputError
from hunyuan_staged.files.sniffing import GGUF_MAGIC
from hunyuan_staged.weights.boundary import require_regular
from hunyuan_staged.weights.quantization.gguf_blocks import TYPES
from hunyuan_staged.weights.quantization.header import Header

ARCHITECTURE = "hyvid"  # what converters call this family
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
READ = (*PLAIN, *TYPES)
INSTALL = "pip install 'hunyuan-staged[gguf]', or pip install gguf"
MAX_HEADER_BYTES = 2**26
MAX_ENTRIES, MAX_AXES = 100_000, 5
GGML_AXES = 4
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."  # of tensors with more axes than ggml has
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a value, by its type's number
TEXT, ARRAY, INT32, _UINT32 = 8, 9, 5, 4  # types of values of the metadata


@dataclass(frozen=True)
class GgufHeader(Header):
    """places: by a tensor's name its first byte in the file, and how many it has."""

    places: Mapping[str, tuple[int, int]]


class _Cursor:
    """Reads the header's bytes in order. ValueError where they end too early."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise ValueError("its header is cut off, or too long")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, form: str) -> int:
        return int(struct.unpack(f"<{form}", self.take(struct.calcsize(form)))[0])

    def text(self) -> str:
        return self.take(self.number("Q")).decode()


def _value(cursor: _Cursor) -> Any:
    """A value of the metadata: text, a 32-bit number, or a list of such numbers; None for others, which are passed."""
    kind = cursor.number("I")
    if kind == TEXT:
        return cursor.text()
    if kind == ARRAY:
        inner, count = cursor.number("I"), cursor.number("Q")
        if inner == TEXT:
            for _ in range(min(count, len(cursor.data))):
                cursor.text()
            return None
        if inner not in _SIZES:
            raise ValueError(f"its metadata has a list of type {inner}")
        held = cursor.take(count * _SIZES[inner])
        return list(struct.unpack(f"<{count}i", held)) if inner == INT32 else None
    if kind not in _SIZES:
        raise ValueError(f"its metadata has a value of type {kind}")
    held = cursor.take(_SIZES[kind])
    return struct.unpack("<I", held)[0] if kind == _UINT32 else None


def ggml_constants(what: str) -> Any:
    """The module of the gguf package that knows ggml's types; InputError where there is none. what: the file."""
    try:
        import gguf.constants as constants
    except ImportError as error:
        raise InputError(f"{what} is a GGUF file, which needs the package gguf: {INSTALL}") from error
    return constants


def read_header(flag: str, path: Path) -> GgufHeader:
    """The header of a file; InputError where it is no whole GGUF file, for types that are not read, and without gguf.

    flag: that named the file, for messages.
    """
    constants = ggml_constants(f"{flag} {path}")
    size = require_regular(path).stat().st_size
    try:
        with path.open("rb") as file:
            metadata, infos, end = _walk(_Cursor(file.read(min(size, MAX_HEADER_BYTES))))
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= 2**20 or alignment & (alignment - 1):
            raise ValueError(f"its alignment is {alignment}")
        start = -(-end // alignment) * alignment
        sizes = constants.GGML_QUANT_SIZES
        known = {int(kind): (kind.name, *sizes[kind]) for kind in constants.GGMLQuantizationType}
        return _header(path, size, start, known, metadata, infos)
    except (OSError, ValueError, struct.error, OverflowError) as error:
        raise InputError(f"{flag} {path} is not a whole GGUF file ({error})") from error


Info = tuple[str, list[int], int, int]  # name, shape with the rows first, type's number, offset


def _walk(cursor: _Cursor) -> tuple[dict[str, Any], list[Info], int]:
    """(metadata, tensors, where the header ends)."""
    if cursor.take(4) != GGUF_MAGIC:
        raise ValueError("it does not begin as one")
    version = cursor.number("I")
    if version not in (2, 3):
        raise ValueError(f"its version is {version}; read are 2 and 3")
    tensors, entries = cursor.number("Q"), cursor.number("Q")
    if max(tensors, entries) > MAX_ENTRIES:
        raise ValueError(f"it says that it has {tensors} tensors and {entries} entries")
    metadata = {}
    for _ in range(entries):
        name = cursor.text()
        metadata[name] = _value(cursor)
    infos: list[Info] = []
    for _ in range(tensors):
        name, axes = cursor.text(), cursor.number("I")
        if axes > MAX_AXES:
            raise ValueError(f"{name[:80]!a} has {axes} axes")
        shape = [cursor.number("Q") for _ in range(axes)][::-1]
        infos.append((name, shape, cursor.number("I"), cursor.number("Q")))
    return metadata, infos, cursor.at


def _header(
    path: Path,
    size: int,
    start: int,
    known: Mapping[int, tuple[str, int, int]],
    metadata: Mapping[str, Any],
    infos: list[Info],
) -> GgufHeader:
    shapes: dict[str, list[int]] = {}
    dtypes, places = {}, {}
    for name, shape, number, offset in infos:
        if name in shapes:
            raise ValueError(f"it holds {name[:80]!a} twice")
        kind, values, held = known.get(number, (f"type {number}", 1, 1))
        if kind not in READ:
            raise InputError(f"{path} holds {name[:80]} in {kind}; read are {', '.join(READ)}")
        count = prod(shape)
        if (shape[-1] if shape else 1) % values:
            raise ValueError(f"{name[:80]!a} {shape} is no whole number of blocks of {values}")
        length = count // values * held
        if start + offset + length > size:
            raise ValueError(f"{name[:80]!a} ends behind the file's end")
        original = metadata.get(ORIGINAL_SHAPE + name)
        if isinstance(original, list):
            if prod(original) != count or any(axis < 1 for axis in original):
                raise ValueError(f"{name[:80]!a} {shape} was {original}, it says")
            shape = original
        shapes[name], dtypes[name], places[name] = shape, kind, (start + offset, length)
    said = {name: value for name, value in metadata.items() if isinstance(value, str)}
    return GgufHeader(path, shapes, dtypes, said, places)


def tensors(header: GgufHeader, names: list[str], device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors in the order in which they lie, on the device: plain ones in their shape, quantised ones as bytes.
    InputError where the file has since got shorter."""
    with header.path.open("rb", buffering=0) as file:
        for name in sorted(names, key=lambda name: header.places[name]):
            start, length = header.places[name]
            held = bytearray(length)
            file.seek(start)
            view = memoryview(held)
            while view:
                count = file.readinto(view)
                if not count:
                    raise InputError(f"{header.path} is not a whole GGUF file ({name} is cut off)")
                view = view[count:]
            data = torch.frombuffer(held, dtype=torch.uint8) if length else torch.empty(0, dtype=torch.uint8)
            shape, kind = header.shapes[name], header.dtypes[name]
            if kind in PLAIN:
                yield name, data.view(PLAIN[kind]).view(shape).to(device)
            else:
                yield name, data.to(device)
