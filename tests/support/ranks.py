"""Run a function on several gloo processes of this machine, as torchrun would, and collect what each returns."""

import os
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from hunyuan_staged.parallel.layout import Layout
from hunyuan_staged.parallel.world import World

TIMEOUT = timedelta(seconds=120)


def _child(rank: int, size: int, port: int, function: Callable[..., Any], args: tuple, results: Any) -> None:
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
    from hunyuan_staged.parallel.world import start_world, stop_world

    world = start_world()
    try:
        results[rank] = function(world, *args)
    finally:
        stop_world(world)


def run_ranks(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """function(world, *args) on `size` processes; a list of the results by rank. The function must be importable."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
    with mp.get_context("spawn").Manager() as manager:
        results = manager.dict()
        mp.spawn(_child, (size, store.port, function, args, results), nprocs=size)
        return [results[rank] for rank in range(size)]


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
