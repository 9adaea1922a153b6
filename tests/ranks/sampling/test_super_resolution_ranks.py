"""Super resolution on several processes against one."""

from pathlib import Path

import pytest
import torch
from golden_super_resolution import golden_run

from hunyuan_staged.parallel.layout import make_layout
from hunyuan_staged.parallel.world import World


def run_on(world: World, folder: Path, name: str) -> torch.Tensor:
    run = golden_run(folder, name)
    guided = float(run.metadata["guidance_scale"]) > 1
    return run.run(layout=make_layout(world, 2 if guided else 1), device=world.device)[-1]


@pytest.mark.parametrize(("size", "name"), [(2, "720p_cfg"), (3, "1080p_i2v"), (2, "720p_t2v")])
def test_processes_give_what_one_gives(golden_folder, ranks, size, name):
    """With a guidance branch each the same arithmetic, hence the same bits; shards split sums."""
    one = golden_run(golden_folder, name).run(device=ranks.device)[-1]
    for latents in ranks.run(size, run_on, golden_folder, name):
        assert ranks.same(latents, one, bits=name == "720p_cfg")
