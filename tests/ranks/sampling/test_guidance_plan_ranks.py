"""Guidance at some steps: several processes against one."""

import pytest
from guided_loop import PLANS, run_loop

from hunyuan_staged.parallel.layout import make_layout
from hunyuan_staged.parallel.world import World
from hunyuan_staged.sampling.guidance_plan import GuidancePlan


def on_ranks(world: World, folder, plan: GuidancePlan, cfg_parallel: str):
    return run_loop(folder, plan, make_layout(world, 2, cfg_parallel), world)


@pytest.mark.parametrize(("size", "cfg_parallel"), [(2, "on"), (2, "off"), (3, "off"), (4, "on")])
def test_processes_give_what_one_gives(golden_folder, ranks, size, cfg_parallel):
    """Side by side, the ranks of the branch that does not run wait for what the other gives: 2 have the same arithmetic as
    one. The others split sums over shards."""
    plan, bits = PLANS["gated"], (size, cfg_parallel) == (2, "on")
    one, state = run_loop(golden_folder, plan, world=ranks.alone())
    found = ranks.run(size, on_ranks, golden_folder, plan, cfg_parallel)
    for latents, _ in found:
        assert ranks.same(latents, one, bits=bits)
    saved = found[0][1]  # the first process alone has the state
    assert saved.keys() == state.keys()
    again = run_loop(golden_folder, plan, world=ranks.alone(), done=4, state=saved)[0]
    assert ranks.same(again, one, bits=bits)
