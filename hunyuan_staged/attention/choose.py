"""Attention behind one signature, its kernel chosen once per run.

attention(q, k, v): each [1, N, H, D] → [1, N, H, D]; no mask, because no padding ever gets here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn.attention import SDPBackend

from hunyuan_staged.attention import kernel_cache, packages, ssta
from hunyuan_staged.attention.dense import (
    SAGE_HEAD_WIDTHS,
    Kernel,
    dense,
    flash_attn_2,
    flash_attn_3,
    flash_attn_4,
    sageattention_kernel,
    sdpa,
)
from hunyuan_staged.attention.modes import ATTN_MODES, DEFAULT_ATTN_MODE, SPARSE_ATTN_MODE
from hunyuan_staged.attention.packages import AMPERE, HALF, HOPPER, installed
from hunyuan_staged.errors import InputError

# What must be importable for a mode, and how to get it.
PACKAGES = {
    "flash3": ("flash_attn_interface", "build it from the hopper folder of the flash-attention repository"),
    "flash4": (packages.FLASH4_PACKAGE, "pip install --pre flash-attn-4"),
    "sageattn": ("sageattention", "pip install sageattention"),
}

# How wide a head may be, where a kernel takes few widths. The published model's are 128, the demo's 32.
HEAD_WIDTHS = {"flash4": packages.FLASH4_HEAD_WIDTHS}


@dataclass(frozen=True)
class AttentionMode:
    """A kernel, its name, and why it was taken.

    make(grid) gives the kernel for a grid of T x h x w video tokens, which dense kernels do not care about. With
    `blocks`, only those blocks of the transformer run it, and the others run `elsewhere`.
    """

    name: str
    reason: str
    make: Callable[[Sequence[int]], Kernel]
    blocks: range | None = None
    elsewhere: "AttentionMode | None" = None

    def kernels(self, grid: Sequence[int], count: int) -> list[Kernel]:
        """The kernel of each of a transformer's `count` blocks."""
        own = partial(_nothing_for_no_heads, self.make(grid))
        if self.blocks is None or self.elsewhere is None:
            return [own] * count
        others = self.elsewhere.kernels(grid, count)
        return [own if index in self.blocks else others[index] for index in range(count)]


def _nothing_for_no_heads(kernel: Kernel, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """A rank that holds no head (more sequence shards than heads) has nothing to compute."""
    return kernel(q, k, v) if q.shape[2] else torch.zeros_like(q)


def choose_attention(
    mode: str, device: torch.device, dtype: torch.dtype, sage_blocks: range | None = None, *, head_width: int = 128
) -> AttentionMode:
    """The kernel for a mode on this device and dtype. Only "flash" chooses; any other mode is honoured or refused.

    sage_blocks: which blocks of the transformer run sageattn; the others run flash. All by default. head_width: D of the
    model. Raises InputError with the reason and the modes that would work where the mode cannot run.
    """
    if mode not in ATTN_MODES:
        raise InputError(f"--attn_mode {mode!r} is unknown; known: {', '.join(ATTN_MODES)}")
    if device.type == "cuda":
        kernel_cache.keep_flash4_kernels()
    if mode == "torch":
        return AttentionMode("torch", "torch's scaled_dot_product_attention, as it chooses", dense(sdpa()))
    if mode == SPARSE_ATTN_MODE:
        core, reason = ssta.fastest_kernel(device, dtype, head_width)
        return AttentionMode(mode, reason, partial(ssta.SparseAttention, device=device, core=core))
    if device.type != "cuda":
        if mode == DEFAULT_ATTN_MODE:
            return AttentionMode("torch", "no GPU: torch's scaled_dot_product_attention", dense(sdpa()))
        raise InputError(f"--attn_mode {mode} needs a GPU, and this run is on a {device.type}; use flash or torch")
    capability = torch.cuda.get_device_capability(device)
    obstacle = None
    if dtype not in HALF:
        obstacle = f"it takes float16 and bfloat16, not {dtype}"
    elif capability < AMPERE:
        obstacle = f"it needs compute capability 8.0, and this GPU has {capability[0]}.{capability[1]}"
    if mode == DEFAULT_ATTN_MODE:
        return _fastest(capability, obstacle, head_width)
    if mode in ("flash3", "flash4", "cudnn") and capability < HOPPER:
        obstacle = (
            f"it needs a Hopper GPU or newer, and this one has compute capability {capability[0]}.{capability[1]}"
        )
    if mode in PACKAGES and not installed(PACKAGES[mode][0]):
        package, remedy = PACKAGES[mode]
        obstacle = f"the package {package} is not installed ({remedy})"
    elif head_width not in HEAD_WIDTHS.get(mode, (head_width,)):
        widths = ", ".join(map(str, HEAD_WIDTHS[mode]))
        obstacle = f"it takes heads that are {widths} wide, and this model's are {head_width}"
    elif mode == "sageattn" and head_width > max(SAGE_HEAD_WIDTHS):
        obstacle = f"it takes heads up to {max(SAGE_HEAD_WIDTHS)} wide, and this model's are {head_width}"
    if obstacle:
        raise InputError(f"--attn_mode {mode}: {obstacle}; use flash or torch")
    if mode == "flash2":
        return _flash2("as asked")
    if mode == "flash3":
        return AttentionMode(mode, "as asked: the flash_attn_interface package", dense(flash_attn_3()))
    if mode == "flash4":
        return AttentionMode(mode, "as asked: the flash-attn-4 package", dense(flash_attn_4(capability, head_width)))
    if mode == "cudnn":
        return AttentionMode(mode, "as asked: cuDNN, through torch", dense(sdpa(SDPBackend.CUDNN_ATTENTION)))
    return AttentionMode(
        mode,
        "as asked: the sageattention package, INT8, not exact",
        dense(sageattention_kernel(head_width)),
        sage_blocks,
        _fastest(capability, None, head_width),
    )


def _flash2(why: str) -> AttentionMode:
    # flash-attn-4 puts a folder of the same name there, without the module that version 2 has.
    if installed("flash_attn.flash_attn_interface"):
        return AttentionMode("flash2", f"{why}: the flash-attn package", dense(flash_attn_2()))
    return AttentionMode("flash2", f"{why}: torch's own FlashAttention-2", dense(sdpa(SDPBackend.FLASH_ATTENTION)))


def _fastest(capability: tuple[int, int], obstacle: str | None, head_width: int) -> AttentionMode:
    """The fastest exact kernel of this GPU. On Hopper flash4 is 1.2 times as fast as cuDNN, and that 1.6 times as fast
    as FlashAttention-2."""
    if obstacle:
        return AttentionMode("torch", f"no flash kernel here: {obstacle}", dense(sdpa()))
    if capability >= HOPPER:
        why = "the fastest exact kernel that is installed"
        if installed(PACKAGES["flash4"][0]) and head_width in HEAD_WIDTHS["flash4"]:
            return AttentionMode("flash4", why, dense(flash_attn_4(capability, head_width)))
        if installed(PACKAGES["flash3"][0]):
            return AttentionMode("flash3", why, dense(flash_attn_3()))
        why += f"; flash4 would be faster: {PACKAGES['flash4'][1]}"
        return AttentionMode("cudnn", why, dense(sdpa(SDPBackend.CUDNN_ATTENTION)))
    return _flash2("the fastest exact kernel before Hopper")
