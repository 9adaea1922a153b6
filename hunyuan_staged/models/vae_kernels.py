"""Triton kernels of the VAE decoder, for vae_decoder.py, which says what they compute. Imported where there is a GPU alone.

A program computes a few whole positions with all their channels, which lie side by side in memory.
"""

import torch
import triton
import triton.language as tl

VALUES = 2048  # of a program: of twice as many, half as many programs run at a time, for want of registers
POSITIONS = 128  # at most
LENGTH_FLOOR = 1e-12  # of F.normalize


@triton.jit
def _put(out, before, place, value, channel, here, t, frames, height, width, first, roll, channels: tl.constexpr):
    """Write values to a place in their frame, also in front of the first one, and of the last two to what is remembered."""
    real = (channel < channels)[None, :]
    frame = (height + 2) * (width + 2)
    tl.store(out + (place[:, None] * channels + channel[None, :]), value, mask=here[:, None] & real)
    if first != 0:
        mask = (here & (t == 0))[:, None] & real
        for back in tl.static_range(1, 3):
            tl.store(out + ((place - back * frame)[:, None] * channels + channel[None, :]), value, mask=mask)
    if roll != 0:
        # What was remembered goes in front, and gives its place to the last two frames.
        mask = (here & (t >= frames - 2))[:, None] & real
        target = (place - frames.to(tl.int64) * frame)[:, None] * channels + channel[None, :]
        tl.store(out + target, tl.load(before + target, mask=mask, other=0.0), mask=mask)
        tl.store(before + target, value, mask=mask)


# Compiled once for each width: nothing is specialised on the sizes of a tile, which differ at a video's borders.
@triton.jit(do_not_specialize=["frames", "height", "width", "has_bias", "has_residual", "keep", "first", "roll"])
def _norm_silu_pad(
    product, bias, residual, gamma, before, out, frames, height, width,
    has_bias, has_residual, keep, first, roll, scale, floor,
    channels: tl.constexpr, block: tl.constexpr, rows: tl.constexpr, has_norm: tl.constexpr,
):  # fmt: skip
    position = tl.program_id(0) * rows + tl.arange(0, rows)
    x = position % width
    y = (position // width) % height
    t = position // (width * height)
    channel = tl.arange(0, block)
    real = (channel < channels)[None, :]
    live = (t < frames)[:, None] & real
    source = position.to(tl.int64)[:, None] * channels + channel[None, :]
    value = tl.load(product + source, mask=live, other=0.0).to(tl.float32)
    value += tl.load(bias + channel[None, :], mask=real & (has_bias != 0), other=0.0).to(tl.float32)
    value += tl.load(residual + source, mask=live & (has_residual != 0), other=0.0).to(tl.float32)
    # In place: no other program reads what this one has.
    tl.store(product + source, value.to(product.dtype.element_ty), mask=live & (keep != 0))
    if has_norm:
        value = tl.where(live, value, 0.0)
        length = tl.sqrt(tl.sum(value * value, axis=1))
        weight = tl.load(gamma + channel[None, :], mask=real, other=0.0).to(tl.float32) * scale
        value = value / tl.maximum(length, floor)[:, None] * weight
        value = value * tl.sigmoid(value)
    value = value.to(out.dtype.element_ty)
    own = ((t + 2).to(tl.int64) * (height + 2) + y + 1) * (width + 2) + x + 1
    _put(out, before, own, value, channel, t < frames, t, frames, height, width, first, roll, channels)
    left, right, top, bottom = x == 0, x == width - 1, y == 0, y == height - 1
    if tl.max((left | right | top | bottom).to(tl.int32), axis=0) > 0:
        # Beyond a border stands what is at it.
        for dy in tl.static_range(-1, 2):
            for dx in tl.static_range(-1, 2):
                here = t < frames
                if dy < 0:
                    here = here & top
                if dy > 0:
                    here = here & bottom
                if dx < 0:
                    here = here & left
                if dx > 0:
                    here = here & right
                if dx != 0 or dy != 0:
                    place = own + dy * (width + 2) + dx
                    _put(out, before, place, value, channel, here, t, frames, height, width, first, roll, channels)


def norm_silu_pad(
    product: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    gamma: torch.Tensor | None,
    before: torch.Tensor | None,
    *,
    keep: bool,
    roll: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """vae_decoder.norm_silu_pad of a sum by its parts. What is kept takes the product's place."""
    frames, height, width, channels = product.shape
    out = product.new_empty(frames + 2, height + 2, width + 2, channels)
    by_kernel = before is not None and roll and frames > 1
    if before is not None and not by_kernel:
        out[:2] = before
    # What was given whole is not written again.
    summed = bias is not None or residual is not None
    block = triton.next_power_of_2(channels)
    rows = max(1, min(POSITIONS, VALUES // block))
    grid = (triton.cdiv(frames * height * width, rows),)

    def there(tensor: torch.Tensor | None) -> torch.Tensor:
        return product if tensor is None else tensor

    _norm_silu_pad[grid](
        product, there(bias), there(residual), there(gamma), there(before), out, frames, height, width,
        int(bias is not None), int(residual is not None), int(keep and summed), int(before is None), int(by_kernel),
        channels**0.5, LENGTH_FLOOR, channels, block, rows, gamma is not None, num_warps=8 if block >= 512 else 4,
    )  # fmt: skip
    if before is not None and roll and not by_kernel:
        before.copy_(out[-2:])
    return out, product if keep else None


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
    rows = max(1, min(POSITIONS, VALUES // block))
    positions = out.numel() // channels
    _spread[(triton.cdiv(positions, rows),)](
        product, bias, x, out, positions, height, width, time, group, repeats, channels, block, rows,
        num_warps=8 if block >= 512 else 4,
    )  # fmt: skip
    return out
