"""What the plan calls free is free once the processes have their groups."""

import pytest
import torch.distributed as dist
from folders import embed

from hunyuan_staged.memory import available
from hunyuan_staged.options import DenoiseOptions
from hunyuan_staged.parallel.world import World
from hunyuan_staged.pipeline import denoising, jobs
from hunyuan_staged.pipeline.denoisers import Denoisers


def order(world: World, folder: str) -> tuple[list[str], bool]:
    """(What happens, in its order, from the plan to the second of two loaded transformers; whether they share groups)."""
    happened = []
    make, measure = dist.new_group, available.free_memory

    def new_group(*args, **options):
        happened.append("group")
        return make(*args, **options)

    def free_memory(device):
        happened.append("measured")
        return measure(device)

    options = DenoiseOptions(input_dir=folder, video_length=5)
    setup = denoising.resolve(options, jobs.read(options), world)
    denoisers = Denoisers()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "new_group", new_group)
        patch.setattr(available, "free_memory", free_memory)
        plan = setup.plan(denoisers.free(setup))
        first = denoisers.load(setup, plan)
        denoisers.drop()
        second = denoisers.load(setup, setup.plan(denoisers.free(setup)))
    return happened, first.layouts == second.layouts and len(first.layouts) == 1


def test_free_memory_is_read_after_the_groups_exist(tmp_path, tiny_official, ranks):
    """On GPUs each group takes memory, which the plan counted as free; and a second transformer made them once more."""
    folder = str(embed(tmp_path / "in", tiny_official))
    for rank in ranks.run(2, order, folder):
        assert rank == (["group"] * 3 + ["measured"], True)  # two groups of shards, one of branches
