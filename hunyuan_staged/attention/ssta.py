"""SSTA, selective and sliding tile attention: each tile of the video attends to its neighbours and to the tiles that
matter most to it. Which blocks that are follows from q and k, anew in every block and step, on the device.

Source: the official implementation, whose numbers are in tests/golden/ssta_12x12x16; the published weights
`_distilled_sparse` are made for it.

Letters: S video tokens, L text tokens, N tiles, B tokens of a tile, P = N * B tiled positions, R rows of blocks
(N plus the text's), h heads, D head width.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from hunyuan_staged.attention import packages
from hunyuan_staged.attention.packages import (
    FLASH4_HEAD_WIDTHS,
    FLASH4_PACKAGE,
    HALF,
    HOPPER,
    output_alone,
    silence_flash4,
)

TILE = (6, 8, 8)  # frames, rows, columns of the latents
WINDOW = (3, 3, 3)  # tiles around each tile
IMAGE_TILE, IMAGE_WINDOW = (1, 16, 24), (1, 1, 1)  # of a single frame (official code: get_image_tile)
TOP_K = 64  # tiles by importance beside the window; half of it for short videos
SHORT_VIDEO = 31  # latent frames
SIMILARITY_WEIGHT = 0.7  # of the importance; the rest counts against tiles that resemble all others
TRIAL_GRID, TRIAL_TEXT = (12, 16, 16), 200  # tokens of a short call; whole tiles, and text whose last block is ragged
FLASH4_KEYS = 128  # keys of a block in flash-attn-4's kernel on Hopper; a tile is several of them

Grid = tuple[int, int, int]
SstaKernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def top_k_of(frames: int) -> int:
    """How many tiles are chosen by importance in a video of so many latent frames."""
    return TOP_K // 2 if frames <= SHORT_VIDEO else TOP_K


def attended_share(grid: Sequence[int]) -> float:
    """The share of a video's tiles that a tile attends to at most; grid: latent frames, rows, columns."""
    tile, window = (IMAGE_TILE, IMAGE_WINDOW) if grid[0] == 1 else (TILE, WINDOW)
    number = math.prod(-(-n // t) for n, t in zip(grid, tile, strict=True))
    return min(1.0, (math.prod(window) + top_k_of(grid[0])) / number)


class SstaGrid:
    """A grid of video tokens cut into tiles; the grid is padded with zeros to whole tiles, as in the official code."""

    def __init__(self, grid: Grid, tile: Grid, device: torch.device) -> None:
        self.counts = tuple(-(-n // t) for n, t in zip(grid, tile, strict=True))
        self.number, self.size = math.prod(self.counts), math.prod(tile)
        self.tokens = math.prod(grid)
        axes = torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")
        outer = [axis // t for axis, t in zip(axes, tile, strict=True)]
        inner = [axis % t for axis, t in zip(axes, tile, strict=True)]
        which = (outer[0] * self.counts[1] + outer[1]) * self.counts[2] + outer[2]
        where = (inner[0] * tile[1] + inner[1]) * tile[2] + inner[2]
        self.place = (which * self.size + where).flatten().to(device)  # [S]: the tiled position of each token

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """Video tokens in tile order with zeros in the padding, text behind: [S + L, h, D] → [P + L, h, D]."""
        text = x[self.tokens :]
        out = x.new_zeros(self.number * self.size + len(text), *x.shape[1:])
        out[self.number * self.size :] = text
        return out.index_copy_(0, self.place, x[: self.tokens])

    def scatter(self, x: torch.Tensor) -> torch.Tensor:
        """The way back: [P + L, h, D] → [S + L, h, D]."""
        return torch.cat([x.index_select(0, self.place), x[self.number * self.size :]])

    def window(self, size: Grid) -> torch.Tensor:
        """[N, N] bool: the tiles around each tile; a window that would stick out is moved inside."""
        axes = torch.meshgrid(*(torch.arange(n, device=self.place.device) for n in self.counts), indexing="ij")
        near = torch.ones(self.number, self.number, dtype=torch.bool, device=self.place.device)
        for axis, count, width in zip(axes, self.counts, size, strict=True):
            position = axis.flatten()
            center = position.clamp(width // 2, max(width // 2, count - 1 - width // 2))
            near &= (position[None] - center[:, None]).abs() <= width // 2
        return near


def block_mask(q: torch.Tensor, k: torch.Tensor, tiles: SstaGrid, window: torch.Tensor, top_k: int) -> torch.Tensor:
    """[h, N, N] bool: which tiles of keys each tile of queries attends to. q, k [P + L, h, D] in tile order.

    The window, or the top_k tiles by importance: 0.7 x the similarity of the mean query to the mean key, less 0.3 x the
    mean similarity of that key to the other tiles' keys; similarities are cosines, mapped to [0, 1].
    """
    queries, keys = (
        F.normalize(
            x[: tiles.number * tiles.size].unflatten(0, (tiles.number, tiles.size)).mean(1, dtype=torch.float32), dim=-1
        ).transpose(0, 1)
        for x in (q, k)
    )
    similarity = (queries @ keys.mT + 1) / 2
    among = (keys @ keys.mT + 1) / 2
    redundancy = (among.sum(1) - among.diagonal(dim1=1, dim2=2)) / max(1, tiles.number - 1)
    importance = SIMILARITY_WEIGHT * similarity - (1 - SIMILARITY_WEIGHT) * redundancy[:, None]
    chosen = importance.topk(min(top_k, tiles.number), dim=-1).indices
    return window.expand_as(importance).scatter(-1, chosen, torch.ones_like(chosen, dtype=torch.bool))


def block_lists(mask: torch.Tensor, parts: int, text_blocks: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(counts [1, h, R], indices [1, h, R, N * parts + text_blocks]) int32 of the key blocks that each row attends to.

    mask [h, N, N] bool. Each tile of keys is `parts` blocks; text_blocks follow, which everyone attends to, as the
    `rows` of text queries attend to everyone. Indices ascend, so that the ragged last block is always listed last.
    """
    heads, number = mask.shape[:2]
    device, width = mask.device, number * parts + text_blocks
    here = mask.cumsum(-1, dtype=torch.int32)
    kept = here[..., -1:]  # [h, N, 1]
    # Compact: the n-th kept tile goes to slot n, all others to a slot too many, which is cut off.
    slot = torch.where(mask, here - 1, number).long()
    tile = torch.arange(number, dtype=torch.int32, device=device).expand_as(mask)
    listed = torch.zeros(heads, number, number + 1, dtype=torch.int32, device=device).scatter_(-1, slot, tile)
    part = torch.arange(parts, dtype=torch.int32, device=device)
    blocks = (listed[..., :number, None] * parts + part).flatten(-2)
    text = torch.arange(text_blocks, dtype=torch.int32, device=device)
    everything = torch.arange(width, dtype=torch.int32, device=device)
    indices = torch.zeros(heads, number, width, dtype=torch.int32, device=device)
    indices[..., : number * parts] = blocks
    place = (kept * parts + text).long()
    indices.scatter_(-1, place, (number * parts + text).expand_as(place).contiguous())
    indices = torch.cat([indices, everything.expand(heads, rows, width)], dim=1)
    counts = kept[..., 0] * parts + text_blocks
    counts = torch.cat([counts, torch.full((heads, rows), width, dtype=torch.int32, device=device)], dim=1)
    return counts[None].to(torch.int32), indices[None]


def _blocks(tokens: int, size: int) -> int:
    return -(-tokens // size)


def gathered(tiles: SstaGrid) -> SstaKernel:
    """Plain torch, anywhere: for each head and each tile of queries, dense attention over the keys that are kept."""

    def kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        edge, out = tiles.number * tiles.size, torch.empty_like(q)
        everyone = torch.ones(len(q) - edge, dtype=torch.bool, device=q.device)
        for head in range(q.shape[1]):
            query, key, value = (x[None, :, head] for x in (q, k, v))
            for row, kept in enumerate(mask[head].repeat_interleave(tiles.size, dim=1)):
                keep, rows = torch.cat([kept, everyone]), slice(row * tiles.size, (row + 1) * tiles.size)
                out[rows, head] = F.scaled_dot_product_attention(query[:, rows], key[:, keep], value[:, keep])[0]
            out[edge:, head] = F.scaled_dot_product_attention(query[:, edge:], key, value)[0]
        return out

    return kernel


def flash4(tiles: SstaGrid) -> SstaKernel:
    """flash-attn-4's block-sparse kernel. The end of the text is the end of the sequence, so nothing needs masking."""
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
    from flash_attn.cute.interface import flash_attn_func

    silence_flash4()
    parts = tiles.size // FLASH4_KEYS

    def kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        text = len(q) - tiles.number * tiles.size
        counts, indices = block_lists(mask, parts, _blocks(text, FLASH4_KEYS), _blocks(text, tiles.size))
        # All are whole blocks; the kernel wants a list of partial ones, too, and this one is empty.
        none, nothing = torch.zeros_like(counts), indices.new_zeros(*indices.shape[:3], 1)
        blocks = BlockSparseTensorsTorch(none, nothing, counts, indices, block_size=(tiles.size, FLASH4_KEYS))
        return output_alone(flash_attn_func(q[None], k[None], v[None], block_sparse_tensors=blocks))[0]

    return kernel


def flex(tiles: SstaGrid) -> SstaKernel:
    """torch's flex_attention, compiled to a Triton kernel on the GPU."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)

    def kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        length = len(q)
        text = _blocks(length - tiles.number * tiles.size, tiles.size)
        counts, indices = block_lists(mask, 1, text, text)
        rows = indices.shape[2]

        def inside(batch: Any, head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            return key < length

        # Whole tiles need no mask; the text is treated as partial, since its last block is ragged.
        whole = (counts - text).contiguous()
        ragged = torch.full_like(counts, text)
        last = torch.arange(rows - text, rows, dtype=torch.int32, device=q.device)
        partial = torch.zeros_like(indices)
        partial[..., :text] = last
        blocks = BlockMask.from_kv_blocks(
            ragged, partial, whole, indices, BLOCK_SIZE=tiles.size, mask_mod=inside, seq_lengths=(length, length)
        )
        query, key, value = (x.transpose(0, 1)[None] for x in (q, k, v))
        return compiled(query, key, value, block_mask=blocks)[0].transpose(0, 1)

    return kernel


def flex_block_attn(tiles: SstaGrid) -> SstaKernel:
    """The flex_block_attn package, which takes whole blocks alone: the text is padded by repeating its last token."""
    from flex_block_attn import flex_block_attn_func

    def kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        length = len(q)
        text = _blocks(length - tiles.number * tiles.size, tiles.size)
        missing = (tiles.number + text) * tiles.size - length
        padded = (torch.cat([x, x[-1:].expand(missing, -1, -1)]).transpose(0, 1)[None] for x in (q, k, v))
        whole = F.pad(mask, (0, text, 0, text), value=True)
        out = flex_block_attn_func(*(x.contiguous() for x in padded), tiles.size, tiles.size, whole[None])
        return out[0].transpose(0, 1)[:length]

    return kernel


KERNELS: dict[str, Callable[[SstaGrid], SstaKernel]] = {
    "flex_block_attn": flex_block_attn,
    "flash4": flash4,
    "flex": flex,
    "torch": gathered,
}


def fastest_kernel(device: torch.device, dtype: torch.dtype, head_width: int) -> tuple[str, str]:
    """(name in KERNELS, reason) of what computes SSTA on this device, in this dtype, with heads so wide.

    A package that does not load, or whose kernel fails in a short call, is passed over, and the reason says so.
    """
    if device.type != "cuda":
        return "torch", "no GPU: tile by tile in torch, slow"
    candidates = [("flex_block_attn", "flex_block_attn", "the flex_block_attn package is installed")]
    # The kernel's blocks of 128 keys are Hopper's; elsewhere it was never run.
    takes = dtype in HALF and head_width in FLASH4_HEAD_WIDTHS
    if takes and torch.cuda.get_device_capability(device)[0] == HOPPER[0]:
        candidates.append(("flash4", FLASH4_PACKAGE, "flash-attn-4 over the blocks that are kept"))
    remarks: list[str] = []
    for kernel, package, reason in candidates:
        why_not = packages.obstacle(package)
        if why_not == packages.ABSENT:
            continue
        why_not = f"the package {package} {why_not}" if why_not else _failure(kernel, device, dtype, head_width)
        if not why_not:
            return kernel, "; ".join([reason, *remarks])
        remarks.append(f"{kernel}: {why_not}")
    return "flex", "; ".join(["torch's flex_attention over the blocks that are kept", *remarks])


def _failure(kernel: str, device: torch.device, dtype: torch.dtype, head_width: int) -> str | None:
    """Why a kernel gives no attention here, from one short call; None where it does."""
    x = packages.trial_tokens(device, dtype, math.prod(TRIAL_GRID) + TRIAL_TEXT, head_width)
    return packages.failure(lambda: SparseAttention(TRIAL_GRID, x.device, kernel)(x, x, x), x)


class SparseAttention:
    """attention(q, k, v) over one grid: [1, S + L, h, D] each → [1, S + L, h, D]."""

    def __init__(
        self,
        grid: Sequence[int],
        device: torch.device,
        kernel: str,
        *,
        tile: Grid | None = None,
        window: Grid | None = None,
        top_k: int | None = None,
    ) -> None:
        frames, rows, columns = grid
        single = frames == 1
        self.tiles = SstaGrid((frames, rows, columns), tile or (IMAGE_TILE if single else TILE), device)
        self.window = self.tiles.window(window or (IMAGE_WINDOW if single else WINDOW))
        self.top_k = top_k_of(frames) if top_k is None else top_k
        self.kernel = KERNELS[kernel](self.tiles)

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (self.tiles.gather(x[0]) for x in (q, k, v))
        mask = block_mask(q, k, self.tiles, self.window, self.top_k)
        return self.tiles.scatter(self.kernel(q, k, v, mask))[None]
