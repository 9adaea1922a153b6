"""Triton kernels of the VAE decoder, for vae_decoder.py, which says what they compute. Imported where there is a GPU alone.

A program computes a few whole positions with all their channels, which lie side by side in memory.
"""

import torch
import triton
import triton.language as tl

VALUES = 4096  # of a program
LENGTH_FLOOR = 1e-12  # of F.normalize


# Compiled once for each width: nothing is specialised on the sizes of a tile, which differ at a video's borders.
@triton.jit(do_not_specialize=["frames", "height", "width", "has_bias", "has_residual", "has_before", "keep"])
def _norm_silu_pad(
    product, bias, residual, gamma, before, out, kept, frames, height, width,
    has_bias, has_residual, has_before, keep, scale, floor,
    channels: tl.constexpr, block: tl.constexpr, rows: tl.constexpr, has_norm: tl.constexpr,
):  # fmt: skip
    position = tl.program_id(0) * rows + tl.arange(0, rows)
    wide = width + 2
    high = height + 2
    x = position % wide - 1
    y = (position // wide) % high - 1
    t = position // (wide * high) - 2
    channel = tl.arange(0, block)
    real = channel < channels
    live = (t < frames)[:, None] & real[None, :]
    source_x = tl.minimum(tl.maximum(x, 0), width - 1)
    source_y = tl.minimum(tl.maximum(y, 0), height - 1)
    source_t = tl.maximum(t, 0)
    row = (source_t.to(tl.int64) * height + source_y) * width + source_x
    source = row[:, None] * channels + channel[None, :]
    value = tl.load(product + source, mask=live, other=0.0).to(tl.float32)
    value += tl.load(bias + channel, mask=real & (has_bias != 0), other=0.0).to(tl.float32)[None, :]
    value += tl.load(residual + source, mask=live & (has_residual != 0), other=0.0).to(tl.float32)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height) & (t >= 0) & (keep != 0)
    tl.store(kept + source, value.to(kept.dtype.element_ty), mask=live & inside[:, None])
    if has_norm:
        value = tl.where(live, value, 0.0)
        length = tl.sqrt(tl.sum(value * value, axis=1))
        weight = tl.load(gamma + channel, mask=real, other=0.0).to(tl.float32) * scale
        value = value / tl.maximum(length, floor)[:, None] * weight[None, :]
        value = value * tl.sigmoid(value)
    target = position.to(tl.int64)[:, None] * channels + channel[None, :]
    front = (t < 0)[:, None] & (has_before != 0)
    value = tl.where(front, tl.load(before + target, mask=live & front, other=0.0).to(tl.float32), value)
    tl.store(out + target, value.to(out.dtype.element_ty), mask=live)


def norm_silu_pad(
    product: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    gamma: torch.Tensor | None,
    before: torch.Tensor | None,
    *,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """vae_decoder.norm_silu_pad of a sum by its parts."""
    frames, height, width, channels = product.shape
    out = product.new_empty(frames + 2, height + 2, width + 2, channels)
    # What was given whole is not written again.
    summed = bias is not None or residual is not None
    kept = (torch.empty_like(product) if summed else product) if keep else None
    block = triton.next_power_of_2(channels)
    rows = max(1, VALUES // block)
    grid = (triton.cdiv(out.numel() // channels, rows),)

    def there(tensor: torch.Tensor | None) -> torch.Tensor:
        return product if tensor is None else tensor

    _norm_silu_pad[grid](
        product, there(bias), there(residual), there(gamma), there(before), out, there(kept), frames, height, width,
        int(bias is not None), int(residual is not None), int(before is not None), int(keep and summed),
        channels**0.5, LENGTH_FLOOR, channels, block, rows, gamma is not None, num_warps=8 if block >= 512 else 4,
    )  # fmt: skip
    return out, kept


@triton.jit(do_not_specialize=["positions", "height", "width"])
def _spread(
    product, bias, x, out, positions, height, width, time: tl.constexpr, group: tl.constexpr, repeats: tl.constexpr,
    channels: tl.constexpr, block: tl.constexpr, rows: tl.constexpr,
):  # fmt: skip
    position = tl.program_id(0) * rows + tl.arange(0, rows)
    live = position < positions
    column = position % (2 * width)
    line = (position // (2 * width)) % (2 * height)
    frame = position // (4 * width * height)
    part = ((frame % time) * 2 + line % 2) * 2 + column % 2
    row = ((frame // time).to(tl.int64) * height + line // 2) * width + column // 2
    channel = tl.arange(0, block)
    mask = live[:, None] & (channel < channels)[None, :]
    place = part[:, None] * group + channel[None, :]
    short: tl.constexpr = time * 4 * channels // repeats  # channels of x
    value = tl.load(product + row[:, None] * (time * 4 * group) + place, mask=mask, other=0.0).to(tl.float32)
    value += tl.load(bias + place, mask=mask, other=0.0).to(tl.float32)
    shortcut = row[:, None] * short + (part[:, None] * channels + channel[None, :]) // repeats
    value += tl.load(x + shortcut, mask=mask, other=0.0).to(tl.float32)
    target = position.to(tl.int64)[:, None] * channels + channel[None, :]
    tl.store(out + target, value.to(out.dtype.element_ty), mask=mask)


def spread(
    product: torch.Tensor, bias: torch.Tensor, x: torch.Tensor, time: int, group: int, repeats: int
) -> torch.Tensor:
    """vae_decoder.spread."""
    frames, height, width, _ = product.shape
    channels = x.shape[-1] * repeats // (time * 4)
    out = product.new_empty(frames * time, 2 * height, 2 * width, channels)
    block = triton.next_power_of_2(channels)
    rows = max(1, VALUES // block)
    positions = out.numel() // channels
    _spread[(triton.cdiv(positions, rows),)](
        product, bias, x, out, positions, height, width, time, group, repeats, channels, block, rows,
        num_warps=8 if block >= 512 else 4,
    )  # fmt: skip
    return out
