"""The layout of a run over processes: guidance rows x sequence shards, and the few collectives that it needs.

On one process the methods here return their input, so callers seldom ask how many there are.

Letters: S video tokens of the whole video, s of this rank's shard; H heads, h this rank's; L text tokens; D head width.
"""

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from hunyuan_staged import InputError
from hunyuan_staged.versions import DEFAULT_CFG_PARALLEL

# How long a collective may wait. It is the last resort, for a process that hangs: a death is noticed by torchrun, and by
# gloo from the closed connection, within a second. Ranks wait for each other where one loads its weights or decodes a
# tile more slowly, and on a slow disk or without a GPU that takes minutes.
TIMEOUT = timedelta(minutes=30)
# How long a process of several goes on after a signal while the others do not answer: torchrun, which sends SIGTERM to
# the rest when one process dies, kills them 30 s later.
PATIENCE_SECONDS = 20.0
POLL_SECONDS = 0.05


class PeerFailed(RuntimeError):
    """Another process has failed, and said why."""


@dataclass(frozen=True)
class World:
    """This process among those of the run, and the device that it owns. store: what the processes tell each other."""

    rank: int
    size: int
    device: torch.device
    store: dist.Store | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self, name: str) -> None:
        """Wait for every process of the run, however long it takes. Each name serves once.

        Through the store, not the process group: what is waited for may be the writing of a video, or its decoding by
        other ranks, for which no time-out is right. Raises PeerFailed where another process ends with an error; one
        that is killed ends the run another way.
        """
        if self.store is None:
            return
        if self.store.add(f"{name}/arrived", 1) == self.size:
            self.store.set(f"{name}/all", "yes")
        while not self.store.check([f"{name}/all"]):
            if self.heard():
                raise PeerFailed("another process of the run has failed")
            time.sleep(POLL_SECONDS)

    def exchange(self, name: str, word: str) -> list[str]:
        """What every rank of the run says, by rank. Each name serves once; waits and fails as `barrier` does."""
        if self.store is None:
            return [word]
        self.store.set(f"{name}/{self.rank}", word)
        self.barrier(name)
        return [self.store.get(f"{name}/{rank}").decode() for rank in range(self.size)]

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        """Rank 0's tensor, on every rank; all give one of the same shape and dtype, on any device."""
        if self.size == 1:
            return tensor
        shared = tensor.to(self.device)
        dist.broadcast(shared, src=0)
        return shared.to(tensor.device)

    def share(self, tensors: Mapping[str, torch.Tensor], source: int) -> dict[str, torch.Tensor]:
        """One rank's named tensors, on every rank, on its device; the other ranks' are not looked at."""
        if self.size == 1:
            return dict(tensors)
        head = [(name, list(x.shape), str(x.dtype).removeprefix("torch.")) for name, x in tensors.items()]
        text = torch.tensor(list(json.dumps(head).encode()), dtype=torch.uint8, device=self.device)
        length = torch.tensor([len(text)], device=self.device)
        dist.broadcast(length, src=source)
        text = text if self.rank == source else text.new_empty(int(length))
        dist.broadcast(text, src=source)
        shared = {}
        for name, shape, dtype in json.loads(bytes(text.tolist())):
            if self.rank == source:
                tensor = tensors[name].to(self.device).contiguous()
            else:
                tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=self.device)
            # As bytes: every backend can send those.
            dist.broadcast(tensor.view(-1).view(torch.uint8), src=source)
            shared[name] = tensor
        return shared

    def first_to_fail(self) -> bool:
        """Whether this process is the first of the run that ends with an error, and so the one to speak.

        Where the store is gone with the process that held it, each takes itself for the first.
        """
        if self.store is None:
            return True
        try:
            return self.store.add("failed", 1) == 1
        except dist.DistError:
            return True

    def said(self) -> None:
        """Tell the others that the error has been printed: torchrun ends all processes once one has ended."""
        if self.store is not None:
            try:
                self.store.set("said", "yes")
            except dist.DistError:
                return

    def heard(self) -> bool:
        """Whether another process has printed its error."""
        try:
            return self.store is not None and self.store.check(["said"])
        except dist.DistError:
            return False


