"""Copies of tiny checkpoints to be damaged, and the golden VAE."""

import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open

from hunyuan_staged.weights import configs

CPU = torch.device("cpu")
F32 = {"device": CPU, "dtype": torch.float32}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def golden_config(path: Path) -> dict:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["config"])


def meta_transformer(config: dict) -> torch.nn.Module:
    from diffusers import HunyuanVideo15Transformer3DModel

    with torch.device("meta"):
        return HunyuanVideo15Transformer3DModel(**config)


def golden_vae(golden_folder: Path) -> torch.nn.Module:
    from diffusers import AutoencoderKLHunyuanVideo15

    config = configs.official_vae_config(golden_config(golden_folder / "vae_5x7.safetensors"))
    with torch.device("meta"):
        return AutoencoderKLHunyuanVideo15(**config)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def copied(folder: Path, tmp_path: Path, *parts: str) -> Path:
    """A copy of some parts of a drawn checkpoint, to be damaged."""
    for part in parts:
        shutil.copytree(folder / part, tmp_path / part)
    return tmp_path


def edit(path: Path, **changes: object) -> None:
    """Change keys of a JSON file; None drops one."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))
