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

ORIGINS = {
    "flash3": "the flash_attn_interface package",
    "flash4": "the flash-attn-4 package",
    "cudnn": "cuDNN, through torch",
    "sageattn": "the sageattention package",
}
FLASH2_MODULE = "flash_attn.flash_attn_interface"
TRIAL_TOKENS = 256

# How wide a head may be, where a kernel takes few widths. The published model's are 128, the demo's 32.
HEAD_WIDTHS = {"flash4": packages.FLASH4_HEAD_WIDTHS}


@dataclass(frozen=True)
class BlockAttention:
    """The attention of a block. any_queries: see AttentionMode."""

    kernel: Kernel
    any_queries: bool

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        # A rank that holds no head (more sequence shards than heads) has nothing to compute.
        return self.kernel(q, k, v) if q.shape[2] else torch.zeros_like(q)


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

    @property
    def any_queries(self) -> bool:
        """Whether it takes queries of some tokens alone, with the keys of all; sparse attention goes by their places."""
        return self.name != SPARSE_ATTN_MODE

    def kernels(self, grid: Sequence[int], count: int) -> list[BlockAttention]:
        """The kernel of each of a transformer's `count` blocks."""
        own = BlockAttention(self.make(grid), self.any_queries)
        if self.blocks is None or self.elsewhere is None:
            return [own] * count
        others = self.elsewhere.kernels(grid, count)
        return [own if index in self.blocks else others[index] for index in range(count)]


