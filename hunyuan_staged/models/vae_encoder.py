"""The VAE encoder's forward: frames → the posterior of latents, channels last, a chunk of frames at a time.

The decoder's, turned round, and of its parts: the levels run over chunks of frames, each convolution remembering the last
two frames of its input, and the mid block, whose attention sees all earlier frames, over the latents of all of them.

Letters: T frames, H x W positions, C channels of a level; t, h, w of the latents.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from einops import rearrange

from hunyuan_staged.geometry import chunk_spans
from hunyuan_staged.models.vae_decoder import ALL_ROWS, CausalCoder, ConvCache, FrameLayout, PendingSum


def pack(x: torch.Tensor, *, time: int) -> torch.Tensor:
    """Positions to channels: [T * time, 2 H, 2 W, C] → [T, H, W, time * 2 * 2 * C]."""
    return rearrange(x, "(t a) (h b) (w d) c -> t h w (a b d c)", a=time, b=2, d=2)


def pack_with_shortcut(values: torch.Tensor, x: torch.Tensor, *, time: int, copies: int = 1) -> torch.Tensor:
    """pack of [T, H, W, c], its channels `copies` times, plus the shortcut: means of neighbouring channels of pack(x)."""
    packed = pack(values, time=time)
    if copies > 1:
        packed = torch.cat([packed] * copies, dim=-1)
    return packed.add_(channel_means(pack(x, time=time), packed.shape[-1]))


def channel_means(x: torch.Tensor, channels: int) -> torch.Tensor:
    """[..., C] → [..., channels], each the mean of C / channels neighbours."""
    return x.unflatten(-1, (channels, -1)).mean(dim=-1)


class Encoder(CausalCoder):
    """The forward of one loaded encoder."""

    @torch.no_grad()
    def __call__(self, video: torch.Tensor, latent_frames_per_chunk: int | None = None) -> torch.Tensor:
        """The posterior [1, 2 C, t, h, w], means (its mode) before log-variances, of a video [1, 3, T, H, W] in [-1, 1].

        The video may lie on another device: so many frames of latents (None: all) come over, and are computed, at a time.
        Chunks change nothing but the rounding. Raises ValueError where T - 1, H or W is not a multiple of its ratio.
        """
        time, space = self.module.time_ratio, self.module.space_ratio
        frames, height, width = video.shape[2:]
        if (frames - 1) % time or height % space or width % space:
            raise ValueError(f"{frames} frames of {height}x{width}; allowed: {time}n + 1 frames, sides of {space}n")
        count = (frames - 1) // time + 1
        spans = chunk_spans(count, latent_frames_per_chunk or count, time)
        return self.of_chunks(lambda now: self.frames(video, now), spans).permute(3, 0, 1, 2)[None]

    @property
    def latent_channels(self) -> int:
        """C: as many means as log-variances."""
        return int(self.module.conv_out.conv.out_channels) // 2

    def frames(self, video: torch.Tensor, now: slice) -> torch.Tensor:
        """Some frames of a video [1, 3, T, H, W] as they are computed: [n, H, W, 3] on the encoder's device."""
        return video[0, :, now].to(self.device, self.dtype).permute(1, 2, 3, 0).contiguous()

    @torch.no_grad()
    def of_chunks(
        self, take: Callable[[slice], torch.Tensor], spans: Sequence[slice], layout: FrameLayout = ALL_ROWS
    ) -> torch.Tensor:
        """The posterior [t, h, w, 2 C] of a layout's rows. take(span): these rows of some frames, as `frames` has them."""
        cache, values = ConvCache(layout), []
        for number, now in enumerate(spans):
            cache.first, cache.last = number == 0, number == len(spans) - 1
            values.append(self._down(take(now), cache))
        return self._behind_chunks(torch.cat(values), layout)

    def _down(self, chunk: torch.Tensor, cache: ConvCache) -> torch.Tensor:
        """A chunk of frames [T, H, W, 3] through the levels."""
        product, _ = self._convolve(self.module.conv_in, chunk, None, cache, keep=False)
        x: Any = PendingSum(product, self.module.conv_in.conv.bias)
        del product  # gigabytes, of which the sum lets go
        for block in self.module.down_blocks:
            for resnet in block.resnets:
                x = self._resnet(resnet, x, cache)
            for downsampler in block.downsamplers or ():
                x = self._downsample(downsampler, x, cache)
        return x.add() if isinstance(x, PendingSum) else x

    def _downsample(self, block: Any, x: Any, cache: ConvCache) -> torch.Tensor:
        """Half as high and wide, and with add_temporal_downsample half as long but for a video's first frame."""
        product, added = self._convolve(block.conv, x, None, cache)
        values = product.add_(block.conv.conv.bias)
        if not block.add_temporal_downsample:
            return pack_with_shortcut(values, added, time=1)
        parts = []
        if cache.first:
            # It has no partner in time: its channels stand for both.
            parts.append(pack_with_shortcut(values[:1], added[:1], time=1, copies=2))
            values, added = values[1:], added[1:]
        if len(values):
            parts.append(pack_with_shortcut(values, added, time=2))
        return torch.cat(parts)

    def _behind_chunks(self, x: Any, layout: FrameLayout) -> torch.Tensor:
        """The mid block and conv_out, over all latents: [t, h, w, C] → [t, h, w, 2 C']."""
        module, cache = self.module, ConvCache(layout, last=True)
        first, second = module.mid_block.resnets
        x = self._attention(module.mid_block.attentions[0], self._resnet(first, x, cache).add(), layout)
        x = self._resnet(second, x, cache)
        product, x = self._convolve(module.conv_out, x, module.norm_out, cache)
        return product + module.conv_out.conv.bias + channel_means(x, product.shape[-1])
