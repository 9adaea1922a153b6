"""LoRA files in each style that people have, written from official names without the suite's own maps."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

RANK = 4
# (official, ComfyUI, diffusers) names; STREAM is img or txt, B a block, R a block of the refiner.
PER_STREAM = (
    ("double_blocks.B.STREAM_mod.linear", "double_blocks.B.STREAM_mod.lin", ("norm1.linear", "norm1_context.linear")),
    ("double_blocks.B.STREAM_attn_proj", "double_blocks.B.STREAM_attn.proj", ("attn.to_out.0", "attn.to_add_out")),
    ("double_blocks.B.STREAM_mlp.fc1", "double_blocks.B.STREAM_mlp.0", ("ff.net.0.proj", "ff_context.net.0.proj")),
    ("double_blocks.B.STREAM_mlp.fc2", "double_blocks.B.STREAM_mlp.2", ("ff.net.2", "ff_context.net.2")),
)
QKV = {"img": ("attn.to_q", "attn.to_k", "attn.to_v"), "txt": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")}
REFINER = "txt_in.individual_token_refiner.blocks.0."
REFINER_DIFFUSERS = "context_embedder.token_refiner.refiner_blocks.0."
OTHERS = (
    (f"{REFINER}self_attn_proj", f"{REFINER}self_attn.proj", f"{REFINER_DIFFUSERS}attn.to_out.0"),
    (f"{REFINER}mlp.fc1", f"{REFINER}mlp.0", f"{REFINER_DIFFUSERS}ff.net.0.proj"),
    (f"{REFINER}adaLN_modulation.1", f"{REFINER}adaLN_modulation.1", f"{REFINER_DIFFUSERS}norm_out.linear"),
    ("time_in.mlp.0", "time_in.in_layer", "time_embed.timestep_embedder.linear_1"),
    (
        "txt_in.t_embedder.mlp.2",
        "txt_in.t_embedder.out_layer",
        "context_embedder.time_text_embed.timestep_embedder.linear_2",
    ),
    (
        "txt_in.c_embedder.linear_1",
        "txt_in.c_embedder.in_layer",
        "context_embedder.time_text_embed.text_embedder.linear_1",
    ),
    ("txt_in.input_embedder", "txt_in.input_embedder", "context_embedder.proj_in"),
    ("img_in.proj", "img_in.proj", "x_embedder.proj"),
    ("byt5_in.fc1", "byt5_in.fc1", "context_embedder_2.linear_1"),
    ("vision_in.proj.1", "vision_in.proj.1", "image_embedder.linear_1"),
    ("final_layer.linear", "final_layer.linear", "proj_out"),
)
REFINER_QKV = (
    f"{REFINER}self_attn_qkv",
    f"{REFINER}self_attn.qkv",
    tuple(f"{REFINER_DIFFUSERS}attn.to_{part}" for part in "qkv"),
)
SWAPPED = ("final_layer.adaLN_modulation.1", "final_layer.adaLN_modulation.1", "norm_out.linear")


@dataclass(frozen=True)
class Drawn:
    """An adapter: (down, up) of each module, deltas of biases, and of norms' weights; by official names.

    The downs of a block's q, k and v are one, so that every style can say the same.
    """

    pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    biases: Mapping[str, torch.Tensor]
    weights: Mapping[str, torch.Tensor]


def qkv(block: int, stream: str) -> list[str]:
    return [f"double_blocks.{block}.{stream}_attn_{part}" for part in "qkv"]


def names(blocks: int) -> dict[str, tuple[str, str]]:
    """(ComfyUI, diffusers) names by official name, of the modules that are one and unchanged in all three."""
    found = {
        official.replace("B", str(block)).replace("STREAM", stream): (
            comfy.replace("B", str(block)).replace("STREAM", stream),
            f"transformer_blocks.{block}.{diffusers[index]}",
        )
        for block in range(blocks)
        for index, stream in enumerate(("img", "txt"))
        for official, comfy, diffusers in PER_STREAM
    }
    return found | {official: (comfy, diffusers) for official, comfy, diffusers in OTHERS}


def draw(official: Mapping[str, torch.Tensor], blocks: int, dtype: torch.dtype = torch.float32) -> Drawn:
    """An adapter of rank RANK for official weights."""
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 0.1).to(dtype)

    pairs = {}
    for name in (*names(blocks), REFINER_QKV[0], SWAPPED[0]):
        shape = official[f"{name}.weight"].shape
        pairs[name] = normal(RANK, *shape[1:]), normal(shape[0], RANK, *[1] * (len(shape) - 2))
    for block in range(blocks):
        for stream in QKV:
            width = official[f"{qkv(block, stream)[0]}.weight"].shape[1]
            down = normal(RANK, width)
            pairs |= {name: (down, normal(width, RANK)) for name in qkv(block, stream)}
    biases = {name: normal(*official[f"{name}.bias"].shape) for name in pairs}
    norms = ("byt5_in.layernorm", "vision_in.proj.0", "double_blocks.0.img_attn_q_norm")
    return Drawn(pairs, biases, {name: normal(*official[f"{name}.weight"].shape) for name in norms})


Tensors = dict[str, torch.Tensor]


def _save(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Path:
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path, metadata)
    return path


def peft_folder(folder: Path, drawn: Drawn, alpha: float) -> Path:
    """As the official train.py leaves it: a folder with peft's settings, the scale in them."""
    (folder / "default").mkdir(parents=True)
    tensors = {}
    for name, (down, up) in drawn.pairs.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = down
        tensors[f"base_model.model.{name}.lora_B.weight"] = up
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": alpha, "use_dora": False, "alpha_pattern": {}}
    (folder / "default" / "adapter_config.json").write_text(json.dumps(settings))
    _save(folder / "default" / "adapter_model.safetensors", tensors)
    return folder


