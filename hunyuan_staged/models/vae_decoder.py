"""The VAE decoder's forward: latents → frames, channels last, a chunk of frames at a time.

The modules' own forward goes over memory many times between two convolutions: bias, residual, norm, activation and
padding are a pass each, and cuDNN turns the layout around besides. Here the layout is the one that convolutions compute
in, and one pass (`norm_silu_pad`) does all that lies between two of them.

A convolution looks back two frames and never ahead. So behind the mid block, whose attention sees all earlier frames, the
decoder runs over chunks of frames, and each convolution remembers the last two frames of its input for the next chunk.
The last level, which takes most memory and gains least from long chunks, may go through a chunk in pieces.

Letters: T frames, H x W positions, C channels of a level; t, h, w of the latents; N = h * w positions of a frame.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from hunyuan_staged.models.vae_attention import frame_causal_attention

# -- between convolutions --


class PendingSum:
    """Activations that are yet to be added up: what a convolution gave [T, H, W, C], its bias [C], a residual.

    It is used once, by take or add, and then holds nothing: at full size each of these is gigabytes.
    """

    def __init__(self, product: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor | None = None) -> None:
        self._parts = [(product, bias, residual)]

    @property
    def is_cuda(self) -> bool:
        return self._parts[0][0].is_cuda

    def take(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        return self._parts.pop()

    def add(self) -> torch.Tensor:
        product, bias, residual = self.take()
        total = product + bias
        return total if residual is None else total + residual


def normalise(x: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    """diffusers' HunyuanVideo15RMS_norm over the last axis: x / ||x|| * sqrt(C) * gamma, the length in float32."""
    return F.normalize(x.float(), dim=-1).to(x.dtype) * (x.shape[-1] ** 0.5 * gamma)


