"""Each attention kernel of a GPU over shards: odd tokens, and heads of the published width that do not divide."""

import pytest
import torch
from ranks import layouts

from hunyuan_staged.attention.choose import choose_attention
from hunyuan_staged.attention.modes import ATTN_MODES, DEFAULT_ATTN_MODE, SPARSE_ATTN_MODE
from hunyuan_staged.errors import InputError
from hunyuan_staged.parallel.heads import attend, pack, split_heads
from hunyuan_staged.parallel.world import World

GRID, LENGTH, HEADS, WIDTH = (5, 9, 17), 37, 5, 128  # 765 tokens


def attentions(world: World) -> dict[str, float]:
    """By mode that runs here: how far a rank's share is from the whole, which it computes, too."""
    draw = torch.Generator().manual_seed(2)
    total = GRID[0] * GRID[1] * GRID[2]
    q, k, v = torch.randn(3, total + LENGTH, HEADS, WIDTH, generator=draw).to(world.device, torch.bfloat16)
    ((_, layout),) = layouts(world, [(1, world.size)])
    found = {}
    for mode in ATTN_MODES:
        try:
            chosen = choose_attention(mode, world.device, torch.bfloat16, head_width=WIDTH)
        except InputError:  # its package is not there
            continue
        (kernel,) = chosen.kernels(GRID, 1)
        split = split_heads(HEADS, layout.shards, by_queries=chosen.any_queries)
        own = [layout.scatter(x[:total], dim=0) for x in (q, k, v)]
        sent, text = pack(own, [x[total:] for x in (q, k, v)], split.shares, split.left)
        video, words = attend(layout, split, sent, text, total, kernel)
        whole = kernel(q[None], k[None], v[None])[0]
        wanted = torch.cat([layout.scatter(whole[:total], dim=0), whole[total:]]).float()
        found[mode] = float((torch.cat([video, words]).float() - wanted).norm() / wanted.norm())
    return found


@pytest.mark.parametrize("ranks", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
def test_kernels_give_a_share_of_heads_and_queries_as_they_give_the_whole(ranks):
    """bfloat16 keeps 8 bits, so that sums in another order are some 0.2% off; sageattn quantizes blocks of other tokens."""
    for found in ranks.run(2, attentions):
        assert {DEFAULT_ATTN_MODE, SPARSE_ATTN_MODE, "torch"} <= found.keys()
        assert all(apart < (0.05 if mode == "sageattn" else 0.01) for mode, apart in found.items()), found
