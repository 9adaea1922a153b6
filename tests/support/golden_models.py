"""The transformers whose golden numbers are in tests/golden, and the inputs that belong to them."""

import json
from pathlib import Path

import torch
from conftest import golden_weights
from safetensors import safe_open

from hunyuan_staged.attention.choose import choose_attention
from hunyuan_staged.memory.offloading import stream_blocks
from hunyuan_staged.models.embeddings import Conditioning
from hunyuan_staged.models.modules import TransformerConfig, TransformerModules
from hunyuan_staged.models.transformer import Transformer
from hunyuan_staged.models.upsampler import build_upsampler
from hunyuan_staged.parallel.layout import Layout
from hunyuan_staged.sampling.cache import Cache
from hunyuan_staged.sampling.cache_settings import resolve
from hunyuan_staged.sampling.conditions import condition_channels
from hunyuan_staged.sampling.loop import Sampling, denoise
from hunyuan_staged.sampling.schedule import flow_sigmas
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


def golden(folder, name: str, device: torch.device = CPU):
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
    return tensors, model, Conditioning.from_embeddings(embeddings, device=device, dtype=torch.float32)


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


def forward(
    folder,
    name: str,
    layout: Layout | None = None,
    mode: str = "torch",
    *,
    offloaded: bool = False,
    device: torch.device = CPU,
) -> torch.Tensor:
    tensors, model, conditioning = golden(folder, name, device)
    attention = choose_attention(mode, device, torch.float32)
    blocks = stream_blocks(model, device, 1) if offloaded else None
    model = model if offloaded else model.to(device)
    velocity = Transformer(model, attention, tensors["hidden_states"].shape[2:], layout, blocks)
    hidden_states = tensors["hidden_states"].to(device)
    return velocity(hidden_states, tensors["timestep"], conditioning, tensors.get("timestep_r"))


def run_loop(
    folder,
    layout: Layout | None = None,
    on_step=None,
    cache_type: str | None = None,
    *,
    device: torch.device = CPU,
) -> torch.Tensor:
    tensors, metadata = load(folder / "loop_cfg6_shift5.safetensors")
    model_config = json.loads(load(folder / "dit_t2v.safetensors")[1]["config"])
    branches, noise = golden_branches(tensors, device), tensors["noise"].to(device)
    attention = choose_attention("torch", device, torch.float32)
    model = build(folder, model_config, "dit_shapes").to(device)
    velocity = Transformer(model, attention, noise.shape[2:], layout)
    cache = None
    if cache_type:
        given: dict[str, float] = {"cache_start_step": 1, "cache_end_step": 5, "cache_step_interval": 2}
        given |= {"cache_threshold": 1.0} if cache_type == "firstblock" else {}
        settings = resolve(cache_type, given, int(metadata["steps"]), model_config["mm_double_blocks_depth"])
        cache = Cache(settings, layout or Layout(), velocity.total)
    return denoise(
        velocity,
        noise,
        condition_channels(noise, None),
        branches,
        flow_sigmas(int(metadata["steps"]), float(metadata["shift"])),
        Sampling(float(metadata["guidance_scale"]), layout=layout, cache=cache),
        on_step=on_step,
    )
