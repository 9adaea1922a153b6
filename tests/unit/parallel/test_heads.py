"""Which heads a rank attends with, and how they are packed for it."""

import pytest
import torch

from hunyuan_staged.parallel.heads import HeadSplit, attend, pack, pack_heads, split_heads
from hunyuan_staged.parallel.layout import Layout, LoneShare, split_evenly


@pytest.mark.parametrize(
    ("heads", "shards", "by_queries", "shares", "left"),
    [
        (16, 4, True, (4,) * 4, 0),
        (16, 3, True, (5,) * 3, 1),
        (16, 6, True, (2,) * 6, 4),
        (4, 5, True, (0,) * 5, 4),
        (16, 3, False, (6, 5, 5), 0),
        (4, 5, False, (1, 1, 1, 1, 0), 0),
    ],
)
def test_every_head_has_its_place(heads, shards, by_queries, shares, left):
    split = split_heads(heads, shards, by_queries=by_queries)
    assert split == HeadSplit(shares, left)
    assert sum(shares) + left == heads


@pytest.mark.parametrize(
    ("heads", "shards", "by_queries", "said"),
    [
        (16, 8, True, ""),
        (16, 4, False, ""),
        (16, 3, True, ", 5 heads a shard, and 1 head that each shard attends with for its own tokens"),
        (4, 6, True, ", 0 heads a shard, and 4 heads that each shard attends with for its own tokens"),
        (16, 3, False, ", 5 or 6 heads a shard, since this attention takes whole sequences"),
    ],
)
def test_heads_that_do_not_divide_are_told(heads, shards, by_queries, said):
    assert split_heads(heads, shards, by_queries=by_queries).describe() == said


@pytest.mark.parametrize(("heads", "ranks"), [(4, 2), (4, 3), (2, 3)])
def test_what_is_sent_lies_rank_after_rank(heads, ranks):
    q, k, v = torch.arange(3 * 2 * heads * 5.0).view(3, 2, heads, 5)
    shares = split_evenly(heads, ranks)
    packed = pack_heads([q, k, v], shares)
    parts = zip(*(x.split(shares, dim=1) for x in (q, k, v)), strict=True)
    assert torch.equal(packed, torch.cat([torch.stack(part, dim=1).flatten() for part in parts]))


class Alone(Layout):
    """One of several ranks, that gets back what it sends."""

    def all_to_all(self, incoming, outgoing, received, sent):
        incoming.copy_(outgoing)


def allocated(function) -> int:
    """Bytes that a call allocates in all."""
    with torch.profiler.profile(profile_memory=True) as profiled:
        function()
    return sum(e.self_cpu_memory_usage for e in profiled.key_averages() if e.self_cpu_memory_usage > 0)


def test_even_heads_are_copied_once_on_the_way_there_and_once_on_the_way_back():
    """And received without a copy: q, k and v are views of what came, the text behind the video."""
    draw = torch.Generator().manual_seed(1)
    video, text = (torch.randn(3, n, 4, 64, generator=draw).unbind(0) for n in (600, 3))
    split, seen = split_heads(4, 2, by_queries=True), []
    sent, joint_text = pack(video, text, split.shares, split.left)
    payload, small = 3 * video[0].nbytes, 4096
    assert [x.nbytes for x in sent] == [payload]
    assert allocated(lambda: pack(video, text, split.shares, split.left)) <= payload + joint_text.nbytes + small
    result = torch.zeros(1, 1203, 2, 64)

    def attention(q, k, v):
        seen.append((q._base is not None, torch.equal(q[0, 1200:], joint_text[:, 0, :2])))
        return result

    # Received q, k, v and the output's way back, each once, and the output put together; the text is small.
    assert allocated(lambda: attend(Alone(shards=2), split, sent, joint_text, 1200, attention)) <= (
        payload + 2 * video[0].nbytes + 40 * joint_text.nbytes
    )
    assert seen == [(True, True)] and sent == []


@pytest.mark.gpu
def test_on_a_gpu_left_heads_run_beside_the_others_without_a_race():
    """The memory of two streams is used again and again; each time the bits are those of one stream."""
    device, total, length = torch.device("cuda"), 3 * 1500, 40
    draw = torch.Generator(device).manual_seed(1)
    layout, split = LoneShare(shards=3), split_heads(16, 3, by_queries=True)

    def attention(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    def attended(parts: torch.Tensor, own: int, left: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the heads that this rank has for itself, or of those that are left."""
        video, text = (x.unbind(0) for x in (parts[:, : total // 3], parts[:, total // 3 :]))
        only = HeadSplit((own,) * 3, left)
        packed, joint_text = pack(video, text, only.shares, only.left)
        return attend(layout, only, packed, joint_text, total, attention)

    for _ in range(50):
        parts = torch.randn(3, total // 3 + length, 16, 128, generator=draw, device=device, dtype=torch.bfloat16)
        both = attended(parts, split.shares[0], split.left)
        torch.cuda.synchronize()
        apart = attended(parts[:, :, :15], 5, 0), attended(parts[:, :, 15:], 0, 1)
        torch.cuda.synchronize()
        for found, *expected in zip(both, *apart, strict=True):
            assert torch.equal(found, torch.cat(expected, dim=1))