def norm_silu_pad(
    x: PendingSum | torch.Tensor,
    gamma: torch.Tensor | None,
    before: torch.Tensor | None,
    *,
    keep: bool = True,
    roll: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(input of the next convolution [T + 2, H + 2, W + 2, C], x added up [T, H, W, C], or None unless keep).

    With gamma [C] the input is normalised and goes through SiLU; without, it is x. The sides repeat the outermost
    positions; in front stands `before` [2, H + 2, W + 2, C], or else the first frame twice. x may take the place of a
    sum's product; with roll, the input's last two frames take that of `before`.
    """
    if x.is_cuda:
        from hunyuan_staged.models import vae_kernels

        product, bias, residual = x.take() if isinstance(x, PendingSum) else (x, None, None)
        return vae_kernels.norm_silu_pad(product, bias, residual, gamma, before, keep=keep, roll=roll)
    added = x.add() if isinstance(x, PendingSum) else x
    values = added if gamma is None else F.silu(normalise(added, gamma))
    rows, columns = (torch.arange(-1, n + 1, device=added.device).clamp(0, n - 1) for n in added.shape[1:3])
    values = values[:, rows[:, None], columns]
    inputs = torch.cat([values[:1].expand(2, -1, -1, -1) if before is None else before, values])
    if roll and before is not None:
        before.copy_(inputs[-2:])
    return inputs, added if keep else None


def spread(
    product: torch.Tensor, bias: torch.Tensor, x: torch.Tensor, *, time: int, group: int, repeats: int
) -> torch.Tensor:
    """Channels to positions: [T, H, W, R * group] and the shortcut from x [T, H, W, C] → [T * time, 2 H, 2 W, c].

    R = time * 2 * 2 groups of channels go to the positions that each position becomes. Of each group the first
    c = C / R * repeats are taken, and x's channels are repeated so often. (diffusers: HunyuanVideo15Upsample.)
    """
    if product.is_cuda:
        from hunyuan_staged.models import vae_kernels

        return vae_kernels.spread(product, bias, x, time, group, repeats)
    parts = {"a": time, "b": 2, "d": 2}
    repeated = x.repeat_interleave(repeats, dim=-1)
    shortcut, values = (
        rearrange(part, "t h w (a b d c) -> (t a) (h b) (w d) c", **parts) for part in (repeated, product + bias)
    )
    return values[..., : shortcut.shape[-1]] + shortcut


def _convolve(inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[T + 2, H + 2, W + 2, C] → [T, H, W, C'], weight [C', C, 3, 3, 3]."""
    x = inputs.permute(3, 0, 1, 2)[None]  # [1, C, T, H, W], its memory format channels_last_3d
    if x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        # For few frames conv3d falls back to a loop of its own, ten times as slow.
        product = torch.ops.aten.mkldnn_convolution(x, weight, None, [0] * 3, [1] * 3, [1] * 3, 1)
    else:
        product = F.conv3d(x, weight)
    return product[0].permute(1, 2, 3, 0).contiguous()


# -- the forward --


class FrameLayout:
    """Which rows of its frames a decoder or encoder computes. Here: all; nothing is exchanged, and nothing cut off."""

    has_halo = False  # whether others have rows that a convolution needs

    def fill_halo(self, inputs: torch.Tensor, *, first: bool) -> None:
        """Write a convolution's inputs [2 + T, 1 + H + 1, W + 2, C] beyond the own rows, where other rows follow there.

        They hold the outermost own rows. The two frames in front are complete, but for those of a video's first chunk.
        """

    def gather_rows(self, x: torch.Tensor) -> torch.Tensor:
        """All rows of the mid block's [t, H, W, C], given the own ones."""
        return x

    def crop(self, x: torch.Tensor, level: int) -> torch.Tensor:
        """[T, H, W, C], input of an up block (0 the first; their number: the pixels), without rows of no more use."""
        return x


ALL_ROWS = FrameLayout()


@dataclass
class ConvCache:
    """What the causal convolutions of one video remember between two chunks: the last two frames of their input."""

    layout: FrameLayout = ALL_ROWS
    frames: dict[nn.Module, torch.Tensor] = field(default_factory=dict)
    first: bool = True
    last: bool = False


class CausalCoder:
    """What the forwards of decoder and encoder share. Convolutions' weights become channels last.

    module: a VaeDecoder or VaeEncoder in eval mode.
    """

    def __init__(self, module: Any) -> None:
        self.module = module
        for part in module.modules():
            if isinstance(part, nn.Conv3d):
                part.weight.data = part.weight.data.contiguous(memory_format=torch.channels_last_3d)
        weight = next(module.parameters())
        self.device, self.dtype = weight.device, weight.dtype

    def _convolve(
        self, layer: Any, x: PendingSum | torch.Tensor, norm: Any, cache: ConvCache, *, keep: bool = True
    ) -> tuple[torch.Tensor, Any]:
        """(product [T, H, W, C'] without its bias, x added up [T, H, W, C] if kept) of a causal 3 x 3 x 3 convolution."""
        before = cache.frames.get(layer)
        roll = not (cache.last or cache.layout.has_halo)
        gamma = None if norm is None else norm.gamma.flatten()
        inputs, added = norm_silu_pad(x, gamma, before, keep=keep, roll=roll)
        cache.layout.fill_halo(inputs, first=before is None)
        if cache.last:
            cache.frames.pop(layer, None)
        elif before is None:
            cache.frames[layer] = inputs[-2:].clone()
        elif not roll:
            before.copy_(inputs[-2:])
        del before
        return _convolve(inputs, layer.conv.weight), added

    def _resnet(self, block: Any, x: PendingSum | torch.Tensor, cache: ConvCache) -> PendingSum:
        product, added = self._convolve(block.conv1, x, block.norm1, cache)
        between = PendingSum(product, block.conv1.conv.bias)
        del product
        product, _ = self._convolve(block.conv2, between, block.norm2, cache, keep=False)
        if block.conv_shortcut is not None:
            added = F.linear(added, block.conv_shortcut.weight.flatten(1), block.conv_shortcut.bias)
        return PendingSum(product, block.conv2.conv.bias, added)

    def _attention(self, block: Any, x: torch.Tensor, layout: FrameLayout = ALL_ROWS) -> torch.Tensor:
        normed = normalise(x, block.norm.gamma.flatten())
        query, key, value = (
            F.linear(normed, layer.weight.flatten(1), layer.bias) for layer in (block.to_q, block.to_k, block.to_v)
        )
        attended = frame_causal_attention(
            # [t, h, w, C] → [1, t, N, C]
            *(rows.flatten(1, 2)[None] for rows in (query, layout.gather_rows(key), layout.gather_rows(value))),
            # A row at a time: the bits must not depend on how many rows there are.
            queries_per_call=x.shape[2],
        )
        return x + F.linear(attended.view(x.shape), block.proj_out.weight.flatten(1), block.proj_out.bias)


class Decoder(CausalCoder):
    """The forward of one loaded decoder."""

    @torch.no_grad()
    def __call__(self, latents: torch.Tensor, latent_frames_per_chunk: int | None = None) -> Iterator[torch.Tensor]:
        """Frames [T, H, W, 3] in the decoder's range of about [-1, 1], from latents [1, C, t, h, w], chunk by chunk.

        A chunk comes from so many latent frames, all of them by default. The first latent frame gives one frame, any
        other as many as the decoder's temporal factor. Chunks change nothing but the rounding.
        """
        values = self.before_chunks(latents)
        yield from self.chunks(values, latent_frames_per_chunk or len(values))

    @torch.no_grad()
    def before_chunks(self, latents: torch.Tensor, layout: FrameLayout = ALL_ROWS) -> torch.Tensor:
        """conv_in and the mid block, over all frames: [1, C, t, h, w] → [t, h, w, C']."""
        module, cache = self.module, ConvCache(layout, last=True)
        latents = latents.to(self.device, self.dtype)[0].permute(1, 2, 3, 0).contiguous()
        product, _ = self._convolve(module.conv_in, latents, None, cache)
        x: PendingSum | torch.Tensor = PendingSum(
            product, module.conv_in.conv.bias, latents.repeat_interleave(module.repeat, dim=-1)
        )
        x = self._resnet(module.mid_block.resnets[0], x, cache)
        for attention, resnet in zip(module.mid_block.attentions, module.mid_block.resnets[1:], strict=True):
            if attention is not None:
                x = self._attention(attention, x.add(), layout)
            x = self._resnet(resnet, x, cache)
        return x.add()

    @torch.no_grad()
    def chunks(
        self, values: torch.Tensor, size: int, layout: FrameLayout = ALL_ROWS, frames_per_piece: int | None = None
    ) -> Iterator[torch.Tensor]:
        """Frames as __call__ gives them, of `size` latent frames at a time, from what before_chunks gave of all.

        frames_per_piece: that go through the last level at a time; None: a chunk's.
        """
        cache = ConvCache(layout)
        for start in range(0, len(values), size):
            cache.first, cache.last = start == 0, start + size >= len(values)
            yield self._chunk(values[start : start + size], cache, frames_per_piece)

    def _chunk(self, values: torch.Tensor, cache: ConvCache, frames_per_piece: int | None) -> torch.Tensor:
        crop, last = cache.layout.crop, cache.last
        *blocks, final = self.module.up_blocks
        assert blocks and not final.upsamplers, "pieces start behind an upsampler, and none follows"
        pieces = [crop(values, 0)]
        for level, block in enumerate(blocks, start=1):
            size = frames_per_piece if level == len(blocks) else None
            pieces = [crop(piece, level) for piece in self._level(block, pieces.pop(), cache, size)]
        pieces.reverse()
        decoded = []
        while pieces:
            cache.last = last and len(pieces) == 1
            decoded.append(crop(self._final_level(final, pieces.pop(), cache), len(blocks) + 1))
        return decoded[0] if len(decoded) == 1 else torch.cat(decoded)

    def _final_level(self, block: Any, x: PendingSum | torch.Tensor, cache: ConvCache) -> torch.Tensor:
        for resnet in block.resnets:
            x = self._resnet(resnet, x, cache)
        product, _ = self._convolve(self.module.conv_out, x, self.module.norm_out, cache, keep=False)
        return product + self.module.conv_out.conv.bias

    def _level(
        self, block: Any, x: PendingSum | torch.Tensor, cache: ConvCache, size: int | None
    ) -> list[torch.Tensor]:
        """All levels but the last. The output comes in one tensor, or in tensors of `size` frames."""
        for resnet in block.resnets:
            x = self._resnet(resnet, x, cache)
        (upsampler,) = block.upsamplers
        return self._upsample(upsampler, x, cache, size)

    def _upsample(
        self, block: Any, x: PendingSum | torch.Tensor, cache: ConvCache, size: int | None
    ) -> list[torch.Tensor]:
        """Twice as high and wide, and with add_temporal_upsample twice as long but for a video's first frame."""
        product, added = self._convolve(block.conv, x, None, cache)
        bias = block.conv.conv.bias
        if not block.add_temporal_upsample:
            plain = {"time": 1, "group": product.shape[-1] // 4, "repeats": block.repeats}
            cut = zip(*(part.split(size or len(part)) for part in (product, added)), strict=True)
            return [spread(some, bias, of_x, **plain) for some, of_x in cut]
        assert size is None, "the last upsampler is one in space alone"
        group = product.shape[-1] // 8
        parts = []
        if cache.first:
            # One frame from the first: of each pair of groups in time the first half, which is the earlier group's place.
            first = {"time": 1, "group": 2 * group, "repeats": block.repeats // 2}
            parts.append(spread(product[:1], bias, added[:1], **first))
            product, added = product[1:], added[1:]
        if len(product):
            parts.append(spread(product, bias, added, time=2, group=group, repeats=block.repeats))
        return [parts[0] if len(parts) == 1 else torch.cat(parts)]
