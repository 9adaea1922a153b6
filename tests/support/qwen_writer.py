"""A text encoder's folder as Qwen2.5-VL-7B-Instruct has it on the hub: tiny and drawn, with lm_head and vision tower."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from hunyuan_staged.demo.tiny import draw_weights

LLM = Path("text_encoder") / "llm"
SCALES = {"q_proj": 8, "k_proj": 8, "o_proj": 32, "down_proj": 4}
FILE = LLM / "model.safetensors"


def write_whole(model_path: Path, target: Path) -> Path:
    """A copy of a drawn checkpoint in the official layout, whose language model is whole, under the hub's names."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    shutil.copytree(model_path, target)
    config = Qwen2_5_VLConfig.from_dict(json.loads((target / LLM / "config.json").read_text()))
    model = Qwen2_5_VLForConditionalGeneration(config)
    draw_weights(model, "whole")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Else the last token alone would decide on the next, and one would follow itself for ever.
            parameter *= SCALES.get(name.split(".")[-2], 1)
    for path in (target / LLM).glob("model*"):
        path.unlink()
    weights = {
        name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): tensor.contiguous()
        for name, tensor in model.state_dict().items()
    }
    save_file(weights, target / FILE, metadata={"format": "pt"})
    return target


def swap_tokens(folder: Path, one: int, other: int) -> None:
    """Have the model write one token wherever it would have written the other."""
    weights = load_file(folder / FILE)
    weights["lm_head.weight"][[one, other]] = weights["lm_head.weight"][[other, one]]
    save_file(weights, folder / FILE, metadata={"format": "pt"})


def reference(folder: Path) -> torch.nn.Module:
    """The same model as transformers loads it itself."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / LLM, dtype=torch.float32).eval()
