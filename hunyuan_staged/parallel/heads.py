"""Attention of a sequence that is split over ranks (Ulysses): for attention, token shards with all heads become whole
sequences with a share of the heads.

Heads that are left over where they do not divide are everybody's: each rank computes them for the queries of its own
tokens, so that only their k and v travel, and nothing on the way back.

Letters: S video tokens of the whole video, s of this rank's shard; L text tokens; H heads, n those of an exchange on this
rank; D head width.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache

import torch

from hunyuan_staged.parallel.layout import Layout, split_evenly

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class HeadSplit:
    """Which heads a rank attends with. shares: how many heads each rank has for itself, in the heads' order; left: how many
    are left for all ranks, the last ones."""

    shares: tuple[int, ...]
    left: int

    def describe(self) -> str:
        """What to say behind a layout of heads that do not divide; nothing where they do."""
        least, most = min(self.shares), max(self.shares)
        if self.left:
            heads = f"{self.left} head{'s' * (self.left > 1)}"
            return f", {most} heads a shard, and {heads} that each shard attends with for its own tokens"
        return f", {least} or {most} heads a shard, since this attention takes whole sequences" if least < most else ""


def split_heads(heads: int, shards: int, *, by_queries: bool) -> HeadSplit:
    """The heads of each of so many ranks. by_queries: attention takes any queries, not the whole sequence's alone; else no
    head is left over, and some ranks have one more."""
    left = heads % shards if by_queries else 0
    return HeadSplit(tuple(split_evenly(heads - left, shards)), left)


def pack_heads(parts: Sequence[torch.Tensor], shares: Sequence[int]) -> torch.Tensor:
    """What an exchange of tokens for heads sends, flat: to each rank in turn [s, len(parts), n, D], its heads of all parts.

    parts: [s, sum(shares), D] each. shares: the heads of each rank, as even as can be. Where they are even it is one copy,
    which a compiler writes in the place of the parts themselves.
    """
    pieces, first = [], 0
    larger = list(shares).count(shares[0])
    for share, ranks in ((shares[0], larger), (shares[-1], len(shares) - larger)):
        if ranks:
            heads = slice(first, first + ranks * share)
            first = heads.stop
            by_rank = [part[:, heads].unflatten(1, (ranks, share)).transpose(0, 1)[:, :, None] for part in parts]
            pieces.append(torch.cat(by_rank, dim=2).flatten())
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0]


def pack(
    video: Sequence[torch.Tensor], text: Sequence[torch.Tensor], shares: Sequence[int], left: int
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """What the exchanges send, and the text's q, k, v [L, 3, H, D]. video: q, k, v [s, H, D]; text: [L, H, D] each.

    shares, left: a HeadSplit, in a compiler's words. What is sent: pack_heads of the ranks' own heads, if there are any. Of
    heads that are left over, k and v to every rank; behind that their queries, [L + s, left, D], text first, which stay.
    """
    sent, own = [], sum(shares)
    if own:
        sent.append(pack_heads([x[:, :own] for x in video], shares))
    if left:
        q, k, v = (x[:, own:] for x in video)
        sent.append(torch.stack([k, v], dim=1).flatten().repeat(len(shares)))
        sent.append(torch.cat([text[0][:, own:], q]))
    return sent, torch.stack(list(text), dim=1)


def attend(
    layout: Layout, split: HeadSplit, packed: list[torch.Tensor], text: torch.Tensor, total: int, attention: Attention
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over all tokens, from what `pack` gave: video [s, H, D] and text [L, H, D]. total: S.

    Text needs no communication on the way there: each rank has it all, and takes its own heads. Empties `packed`, so that
    what was sent is freed early. For more than one shard.
    """
    own, start = sum(split.shares), sum(split.shares[: layout.shard])
    tokens, mine = split_evenly(total, layout.shards), split.shares[layout.shard]
    queries = packed.pop() if split.left else None
    joint = _receive(layout, packed.pop(0), text[:, :, start : start + mine], tokens, split.shares) if own else None
    left = None
    if queries is not None:
        everywhere = [split.left] * layout.shards
        left = _Beside(attention, queries, _receive(layout, packed.pop(), text[:, 1:, own:], tokens, everywhere))
    videos: list[torch.Tensor] = []
    texts: list[torch.Tensor] = []
    if joint is not None:
        out = attention(*joint[None].unbind(2)).squeeze(0).contiguous()
        del joint
        videos += _send_back(layout, out[:total], tokens, split.shares)
        # Apart from the video, whose tokens leave from where they lie.
        length = len(text)
        texts += _send_back(layout, out[total:].repeat(layout.shards, 1, 1), [length] * layout.shards, split.shares)
        del out
    if left:
        out = left.wait()
        videos.append(out[len(text) :])
        texts.append(out[: len(text)])
    return torch.cat(videos, dim=1), torch.cat(texts, dim=1)


def _receive(
    layout: Layout, packed: torch.Tensor, text: torch.Tensor, tokens: Sequence[int], shares: Sequence[int]
) -> torch.Tensor:
    """Of the video's tokens by rank, what is packed of `shares` heads for each rank; behind it the text [L, m, n, D] →
    [S + L, m, n, D]."""
    _, parts, own, width = text.shape
    joint = packed.new_empty(sum(tokens) + len(text), parts, own, width)
    unit, mine = parts * width, tokens[layout.shard]
    sent, received = [mine * share * unit for share in shares], [count * own * unit for count in tokens]
    layout.all_to_all(joint[: sum(tokens)].view(-1), packed, received, sent)
    joint[sum(tokens) :] = text
    return joint


def _send_back(
    layout: Layout, out: torch.Tensor, tokens: Sequence[int], shares: Sequence[int]
) -> tuple[torch.Tensor, ...]:
    """This rank's tokens with the heads of each rank, [sum(tokens), n, D] → [s, n, D] each; tokens: how many go where."""
    own, width = out.shape[1:]
    mine = tokens[layout.shard]
    received = [mine * share * width for share in shares]
    incoming = out.new_empty(sum(received))
    layout.all_to_all(incoming, out.view(-1), received, [count * own * width for count in tokens])
    parts = zip(incoming.split(received), shares, strict=True)
    return tuple(flat.view(mine, share, width) for flat, share in parts)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class _Beside:
    """Attention of queries [N, n, D] with keys and values [S + L, 2, n, D], on a GPU beside what follows, till `wait`.

    A last wave of its own would leave most of a GPU idle. What the side stream reads is held until the stream that made it
    has waited for that one, and that one waits for it at its next use: neither gives memory away that the other uses.
    """

    def __init__(self, attention: Attention, queries: torch.Tensor, kv: torch.Tensor) -> None:
        self.held = queries, kv
        self.stream = _side_stream(kv.device) if kv.is_cuda else None
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(kv.device))
        with torch.cuda.stream(self.stream) if self.stream is not None else nullcontext():
            self.out = attention(queries[None], *kv[None].unbind(2)).squeeze(0)

    def wait(self) -> torch.Tensor:
        """[N, n, D]."""
        if self.stream is not None:
            torch.cuda.current_stream(self.out.device).wait_stream(self.stream)
        return self.out
