"""Latents → frames: the decoder over tiles, on one process or many.

Letters: T frames, H x W px of the video; t, h, w the same of a latent; C channels; N = h * w positions of a frame.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from hunyuan_staged import InputError, quiet
from hunyuan_staged.parallel import World
from hunyuan_staged.tiles import Tile, TilePlan, deal, tile_plan, whole_plan

__all__ = ["Video", "decode_frames", "plan_decode", "prepare_decoder", "tile_owners", "tile_plan"]

# Frames are blended and rounded so many at a time: the float32 copy of a tile is never whole in memory.
FRAMES_AT_ONCE = 16
# Decoded tiles that a rank keeps while rank 0 has not taken them yet.
SENDS_AHEAD = 2


def frame_causal_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention in which each position sees its own frame and all earlier ones.

    query, key, value [B, t, N, C] → [B, t, N, C]. Frame by frame, so that no mask exists: frame i's queries against the
    keys of frames 0..i. The same sums as diffusers' masked call, without the t*N x t*N mask.
    """
    batch, frames, _, channels = query.shape
    outputs = []
    for i in range(frames):
        keys, values = (x[:, : i + 1].reshape(batch, 1, -1, channels) for x in (key, value))
        outputs.append(F.scaled_dot_product_attention(query[:, i : i + 1], keys, values))
    return torch.cat(outputs, dim=1)


def _attention_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    """HunyuanVideo15AttnBlock.forward with the mask replaced by its meaning: [B, C, t, h, w] → the same."""
    batch, channels, frames, height, width = x.shape
    normed = self.norm(x)
    query, key, value = (
        # [B, C, t, h, w] → [B, t, N, C]
        project(normed).permute(0, 2, 3, 4, 1).reshape(batch, frames, height * width, channels)
        for project in (self.to_q, self.to_k, self.to_v)
    )
    attended = frame_causal_attention(query, key, value)
    return x + self.proj_out(attended.reshape(batch, frames, height, width, channels).permute(0, 4, 1, 2, 3))


def prepare_decoder(decoder: torch.nn.Module) -> torch.nn.Module:
    """Give the mid block's attention a forward without a mask; weights and numbers stay. Works on the encoder, too."""
    from diffusers.models.autoencoders.autoencoder_kl_hunyuanvideo15 import HunyuanVideo15AttnBlock

    for module in decoder.modules():
        if isinstance(module, HunyuanVideo15AttnBlock):
            module.forward = MethodType(_attention_forward, module)  # type: ignore[method-assign]
    return decoder


def plan_decode(
    latents: torch.Tensor, config: Mapping[str, Any], *, tile_size: int | None, tile_overlap: float
) -> TilePlan:
    """The tiles for latents [1, C, t, h, w]; tile_size (px) None decodes whole frames.

    Needs no weights, so a caller can ask before it loads any. Raises InputError for latents that this decoder does not
    take and for a tiling that makes no sense.
    """
    channels = config["latent_channels"]
    if latents.ndim != 5 or latents.shape[0] != 1 or latents.shape[1] != channels:
        raise InputError(f"latents {list(latents.shape)} do not fit this VAE, which takes [1, {channels}, t, h, w]")
    height, width = latents.shape[-2:]
    ratio = config["spatial_compression_ratio"]
    if tile_size is None:
        return whole_plan(height, width, spatial_ratio=ratio)
    return tile_plan(height, width, tile_size=tile_size, tile_overlap=tile_overlap, spatial_ratio=ratio)


def tile_owners(plan: TilePlan, ranks: int) -> list[int]:
    """Which rank decodes each of plan.tiles. A rank that is not in the list needs no decoder."""
    return deal([tile.cost for tile in plan.tiles], ranks)


@dataclass(frozen=True)
class Video:
    """A decoded video in host memory: frames uint8 [T, H, W, 3], and where asked for, floats [1, 3, T, H, W] in [0, 1].

    floats have the decoder's dtype: half precision is still eight times finer than 8 bits.
    """

    frames: torch.Tensor
    floats: torch.Tensor | None = None


