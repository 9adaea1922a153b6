"""The layout over processes: every exchange against what one process holds."""

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from hunyuan_staged.errors import InputError
from hunyuan_staged.parallel import world as world_module
from hunyuan_staged.parallel.environment import RankInfo
from hunyuan_staged.parallel.layout import Layout, make_layout, plan_layout, split_evenly
from hunyuan_staged.parallel.world import World, open_world, split_world


@pytest.mark.parametrize(
    ("world", "branches", "plan"),
    [(1, 2, (1, 1)), (2, 2, (2, 1)), (3, 2, (1, 3)), (4, 2, (2, 2)), (8, 2, (2, 4)), (8, 1, (1, 8)), (7, 2, (1, 7))],
)
def test_plan(world, branches, plan):
    if world == 1:
        assert make_layout(World(0, 1, torch.device("cpu")), branches) == Layout()
    else:
        assert plan_layout(world, branches) == plan


@pytest.mark.parametrize(("total", "parts"), [(7, 3), (5, 8), (16, 16), (111600, 7)])
def test_shares_are_whole_and_even(total, parts):
    counts = split_evenly(total, parts)
    assert sum(counts) == total and max(counts) - min(counts) <= 1


def test_one_process_moves_nothing():
    layout, tokens = Layout(), torch.randn(1, 7, 4)
    assert layout.scatter(tokens) is tokens and layout.gather(tokens, 7) is tokens


@pytest.mark.parametrize(
    ("world", "branches", "wish", "plan"),
    [(4, 2, "auto", (2, 2)), (4, 2, "off", (1, 4)), (6, 2, "on", (2, 3)), (1, 2, "off", (1, 1)), (3, 1, "off", (1, 3))],
)
def test_cfg_parallel_is_followed(world, branches, wish, plan):
    assert plan_layout(world, branches, wish) == plan


@pytest.mark.parametrize(
    ("world", "branches", "reason"),
    [(3, 2, "the number of processes, 3, is odd"), (4, 1, "there is one guidance branch")],
)
def test_cfg_parallel_on_is_refused_where_it_cannot_be(world, branches, reason):
    with pytest.raises(InputError, match=f"--cfg_parallel on: {reason}; use auto or off"):
        plan_layout(world, branches, "on")


def test_every_group_waits_as_long_as_the_run(monkeypatch):
    """NCCL's own 10 minutes held for groups: a rank that read its weights from a cold disk was given up."""
    made, joined = [], []
    monkeypatch.setattr(dist, "new_group", lambda ranks, **more: made.append((list(ranks), more)))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **more: joined.append((backend, more["timeout"])))
    store = dist.HashStore()
    world = World(1, 4, torch.device("cpu"), store)
    make_layout(world, 2)
    waits = {"timeout": timedelta(minutes=30)}
    assert made == [([0, 1], waits), ([2, 3], waits), ([0, 2], waits), ([1, 3], waits)]
    made.clear()
    make_layout(world, 1)
    assert made == [], "one branch takes the run's own group, and no second one of the same ranks"
    split_world(world, 2)
    assert joined == [("gloo", timedelta(minutes=30))]


@pytest.mark.parametrize("own_gpus", [False, True])
def test_processes_that_share_a_gpu_are_refused_before_they_join(monkeypatch, own_gpus):
    """NCCL told each of a duplicate GPU, in a traceback. A launcher may show each process its own GPU as number 0."""
    stores = dist.HashStore()
    named = threading.local()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=named.gpu))
    monkeypatch.setattr(world_module, "rank_info", lambda: RankInfo(named.rank, 2, named.rank, 2))
    monkeypatch.setattr(world_module, "_join_store", lambda rank, size: stores)

    def start(rank: int) -> World:
        named.rank, named.gpu = rank, f"GPU-{rank * own_gpus}"
        return open_world()

    with ThreadPoolExecutor(2) as pool:
        ranks = [pool.submit(start, rank) for rank in range(2)]
        for rank, started in enumerate(ranks):
            if own_gpus:
                assert (started.result().rank, started.result().device) == (rank, torch.device("cuda", 0))
            else:
                with pytest.raises(InputError, match=r"^2 processes share 1 GPU on .*; start one a GPU$"):
                    started.result()
