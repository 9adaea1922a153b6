"""What several test files share: the drawn checkpoints, the golden numbers, and a folder of the TPU suite."""

import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file

if TYPE_CHECKING:
    from ranks import Ranks

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).resolve().parent / "golden"


def pytest_configure() -> None:
    """One thread for this process and for those that a test starts: tests run side by side, and results do not vary."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--real", metavar="DIR", help="a folder that the TPU suite wrote with the published weights")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def ranks(request: pytest.FixtureRequest) -> Iterator["Ranks"]:
    """Processes on CPUs (gloo); with `-m gpu` on this machine's GPUs (NCCL), of which it takes two."""
    from ranks import Ranks, precise

    if request.param == "cpu":
        yield Ranks(torch.device("cpu"))
        return
    count = torch.cuda.device_count()
    if count < 2:
        pytest.skip(f"NCCL needs two GPUs, and there are {count}")
    backends = torch.backends.cudnn, torch.backends.cuda.matmul
    former = [backend.allow_tf32 for backend in backends]
    precise()
    yield Ranks(torch.device("cuda", 0), count)
    for backend, allowed in zip(backends, former, strict=True):
        backend.allow_tf32 = allowed


@pytest.fixture(scope="session")
def golden_folder() -> Path:
    """The numbers of the official implementation; README.md there says where they come from."""
    return GOLDEN


@pytest.fixture(scope="session", params=["drawn", "real"])
def tpu_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in the format of the suite for TPUs, drawn with its keys, and with --real the one it wrote itself."""
    if request.param == "real":
        given = request.config.getoption("--real")
        if not given:
            pytest.skip("--real DIR was not given")
        return Path(given)
    folder = tmp_path_factory.mktemp("tpu")
    config = {
        "prompt": 'A girl holding a paper with words "Hello, world!"',
        "negative_prompt": "",
        "model_id": "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-720p_t2v",
    }
    (folder / "generation_config.json").write_text(json.dumps(config, indent=2))
    latents = torch.randn(1, 32, 13, 45, 80, generator=torch.Generator().manual_seed(0)).bfloat16()
    metadata = {
        "num_inference_steps": "50",
        "num_frames": "49",
        "guidance_scale": "6.0",
        "seed": "42",
        "dtype_info": json.dumps({"latents": "torch.bfloat16"}),
    }
    save_file({"latents": latents}, folder / "stage2_latents.safetensors", metadata=metadata)
    return folder


@pytest.fixture(scope="session")
def tiny_official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A drawn tiny checkpoint in the official layout, with demo_t2v and demo_i2v. Read only: tests share it."""
    return _drawn(tmp_path_factory, "official")


@pytest.fixture(scope="session")
def tiny_diffusers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights in the diffusers layout, with the transformer of demo_t2v. Read only: tests share it."""
    return _drawn(tmp_path_factory, "diffusers")


@pytest.fixture(scope="session")
def tiny_super_resolution(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny_official with demo_hd_sr_distilled beside its transformers. Read only: tests share it."""
    return _drawn(tmp_path_factory, "official", "demo_t2v", "demo_i2v", "demo_hd_sr_distilled")


@pytest.fixture(scope="session")
def tiny_enlarging(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """720p_sr_distilled and 1080p_sr_distilled beside demo_t2v, so small that 8,000 tokens take no time. Read only."""
    versions = ("demo_t2v", "720p_sr_distilled", "1080p_sr_distilled")
    return _drawn(tmp_path_factory, "official", *versions, transformer_heads=1, transformer_layers=1)


def _drawn(factory: pytest.TempPathFactory, layout: str, *versions: str, **sizes: int) -> Path:
    from filelock import FileLock

    from hunyuan_staged.demo.tiny import DEMO_VERSIONS, Sizes, draw_checkpoint

    base = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # of all workers of this run
    folder = base / "_".join(["tiny", layout, *versions])
    with FileLock(base / f"{folder.name}.lock"):
        if not folder.exists():
            draw_checkpoint(folder, sizes=Sizes(**sizes), layout=layout, versions=versions or DEMO_VERSIONS)
    return folder


def golden_weights(shapes: str | Path) -> dict[str, torch.Tensor]:
    """The state dict of an official-layout *_shapes.json by the weight rule of golden/README.md."""
    ones = ("norm.weight", "norm1.weight", "norm2.weight", "layernorm.weight", "proj.0.weight", "proj.4.weight")
    weights = {}
    for name, shape in json.loads(Path(shapes).read_text()).items():
        x = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        if "gamma" in name or (x.ndim == 1 and name.endswith(ones)):
            weights[name] = 1 + 0.1 * x
        else:
            weights[name] = x * 0.7 / (x[0].numel() if x.ndim > 1 else 64) ** 0.5
    return weights


@pytest.fixture(params=["official", "diffusers"])
def either_layout(request, tiny_official, tiny_diffusers):
    """A tiny checkpoint, opened, in the official layout and in diffusers'."""
    from hunyuan_staged.weights.folder import open_model
    from hunyuan_staged.weights.hub import PARTS

    path = {"official": tiny_official, "diffusers": tiny_diffusers}[request.param]
    return open_model(path, tuple(PARTS))
