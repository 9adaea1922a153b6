"""Run a function on several gloo processes of this machine, as torchrun would, and collect what each returns."""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

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
