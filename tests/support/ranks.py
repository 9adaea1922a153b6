"""Run a function on several processes of this machine, as torchrun would: gloo, or NCCL and a GPU each."""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from hunyuan_staged.parallel.layout import Layout
from hunyuan_staged.parallel.world import World

TIMEOUT = timedelta(seconds=120)


def precise() -> None:
    """Have a GPU compute float32 in float32: cuDNN takes TF32 by default, whose errors would hide others."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def on_host(found: Any) -> Any:
    """The same with its tensors in host memory: one of a GPU is gone with the process that made it."""
    if isinstance(found, torch.Tensor):
        return found.cpu()
    if isinstance(found, dict):
        return {name: on_host(value) for name, value in found.items()}
    return type(found)(map(on_host, found)) if isinstance(found, list | tuple) else found


def _child(
    rank: int, size: int, port: int, device: str, function: Callable[..., Any], args: tuple, results: Any
) -> None:
    # TORCHELASTIC_USE_AGENT_STORE: rank 0 joins the store that the parent serves, so no port is guessed.
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
    )
    torch.set_num_threads(1)
    precise()
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # else start_world takes a GPU wherever there is one
    from hunyuan_staged.parallel.world import start_world, stop_world

    world = start_world()
    try:
        assert world.device.type == device
        results[rank] = on_host(function(world, *args))
    finally:
        stop_world(world)


def run_ranks(size: int, function: Callable[..., Any], *args: Any, device: str = "cpu") -> list[Any]:
    """function(world, *args) on `size` processes; a list of the results by rank. The function must be importable."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
    with mp.get_context("spawn").Manager() as manager:
        results = manager.dict()
        mp.spawn(_child, (size, store.port, device, function, args, results), nprocs=size)
        return [results[rank] for rank in range(size)]


@dataclass(frozen=True)
class Ranks:
    """What a test of several processes runs on: CPUs, or as many GPUs as there are. See the fixture `ranks`."""

    device: torch.device
    most: int | None = None  # processes

    def run(self, size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """As run_ranks; skips the test where there are fewer GPUs."""
        if self.most is not None and size > self.most:
            pytest.skip(f"{size} processes need as many GPUs, and there are {self.most}")
        return run_ranks(size, function, *args, device=self.device.type)

    def up_to(self, sizes: Iterable[int]) -> tuple[int, ...]:
        """Those of some numbers of processes that there are GPUs for."""
        return tuple(size for size in sizes if self.most is None or size <= self.most)

    def alone(self) -> World:
        """A world of this process alone, to compare with."""
        return World(0, 1, self.device)

    def same(self, found: torch.Tensor, wanted: torch.Tensor, *, bits: bool = True) -> bool:
        """Whether float32 results agree: to the bit on CPUs, or, where sums are split otherwise, to 1e-5.

        On GPUs to 1e-4: libraries choose kernels by shape, which sum in another order, and a loop makes more of that.
        """
        found, wanted = found.cpu(), wanted.cpu()
        if bits and self.device.type == "cpu":
            return torch.equal(found, wanted)
        apart = float((found - wanted).norm() / wanted.norm())
        return apart < (1e-5 if self.device.type == "cpu" else 1e-4)

    def same_pixels(self, found: torch.Tensor, wanted: torch.Tensor) -> bool:
        """As `same`, of a video's frames as floats or in 8 bits, where a GPU may round to the next level."""
        if found.dtype == torch.uint8 and self.device.type == "cuda":
            return int((found.int() - wanted.int()).abs().max()) <= 1
        return self.same(found, wanted)


def layouts(world: World, kinds: Iterable[tuple[int, int]]) -> Iterator[tuple[tuple[int, int], Layout]]:
    """Each (branches, shards) on the first processes of a world, with this one's layout where it is among them.

    So that one start of the processes, which is what takes long, serves many numbers of them. Every process goes through
    all of it.
    """
    for branches, shards in kinds:
        rows = [dist.new_group(range(b * shards, (b + 1) * shards)) for b in range(branches)]
        columns = [dist.new_group(range(s, branches * shards, shards)) for s in range(shards)]
        branch, shard = divmod(world.rank, shards)
        if branch < branches:
            yield (branches, shards), Layout(branches, shards, branch, shard, rows[branch], columns[shard])
