"""What the ranks of a layout send each other."""

import torch
from ranks import layouts

from hunyuan_staged.parallel.heads import attend, pack, split_heads
from hunyuan_staged.parallel.layout import Layout, make_layout
from hunyuan_staged.parallel.world import World


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention [1, N, n, D], a query and a head at a time, so that its bits depend on nothing but its numbers."""
    out = torch.empty_like(q)
    for head in range(q.shape[2]):
        for token in range(q.shape[1]):
            weights = (k[0, :, head] * q[0, token, head]).sum(dim=1).softmax(dim=0)
            out[0, token, head] = (weights[:, None] * v[0, :, head]).sum(dim=0)
    return out


CASES = [(2, 7, 3, 4), (3, 8, 7, 1), (4, 10, 8, 5), (5, 11, 16, 2), (6, 13, 16, 2), (8, 17, 4, 3)]


def agree(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """To the bit on a CPU; a GPU adds up five numbers in an order that their strides decide."""
    return torch.allclose(found, wanted, rtol=1e-5, atol=1e-6) if found.is_cuda else torch.equal(found, wanted)


def exchange(
    layout: Layout, device: torch.device, total: int, heads: int, length: int, by_queries: bool
) -> dict[str, bool]:
    """What one rank sees of a scatter, attention and a gather, on tensors that every rank draws alike."""
    draw = torch.Generator().manual_seed(3)
    tokens = torch.randn(1, total, 6, generator=draw).to(device)
    qkv, text = torch.randn(3, total, heads, 5, generator=draw), torch.randn(3, length, heads, 5, generator=draw)
    qkv, text = qkv.to(device), text.to(device)
    split = split_heads(heads, layout.shards, by_queries=by_queries)
    mine = [layout.scatter(x, dim=0) for x in qkv]
    sent, text_qkv = pack(mine, list(text), split.shares, split.left)
    video, back = attend(layout, split, sent, text_qkv, total, exact)
    whole = exact(*torch.cat([qkv, text], dim=1)[:, None])[0]
    return {
        "gathered": torch.equal(layout.gather(layout.scatter(tokens), total), tokens),
        "freed": sent == [],
        "video": agree(video, layout.scatter(whole[:total], dim=0)),
        "text": agree(back, whole[total:]),
    }


def exchanges(world: World, sizes: tuple[int, ...]) -> dict[tuple[int, bool], dict[str, bool]]:
    """By the number of shards, and whether heads are left for all."""
    found = {}
    for (_, size), layout in layouts(world, [(1, size) for size in sizes]):
        (numbers,) = [numbers for shards, *numbers in CASES if shards == size]
        found |= {
            (size, by_queries): exchange(layout, world.device, *numbers, by_queries) for by_queries in (True, False)
        }
    return found


def test_sharded_attention_has_the_bits_of_one_process(ranks):
    sizes = ranks.up_to(size for size, *_ in CASES)
    for rank, found in enumerate(ranks.run(max(sizes), exchanges, sizes)):
        assert len(found) == 2 * sum(rank < size for size in sizes)
        for case, seen in found.items():
            assert all(seen.values()), (rank, case, seen)


def rows_of(world: World) -> list:
    layout = make_layout(world, 2)
    mine = torch.full((1, 2), float(layout.branch), device=world.device)
    return [layout.my_branches(2), [part.tolist() for part in layout.gather_branches(mine)], layout.shard]


def test_guidance_branches_run_side_by_side(ranks):
    seen = ranks.run(4, rows_of)
    both = [[[0.0, 0.0]], [[1.0, 1.0]]]
    assert seen == [[[0], both, 0], [[0], both, 1], [[1], both, 0], [[1], both, 1]]
