"""What the ranks of a layout send each other."""

import pytest
import torch
from ranks import run_ranks

from hunyuan_staged.parallel.layout import make_layout, pack_heads, split_evenly
from hunyuan_staged.parallel.world import World


def exchange(world: World, total: int, heads: int, length: int) -> dict:
    """What one rank sees of a scatter, both all-to-alls and a gather, on tensors that every rank draws alike."""
    draw = torch.Generator().manual_seed(3)
    layout = make_layout(world, 1)
    tokens = torch.randn(1, total, 6, generator=draw)
    qkv, text = torch.randn(3, total, heads, 5, generator=draw), torch.randn(3, length, heads, 5, generator=draw)
    packed = pack_heads(layout.scatter(qkv).unbind(0), layout.head_shares(heads))
    joint = layout.tokens_to_heads(packed, text.transpose(0, 1), total).transpose(0, 1)
    video, back = layout.heads_to_tokens(joint[0], heads, total)
    sizes = split_evenly(heads, world.size)
    first = sum(sizes[: world.rank])
    mine = slice(first, first + sizes[world.rank])
    return {
        "gathered": torch.equal(layout.gather(layout.scatter(tokens), total), tokens),
        "heads": torch.equal(joint, torch.cat([qkv, text], dim=1)[:, :, mine]),
        "video": torch.equal(video, layout.scatter(qkv[0], dim=0)),
        "text": torch.equal(back, text[0]),
    }


@pytest.mark.parametrize(
    ("size", "total", "heads", "length"), [(2, 7, 3, 4), (3, 8, 4, 1), (4, 10, 3, 5), (5, 11, 16, 2), (8, 17, 16, 3)]
)
def test_exchanges_lose_nothing_when_nothing_divides(size, total, heads, length):
    for rank, seen in enumerate(run_ranks(size, exchange, total, heads, length)):
        assert all(seen.values()), (rank, seen)


def rows_of(world: World) -> list:
    layout = make_layout(world, 2)
    mine = torch.full((1, 2), float(layout.branch))
    return [layout.my_branches(2), [part.tolist() for part in layout.gather_branches(mine)], layout.shard]


def test_guidance_branches_run_side_by_side():
    seen = run_ranks(4, rows_of)
    both = [[[0.0, 0.0]], [[1.0, 1.0]]]
    assert seen == [[[0], both, 0], [[0], both, 1], [[1], both, 0], [[1], both, 1]]
