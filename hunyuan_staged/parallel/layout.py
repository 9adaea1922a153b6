"""The layout of a run over processes: guidance rows x sequence shards, and the few collectives that it needs.

On one process the methods here return their input, so callers seldom ask how many there are.

Letters: S video tokens of the whole video, s of this rank's shard; H heads, h this rank's; L text tokens; D head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from hunyuan_staged.errors import InputError
from hunyuan_staged.parallel.world import TIMEOUT, World


def split_evenly(total: int, parts: int) -> list[int]:
    """How many of `total` things each of `parts` ranks takes: as even as can be, the first ranks one more."""
    return [total // parts + (part < total % parts) for part in range(parts)]


@dataclass(frozen=True)
class Layout:
    """Where this process stands: which guidance row it computes, and which shard of that row's sequence.

    rows is the number of guidance rows that run side by side (1 or 2). With rows = 1 each process computes every row,
    one after the other. A row's shards talk through `group`; the same shard of both rows talks through `row_group`.
    """

    rows: int = 1
    shards: int = 1
    row: int = 0
    shard: int = 0
    group: dist.ProcessGroup | None = None
    row_group: dist.ProcessGroup | None = None

    def describe(self) -> str:
        """One phrase for the log, e.g. "2 guidance rows x 4 sequence shards"."""
        return (
            f"{self.rows} guidance row{'s' * (self.rows > 1)} x {self.shards} sequence shard{'s' * (self.shards > 1)}"
        )

    def my_rows(self, count: int) -> list[int]:
        """Which of `count` guidance rows this process computes."""
        return [self.row] if self.rows > 1 else list(range(count))

    def scatter(self, tokens: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """This rank's shard of tokens that every rank holds whole: [.., S, ..] → [.., s, ..]."""
        if self.shards == 1:
            return tokens
        sizes = split_evenly(tokens.shape[dim], self.shards)
        return tokens.narrow(dim, sum(sizes[: self.shard]), sizes[self.shard]).contiguous()

    def gather(self, tokens: torch.Tensor, total: int) -> torch.Tensor:
        """All shards of a row put together again, on every rank of it: [1, s, C] → [1, S, C]."""
        if self.shards == 1:
            return tokens
        sizes = split_evenly(total, self.shards)
        # all_gather wants equal shapes, and shards differ by one token at most: pad, gather, cut.
        padded = tokens.new_zeros(1, max(sizes), tokens.shape[2])
        padded[:, : tokens.shape[1]] = tokens
        parts = self._all_gather(padded, self.shards, self.group)
        return torch.cat([part[:, :size] for part, size in zip(parts, sizes, strict=True)], dim=1)

    def total(self, numbers: torch.Tensor) -> torch.Tensor:
        """The sum of a row's ranks' numbers [n], to the same bits on each of them: all add up in one order."""
        if self.shards == 1:
            return numbers
        return torch.stack(self._all_gather(numbers, self.shards, self.group)).sum(dim=0)

    def gather_rows(self, velocity: torch.Tensor) -> list[torch.Tensor]:
        """The velocity of every guidance row, where each row was computed by other ranks: X → [X of row 0, X of row 1]."""
        assert self.rows > 1
        return self._all_gather(velocity.contiguous(), self.rows, self.row_group)

    def head_shares(self, heads: int) -> tuple[int, ...]:
        """How many heads each shard attends with."""
        return tuple(split_evenly(heads, self.shards))

    def tokens_to_heads(self, packed: torch.Tensor, text_qkv: torch.Tensor, total: int) -> torch.Tensor:
        """Before attention: token shards with all heads become whole sequences with a share of the heads.

        packed: what pack_heads gave of q, k, v of the video. text_qkv [L, 3, H, D], the same on every rank → [S + L, 3, h,
        D]. Text needs no communication here: each rank has it all and takes its own heads. For more than one shard.
        """
        length, three, heads, width = text_qkv.shape
        tokens, shares = split_evenly(total, self.shards), self.head_shares(heads)
        mine, own, unit = tokens[self.shard], shares[self.shard], three * width
        joint = packed.new_empty(total + length, three, own, width)
        self._all_to_all(
            joint[:total].view(-1), packed, [t * own * unit for t in tokens], [mine * h * unit for h in shares]
        )
        joint[total:] = text_qkv.split(shares, dim=2)[self.shard]
        return joint

    def heads_to_tokens(self, out: torch.Tensor, heads: int, total: int) -> tuple[torch.Tensor, torch.Tensor]:
        """After attention, the way back: [S + L, h, D] → video [s, H, D] and text [L, H, D]."""
        if self.shards == 1:
            return out[:total], out[total:]
        out, shares = out.contiguous(), self.head_shares(heads)
        tokens = split_evenly(total, self.shards)
        video = self._merge_heads(out[:total], tokens, shares)
        # Apart from the video, whose tokens leave from where they lie.
        length = out.shape[0] - total
        text = out[total:].repeat(self.shards, 1, 1)
        return video, self._merge_heads(text, [length] * self.shards, shares)

    def _merge_heads(self, out: torch.Tensor, tokens: Sequence[int], shares: Sequence[int]) -> torch.Tensor:
        """This rank's tokens with all heads, [sum(tokens), h, D] → [s, H, D]; tokens: how many go to each rank."""
        own, width = out.shape[1:]
        mine = tokens[self.shard]
        received = [mine * h * width for h in shares]
        incoming = out.new_empty(sum(received))
        self._all_to_all(incoming, out.view(-1), received, [t * own * width for t in tokens])
        parts = zip(incoming.split(received), shares, strict=True)
        return torch.cat([flat.view(mine, h, width) for flat, h in parts], dim=1)

    def _all_to_all(
        self, incoming: torch.Tensor, outgoing: torch.Tensor, received: Sequence[int], sent: Sequence[int]
    ) -> None:
        dist.all_to_all_single(incoming, outgoing, list(received), list(sent), group=self.group)

    def _all_gather(self, tensor: torch.Tensor, count: int, group: dist.ProcessGroup | None) -> list[torch.Tensor]:
        parts = [torch.empty_like(tensor) for _ in range(count)]
        dist.all_gather(parts, tensor, group=group)
        return parts


