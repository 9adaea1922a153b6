"""Attention behind one signature, its kernel chosen once per run.

attention(q, k, v): each [B, N, H, D] → [B, N, H, D]; no mask, because no padding ever gets here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from hunyuan_staged import InputError
from hunyuan_staged.versions import ATTN_MODES

HALF = (torch.float16, torch.bfloat16)
HOPPER = (9, 0)
AMPERE = (8, 0)

LATER = {
    "sageattn": "INT8 attention",
    "flex-block-attn": "block-sparse attention (SSTA)",
}

Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class AttentionMode:
    """A kernel, its name, and why it was taken; callable as attention(q, k, v)."""

    name: str
    reason: str
    kernel: Kernel

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        # A rank that holds no head (more sequence shards than heads) has nothing to compute.
        return self.kernel(q, k, v) if q.shape[2] else torch.zeros_like(q)


def _sdpa(*backends: SDPBackend) -> Kernel:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if not backends:
            return scaled_dot_product_attention(q, k, v).transpose(1, 2)
        with sdpa_kernel(list(backends)):
            return scaled_dot_product_attention(q, k, v).transpose(1, 2)

    return attend


def _flash_attn_2() -> Kernel:
    from flash_attn import flash_attn_func

    return flash_attn_func


def _flash_attn_3() -> Kernel:
    from flash_attn_interface import flash_attn_func

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = flash_attn_func(q, k, v)
        return out[0] if isinstance(out, tuple) else out

    return attend


def choose_attention(mode: str, device: torch.device, dtype: torch.dtype) -> AttentionMode:
    """The kernel for a mode on this device and dtype. Only "flash" chooses; any other mode is honoured or refused.

    Raises InputError with the reason and the modes that would work where the mode cannot run.
    """
    if mode in LATER:
        raise InputError(f"--attn_mode {mode}: {LATER[mode]} is not part of this release yet; use flash or torch")
    if mode not in ATTN_MODES:
        raise InputError(f"--attn_mode {mode!r} is unknown; known: {', '.join(ATTN_MODES)}")
    if mode == "torch":
        return AttentionMode("torch", "torch's scaled_dot_product_attention, as it chooses", _sdpa())
    if device.type != "cuda":
        if mode == "flash":
            return AttentionMode("torch", "no GPU: torch's scaled_dot_product_attention", _sdpa())
        raise InputError(f"--attn_mode {mode} needs a GPU, and this run is on a {device.type}; use flash or torch")
    capability = torch.cuda.get_device_capability(device)
    obstacle = None
    if dtype not in HALF:
        obstacle = f"flash kernels take float16 and bfloat16, not {dtype}"
    elif capability < AMPERE:
        obstacle = f"flash kernels need compute capability 8.0, and this GPU has {capability[0]}.{capability[1]}"
    if mode == "flash":
        return _fastest(capability, obstacle)
    if obstacle:
        raise InputError(f"--attn_mode {mode}: {obstacle}; use flash or torch")
    if mode == "flash3":
        if find_spec("flash_attn_interface") is None:
            raise InputError(
                "--attn_mode flash3: the package flash_attn_interface is not installed; use flash or torch"
            )
        if capability < HOPPER:
            raise InputError("--attn_mode flash3 needs a Hopper GPU (compute capability 9.0); use flash or torch")
        return AttentionMode("flash3", "as asked: the flash_attn_interface package", _flash_attn_3())
    if find_spec("flash_attn") is not None:
        return AttentionMode("flash2", "as asked: the flash-attn package", _flash_attn_2())
    return AttentionMode("flash2", "as asked: torch's own FlashAttention-2", _sdpa(SDPBackend.FLASH_ATTENTION))


def _fastest(capability: tuple[int, int], obstacle: str | None) -> AttentionMode:
    """The fastest exact kernel of this GPU (../shared/measured.md: flash3 and cuDNN before FlashAttention-2 on Hopper)."""
    if obstacle:
        return AttentionMode("torch", obstacle, _sdpa())
    if capability >= HOPPER:
        if find_spec("flash_attn_interface") is not None:
            return AttentionMode("flash3", "Hopper or newer, and flash_attn_interface is installed", _flash_attn_3())
        return AttentionMode("cudnn", "Hopper or newer: cuDNN is the fastest here", _sdpa(SDPBackend.CUDNN_ATTENTION))
    if find_spec("flash_attn") is not None:
        return AttentionMode("flash2", "the flash-attn package is installed", _flash_attn_2())
    return AttentionMode("flash2", "torch's own FlashAttention-2", _sdpa(SDPBackend.FLASH_ATTENTION))