class Agreement:
    """The largest of each of all ranks' numbers, once a step, without waiting for what a GPU has still to compute.

    On a GPU the answer is therefore that of the call before (None the first time): its numbers are on the host by then.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self._pending: tuple[torch.Tensor, torch.cuda.Event] | None = None

    def __call__(self, *numbers: int | torch.Tensor) -> list[int] | None:
        """numbers: whole ones, or tensors [] on the device. Every rank must call it, with as many."""
        device = self.world.device
        parts = [
            number.to(torch.int64) if isinstance(number, torch.Tensor) else torch.full((), number, device=device)
            for number in numbers
        ]
        largest = torch.stack(parts)
        if self.world.size > 1:
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        if device.type != "cuda":
            return largest.tolist()
        before, host = self._pending, torch.empty(largest.shape, dtype=largest.dtype, pin_memory=True)
        host.copy_(largest, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._pending = host, event
        if before is None:
            return None
        before[1].synchronize()
        return before[0].tolist()


def lone_world() -> World:
    """A world of this process alone, on the device that torchrun's environment gives it."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    return World(0, 1, device)


def start_world() -> World:
    """Read torchrun's environment, take this rank's device, and join the others (NCCL on GPUs, gloo on CPUs)."""
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = lone_world().device
    if size == 1:
        return World(rank, size, device)
    cuda = device.type == "cuda"
    # As init_process_group would find it, from torchrun's environment; kept, because there is no public way to it.
    store, rank, size = next(iter(dist.rendezvous("env://", timeout=TIMEOUT)))
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=dist.PrefixStore("group", store),
        rank=rank,
        world_size=size,
        timeout=TIMEOUT,
        device_id=device if cuda else None,
    )
    return World(rank, size, device, dist.PrefixStore("run", store))


def stop_world(world: World) -> None:
    """Leave the process group, if there is one."""
    if world.size > 1 and dist.is_initialized():
        dist.destroy_process_group()


def shares(total: int, parts: int) -> list[int]:
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
        sizes = shares(tokens.shape[dim], self.shards)
        return tokens.narrow(dim, sum(sizes[: self.shard]), sizes[self.shard]).contiguous()

    def gather(self, tokens: torch.Tensor, total: int) -> torch.Tensor:
        """All shards of a row put together again, on every rank of it: [1, s, C] → [1, S, C]."""
        if self.shards == 1:
            return tokens
        sizes = shares(total, self.shards)
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
        tokens, head_shares = shares(total, self.shards), shares(heads, self.shards)
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
        tokens, head_shares = shares(total, self.shards), shares(heads, self.shards)
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


def plan_layout(world_size: int, guidance_rows: int, cfg_parallel: str = DEFAULT_CFG_PARALLEL) -> tuple[int, int]:
    """(rows side by side, shards) for a run. "auto": two rows side by side where there are two and the ranks halve.

    Raises InputError where "on" asks for what this world cannot do.
    """
    fits = guidance_rows == 2 and world_size % 2 == 0
    if cfg_parallel == "on" and not fits:
        reason = "there is one guidance row" if guidance_rows != 2 else f"the number of processes, {world_size}, is odd"
        raise InputError(f"--cfg_parallel on: {reason}; use auto or off")
    rows = 2 if fits and cfg_parallel != "off" else 1
    return rows, world_size // rows


def make_layout(world: World, guidance_rows: int, cfg_parallel: str = DEFAULT_CFG_PARALLEL) -> Layout:
    """The layout of a run with 1 or 2 guidance rows on this world; creates the groups (every rank must call it)."""
    rows, shards = plan_layout(world.size, guidance_rows, cfg_parallel)
    if world.size == 1:
        return Layout()
    row, shard = divmod(world.rank, shards)
    groups = [dist.new_group(range(r * shards, (r + 1) * shards)) for r in range(rows)]
    row_groups = [dist.new_group(range(s, world.size, shards)) for s in range(shards)] if rows > 1 else []
    return Layout(rows, shards, row, shard, groups[row], row_groups[shard] if row_groups else None)
