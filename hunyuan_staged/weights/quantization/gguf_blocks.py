"""GGUF's quantised tensors in torch: bytes of blocks along a row → numbers, and the layer that keeps them as bytes.

The layouts are ggml's (ggml-common.h, block_q8_0 and so on). The arithmetic is in float32, in the order in which the gguf
package does it, so that both give the same bits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from hunyuan_staged.weights.quantization.stored import Replacement, StoredLinear


def _half(data: torch.Tensor, at: int) -> torch.Tensor:
    """[n, 1], float32, of the float16 at a byte of each block."""
    return data[:, at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(data: torch.Tensor) -> torch.Tensor:
    """[n, k] bytes → [n, 2, k]: low halves, then high ones."""
    return torch.stack([data & 15, data >> 4], dim=1)


def _bits(data: torch.Tensor, count: int, width: int = 1) -> torch.Tensor:
    """[n, k] bytes → [n, count, k]: fields of so many bits, from the lowest on."""
    shifts = torch.arange(0, count * width, width, dtype=torch.uint8, device=data.device)
    return (data[:, None] >> shifts[:, None]) & (2**width - 1)


def _fifth_bits(data: torch.Tensor) -> torch.Tensor:
    """[n, 4] bytes → [n, 32]: the fifth bit of each value."""
    return _bits(data, 8).transpose(1, 2).flatten(1)


def _q8_0(data: torch.Tensor) -> torch.Tensor:
    return _half(data, 0) * data[:, 2:].contiguous().view(torch.int8).float()


def _q4_0(data: torch.Tensor) -> torch.Tensor:
    return _half(data, 0) * (_nibbles(data[:, 2:]).flatten(1).float() - 8)


def _q4_1(data: torch.Tensor) -> torch.Tensor:
    return _half(data, 0) * _nibbles(data[:, 4:]).flatten(1).float() + _half(data, 2)


def _q5_0(data: torch.Tensor) -> torch.Tensor:
    values = _nibbles(data[:, 6:]).flatten(1) | (_fifth_bits(data[:, 2:6]) << 4)
    return _half(data, 0) * (values.float() - 16)


def _q5_1(data: torch.Tensor) -> torch.Tensor:
    values = _nibbles(data[:, 8:]).flatten(1) | (_fifth_bits(data[:, 4:8]) << 4)
    return _half(data, 0) * values.float() + _half(data, 2)


def _scales_and_minima(data: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the eight parts of a block, [n, 8, 1] each: 12 bytes behind d and dmin hold six bits of each."""
    scale, least = _half(data, 0), _half(data, 2)
    low, middle, high = data[:, 4:8], data[:, 8:12], data[:, 12:16]
    scales = torch.cat([low & 63, (high & 15) | ((low >> 6) << 4)], dim=1).float()
    minima = torch.cat([middle & 63, (high >> 4) | ((middle >> 6) << 4)], dim=1).float()
    return (scale * scales)[..., None], (least * minima)[..., None]


def _q4_k(data: torch.Tensor) -> torch.Tensor:
    scales, minima = _scales_and_minima(data)
    values = _nibbles(data[:, 16:].reshape(-1, 32)).reshape(-1, 8, 32).float()
    return (scales * values - minima).flatten(1)


def _q5_k(data: torch.Tensor) -> torch.Tensor:
    scales, minima = _scales_and_minima(data)
    low = _nibbles(data[:, 48:].reshape(-1, 32)).reshape(-1, 8, 32)
    values = (low | (_bits(data[:, 16:48], 8) << 4)).float()
    return (scales * values - minima).flatten(1)


def _q6_k(data: torch.Tensor) -> torch.Tensor:
    low = _nibbles(data[:, :128].reshape(-1, 64)).reshape(-1, 2, 4, 32)  # n, half, quarter, value
    high = _bits(data[:, 128:192].reshape(-1, 32), 4, 2).reshape(-1, 2, 4, 32)
    values = (low | (high << 4)).float() - 32
    scales = _half(data, 208) * data[:, 192:208].contiguous().view(torch.int8).float()
    return (scales[..., None] * values.reshape(-1, 16, 16)).flatten(1)


@dataclass(frozen=True)
class BlockType:
    """A way to quantise: `values` numbers in `size` bytes, with float16 scales at these bytes."""

    values: int
    size: int
    halves: tuple[int, ...]
    numbers: Callable[[torch.Tensor], torch.Tensor]


TYPES = {
    "Q4_0": BlockType(32, 18, (0,), _q4_0),
    "Q4_1": BlockType(32, 20, (0, 2), _q4_1),
    "Q5_0": BlockType(32, 22, (0,), _q5_0),
    "Q5_1": BlockType(32, 24, (0, 2), _q5_1),
    "Q8_0": BlockType(32, 34, (0,), _q8_0),
    "Q4_K": BlockType(256, 144, (0, 2), _q4_k),
    "Q5_K": BlockType(256, 176, (0, 2), _q5_k),
    "Q6_K": BlockType(256, 210, (208,), _q6_k),
}


def row_bytes(kind: str, length: int) -> int:
    """What a row of so many numbers takes; they are whole blocks."""
    assert length % TYPES[kind].values == 0, f"{length} are no whole blocks of {kind}"
    return length // TYPES[kind].values * TYPES[kind].size


def are_finite(stored: torch.Tensor, kind: str) -> torch.Tensor:
    """Whether all scales of rows [..., bytes] are finite, as a tensor [] on their device."""
    blocks = stored.reshape(-1, TYPES[kind].size)
    return torch.stack([torch.isfinite(_half(blocks, at)).all() for at in TYPES[kind].halves]).all()


def dequantise(stored: torch.Tensor, kind: str, dtype: torch.dtype) -> torch.Tensor:
    """Rows [..., bytes] → [..., numbers]. For a compiler an op of its own; eager calls pass it by (fp8_rows)."""
    return (_dequantise_op if torch.compiler.is_compiling() else _dequantise)(stored, kind, dtype)


def _dequantise(stored: torch.Tensor, kind: str, dtype: torch.dtype) -> torch.Tensor:
    numbers = TYPES[kind].numbers(stored.reshape(-1, TYPES[kind].size))
    return numbers.to(dtype).view(*stored.shape[:-1], -1)


_dequantise_op = torch.library.custom_op("hunyuan_staged::dequantise_gguf", _dequantise, mutates_args=())


@_dequantise_op.register_fake
def _(stored: torch.Tensor, kind: str, dtype: torch.dtype) -> torch.Tensor:
    numbers = stored.shape[-1] // TYPES[kind].size * TYPES[kind].values
    return stored.new_empty(*stored.shape[:-1], numbers, dtype=dtype)


class GgufLinear(StoredLinear):
    """A linear layer whose weight is kept as a GGUF file has it: `stored` [out, bytes of a row]."""

    def __init__(self, linear: nn.Linear, kind: str) -> None:
        super().__init__(linear)
        self.kind = kind
        held = linear.weight.new_empty(self.out_features, row_bytes(kind, self.in_features), dtype=torch.uint8)
        self.stored = nn.Parameter(held, requires_grad=False)

    @property
    def weight(self) -> torch.Tensor:
        return dequantise(self.stored, self.kind, self.dtype)


def keeping(kind: str) -> Replacement:
    """What makes a layer that keeps this type."""
    return partial(GgufLinear, kind=kind)