def pack_heads(parts: Sequence[torch.Tensor], shares: Sequence[int]) -> torch.Tensor:
    """What an exchange of tokens for heads sends, flat: to each rank in turn [s, len(parts), h, D], its heads of all parts.

    parts: [s, H, D] each. shares: the heads of each rank, as even as can be. Where they are even it is one copy, which a
    compiler writes in the place of the parts themselves.
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


def plan_layout(world_size: int, guidance_rows: int, cfg_parallel: str = "auto") -> tuple[int, int]:
    """(rows side by side, shards) for a run. "auto": two rows side by side where there are two and the ranks halve.

    Raises InputError where "on" asks for what this world cannot do.
    """
    fits = guidance_rows == 2 and world_size % 2 == 0
    if cfg_parallel == "on" and not fits:
        reason = "there is one guidance row" if guidance_rows != 2 else f"the number of processes, {world_size}, is odd"
        raise InputError(f"--cfg_parallel on: {reason}; use auto or off")
    rows = 2 if fits and cfg_parallel != "off" else 1
    return rows, world_size // rows


def make_layout(world: World, guidance_rows: int, cfg_parallel: str = "auto") -> Layout:
    """The layout of a run with 1 or 2 guidance rows on this world; creates the groups (every rank must call it)."""
    rows, shards = plan_layout(world.size, guidance_rows, cfg_parallel)
    if world.size == 1:
        return Layout()
    row, shard = divmod(world.rank, shards)
    if rows == 1:
        return Layout(rows, shards, row, shard, dist.group.WORLD)
    # Without a time-out of their own, groups take the backend's, which is shorter than the run's.
    groups = [dist.new_group(range(r * shards, (r + 1) * shards), timeout=TIMEOUT) for r in range(rows)]
    row_groups = [dist.new_group(range(s, world.size, shards), timeout=TIMEOUT) for s in range(shards)]
    return Layout(rows, shards, row, shard, groups[row], row_groups[shard])
