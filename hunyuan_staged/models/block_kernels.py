"""Triton kernels of the transformer's blocks, for blocks.py, which says what they compute. Imported where there is a GPU
alone.

They compute in float32 and round where torch's eager formulas round, products and sums apart: what differs is the order in
which a row is summed up. Nothing is specialised on a number of tokens, so that no length compiles anything anew.

Letters: s video tokens, L text tokens, N any; H heads, D head width, C = H*D.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from hunyuan_staged.models.layers import EPSILON

VALUES = 2048  # of a program that goes through rows, at least one row
# At most as many warps as have so many values each: no value is loaded twice, and rewritten in between.
WARP_VALUES = 256
GATE_VALUES = 4096  # of one that adds up
MOST_WARPS = 4


@triton.jit
def _whole_rows(tokens, channels: tl.constexpr, block: tl.constexpr, rows: tl.constexpr):
    """Of this program's rows: the channels, which of them there are, which values there are, and where these lie."""
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    channel = tl.arange(0, block)
    real = channel < channels
    live = (row < tokens)[:, None] & real[None, :]
    place = row.to(tl.int64)[:, None] * channels + channel[None, :]
    return channel, real, live, place


@triton.jit(do_not_specialize=["tokens"])
def _modulate(
    x, shift, scale, out, epsilon, tokens, channels: tl.constexpr, block: tl.constexpr, rows: tl.constexpr
):  # fmt: skip
    channel, real, live, place = _whole_rows(tokens, channels, block, rows)
    dtype = x.dtype.element_ty
    value = tl.load(x + place, mask=live, other=0.0).to(tl.float32)
    value = tl.where(live, value - (tl.sum(value, axis=1) / channels)[:, None], 0.0)
    value = value * tl.rsqrt(tl.sum(value * value, axis=1) / channels + epsilon)[:, None]
    factor = (1.0 + tl.load(scale + channel, mask=real, other=0.0).to(tl.float32)).to(dtype).to(tl.float32)
    value = (value.to(dtype).to(tl.float32) * factor[None, :]).to(dtype).to(tl.float32)
    value += tl.load(shift + channel, mask=real, other=0.0).to(tl.float32)[None, :]
    tl.store(out + place, value.to(dtype), mask=live)


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """blocks.modulate of x [1, N, C], by shift and scale [C] each."""
    x = x.contiguous()
    out = torch.empty_like(x)
    grid, sizes, how = _rows(x, VALUES)
    _modulate[grid](x, shift, scale, out, EPSILON, *sizes, **how)
    return out


@triton.jit(do_not_specialize=["tokens"])
def _add_gated(x, y, gate, tokens, channels: tl.constexpr, block: tl.constexpr, rows: tl.constexpr):
    channel, real, live, place = _whole_rows(tokens, channels, block, rows)
    dtype = x.dtype.element_ty
    factor = tl.load(gate + channel, mask=real, other=0.0).to(tl.float32)
    product = tl.load(y + place, mask=live, other=0.0).to(tl.float32) * factor[None, :]
    total = tl.load(x + place, mask=live, other=0.0).to(tl.float32) + product.to(dtype).to(tl.float32)
    tl.store(y + place, total.to(dtype), mask=live)


