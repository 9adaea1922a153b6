"""The tiny transformer, some of its blocks on the host."""

from pathlib import Path

import torch

from hunyuan_staged.memory.offloading import load_offloaded
from hunyuan_staged.parallel.world import World
from hunyuan_staged.weights import components, loading
from hunyuan_staged.weights.folder import open_model

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)


def loaded(folder: Path, offloaded: int, world: World = ALONE, weights_dtype: str | None = None):
    """The tiny transformer, loaded as stage 2 loads it."""
    source = open_model(folder, ["transformer"])
    skeleton = components.transformer_skeleton(source, "demo_t2v", weights_dtype=weights_dtype)

    def load(destinations: loading.Destinations):
        return components.load_transformer(
            source, "demo_t2v", device=world.device, dtype=torch.float32, skeleton=skeleton, destinations=destinations
        )

    return load_offloaded(
        skeleton, "transformer_blocks", offloaded, load, device=world.device, dtype=torch.float32, world=world
    )
