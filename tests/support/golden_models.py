"""The transformers whose golden numbers are in tests/golden, and the inputs that belong to them."""

import json
from pathlib import Path

import torch
from conftest import golden_weights
from safetensors import safe_open

from hunyuan_staged.models.embeddings import Conditioning
from hunyuan_staged.models.modules import TransformerConfig, TransformerModules
from hunyuan_staged.models.upsampler import build_upsampler
from hunyuan_staged.weights.configs import official_transformer_config
from hunyuan_staged.weights.key_maps import TRANSFORMER_MAP, to_diffusers
from hunyuan_staged.weights.upsampler import upsampler_kind

CPU = torch.device("cpu")
SHAPES = {"dit_t2v": "dit_shapes", "dit_i2v": "dit_shapes", "dit_meanflow": "dit_meanflow_shapes"}


def load(path) -> tuple[dict, dict]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def build(folder, config: dict, shapes: str):
    """The modules with the golden weights, through the key map."""
    weights = golden_weights(folder / f"{shapes}.json")
    arguments = official_transformer_config(config, weights["byt5_in.fc1.weight"].shape[1])
    model = TransformerModules(TransformerConfig(**arguments))
    model.load_state_dict(to_diffusers(weights, TRANSFORMER_MAP))
    return model.eval()


def golden(folder, name: str):
    """The golden tensors under stage 1's names, and the model that made them."""
    tensors, metadata = load(folder / f"{name}.safetensors")
    model = build(folder, json.loads(metadata["config"]), SHAPES[name])
    embeddings = {
        "prompt_embeds": tensors["text_states"],
        "prompt_embeds_mask": tensors["text_mask"],
        "prompt_embeds_2": tensors["byt5_states"],
        "prompt_embeds_mask_2": tensors["byt5_mask"],
        "image_embeds": tensors["vision_states"],
    }
    return tensors, model, Conditioning.from_embeddings(embeddings, device=CPU, dtype=torch.float32)


def distance(ours: torch.Tensor, reference: torch.Tensor) -> float:
    return float((ours - reference).norm() / reference.norm())


def golden_branches(tensors: dict, device: torch.device = CPU) -> list[Conditioning]:
    """[unconditional, conditional] of the golden loop."""
    names = {
        "prompt_embeds": "text_states",
        "prompt_embeds_mask": "text_mask",
        "prompt_embeds_2": "byt5_states",
        "prompt_embeds_mask_2": "byt5_mask",
    }
    return [
        Conditioning.from_embeddings(
            {ours: tensors[theirs][row][None] for ours, theirs in names.items()}, device=device, dtype=torch.float32
        )
        for row in range(2)
    ]


def golden_upsampler(folder: Path, kind: str, config: dict):
    weights = golden_weights(folder / f"sr_upsampler_{kind}_shapes.json")
    assert upsampler_kind(weights) == kind
    upsampler = build_upsampler(kind, config)
    upsampler.load_state_dict(weights)
    return upsampler.eval()
