"""What several test files share: the drawn checkpoints, ../shared, and the golden weights."""

import json
import os
import zlib
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"


def pytest_configure() -> None:
    """One thread for this process and for those that a test starts: tests run side by side, and results do not vary."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared() -> Path:
    """../shared with the golden numbers; the checkout may lie where there is none."""
    if not SHARED.is_dir():
        pytest.skip("../shared is absent: no golden numbers here")
    return SHARED


@pytest.fixture(scope="session")
def tiny_official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A drawn tiny checkpoint in the official layout, with demo_t2v and demo_i2v. Read only: tests share it."""
    return _drawn(tmp_path_factory, "official")


@pytest.fixture(scope="session")
def tiny_diffusers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights in the diffusers layout, with the transformer of demo_t2v. Read only: tests share it."""
    return _drawn(tmp_path_factory, "diffusers")


def _drawn(factory: pytest.TempPathFactory, layout: str) -> Path:
    from filelock import FileLock

    from hunyuan_staged.demo.draw import draw_checkpoint

    base = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # of all workers of this run
    folder = base / f"tiny_{layout}"
    with FileLock(base / f"{folder.name}.lock"):
        if not folder.exists():
            draw_checkpoint(folder, layout=layout)
    return folder


def golden_weights(shapes: str | Path) -> dict[str, torch.Tensor]:
    """The state dict of an official-layout *_shapes.json by the weight rule of ../shared/golden/README.md."""
    ones = ("norm.weight", "norm1.weight", "norm2.weight", "layernorm.weight", "proj.0.weight", "proj.4.weight")
    weights = {}
    for name, shape in json.loads(Path(shapes).read_text()).items():
        x = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        if "gamma" in name or (x.ndim == 1 and name.endswith(ones)):
            weights[name] = 1 + 0.1 * x
        else:
            weights[name] = x * 0.7 / (x[0].numel() if x.ndim > 1 else 64) ** 0.5
    return weights