def musubi(path: Path, drawn: Drawn, alpha: float) -> Path:
    tensors = {}
    for name, (down, up) in drawn.pairs.items():
        stem = f"lora_unet_{name.replace('.', '_')}"
        tensors |= {
            f"{stem}.lora_down.weight": down,
            f"{stem}.lora_up.weight": up,
            f"{stem}.alpha": torch.tensor(alpha),
        }
    return _save(path, tensors)


def _comfy_modules(drawn: Drawn, blocks: int) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(down, up, delta of the bias) by ComfyUI's name, q, k and v in one with their down."""
    found = {comfy: (*drawn.pairs[official], drawn.biases[official]) for official, (comfy, _) in names(blocks).items()}
    for official, comfy, _ in (REFINER_QKV, SWAPPED):
        found[comfy] = (*drawn.pairs[official], drawn.biases[official])
    for block in range(blocks):
        for stream in QKV:
            own = qkv(block, stream)
            up = torch.cat([drawn.pairs[name][1] for name in own])
            bias = torch.cat([drawn.biases[name] for name in own])
            found[f"double_blocks.{block}.{stream}_attn.qkv"] = drawn.pairs[own[0]][0], up, bias
    return found


def musubi_for_comfy(path: Path, drawn: Drawn, blocks: int, alpha: float) -> Path:
    """As musubi-tuner's converter writes: q, k and v at three times the rank, their up block-sparse, alpha x 3."""
    tensors: Tensors = {}

    def put(comfy: str, down: torch.Tensor, up: torch.Tensor, own_alpha: float) -> None:
        stem = f"lora_unet_{comfy.replace('.', '_')}"
        tensors[f"{stem}.lora_down.weight"], tensors[f"{stem}.lora_up.weight"] = down, up
        tensors[f"{stem}.alpha"] = torch.tensor(own_alpha)

    for name, (down, up, _) in _comfy_modules(drawn, blocks).items():
        if name.endswith("_attn.qkv"):
            put(name, torch.cat([down] * 3), torch.block_diag(*up.chunk(3)), 3 * alpha)
        else:
            put(name, down, up, alpha)
    return _save(path, tensors)


def diffusion_pipe(path: Path, drawn: Drawn, blocks: int) -> Path:
    tensors = {}
    for name, (down, up, _) in _comfy_modules(drawn, blocks).items():
        tensors |= {f"diffusion_model.{name}.lora_A.weight": down, f"diffusion_model.{name}.lora_B.weight": up}
    return _save(path, tensors)


def comfy_extracted(path: Path, drawn: Drawn, blocks: int) -> Path:
    """As ComfyUI extracts the difference of two models: with deltas of biases, and of norms whole."""
    tensors = {}
    for name, (down, up, bias) in _comfy_modules(drawn, blocks).items():
        stem = f"diffusion_model.{name}"
        tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.diff_b": bias}
    for name, delta in drawn.weights.items():
        comfy = name.replace("img_attn_q_norm", "img_attn.norm.query_norm")
        tensors[f"diffusion_model.{comfy}.diff"] = delta
    return _save(path, tensors)


def _diffusers_modules(drawn: Drawn, blocks: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    found = {diffusers: drawn.pairs[official] for official, (_, diffusers) in names(blocks).items()}
    for block in range(blocks):
        for stream, own in QKV.items():
            for official, name in zip(qkv(block, stream), own, strict=True):
                found[f"transformer_blocks.{block}.{name}"] = drawn.pairs[official]
    down, up = drawn.pairs[REFINER_QKV[0]]
    found |= {name: (down, share) for name, share in zip(REFINER_QKV[2], up.chunk(3), strict=True)}
    down, up = drawn.pairs[SWAPPED[0]]
    return found | {SWAPPED[2]: (down, up.roll(len(up) // 2, 0))}


def simple_tuner(path: Path, drawn: Drawn, blocks: int) -> Path:
    tensors = {}
    for name, (down, up) in _diffusers_modules(drawn, blocks).items():
        tensors |= {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}
    return _save(path, tensors)


def diffusers(path: Path, drawn: Drawn, blocks: int, alpha: float) -> Path:
    """As diffusers' save_lora_weights: the scale in the file's metadata."""
    tensors = {}
    for name, (down, up) in _diffusers_modules(drawn, blocks).items():
        tensors |= {f"transformer.{name}.lora_A.weight": down, f"transformer.{name}.lora_B.weight": up}
    settings = {"transformer.r": RANK, "transformer.lora_alpha": alpha}
    return _save(path, tensors, {"lora_adapter_metadata": json.dumps(settings)})
