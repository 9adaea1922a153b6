"""Exact attention kernels (and sageattn), each as kernel(q, k, v) over [1, N, H, D]."""

from collections.abc import Callable, Sequence
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

from hunyuan_staged.attention import packages
from hunyuan_staged.attention.packages import HOPPER

SAGE_HEAD_WIDTHS = (64, 96, 128)  # of version 1.0.6

# flash-attn-4 on Hopper, heads of 128: queries x keys of a tile, and the softmax through shared memory. The package's own
# choice, 128 x 128 through registers, takes 3 % longer (README, ideas tried).
FLASH4_TILE: dict[str, Any] = {"tile_mn": (192, 128), "mma_pv_is_rs": False, "intra_wg_overlap": True}
FLASH4_TILE_HEADS = 128
# What is left of the queries after the last whole wave of tiles, a tile on each multiprocessor: smaller tiles, where they
# take less than another wave of large ones. A small tile of 128 queries takes about 0.7 of a large one's time.
FLASH4_SMALL_TILE: dict[str, Any] = {"tile_mn": (128, 128), "mma_pv_is_rs": True, "intra_wg_overlap": True}
FLASH4_SMALL_TILE_TIME = 0.7
LEAST_GAIN = 0.02  # of a call's time; less is not worth a second launch

Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def dense(kernel: Kernel) -> Callable[[Sequence[int]], Kernel]:
    return lambda grid: kernel


def sdpa(*backends: SDPBackend) -> Kernel:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if not backends:
            return scaled_dot_product_attention(q, k, v).transpose(1, 2)
        with sdpa_kernel(list(backends)):
            return scaled_dot_product_attention(q, k, v).transpose(1, 2)

    return attend


def flash_attn_2() -> Kernel:
    from flash_attn import flash_attn_func

    return flash_attn_func


def flash_attn_3() -> Kernel:
    from flash_attn_interface import flash_attn_func

    return lambda q, k, v: packages.output_alone(flash_attn_func(q, k, v))


def flash_attn_4(capability: tuple[int, int], head_width: int) -> Kernel:
    """With a tile of our own where the GPU is a Hopper and the package lets one choose; its public function does not."""
    from flash_attn.cute import interface

    packages.silence_flash4()
    kernel: Any = interface.flash_attn_func
    inner: Any = getattr(interface, "_flash_attn_fwd", None)
    chosen = capability[0] == HOPPER[0] and head_width == FLASH4_TILE_HEADS and inner is not None
    if chosen and {*FLASH4_TILE, "out"} <= signature(inner).parameters.keys():
        kernel = partial(_by_waves, inner)
    return lambda q, k, v: packages.output_alone(kernel(q, k, v))


def _by_waves(inner: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    first = whole_waves(q.shape[1], q.shape[2], torch.cuda.get_device_properties(q.device).multi_processor_count)
    out = torch.empty_like(q)
    inner(q[:, :first], k, v, out=out[:, :first], **FLASH4_TILE)
    if first < q.shape[1]:
        inner(q[:, first:], k, v, out=out[:, first:], **FLASH4_SMALL_TILE)
    return out


def whole_waves(queries: int, heads: int, processors: int) -> int:
    """How many of a sequence's queries go through large tiles; the others go through small ones.

    A GPU works on as many tiles at once as it has multiprocessors. Of few heads (one of eight ranks has 4) a last wave with
    few tiles costs several percent.
    """
    large, small = (tile["tile_mn"][0] for tile in (FLASH4_TILE, FLASH4_SMALL_TILE))
    tiles = -(-queries // large) * heads
    waves, rest = divmod(tiles, processors)
    first = waves * processors // heads * large
    if not waves or not rest or first >= queries:
        return queries
    small_waves = -(-(-(-(queries - first) // small) * heads) // processors)
    taken = -(-(first // large * heads) // processors) + small_waves * FLASH4_SMALL_TILE_TIME
    return first if taken <= (waves + 1) * (1 - LEAST_GAIN) else queries


def sageattention_kernel(head_width: int) -> Kernel:
    """Heads of another width are filled up with zeros, which change neither a product nor a quantisation step."""
    from sageattention import sageattn

    zeros = min(width for width in SAGE_HEAD_WIDTHS if width >= head_width) - head_width

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if not zeros:
            return sageattn(q, k, v, tensor_layout="NHD")
        q, k, v = (pad(x, (0, zeros)) for x in (q, k, v))
        return sageattn(q, k, v, tensor_layout="NHD", sm_scale=head_width**-0.5)[..., :head_width]

    return attend
