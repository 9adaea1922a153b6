"""A forward whose tokens are split over processes."""

import pytest
import torch
from golden_models import distance, forward
from ranks import run_ranks

from hunyuan_staged.parallel.layout import make_layout
from hunyuan_staged.parallel.world import World


def sharded(world: World, folder, name: str) -> torch.Tensor:
    return forward(folder, name, make_layout(world, 1))


@pytest.mark.parametrize(("size", "name"), [(3, "dit_i2v"), (5, "dit_meanflow")])
def test_shards_give_what_one_process_gives(golden_folder, size, name):
    """3 does not divide the 4 heads, 5 leaves a rank without one. Sums are split differently, hence not bits."""
    one = forward(golden_folder, name)
    for out in run_ranks(size, sharded, golden_folder, name):
        assert distance(out, one) < 1e-5
