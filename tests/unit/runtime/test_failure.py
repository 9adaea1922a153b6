"""Which of a run's processes says why it ends."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hunyuan_staged.errors import InputError
from hunyuan_staged.parallel.world import World
from hunyuan_staged.runtime import failure


class GoneStore:
    """As a TCPStore whose server has ended."""

    def add(self, *_: Any) -> int:
        raise dist.DistNetworkError("connection reset by peer")

    check = add


@pytest.fixture
def orphan(monkeypatch):
    """The second of two processes, after the one that held the store has gone."""
    monkeypatch.setattr(failure, "SILENCE_SECONDS", 0.1)
    return World(1, 2, torch.device("cpu"), GoneStore())


def test_a_process_whose_store_is_gone_leaves_the_word_to_the_launcher(orphan):
    """The first process had printed the same refusal and ended: CI saw it twice."""
    told_to_stop = SimpleNamespace(received=15)
    assert orphan.claims_report() is None
    assert failure._is_the_cause(InputError("x"), orphan, told_to_stop) is False


def test_and_speaks_where_nobody_ends_it(orphan):
    assert failure._is_the_cause(InputError("x"), orphan, SimpleNamespace(received=0)) is True


@pytest.mark.parametrize(("before", "speaks"), [(0, True), (1, False)])
def test_the_first_to_claim_speaks(before, speaks):
    store = dist.HashStore()
    store.add("failed", before)
    world = World(1, 2, torch.device("cpu"), store)
    assert failure._is_the_cause(InputError("x"), world, SimpleNamespace(received=0)) is speaks