def choose_attention(
    mode: str, device: torch.device, dtype: torch.dtype, sage_blocks: range | None = None, *, head_width: int = 128
) -> AttentionMode:
    """The kernel for a mode on this device and dtype. Only "flash" chooses; any other mode is honoured or refused.

    On a GPU the kernel is tried on a few tokens first: one that fails is passed over by "flash", which says so.

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
        kernel, reason = ssta.fastest_kernel(device, dtype, head_width)
        return AttentionMode(mode, reason, partial(ssta.SparseAttention, device=device, kernel=kernel))
    if device.type != "cuda":
        if mode == DEFAULT_ATTN_MODE:
            return AttentionMode("torch", "no GPU: torch's scaled_dot_product_attention", dense(sdpa()))
        raise InputError(f"--attn_mode {mode} needs a GPU, and this run is on a {device.type}; use flash or torch")
    gpu = Gpu(device, dtype, torch.cuda.get_device_capability(device), head_width)
    if mode == DEFAULT_ATTN_MODE:
        return _fastest(gpu)
    why_not = _obstacle(mode, gpu) or _failure(mode, gpu)
    if why_not:
        raise InputError(f"--attn_mode {mode}: {why_not}; use flash or torch")
    reason = f"as asked: {_origin(mode)}"
    if mode == "sageattn":
        return AttentionMode(mode, f"{reason}, INT8, not exact", _make(mode, gpu), sage_blocks, _fastest(gpu))
    return AttentionMode(mode, reason, _make(mode, gpu))


@dataclass(frozen=True)
class Gpu:
    """What a kernel is chosen for."""

    device: torch.device
    dtype: torch.dtype
    capability: tuple[int, int]
    head_width: int


def _unsuited(mode: str, gpu: Gpu) -> str | None:
    """Why a mode runs on no such GPU, whatever is installed."""
    major, minor = gpu.capability
    if gpu.dtype not in HALF:
        return f"it takes float16 and bfloat16, not {gpu.dtype}"
    if gpu.capability < AMPERE:
        return f"it needs compute capability 8.0, and this GPU has {major}.{minor}"
    if mode == "flash3" and major != HOPPER[0]:
        return f"its kernels are for Hopper alone (compute capability 9.x), and this GPU has {major}.{minor}"
    if mode == "flash4" and gpu.capability < HOPPER:
        return f"it needs a Hopper GPU or newer, and this one has compute capability {major}.{minor}"
    if gpu.head_width not in HEAD_WIDTHS.get(mode, (gpu.head_width,)):
        widths = ", ".join(map(str, HEAD_WIDTHS[mode]))
        return f"it takes heads that are {widths} wide, and this model's are {gpu.head_width}"
    if mode == "sageattn" and gpu.head_width > max(SAGE_HEAD_WIDTHS):
        return f"it takes heads up to {max(SAGE_HEAD_WIDTHS)} wide, and this model's are {gpu.head_width}"
    return None


def _obstacle(mode: str, gpu: Gpu) -> str | None:
    """Why a mode cannot run here, known without trying."""
    why_not = _unsuited(mode, gpu)
    if not why_not and mode in PACKAGES and not installed(PACKAGES[mode][0]):
        package, remedy = PACKAGES[mode]
        return f"the package {package} {packages.obstacle(package)} ({remedy})"
    return why_not


def assumed_attention(
    mode: str, capability: tuple[int, int] | None, dtype: torch.dtype, *, head_width: int = 128
) -> AttentionMode:
    """The name and reason of the kernel that a mode would take on a GPU that is not here, with all packages installed.

    capability: None where it is not known, as if of the oldest GPUs with flash kernels. InputError as choose_attention.
    """
    gpu = Gpu(torch.device("cuda"), dtype, capability or AMPERE, head_width)
    if mode in ("torch", SPARSE_ATTN_MODE):
        return AttentionMode(mode, "as asked", dense(sdpa()))
    if mode != DEFAULT_ATTN_MODE:
        why_not = capability and _unsuited(mode, gpu)
        if why_not:
            raise InputError(f"--attn_mode {mode}: {why_not}; use flash or torch")
        return AttentionMode(mode, "as asked, if it is installed there", dense(sdpa()))
    found = next((one for one in ("flash4", "flash2") if not _unsuited(one, gpu)), "torch")
    needs = f", with its package: {PACKAGES[found][1]}" if found in PACKAGES else ""
    return AttentionMode(found, f"the fastest exact kernel of such a card{needs}", dense(sdpa()))


def _has_flash2_package() -> bool:
    # flash-attn-4 puts a folder of the same name there, without the module that version 2 has.
    return installed(FLASH2_MODULE)


def _origin(mode: str) -> str:
    if mode == "flash2":
        return "the flash-attn package" if _has_flash2_package() else "torch's own FlashAttention-2"
    return ORIGINS[mode]


def _make(mode: str, gpu: Gpu) -> Callable[[Sequence[int]], Kernel]:
    if mode == "flash2" and not _has_flash2_package():
        return dense(sdpa(SDPBackend.FLASH_ATTENTION))
    makers: dict[str, Callable[[], Kernel]] = {
        "flash2": flash_attn_2,
        "flash3": flash_attn_3,
        "flash4": lambda: flash_attn_4(gpu.capability, gpu.head_width),
        "cudnn": lambda: sdpa(SDPBackend.CUDNN_ATTENTION),
        "sageattn": lambda: sageattention_kernel(gpu.head_width),
        "torch": sdpa,
    }
    return dense(makers[mode]())


def _failure(mode: str, gpu: Gpu) -> str | None:
    """Why a mode's kernel gives no attention here, from one short call; None where it does."""
    x = packages.trial_tokens(gpu.device, gpu.dtype, TRIAL_TOKENS, gpu.head_width)
    return packages.failure(lambda: _make(mode, gpu)(())(x, x, x), x)


def _fastest(gpu: Gpu) -> AttentionMode:
    """The fastest exact kernel of this GPU that runs; what fails is named in the reason. On Hopper flash4 is 1.2 times
    as fast as cuDNN, and that 1.6 times as fast as FlashAttention-2."""
    obstacle = _obstacle("flash2", gpu)
    if obstacle:
        return AttentionMode("torch", f"no flash kernel here: {obstacle}", dense(sdpa()))
    hopper = gpu.capability >= HOPPER
    why = "the fastest exact kernel that is installed" if hopper else "the fastest exact kernel before Hopper"
    remarks: list[str] = []
    for mode in ("flash4", "flash3", "cudnn", "flash2") if hopper else ("flash2",):
        why_not = _obstacle(mode, gpu) or _failure(mode, gpu)
        if not why_not:
            if mode == "flash2":
                why += f": {_origin(mode)}"
            if mode == "cudnn" and not installed(PACKAGES["flash4"][0]) and not remarks:
                remarks.append(f"flash4 would be faster: {PACKAGES['flash4'][1]}")
            return AttentionMode(mode, "; ".join([why, *remarks]), _make(mode, gpu))
        if mode not in PACKAGES or packages.obstacle(PACKAGES[mode][0]) != packages.ABSENT:
            remarks.append(f"{mode}: {why_not}")
    return AttentionMode("torch", "; ".join(["no flash kernel runs here", *remarks]), dense(sdpa()))