def blend(before: torch.Tensor, tile: torch.Tensor, dim: int) -> None:
    """Fade from `before` into the head of `tile`, in place, linearly along dim.

    before is the tail of the neighbour above or to the left. Position y of e gets before * (1 - y/e) + tile * (y/e), e
    being the shorter of both: a last tile can be narrower than the overlap. (Official code: blend_v, blend_h.)
    """
    extent = min(before.shape[dim], tile.shape[dim])
    shape = [1] * tile.ndim
    shape[dim] = extent
    ramp = (torch.arange(extent, device=tile.device, dtype=tile.dtype) / extent).view(shape)
    head = tile.narrow(dim, 0, extent)
    head.mul_(ramp).add_(before.narrow(dim, before.shape[dim] - extent, extent) * (1 - ramp))


def to_8bit(pixels: torch.Tensor) -> torch.Tensor:
    """[0, 1] → uint8, rounded to the nearest of 256 levels, a half upwards."""
    return (pixels * 255 + 0.5).to(torch.uint8)


class Mosaic:
    """Takes decoded tiles in raster order and puts the video together.

    Of each tile it keeps 8-bit pixels in host memory, and on the device only what neighbours blend with: a tile's
    last columns until the next tile, its last rows until the next row of tiles.
    """

    def __init__(self, plan: TilePlan, num_frames: int, dtype: torch.dtype, *, as_float: bool) -> None:
        self.plan = plan
        height, width = (spans[-1].stop * plan.spatial_ratio for spans in (plan.rows, plan.columns))
        floats = torch.empty(1, 3, num_frames, height, width, dtype=dtype) if as_float else None
        self.video = Video(torch.empty(num_frames, height, width, 3, dtype=torch.uint8), floats)
        self._above: list[torch.Tensor | None] = [None] * len(plan.columns)
        self._left: torch.Tensor | None = None

    def add(self, tile: Tile, decoded: torch.Tensor) -> None:
        """The next tile in raster order, [1, 3, T, h*ratio, w*ratio] in the decoder's range of about [-1, 1]."""
        if not torch.isfinite(decoded).all():
            raise FloatingPointError(f"tile {tile.row},{tile.column} decoded to NaN or Inf in {decoded.dtype}")
        ratio, overlap = self.plan.spatial_ratio, self.plan.blend_px
        above, left = self._above[tile.column], self._left
        below = bool(overlap) and tile.row < len(self.plan.rows) - 1
        right = bool(overlap) and tile.column < len(self.plan.columns) - 1
        bottoms, rights = [], []
        for start in range(0, decoded.shape[2], FRAMES_AT_ONCE):
            now = slice(start, start + FRAMES_AT_ONCE)
            # A copy even where the tile is float32 already: blending writes into it.
            chunk = decoded[:, :, now].to(torch.float32, copy=True)
            if above is not None:
                blend(above[:, :, now], chunk, dim=-2)
            if left is not None:
                blend(left[:, :, now], chunk, dim=-1)
            # Tails of the blended tile, not of the decoded one: so blends chain as in the official code.
            if below:
                bottoms.append(chunk[..., -overlap:, :].clone())
            if right:
                rights.append(chunk[..., -overlap:].clone())
            self._write(tile, now, chunk[..., : tile.y.kept * ratio, : tile.x.kept * ratio])
        self._above[tile.column] = torch.cat(bottoms, dim=2) if below else None
        self._left = torch.cat(rights, dim=2) if right else None

    def _write(self, tile: Tile, now: slice, chunk: torch.Tensor) -> None:
        ratio = self.plan.spatial_ratio
        pixels = (chunk / 2 + 0.5).clamp_(0, 1)
        ys = slice(tile.y.start * ratio, tile.y.start * ratio + pixels.shape[-2])
        xs = slice(tile.x.start * ratio, tile.x.start * ratio + pixels.shape[-1])
        # [1, 3, T, H, W] → [T, H, W, 3]; made contiguous on the device, so that one dense block crosses to the host
        self.video.frames[now, ys, xs] = to_8bit(pixels)[0].permute(1, 2, 3, 0).contiguous().cpu()
        if self.video.floats is not None:
            self.video.floats[:, :, now, ys, xs] = pixels.to(self.video.floats.dtype).cpu()


