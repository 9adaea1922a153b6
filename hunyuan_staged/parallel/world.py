"""The processes of a run: who this one is, its device, and what they tell each other."""

import json
import os
import socket
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from hunyuan_staged.errors import InputError
from hunyuan_staged.parallel.environment import STORE_SOCKET, rank_info
from hunyuan_staged.parallel.exchange import description

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
    """This process among those of the run, and the device that it owns. store: what the processes tell each other.

    within: the world that this one is a part of, whose errors end it, too.
    """

    rank: int
    size: int
    device: torch.device
    store: dist.Store | None = None
    within: "World | None" = None
    # How often each name has been used: a second job of the same processes waits for its own words, not for the first's.
    _uses: Counter[str] = field(default_factory=Counter, repr=False, compare=False)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def part(self, name: str) -> "World":
        """The same processes for a part of their work: an error that is reported there ends that part alone."""
        store = None if self.store is None else dist.PrefixStore(name, self.store)
        return World(self.rank, self.size, self.device, store, self)

    def from_main(self, name: str, word: str) -> str:
        """What rank 0 says, on every rank; waits and fails as `barrier` does."""
        return self.all_gather_text(name, word)[0]

    def barrier(self, name: str) -> None:
        """Wait for every process of the run, however long it takes.

        Every process calls barriers and exchanges of one name in the same order.

        Through the store, not the process group: what is waited for may be the writing of a video, or its decoding by
        other ranks, for which no time-out is right. Raises PeerFailed where another process ends with an error; one
        that is killed ends the run another way.
        """
        if self.store is not None:
            self._wait_for_all(self.store, self._key(name))

    def _key(self, name: str) -> str:
        """What the store calls this use of a name."""
        self._uses[name] += 1
        return f"{name}/{self._uses[name]}"

    def _wait_for_all(self, store: dist.Store, key: str) -> None:
        if store.add(f"{key}/arrived", 1) == self.size:
            store.set(f"{key}/all", "yes")
        while not store.check([f"{key}/all"]):
            if self.error_reported():
                raise PeerFailed("another process of the run has failed")
            time.sleep(POLL_SECONDS)

    def all_gather_text(self, name: str, word: str) -> list[str]:
        """What every rank of the run says, by rank; waits and fails as `barrier` does."""
        if self.store is None:
            return [word]
        key = self._key(name)
        self.store.set(f"{key}/{self.rank}", word)
        self._wait_for_all(self.store, key)
        return [self.store.get(f"{key}/{rank}").decode() for rank in range(self.size)]

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        """Rank 0's tensor, on every rank; all give one of the same shape and dtype, on any device."""
        if self.size == 1:
            return tensor
        shared = tensor.to(self.device)
        dist.broadcast(shared, src=0)
        return shared.to(tensor.device)

    def broadcast_tensors(self, tensors: Mapping[str, torch.Tensor], source: int) -> dict[str, torch.Tensor]:
        """One rank's named tensors, on every rank, on its device; the other ranks' are not looked at."""
        if self.size == 1:
            return dict(tensors)
        text = description(tensors, self.device)
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

    def claims_report(self) -> bool | None:
        """Whether this process is the first of the run that ends with an error, and so the one to speak.

        None: the store is gone with the process that held it.
        """
        if self.store is None:
            return True
        try:
            return self.store.add("failed", 1) == 1
        except dist.DistError:
            return None

    def report_error(self) -> None:
        """Tell the others that the error has been printed: torchrun ends all processes once one has ended."""
        if self.store is not None:
            try:
                self.store.set("said", "yes")
            except dist.DistError:
                return

    def error_reported(self) -> bool:
        """Whether another process has printed its error."""
        if self.within is not None and self.within.error_reported():
            return True
        try:
            return self.store is not None and self.store.check(["said"])
        except dist.DistError:
            return False


class MaxAcrossRanks:
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
    """A world of this process alone, on the device that its launcher's environment gives it."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", rank_info().local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    return World(0, 1, device)


def start_world() -> World:
    """Read the launcher's environment, take this rank's device, and join the others (NCCL on GPUs, gloo on CPUs).

    InputError: the environment contradicts itself, or there are more processes than GPUs.
    """
    world = open_world()
    _join_group(world)
    return world


def open_world() -> World:
    """As start_world, but the processes do not join yet: they only talk through the store."""
    info = rank_info()
    device = lone_world().device
    if info.size == 1:
        return World(0, 1, device)
    world = World(info.rank, info.size, device, dist.PrefixStore("run", _join_store(info.rank, info.size)))
    if device.type == "cuda":
        # Else NCCL ends every process in a traceback about a duplicate GPU.
        own = f"{socket.gethostname()} {torch.cuda.get_device_properties(device).uuid}"
        check_devices(world.all_gather_text("device", own))
    return world


def split_world(world: World, size: int) -> World:
    """The group of `size` processes that this one of an open world joins; `size` divides the world's.

    Each group is a process group of its own, whose ranks count from 0: what runs in it knows of no other.
    """
    assert world.size % size == 0
    if world.store is None:
        return world
    group, rank = divmod(world.rank, size)
    part = World(rank, size, world.device, dist.PrefixStore(f"group {group}", world.store), world)
    _join_group(part)
    return part


def _join_group(world: World) -> None:
    """Make the world's processes torch's process group."""
    if world.store is None or world.size == 1:
        return
    cuda = world.device.type == "cuda"
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=dist.PrefixStore("process group", world.store),
        rank=world.rank,
        world_size=world.size,
        timeout=TIMEOUT,
        device_id=world.device if cuda else None,
    )


def _join_store(rank: int, size: int) -> dist.Store:
    """The store that all processes share: rank 0 serves it on the socket that it inherited, if it did.

    Else as init_process_group would find it, from torchrun's environment; kept, because there is no public way to it.
    """
    inherited = os.environ.get(STORE_SOCKET)
    if inherited is None or rank != 0:
        return next(iter(dist.rendezvous("env://", timeout=TIMEOUT)))[0]
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(address, port, size, is_master=True, timeout=TIMEOUT, master_listen_fd=int(inherited))


def check_devices(owned: Sequence[str]) -> None:
    """InputError where two ranks own one GPU; owned: each rank's host and GPU, a space between.

    By the GPU's own id: some launchers show each process one GPU, which each then calls number 0.
    """
    hosts = Counter(word.split()[0] for word in owned)
    for host, processes in hosts.items():
        gpus = len({word for word in owned if word.split()[0] == host})
        if gpus < processes:
            raise InputError(f"{processes} processes share {gpus} GPU{'s' * (gpus > 1)} on {host}; start one a GPU")


def stop_world(world: World) -> None:
    """Leave the process group, if there is one. Rank 0, which may serve the store, leaves last."""
    if world.store is None:
        return
    if dist.is_initialized():
        dist.destroy_process_group()
    arrived = world.store.add("left", 1)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while world.is_main and arrived < world.size and not world.error_reported() and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS / 10)
        arrived = world.store.add("left", 0)
