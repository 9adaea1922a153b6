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
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[:, :size] for part, size in zip(parts, sizes, strict=True)], dim=1)

    def total(self, numbers: torch.Tensor) -> torch.Tensor:
        """The sum of a row's ranks' numbers [n], to the same bits on each of them: all add up in one order."""
        if self.shards == 1:
            return numbers
        parts = [torch.empty_like(numbers) for _ in range(self.shards)]
        dist.all_gather(parts, numbers, group=self.group)
        return torch.stack(parts).sum(dim=0)

    def gather_rows(self, velocity: torch.Tensor) -> list[torch.Tensor]:
        """The velocity of every guidance row, where each row was computed by other ranks: X → [X of row 0, X of row 1]."""
        assert self.rows > 1
        parts = [torch.empty_like(velocity) for _ in range(self.rows)]
        dist.all_gather(parts, velocity.contiguous(), group=self.row_group)
        return parts

    def tokens_to_heads(self, qkv: torch.Tensor, text_qkv: torch.Tensor, total: int) -> torch.Tensor:
        """Before attention: token shards with all heads become whole sequences with a share of the heads.

        qkv [3, s, H, D] of the video and text_qkv [3, L, H, D], the same on every rank → [3, S + L, h, D]. Text needs
        no communication here: each rank has it all and takes its own heads. For more than one shard.
        """
        three, mine, heads, width = qkv.shape
        tokens, head_shares = split_evenly(total, self.shards), split_evenly(heads, self.shards)
        own = head_shares[self.shard]
        outgoing = torch.cat([part.permute(1, 0, 2, 3).reshape(-1) for part in qkv.split(head_shares, dim=2)])
        unit = three * width
        incoming = self._all_to_all(outgoing, [mine * h * unit for h in head_shares], [t * own * unit for t in tokens])
        video = incoming.view(total, three, own, width).permute(1, 0, 2, 3)
        return torch.cat([video, text_qkv.split(head_shares, dim=2)[self.shard]], dim=1)

    def heads_to_tokens(self, out: torch.Tensor, heads: int, total: int) -> tuple[torch.Tensor, torch.Tensor]:
        """After attention, the way back: [S + L, h, D] → video [s, H, D] and text [L, H, D].

        The text rows ride in the same exchange: every rank sends its heads of them beside the tokens of each shard.
        """
        if self.shards == 1:
            return out[:total], out[total:]
        own, width = out.shape[1:]
        tokens, head_shares = split_evenly(total, self.shards), split_evenly(heads, self.shards)
        length = out.shape[0] - total
        text = out[total:].reshape(-1)
        outgoing = torch.cat([piece for part in out[:total].split(tokens) for piece in (part.reshape(-1), text)])
        rows = tokens[self.shard] + length
        incoming = self._all_to_all(
            outgoing, [(t + length) * own * width for t in tokens], [rows * h * width for h in head_shares]
        )
        parts = [
            flat.view(rows, h, width)
            for flat, h in zip(incoming.split([rows * h * width for h in head_shares]), head_shares, strict=True)
        ]
        merged = torch.cat(parts, dim=1)
        return merged[: tokens[self.shard]], merged[tokens[self.shard] :]

    def _all_to_all(self, outgoing: torch.Tensor, sent: Sequence[int], received: Sequence[int]) -> torch.Tensor:
        incoming = outgoing.new_empty(sum(received))
        dist.all_to_all_single(incoming, outgoing, list(received), list(sent), group=self.group)
        return incoming


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
