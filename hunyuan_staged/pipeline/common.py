"""What the stages have in common: dtypes of a run, the memory that all its processes have, the model's path."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hunyuan_staged.attention.choose import AttentionMode, assumed_attention, choose_attention
from hunyuan_staged.errors import InputError
from hunyuan_staged.memory import available
from hunyuan_staged.memory.budget import FreeMemory
from hunyuan_staged.memory.cards import assumed_card
from hunyuan_staged.options import DEFAULT_DTYPE, DTYPES, DenoiseOptions
from hunyuan_staged.parallel.world import World

Lock = tuple[Path, tuple[str, ...]]  # the file to lock, and the files beside it that only its owner writes


def torch_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype that --dtype names or a config records; auto is bf16 on a GPU, and fp32 on a CPU, where bf16 is slow.

    InputError lists the names there are.
    """
    if name == DEFAULT_DTYPE:
        name = "bf16" if device.type == "cuda" else "fp32"
    if name not in DTYPES:
        raise InputError(f"dtype {name!r} is unknown; known: {', '.join((*DTYPES, DEFAULT_DTYPE))}")
    dtype: torch.dtype = getattr(torch, DTYPES[name])
    return dtype


@dataclass(frozen=True)
class EncoderDtypes:
    """What the encoders compute in: the language model; the glyph encoder; SigLIP and the VAE's encoder."""

    text: torch.dtype
    glyph: torch.dtype
    image: torch.dtype

    def __str__(self) -> str:
        named = {"text": self.text, "glyphs": self.glyph, "image": self.image}
        same = len(set(named.values())) == 1
        return str(self.text) if same else ", ".join(f"{part} {dtype}" for part, dtype in named.items())


def encoder_dtypes(name: str, device: torch.device) -> EncoderDtypes:
    """The dtypes that --dtype names. auto on a GPU: those of the official code, on which the transformers were trained.

    There a bf16 VAE encoder puts the first latent 5.5 % off, a float16 one 0.8 %. InputError as torch_dtype.
    """
    if name == DEFAULT_DTYPE and device.type == "cuda":
        return EncoderDtypes(torch.float16, torch.float32, torch.float16)
    dtype = torch_dtype(name, device)
    return EncoderDtypes(dtype, dtype, dtype)


def free_memory(world: World, loaded: bool = False) -> FreeMemory:
    """What is free for each process of the run: the least that any of them has. loaded: but for what torch has allocated
    on the device."""
    own = available.free_memory(world.device)
    taken = torch.cuda.memory_allocated(world.device) if loaded and own.device is not None else 0
    words = world.all_gather_text("free memory", f"{-1 if own.device is None else own.device + taken} {own.host}")
    device, host = (min(numbers) for numbers in zip(*(map(int, word.split()) for word in words), strict=True))
    return FreeMemory(None if own.device is None else device, host)


def attention_for(
    options: DenoiseOptions, mode: str, device: torch.device, dtype: torch.dtype, head_width: int
) -> AttentionMode:
    """A mode's kernel: of this device, or of the card that --assume_gpu names."""
    if options.assume_gpu is not None:
        return assumed_attention(mode, assumed_card(options.assume_gpu).capability, dtype, head_width=head_width)
    return choose_attention(mode, device, dtype, options.sage_blocks(), head_width=head_width)


def capability_for(options: DenoiseOptions, device: torch.device) -> tuple[int, int] | None:
    """The compute capability of this device, or of the card that --assume_gpu names; None for a CPU, or where unknown."""
    if options.assume_gpu is not None:
        return assumed_card(options.assume_gpu).capability
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def gpu_name(device: torch.device) -> str | None:
    """The name of a GPU as its driver has it; None for a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def chosen_model(model_path: str | None, input_dir: str, config: Mapping[str, Any]) -> str:
    """The model's folder or hub id: what is asked for, else what stage 1 recorded; InputError where neither is there."""
    chosen = model_path or config.get("model_path")
    if not chosen:
        raise InputError(f"{input_dir} records no model_path; give --model_path")
    return str(chosen)
