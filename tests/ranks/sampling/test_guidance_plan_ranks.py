"""Guidance at some steps: several processes against one."""

import pytest
import torch
from golden_models import distance
from guided_loop import PLANS, run_loop
from ranks import run_ranks

from hunyuan_staged.parallel.layout import make_layout
from hunyuan_staged.parallel.world import World
from hunyuan_staged.sampling.guidance_plan import GuidancePlan


def on_ranks(world: World, folder, plan: GuidancePlan, cfg_parallel: str):
    return run_loop(folder, plan, make_layout(world, 2, cfg_parallel), world)


@pytest.mark.parametrize(("size", "cfg_parallel"), [(2, "on"), (3, "off"), (4, "on")])
def test_processes_give_what_one_gives(golden_folder, size, cfg_parallel):
    """Side by side, the ranks of the branch that does not run wait for what the other gives: 2 have the same arithmetic as
    one. 3 and 4 split sums over shards."""
    plan = PLANS["gated"]
    one, state = run_loop(golden_folder, plan)
    found = run_ranks(size, on_ranks, golden_folder, plan, cfg_parallel)
    for latents, _ in found:
        assert torch.equal(latents, one) if size == 2 else distance(latents, one) < 1e-5
    saved = found[0][1]  # the first process alone has the state
    assert saved.keys() == state.keys()
    again = run_loop(golden_folder, plan, done=4, state=saved)[0]
    assert torch.equal(again, one) if size == 2 else distance(again, one) < 1e-5