def add_gated(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """blocks.add_gated of x, y [1, N, C] and gate [C]; the sum takes y's place."""
    x, y = x.contiguous(), y.contiguous()
    grid, sizes, how = _rows(x, GATE_VALUES)
    _add_gated[grid](x, y, gate, *sizes, **how)
    return y


@triton.jit(do_not_specialize=["tokens", "video"])
def _normalise_rotate(
    qkv, packed, text, q_weight, k_weight, text_q_weight, text_k_weight, cos, sin, tokens, video, epsilon,
    parts: tl.constexpr, heads: tl.constexpr, width: tl.constexpr, head_block: tl.constexpr, half_block: tl.constexpr,
    share: tl.constexpr,
):  # fmt: skip
    """A token. share: heads that a rank is sent; 0 to write where it was read."""
    token = tl.program_id(0)
    is_video = token < video
    head = tl.arange(0, head_block)[:, None]
    channel = tl.arange(0, 2 * half_block)
    real = channel < width
    live = (head < heads) & real[None, :]
    inner = head * width + channel[None, :]
    dtype = qkv.dtype.element_ty
    # Text is not rotated. Both of a pair of channels have the same angle.
    angle = token.to(tl.int64) * width + channel
    cosine, _ = tl.split(tl.reshape(tl.load(cos + angle, mask=real & is_video, other=1.0), (half_block, 2)))
    sine, _ = tl.split(tl.reshape(tl.load(sin + angle, mask=real & is_video, other=0.0), (half_block, 2)))
    for part in tl.static_range(parts):
        source = (part * tokens.to(tl.int64) + token) * (heads * width) + inner
        value = tl.load(qkv + source, mask=live, other=0.0)
        if part < 2:
            # One of the two is masked.
            if part == 0:
                weight = tl.load(q_weight + channel, mask=real & is_video, other=0.0)
                added = tl.load(text_q_weight + channel, mask=real & (token >= video), other=0.0)
            else:
                weight = tl.load(k_weight + channel, mask=real & is_video, other=0.0)
                added = tl.load(text_k_weight + channel, mask=real & (token >= video), other=0.0)
            weight = weight.to(tl.float32) + added.to(tl.float32)
            wide = value.to(tl.float32)
            wide = wide * tl.rsqrt(tl.sum(wide * wide, axis=1) / width + epsilon)[:, None]
            wide = (wide.to(dtype).to(tl.float32) * weight[None, :]).to(dtype).to(tl.float32)
            even, odd = tl.split(tl.reshape(wide, (head_block, half_block, 2)))
            turned = tl.join(even * cosine[None, :] - odd * sine[None, :], odd * cosine[None, :] + even * sine[None, :])
            value = tl.reshape(turned, (head_block, 2 * half_block)).to(dtype)
        if share == 0:
            tl.store(qkv + source, value, mask=live)
        else:
            rank = (head // share).to(tl.int64)
            row = (rank * video + token) * parts + part
            target = (row * share + head % share) * width + channel[None, :]
            tl.store(packed + target, value, mask=live & is_video)
            target = ((token - video).to(tl.int64) * parts + part) * (heads * width) + inner
            tl.store(text + target, value, mask=live & (token >= video))


Norms = Sequence[torch.Tensor]  # weights [D]: the video's of q and k, the text's


def normalise_rotate(qkv: torch.Tensor, norms: Norms, rope: Sequence[torch.Tensor], heads: int) -> None:
    """In place, q and k of qkv [3, s + L, C] normalised, and those of the video, which are in front, rotated.

    rope: cosines and sines [s, D], float32.
    """
    _launch(qkv, qkv, qkv, norms, rope, heads, parts=2, share=0)


def normalise_rotate_pack(
    qkv: torch.Tensor, norms: Norms, rope: Sequence[torch.Tensor], heads: int, ranks: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same as parallel.heads.pack gives it for heads that divide: what is sent, flat, and the text [L, 3, H, D]."""
    parts, tokens, channels = qkv.shape
    video = len(rope[0])
    packed = qkv.new_empty(parts * video * channels)
    text = qkv.new_empty(tokens - video, parts, heads, channels // heads)
    _launch(qkv, packed, text, norms, rope, heads, parts=parts, share=heads // ranks)
    return packed, text


def _launch(qkv, packed, text, norms, rope, heads, *, parts, share):
    tokens, channels = qkv.shape[1:]
    width = channels // heads
    head_block, half_block = triton.next_power_of_2(heads), triton.next_power_of_2(width) // 2
    _normalise_rotate[(tokens,)](
        qkv, packed, text, *norms, *rope, tokens, len(rope[0]), EPSILON, parts, heads, width, head_block, half_block, share,
        num_warps=_warps(2 * head_block * half_block), enable_fp_fusion=False,
    )  # fmt: skip


def _rows(x, values):
    """The grid, the last arguments and the options of a kernel that goes through whole rows of x."""
    channels = x.shape[-1]
    tokens, block = x.numel() // channels, triton.next_power_of_2(channels)
    rows = max(1, values // block)
    how = {"num_warps": _warps(rows * block), "enable_fp_fusion": False}
    return (triton.cdiv(tokens, rows),), (tokens, channels, block, rows), how


def _warps(values):
    return min(MOST_WARPS, max(1, values // WARP_VALUES))
