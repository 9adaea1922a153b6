"""The parts of a drawn checkpoint as one file each, as ComfyUI has them, written without the suite's own readers."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformer_writer import E4M3, LARGEST, save

Tensors = dict[str, torch.Tensor]


def text(model: Path) -> Tensors:
    """The whole language model, with lm_head and vision tower."""
    found: Tensors = {}
    for path in sorted((model / "text_encoder" / "llm").glob("*.safetensors")):
        found |= load_file(path)
    return found


def glyph(model: Path) -> Tensors:
    """The encoder alone, its tokens' embeddings as shared.weight."""
    path = model / "text_encoder" / "Glyph-SDXL-v2" / "checkpoints" / "byt5_model.pt"
    stack = torch.load(path, weights_only=True)["state_dict"]
    plain = {name.removeprefix("module.text_tower.encoder."): x for name, x in stack.items()}
    return {"shared.weight" if name == "embed_tokens.weight" else f"encoder.{name}": x for name, x in plain.items()}


def image(model: Path) -> Tensors:
    return load_file(model / "vision_encoder" / "siglip" / "image_encoder" / "model.safetensors")


def vae(model: Path) -> Tensors:
    return load_file(model / "vae" / "diffusion_pytorch_model.safetensors")


def scaled(tensors: Mapping[str, torch.Tensor], ending: str = "proj.weight") -> tuple[Tensors, Tensors]:
    """(some matrices in float8 with one scale each, as ComfyUI's older files; what they say exactly)."""
    found, exact = dict(tensors), dict(tensors)
    for name, x in tensors.items():
        if x.ndim == 2 and name.endswith(ending):
            scale = x.float().abs().max() / LARGEST
            found[name] = (x.float() / scale).to(E4M3)
            found[f"{name.removesuffix('.weight')}.scale_weight"] = scale
            exact[name] = found[name].float() * scale
    return found | {"scaled_fp8": torch.zeros(2).to(E4M3)}, exact


def write_files(model: Path, folder: Path, transformer: Mapping[str, torch.Tensor], version: str = "demo_t2v") -> Path:
    """A folder of single files, below it ComfyUI's folders, and what of the encoders no file holds."""
    parts = {
        f"split_files/diffusion_models/some_{version}.safetensors": transformer,
        "text_encoders/qwen.safetensors": text(model),
        "text_encoders/byt5.safetensors": glyph(model),
        "clip_vision/sigclip.safetensors": image(model),
        "vae/hunyuan_vae.safetensors": vae(model),
    }
    for name, tensors in parts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        save(folder / name, tensors)
    copy_small(model, folder, "text_encoder/llm", "text_encoder/byt5-small", "text_encoder/Glyph-SDXL-v2/assets")
    copy_small(model, folder, "vision_encoder/siglip/image_encoder")
    return folder


def copy_small(model: Path, folder: Path, *names: str) -> None:
    """Configs, tokenizers and tables of some folders."""
    for name in names:
        shutil.copytree(model / name, folder / name, ignore=shutil.ignore_patterns("*.safetensors*", "*.pt"))
