"""Folders as the stages leave them, for tests that begin behind one."""

import json
from pathlib import Path

import torch

from hunyuan_staged.files import contract
from hunyuan_staged.files import tensors as stage_tensors
from hunyuan_staged.files.config import update_config
from hunyuan_staged.files.tensors import save_embeddings


def embed(folder: Path, model_path: Path, config: dict | None = None, *, image: bool = False) -> Path:
    """A folder as stage 1 leaves it, with embeddings drawn at the widths of the tiny checkpoint."""
    transformer = json.loads((model_path / "transformer" / "demo_t2v" / "config.json").read_text())
    draw = torch.Generator().manual_seed(5)
    tensors = {}
    for prefix, valid, glyphs in (("", 9, 5), ("negative_", 6, 0)):
        for name, tokens, width, count in (
            ("prompt_embeds", 1000, transformer["text_states_dim"], valid),
            ("prompt_embeds_2", 256, glyph_width(model_path), glyphs),
        ):
            mask = torch.zeros(1, tokens, dtype=torch.int64)
            mask[:, :count] = 1
            tensors[prefix + name] = torch.randn(1, tokens, width, generator=draw) * mask[..., None]
            tensors[prefix + name.replace("embeds", "embeds_mask")] = mask
    if image:
        tensors["image_embeds"] = torch.randn(1, 4, transformer["vision_states_dim"], generator=draw)
        tensors["image_latents"] = torch.randn(1, 32, 1, 6, 10, generator=draw)
    version = "demo_i2v" if image else "demo_t2v"
    recorded = {"prompt": "a", "model_path": str(model_path), "resolution": "demo", "transformer_version": version}
    recorded |= {"task_type": version[-3:], "dtype": "fp32"}
    save_embeddings(folder, tensors, {"prompt": "a", "negative_prompt": "", "model": "tiny", "version": version})
    update_config(folder, recorded | (config or {}))
    return folder


def glyph_width(model_path: Path) -> int:
    from safetensors import safe_open

    with safe_open(model_path / "transformer" / "demo_t2v" / "diffusion_pytorch_model.safetensors", "pt") as file:
        return file.get_slice("byt5_in.fc1.weight").get_shape()[1]


def denoised(folder: Path, model_path: object, latents: torch.Tensor | None = None, **config: object) -> Path:
    """A folder as stage 2 leaves it."""
    if latents is None:
        latents = torch.randn(1, 32, 3, 6, 10, generator=torch.Generator().manual_seed(5))
    stage_tensors.save_latents(folder, latents, {"num_frames": "9", "seed": "42"})
    recorded = {"prompt": "a", "model_path": str(model_path), "seed": 42} | config
    (folder / contract.CONFIG_FILE).write_text(json.dumps(recorded))
    return folder