def _send_tiles(tiles: list[Tile], decode: Callable[[Tile], torch.Tensor]) -> None:
    """A rank other than 0: decode these tiles in order and hand each to rank 0 while the next one decodes."""
    pending: list[tuple[Any, torch.Tensor]] = []  # the tensor must outlive its transfer
    for tile in tiles:
        if len(pending) == SENDS_AHEAD:
            pending.pop(0)[0].wait()
        decoded = decode(tile).contiguous()
        pending.append((dist.isend(decoded, dst=0), decoded))
    for transfer, _ in pending:
        transfer.wait()


def _collect_tiles(
    plan: TilePlan,
    owners: list[int],
    decode: Callable[[Tile], torch.Tensor],
    receive: Callable[[Tile, int], torch.Tensor],
) -> Iterator[tuple[Tile, torch.Tensor]]:
    """Rank 0: every tile in raster order, decoded here or received from its owner.

    Rank 0's own next tile is decoded before it waits for others' tiles that come earlier, so it never idles with work
    left. What travels is what the decoder wrote, all arithmetic after it happens here: any number of ranks gives the
    same bits.
    """
    mine = iter([tile for tile, owner in zip(plan.tiles, owners, strict=True) if owner == 0])
    ahead = next(mine, None)
    decoded = None if ahead is None else decode(ahead)
    for tile, owner in zip(plan.tiles, owners, strict=True):
        if owner != 0:
            yield tile, receive(tile, owner)
            continue
        assert decoded is not None
        yield tile, decoded
        ahead = next(mine, None)
        decoded = None if ahead is None else decode(ahead)


@torch.no_grad()
def decode_frames(
    decoder: torch.nn.Module | None,
    latents: torch.Tensor,
    config: Mapping[str, Any],
    *,
    tile_size: int | None,
    tile_overlap: float,
    world: World,
    progress: Callable[..., Any] = quiet,
    as_float: bool = False,
) -> Video | None:
    """Decode latents [1, C, t, h, w] to a Video on rank 0; None on the other ranks.

    Every rank of `world` calls this with the same arguments. decoder: diffusers' HunyuanVideo15Decoder3D on the rank's
    device; None where tile_owners gives the rank no tile. config: scaling_factor, latent_channels,
    spatial_compression_ratio and temporal_compression_ratio of the VAE. tile_size is in px, None for whole frames.
    The result has the same bits for any number of ranks.

    Raises InputError as plan_decode does, FloatingPointError where a tile decodes to NaN or Inf.
    """
    plan = plan_decode(latents, config, tile_size=tile_size, tile_overlap=tile_overlap)
    owners = tile_owners(plan, world.size)
    if world.rank not in owners:
        return None
    assert decoder is not None, f"rank {world.rank} has tiles to decode and no decoder"
    prepare_decoder(decoder)
    weight = next(decoder.parameters())
    scaled = (latents.float() / config["scaling_factor"]).to(weight.device, weight.dtype)
    num_frames = (latents.shape[2] - 1) * config["temporal_compression_ratio"] + 1

    def decode(tile: Tile) -> torch.Tensor:
        return decoder(scaled[..., tile.y.start : tile.y.stop, tile.x.start : tile.x.stop].contiguous())

    def receive(tile: Tile, owner: int) -> torch.Tensor:
        size = [side * plan.spatial_ratio for side in (tile.y.size, tile.x.size)]
        incoming = torch.empty(1, 3, num_frames, *size, dtype=weight.dtype, device=weight.device)
        dist.recv(incoming, src=owner)
        return incoming

    if not world.is_main:
        _send_tiles([tile for tile, owner in zip(plan.tiles, owners, strict=True) if owner == world.rank], decode)
        return None
    mosaic = Mosaic(plan, num_frames, weight.dtype, as_float=as_float)
    tiles = _collect_tiles(plan, owners, decode, receive)
    for tile, decoded in progress(tiles, desc="decoding tiles", total=len(owners), unit="tile"):
        mosaic.add(tile, decoded)
    return mosaic.video
