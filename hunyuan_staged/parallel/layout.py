"""The layout of a run over processes: guidance branches x sequence shards, and the few collectives that it needs.

On one process the methods here return their input, so callers seldom ask how many there are.

Letters: S video tokens of the whole video, s of this rank's shard; C channels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from hunyuan_staged.errors import InputError
from hunyuan_staged.parallel.world import TIMEOUT, World


def split_evenly(total: int, parts: int) -> list[int]:
    """How many of `total` things each of `parts` ranks takes: as even as can be, the first ranks one more."""
    return [total // parts + (part < total % parts) for part in range(parts)]


@dataclass(frozen=True)
class Layout:
    """Where this process stands: which guidance branch it computes, and which shard of that branch's sequence.

    branches is the number of guidance branches that run side by side (1 or 2). With branches = 1 each process computes
    all of them, one after the other. A branch's shards talk through `group`; the same shard of both branches talks
    through `branch_group`.
    """

    branches: int = 1
    shards: int = 1
    branch: int = 0
    shard: int = 0
    group: dist.ProcessGroup | None = None
    branch_group: dist.ProcessGroup | None = None

    def describe(self) -> str:
        """One phrase for the log, e.g. "2 guidance branches x 4 sequence shards"."""
        branches = f"{self.branches} guidance branch{'es' * (self.branches > 1)}"
        return f"{branches} x {self.shards} sequence shard{'s' * (self.shards > 1)}"

    def my_branches(self, count: int) -> list[int]:
        """Which of `count` guidance branches this process computes."""
        return [self.branch] if self.branches > 1 else list(range(count))

    def scatter(self, tokens: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """This rank's shard of tokens that every rank holds whole: [.., S, ..] → [.., s, ..]."""
        if self.shards == 1:
            return tokens
        sizes = split_evenly(tokens.shape[dim], self.shards)
        return tokens.narrow(dim, sum(sizes[: self.shard]), sizes[self.shard]).contiguous()

    def gather(self, tokens: torch.Tensor, total: int) -> torch.Tensor:
        """All shards of a branch put together again, on every rank of it: [1, s, C] → [1, S, C]."""
        if self.shards == 1:
            return tokens
        sizes = split_evenly(total, self.shards)
        # all_gather wants equal shapes, and shards differ by one token at most: pad, gather, cut.
        padded = tokens.new_zeros(1, max(sizes), tokens.shape[2])
        padded[:, : tokens.shape[1]] = tokens
        parts = self._all_gather(padded, self.shards, self.group)
        return torch.cat([part[:, :size] for part, size in zip(parts, sizes, strict=True)], dim=1)

    def total(self, numbers: torch.Tensor) -> torch.Tensor:
        """The sum of a branch's ranks' numbers [n], to the same bits on each of them: all add up in one order."""
        if self.shards == 1:
            return numbers
        return torch.stack(self._all_gather(numbers, self.shards, self.group)).sum(dim=0)

    def gather_branches(self, velocity: torch.Tensor) -> list[torch.Tensor]:
        """The velocity of every guidance branch, each computed by other ranks: X → [X of branch 0, X of branch 1]."""
        assert self.branches > 1
        return self._all_gather(velocity.contiguous(), self.branches, self.branch_group)

    def all_velocities(
        self, found: Mapping[int, torch.Tensor], running: Sequence[int], like: torch.Tensor
    ) -> list[torch.Tensor]:
        """The velocities of the branches that run at a step, in their order, on every rank.

        found: those that this rank computed, by branch. like: a tensor of their shape and device.
        """
        if self.branches == 1:
            return [found[branch] for branch in running]
        if len(running) > 1:
            return self.gather_branches(found[self.branch])
        # One branch alone: the other's ranks wait for what it gives.
        (branch,) = running
        velocity = (
            found[branch].float().contiguous() if branch in found else torch.empty_like(like, dtype=torch.float32)
        )
        dist.broadcast(velocity, group=self.branch_group, group_src=branch)
        return [velocity]

    def all_to_all(
        self, incoming: torch.Tensor, outgoing: torch.Tensor, received: Sequence[int], sent: Sequence[int]
    ) -> None:
        """Exchange flat tensors between a branch's ranks. received, sent: how many values come from and go to each."""
        dist.all_to_all_single(incoming, outgoing, list(received), list(sent), group=self.group)

    def _all_gather(self, tensor: torch.Tensor, count: int, group: dist.ProcessGroup | None) -> list[torch.Tensor]:
        parts = [torch.empty_like(tensor) for _ in range(count)]
        dist.all_gather(parts, tensor, group=group)
        return parts


@dataclass(frozen=True)
class LoneShare(Layout):
    """A layout of which only this rank is there: what it would get from others it copies from what it would send.

    sent: bytes that would leave this rank, one entry an exchange.
    """

    sent: list[int] = field(default_factory=list)

    def all_to_all(
        self, incoming: torch.Tensor, outgoing: torch.Tensor, received: Sequence[int], sent: Sequence[int]
    ) -> None:
        self.sent.append((sum(sent) - sent[self.shard]) * outgoing.itemsize)
        size = min(len(incoming), len(outgoing))
        incoming[:size] = outgoing[:size]
        incoming[size:] = 0  # where tokens or heads do not divide, a rank may get more than it sends

    def _all_gather(self, tensor: torch.Tensor, count: int, group: dist.ProcessGroup | None) -> list[torch.Tensor]:
        self.sent.append((count - 1) * tensor.nbytes)
        return [tensor.clone() for _ in range(count)]


def plan_layout(world_size: int, guidance_branches: int, cfg_parallel: str = "auto") -> tuple[int, int]:
    """(branches side by side, shards) for a run. "auto": two side by side where there are two and the ranks halve.

    Raises InputError where "on" asks for what this world cannot do.
    """
    fits = guidance_branches == 2 and world_size % 2 == 0
    if cfg_parallel == "on" and not fits:
        odd = f"the number of processes, {world_size}, is odd"
        reason = "there is one guidance branch" if guidance_branches != 2 else odd
        raise InputError(f"--cfg_parallel on: {reason}; use auto or off")
    branches = 2 if fits and cfg_parallel != "off" else 1
    return branches, world_size // branches


def make_layout(world: World, guidance_branches: int, cfg_parallel: str = "auto") -> Layout:
    """The layout of a run with 1 or 2 guidance branches on this world; creates the groups (every rank must call it)."""
    branches, shards = plan_layout(world.size, guidance_branches, cfg_parallel)
    if world.size == 1:
        return Layout()
    branch, shard = divmod(world.rank, shards)
    if branches == 1:
        return Layout(branches, shards, branch, shard, dist.group.WORLD)
    # Without a time-out of their own, groups take the backend's, which is shorter than the run's.
    groups = [dist.new_group(range(r * shards, (r + 1) * shards), timeout=TIMEOUT) for r in range(branches)]
    branch_groups = [dist.new_group(range(s, world.size, shards), timeout=TIMEOUT) for s in range(shards)]
    return Layout(branches, shards, branch, shard, groups[branch], branch_groups[shard])
