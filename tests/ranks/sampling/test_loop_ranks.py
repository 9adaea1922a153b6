"""The loop on several processes against one."""

import pytest
import torch
from golden_models import CPU, run_loop

from hunyuan_staged.parallel.layout import Layout, make_layout
from hunyuan_staged.parallel.world import World


def with_first_estimate(
    folder, layout: Layout | None = None, device: torch.device = CPU
) -> tuple[torch.Tensor, torch.Tensor]:
    """(latents, what the first step took them to be)."""
    found = []
    latents = run_loop(folder, layout, lambda i, _, clean: found.append(clean()), device=device)
    assert torch.equal(found[-1], latents), "behind the last step no noise is left"
    return latents, found[0]


def loop_on(world: World, folder) -> tuple[torch.Tensor, torch.Tensor]:
    return with_first_estimate(folder, make_layout(world, 2), world.device)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_processes_give_what_one_gives(golden_folder, ranks, size):
    """2: a guidance branch each, the same arithmetic. 3 and 4: sums are split over shards, so not the same bits."""
    one = with_first_estimate(golden_folder, device=ranks.device)
    for rank in ranks.run(size, loop_on, golden_folder):
        for found, alone in zip(rank, one, strict=True):
            assert ranks.same(found, alone, bits=size == 2)
