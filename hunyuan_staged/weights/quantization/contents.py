"""The weights in a file of any format that is read: each made wide, or in the form in which the file has it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from hunyuan_staged.errors import InputError
from hunyuan_staged.weights.loading import read_tensors
from hunyuan_staged.weights.quantization import gguf_blocks, gguf_file, scaled_fp8
from hunyuan_staged.weights.quantization.formats import PLAIN
from hunyuan_staged.weights.quantization.gguf_file import GgufHeader
from hunyuan_staged.weights.quantization.header import Header
from hunyuan_staged.weights.quantization.scaled_linear import ScaledLinear, scale_bytes
from hunyuan_staged.weights.quantization.stored import FLOAT8, Replacement

Leaves = dict[str, torch.Tensor]  # of a stored layer, by the names of its tensors
STORED = (*PLAIN, *scaled_fp8.TYPES)  # what weights of a safetensors file may be in


class Weight(Protocol):
    """A weight as it was read."""

    def wide(self) -> torch.Tensor:
        """Its numbers, in a floating-point dtype."""
        ...

    def leaves(self, parts: int) -> list[Leaves]:
        """What the layers hold that keep it as it is: so many, which share its first axis evenly."""
        ...


class Contents(Protocol):
    """What a file holds. names: of its weights."""

    @property
    def names(self) -> Sequence[str]: ...

    def keeping(self, name: str) -> Replacement | None:
        """What makes a layer that keeps a weight as it is; None for one that is made wide as it is read."""
        ...

    def read(
        self, wanted: Callable[[str], bool], device: torch.device, stays_on_host: Callable[[str], bool]
    ) -> Iterator[tuple[str, Weight]]:
        """The weights that are wanted, on the device, but for those plain ones that stay on the host."""
        ...


def contents(header: Header) -> Contents:
    """What stands behind a header; InputError where scales do not fit."""
    if isinstance(header, GgufHeader):
        return GgufContents(header)
    return SafetensorsContents(header, tuple(scaled_fp8.weights(header)), scaled_fp8.read_scales(header))


@dataclass(frozen=True)
class ScaledWeight:
    """A tensor, and where it is in float8 maybe its scale, float32, [1, 1] or [out, 1]."""

    tensor: torch.Tensor
    scale: torch.Tensor | None

    def wide(self) -> torch.Tensor:
        return scaled_fp8.dequantised(self.tensor, self.scale)

    def leaves(self, parts: int) -> list[Leaves]:
        rows = len(self.tensor)
        scale = torch.ones(1, 1) if self.scale is None else self.scale
        scales = scale_bytes(scale.to(self.tensor.device).expand(rows, 1))
        pairs = zip(self.tensor.chunk(parts), scales.chunk(parts), strict=True)
        return [{"stored": stored, "scale": scale} for stored, scale in pairs]


@dataclass(frozen=True)
class SafetensorsContents:
    """Weights in a safetensors file, plain or in float8, with the scales of the latter by the weights' names."""

    header: Header
    names: tuple[str, ...]
    scales: dict[str, torch.Tensor]

    def keeping(self, name: str) -> Replacement | None:
        float8 = scaled_fp8.TYPES.get(self.header.dtypes[name]) == FLOAT8 and len(self.header.shapes[name]) == 2
        return ScaledLinear if float8 else None

    def read(
        self, wanted: Callable[[str], bool], device: torch.device, stays_on_host: Callable[[str], bool]
    ) -> Iterator[tuple[str, Weight]]:
        own = set(self.names)

        def in_map(name: str) -> bool:
            # Float8 is made wider on the device, which is faster.
            return self.header.dtypes[name] in PLAIN and stays_on_host(name)

        read = read_tensors([self.header.path], lambda name: name in own and wanted(name), device, in_map, STORED)
        for name, tensor in read:
            yield name, ScaledWeight(tensor, self.scales.get(name))


@dataclass(frozen=True)
class GgufWeight:
    """Plain numbers, or the bytes of a quantised tensor. what: names it in a message."""

    data: torch.Tensor
    kind: str
    shape: list[int]
    what: str

    def wide(self) -> torch.Tensor:
        if self.kind in gguf_file.PLAIN:
            return self.data
        return gguf_blocks.dequantise(self.data, self.kind, torch.float32).view(self.shape)

    def leaves(self, parts: int) -> list[Leaves]:
        if not gguf_blocks.are_finite(self.data, self.kind):
            raise InputError(f"{self.what} has scales that are no finite numbers")
        return [{"stored": stored} for stored in self.data.view(self.shape[0], -1).chunk(parts)]


@dataclass(frozen=True)
class GgufContents:
    """Weights in a GGUF file."""

    header: GgufHeader

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.header.shapes)

    def keeping(self, name: str) -> Replacement | None:
        kind, shape = self.header.dtypes[name], self.header.shapes[name]
        whole_rows = kind in gguf_blocks.TYPES and len(shape) == 2 and shape[1] % gguf_blocks.TYPES[kind].values == 0
        return gguf_blocks.keeping(kind) if whole_rows and 0 not in shape else None

    def read(
        self, wanted: Callable[[str], bool], device: torch.device, stays_on_host: Callable[[str], bool]
    ) -> Iterator[tuple[str, Weight]]:
        for name, data in gguf_file.tensors(self.header, [name for name in self.names if wanted(name)], device):
            what = f"{self.header.path}: {name}"
            yield name, GgufWeight(data, self.header.dtypes[name], self.header.shapes[name], what)
