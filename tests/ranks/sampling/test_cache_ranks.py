"""The state of a feature cache on its way to a file: whole on the first process, nothing on the others."""

import pytest
import torch

from hunyuan_staged.parallel.layout import make_layout
from hunyuan_staged.sampling.cache import BranchState, Cache
from hunyuan_staged.sampling.cache_settings import resolve

TOTAL, TEXT_TOKENS, CHANNELS = 7, (3, 2), 4


def whole(branch: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(branch)
    return {
        "video": torch.randn(1, TOTAL, CHANNELS, generator=draw).bfloat16(),
        "text": torch.randn(1, TEXT_TOKENS[branch], CHANNELS, generator=draw).bfloat16(),
    }


def gathered(world) -> dict[str, torch.Tensor]:
    """What one process gets of the state of all."""
    layout = make_layout(world, 2)
    cache = Cache(resolve("deepcache", {}, 50, 54), layout, TOTAL)
    for branch in layout.my_branches(2):
        kept = whole(branch)
        cache.branches[branch] = BranchState(
            {"video": layout.scatter(kept["video"]).to(world.device), "text": kept["text"].to(world.device)},
            {"step": 3.0},
        )
    return cache.tensors(world)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_the_state_of_a_cache_goes_to_the_first_process_alone(ranks, size):
    """Every process gathered its branch whole, and got the other one by broadcast: memory that no plan had."""
    first, *others = ranks.run(size, gathered)
    expected = {f"cache.{branch}.{name}": x for branch in (0, 1) for name, x in whole(branch).items()}
    expected |= {f"cache.{branch}.numbers": torch.tensor([3.0], dtype=torch.float64) for branch in (0, 1)}
    assert first.keys() == expected.keys()
    assert all(torch.equal(first[name], tensor) for name, tensor in expected.items())
    assert others == [{}] * (size - 1)
