"""SSTA against the official numbers, its lists of blocks, and every kernel that computes it."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from hunyuan_staged.attention import ssta
from hunyuan_staged.attention.choose import choose_attention

CPU = torch.device("cpu")
GOLDEN_GRID, GOLDEN_TILE, GOLDEN_TOP_K = (12, 12, 16), (4, 4, 4), 4
GOLDEN_TEXT = 64  # the first text block; the second holds padding alone, and only looks at itself


def golden(golden_folder) -> dict[str, torch.Tensor]:
    """q, k, v, output [S + 64, H, D] and the block mask [H, 36, 36] of the video."""
    tensors = load_file(golden_folder / "ssta_12x12x16.safetensors")
    length = 12 * 12 * 16 + GOLDEN_TEXT
    found = {n: tensors[n][0].float().transpose(0, 1)[:length].contiguous() for n in ("q", "k", "v", "output")}
    return found | {"mask": tensors["block_mask"][0, :, :36, :36].bool()}


def attention(kernel: str, device: torch.device = CPU) -> ssta.SparseAttention:
    return ssta.SparseAttention(GOLDEN_GRID, device, kernel, tile=GOLDEN_TILE, top_k=GOLDEN_TOP_K)


def distance(ours: torch.Tensor, reference: torch.Tensor) -> float:
    return float((ours - reference).norm() / reference.norm())


def test_the_mask_is_the_official_one(golden_folder):
    numbers, ours = golden(golden_folder), attention("torch")
    q, k = (ours.tiles.gather(numbers[n]) for n in "qk")
    assert torch.equal(ssta.block_mask(q, k, ours.tiles, ours.window, ours.top_k), numbers["mask"])


def test_the_output_is_the_official_one(golden_folder):
    numbers = golden(golden_folder)
    out = attention("torch")(*(numbers[n][None] for n in "qkv"))
    assert distance(out[0], numbers["output"]) < 1e-5


def test_a_window_at_the_border_moves_inside():
    tiles = ssta.SstaGrid((8, 8, 20), (4, 4, 4), CPU)
    window = tiles.window((3, 3, 3))
    assert tiles.counts == (2, 2, 5)
    assert window.sum(1).unique().tolist() == [2 * 2 * 3]
    assert window[0].nonzero().flatten().tolist() == [0, 1, 2, 5, 6, 7, 10, 11, 12, 15, 16, 17]


def test_a_single_frame_has_tiles_and_a_window_of_its_own():
    """3,600 tokens of 45 x 80 in 12 tiles of 384, not in 60 of 6 x 8 x 8 that are empty but for a sixth."""
    image = ssta.SparseAttention((1, 45, 80), CPU, "torch")
    assert (image.tiles.counts, image.tiles.size, image.tiles.number) == ((1, 3, 4), 384, 12)
    assert torch.equal(image.window, torch.eye(12, dtype=torch.bool))
    video = ssta.SparseAttention((2, 45, 80), CPU, "torch")
    assert (video.tiles.counts, video.tiles.size) == ((1, 6, 10), 384)
    assert video.window.sum(1).unique().tolist() == [9]


def test_tiling_pads_with_zeros_and_comes_back():
    tiles = ssta.SstaGrid((3, 5, 4), (2, 4, 4), CPU)
    x = torch.randn(60 + 7, 2, 3)
    tiled = tiles.gather(x)
    assert tiles.counts == (2, 2, 1) and tiled.shape == (4 * 32 + 7, 2, 3)
    assert torch.equal(tiles.scatter(tiled), x)
    assert (tiled[:128].abs().sum((1, 2)) == 0).sum() == 128 - 60
    # Frames 0 and 1, row 4 open the second tile.
    assert torch.equal(tiled[32:36], x[16:20])


@pytest.mark.parametrize(("frames", "top_k"), [(13, 32), (31, 32), (32, 64)])
def test_short_videos_choose_half_as_many(frames, top_k):
    assert ssta.top_k_of(frames) == top_k


def test_lists_name_exactly_the_blocks_of_the_mask():
    mask = torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    counts, indices = ssta.block_lists(mask, parts=3, text_blocks=2, rows=1)
    assert counts.dtype == indices.dtype == torch.int32
    assert counts.shape == (1, 3, 7) and indices.shape == (1, 3, 7, 20)
    whole = F.pad(mask.repeat_interleave(3, dim=2), (0, 2, 0, 1), value=True)
    for head in range(3):
        for row in range(7):
            listed = indices[0, head, row, : counts[0, head, row]]
            assert listed.tolist() == whole[head, row].nonzero().flatten().tolist()


def test_the_mode_runs_on_a_cpu_and_says_what_it_is():
    mode = choose_attention("flex-block-attn", CPU, torch.float32)
    assert (mode.name, mode.reason) == ("flex-block-attn", "no GPU: tile by tile in torch, slow")
    q, k, v = torch.randn(3, 1, 7 * 9 * 9 + 5, 2, 8, generator=torch.Generator().manual_seed(1))
    # 2 x 2 x 2 tiles: everything is in the window, so it is dense attention with the padding's zeros beside it.
    (attend,) = mode.kernels((7, 9, 9), 1)
    tiles = ssta.SstaGrid((7, 9, 9), ssta.TILE, CPU)
    padded = (tiles.gather(x[0]).transpose(0, 1) for x in (q, k, v))
    dense = tiles.scatter(F.scaled_dot_product_attention(*padded).transpose(0, 1))
    assert distance(attend(q, k, v)[0], dense) < 1e-5


def dense_by_blocks(q, k, v, query_block: int, key_block: int, mask: torch.Tensor) -> torch.Tensor:
    """What the flex_block_attn package documents: q, k, v [1, H, S, D], mask [1, H, S / block, S / block]."""
    assert query_block == key_block and q.shape[2] == mask.shape[2] * query_block
    tokens = mask.repeat_interleave(query_block, 2).repeat_interleave(key_block, 3)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=tokens)


def test_the_package_is_called_as_it_documents(golden_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "flex_block_attn", types.SimpleNamespace(flex_block_attn_func=dense_by_blocks))
    numbers = golden(golden_folder)
    out = attention("flex_block_attn")(*(numbers[n][None] for n in "qkv"))
    assert distance(out[0], numbers["output"]) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["flash4", "flex"])
@pytest.mark.parametrize("text", [1, 200, 384])
def test_every_core_agrees_with_torch_on_the_gpu(kernel, text):
    """A grid that needs padding, and text whose last block is ragged."""
    if kernel == "flash4":
        pytest.importorskip("flash_attn.cute", reason="flash-attn-4 is not installed")
    grid = (13, 30, 26)
    draw = torch.Generator("cuda").manual_seed(2)
    tokens = grid[0] * grid[1] * grid[2] + text
    q, k, v = torch.randn(3, 1, tokens, 2, 128, device="cuda", dtype=torch.bfloat16, generator=draw)
    ours, plain = (
        ssta.SparseAttention(grid, torch.device("cuda"), name, top_k=4)(q, k, v).float() for name in (kernel, "torch")
    )
    assert distance(ours, plain) < 5e-3
