"""Every process gets the same condition of super resolution."""

from pathlib import Path

import pytest
import torch

from hunyuan_staged.parallel.world import World
from hunyuan_staged.pipeline import low_resolution
from hunyuan_staged.versions import super_resolution_version
from hunyuan_staged.weights.upsampler import open_upsampler


def prepared(world: World, folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    version = super_resolution_version("demo_hd")
    latents = torch.randn(1, 32, 3, 6, 10, generator=torch.Generator().manual_seed(1))
    image = torch.ones(1, 32, 1, 12, 20)
    noise, condition = low_resolution.prepare(
        open_upsampler(folder / "upsampler" / version.name),
        latents if world.is_main else torch.zeros_like(latents),
        image,
        low_resolution.enlarged_shape(version, latents.shape),
        seed=5,
        dtype=torch.bfloat16,
        world=world,
    )
    return noise, condition(1000.0)


@pytest.mark.parametrize("size", [2, 3])
def test_every_process_gets_the_same_condition(tiny_super_resolution, ranks, size):
    one = [x.cpu() for x in prepared(ranks.alone(), tiny_super_resolution)]
    assert one[0].shape == (1, 32, 3, 12, 20) and one[1].shape == (1, 66, 3, 12, 20)
    assert one[1].dtype == torch.bfloat16 and one[1][:, :33, 0].eq(1).all()
    for noise, channels in ranks.run(size, prepared, tiny_super_resolution):
        assert torch.equal(noise, one[0]) and torch.equal(channels, one[1])
