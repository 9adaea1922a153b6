"""LPIPS: how different two frames look, by features of a network that was trained to see."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np

Distance = Callable[[np.ndarray, np.ndarray], float]

PACKAGES = ("lpips", "torchvision")
NETWORK_FILES = "alexnet-owt-*.pth"  # as torchvision names the weights that it keeps


def open_lpips() -> Distance | None:
    """LPIPS of two frames float32 [H, W, 3] in [0, 1], 0 for equal ones (Zhang et al. 2018, "The Unreasonable
    Effectiveness of Deep Features as a Perceptual Metric"; AlexNet, version 0.1).

    None where the packages or AlexNet's weights are not here: nothing is downloaded for it.
    """
    if not all(map(find_spec, PACKAGES)):
        return None
    import torch

    if not any((Path(torch.hub.get_dir()) / "checkpoints").glob(NETWORK_FILES)):
        return None
    from lpips import LPIPS

    network = LPIPS(net="alex", version="0.1", verbose=False).eval()

    def distance(a: np.ndarray, b: np.ndarray) -> float:
        # [H, W, 3] in [0, 1] → [1, 3, H, W] in [-1, 1]
        with torch.inference_mode():
            return float(network(*(torch.from_numpy(x).movedim(-1, 0)[None] * 2 - 1 for x in (a, b))))

    return distance
