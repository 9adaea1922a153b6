"""Transformers as one file in each format that people have, written from official weights without the suite's own maps."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from adapter_writer import OTHERS, PER_STREAM, QKV, REFINER, REFINER_DIFFUSERS, REFINER_QKV, SWAPPED
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]
E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
# LightX2V's: modulations, q, k, v, proj and mlp of both streams of the blocks
IN_FLOAT8 = re.compile(r"double_blocks\.\d+\.\w+_(mod\.linear|attn_(q|k|v|proj|qkv)|mlp\.fc[12])\.weight")


def save(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path, metadata)
    return path


def fused(official: Mapping[str, torch.Tensor]) -> Tensors:
    """As Comfy-Org repackages: q, k and v of the blocks along the first axis of one tensor."""
    found = {}
    for name, tensor in official.items():
        match = re.fullmatch(r"(double_blocks\.\d+\.\w+_attn)_([qkv])\.(weight|bias)", name)
        if not match:
            found[name] = tensor
        elif match[2] == "q":
            stem, leaf = match[1], match[3]
            found[f"{stem}_qkv.{leaf}"] = torch.cat([official[f"{stem}_{part}.{leaf}"] for part in "qkv"])
    return found


def _diffusers_module(module: str) -> str:
    others = {official: name for official, _, name in (*OTHERS, SWAPPED)}
    if module in others:
        return others[module]
    block = re.fullmatch(r"double_blocks\.(\d+)\.(img|txt)_(.+)", module)
    if block:
        number, stream, rest = block.groups()
        index = ("img", "txt").index(stream)
        named = {official.split("STREAM_")[1]: names[index] for official, _, names in PER_STREAM}
        named |= {f"attn_{part}": name for part, name in zip("qkv", QKV[stream], strict=True)}
        norms = {"img": ("attn.norm_q", "attn.norm_k"), "txt": ("attn.norm_added_q", "attn.norm_added_k")}[stream]
        named |= {f"attn_{part}_norm": name for part, name in zip("qk", norms, strict=True)}
        return f"transformer_blocks.{number}.{named[rest]}"
    text = "context_embedder.time_text_embed"
    refiner = re.sub(r"blocks\.\d+\.", "blocks.0.", module)
    named = {
        f"{REFINER}norm1": f"{REFINER_DIFFUSERS}norm1",
        f"{REFINER}norm2": f"{REFINER_DIFFUSERS}norm2",
        f"{REFINER}mlp.fc2": f"{REFINER_DIFFUSERS}ff.net.2",
        **{official: name for official, _, name in OTHERS},
        "time_in.mlp.2": "time_embed.timestep_embedder.linear_2",
        "txt_in.t_embedder.mlp.0": f"{text}.timestep_embedder.linear_1",
        "txt_in.c_embedder.linear_2": f"{text}.text_embedder.linear_2",
        "byt5_in.layernorm": "context_embedder_2.norm",
        "byt5_in.fc2": "context_embedder_2.linear_2",
        "byt5_in.fc3": "context_embedder_2.linear_3",
        "vision_in.proj.0": "image_embedder.norm_in",
        "vision_in.proj.3": "image_embedder.linear_2",
        "vision_in.proj.4": "image_embedder.norm_out",
        "cond_type_embedding": "cond_type_embed",
    }
    number = re.search(r"blocks\.(\d+)\.", module)
    return named[refiner].replace("blocks.0.", f"blocks.{number[1] if number else 0}.")


def diffusers(official: Mapping[str, torch.Tensor]) -> Tensors:
    """Under diffusers' names."""
    found = {}
    for name, tensor in official.items():
        module, _, leaf = name.rpartition(".")
        number = re.search(r"refiner\.blocks\.(\d+)\.self_attn_qkv$", module)
        if number:
            names = [target.replace("blocks.0.", f"blocks.{number[1]}.") for target in REFINER_QKV[2]]
            found |= {f"{target}.{leaf}": part for target, part in zip(names, tensor.chunk(3), strict=True)}
        elif module == SWAPPED[0]:
            found[f"{SWAPPED[2]}.{leaf}"] = tensor.roll(len(tensor) // 2, 0)
        else:
            found[f"{_diffusers_module(module)}.{leaf}"] = tensor
    return found


def _quantised(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (weight.float() / scale).clamp(-LARGEST, LARGEST).to(E4M3)


def by_rows(official: Mapping[str, torch.Tensor]) -> tuple[Tensors, Tensors]:
    """(LightX2V's: weight_scale [out, 1]; what the weights then are, in float32)."""
    tensors, exact = {}, {}
    for name, x in official.items():
        tensors[name] = exact[name] = x
        if IN_FLOAT8.fullmatch(name):
            scale = x.float().abs().amax(1, keepdim=True) / LARGEST
            tensors[name] = _quantised(x, scale)
            tensors[f"{name}_scale"] = scale
            exact[name] = tensors[name].float() * scale
    return tensors, exact


def by_tensor(source: Mapping[str, torch.Tensor], scale_name: str, extra: str | None = None) -> tuple[Tensors, Tensors]:
    """(one scale a tensor, called scale_name, with a scale of the activations called extra; what the weights then are)."""
    tensors, exact = {}, {}
    for name, x in source.items():
        tensors[name] = exact[name] = x
        if IN_FLOAT8.fullmatch(name) or re.fullmatch(
            r"transformer_blocks\.\d+\.(attn\.to|attn\.add|ff).*\.weight", name
        ):
            layer, scale = name.removesuffix(".weight"), x.float().abs().max() / LARGEST
            tensors[name], tensors[f"{layer}.{scale_name}"] = _quantised(x, scale), scale
            exact[name] = tensors[name].float() * scale
            if extra:
                tensors[f"{layer}.{extra}"] = torch.tensor(1.5)
    return tensors, exact


def comfy_old(official: Mapping[str, torch.Tensor]) -> tuple[Tensors, Tensors]:
    tensors, exact = by_tensor(fused(official), "scale_weight", "scale_input")
    return tensors | {"scaled_fp8": torch.zeros(2).to(E4M3)}, exact


def comfy_new(official: Mapping[str, torch.Tensor], kind: str = "float8_e4m3fn") -> tuple[Tensors, Tensors]:
    tensors, exact = by_tensor(fused(official), "weight_scale")
    said = torch.tensor(list(json.dumps({"format": kind}).encode()), dtype=torch.uint8)
    layers = [name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")]
    return tensors | {f"{layer}.comfy_quant": said for layer in layers}, exact
