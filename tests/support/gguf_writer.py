"""GGUF files of official weights, by the gguf package's own writer; what it cannot quantise is drawn block by block."""

import itertools
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants
from transformer_writer import IN_FLOAT8, fused

Tensors = dict[str, torch.Tensor]
HALVES = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}  # where the float16 scales of a block are
SIZE = {"Q4_K": 0.002, "Q5_K": 0.001, "Q6_K": 0.00005}  # of those scales, so that weights come out about as drawn


def quantised(tensor: torch.Tensor, kind: str, seed: int = 0) -> tuple[np.ndarray, torch.Tensor]:
    """(bytes [rows, bytes of a row], the numbers that they say)."""
    number = GGMLQuantizationType[kind]
    if kind not in HALVES:
        data = quants.quantize(tensor.float().numpy(), number)
    else:
        values, size = gguf.GGML_QUANT_SIZES[number]
        draw = np.random.default_rng(seed)
        blocks = draw.integers(0, 256, (tensor.numel() // values, size), dtype=np.uint8)
        for at in HALVES[kind]:
            scale = (draw.random(len(blocks)) * SIZE[kind]).astype(np.float16)
            blocks[:, at : at + 2] = scale.view(np.uint8).reshape(-1, 2)
        data = blocks.reshape(tensor.shape[0], -1)
    return data, torch.from_numpy(np.array(quants.dequantize(data, number)))


def write(path: Path, official: Mapping[str, torch.Tensor], *kinds: str) -> tuple[Path, Tensors]:
    """(a file with ComfyUI's names, its blocks' matrices in these types by turns; what it says exactly, in float32)."""
    writer = GGUFWriter(path, "hyvid")
    exact: Tensors = {}
    turns = itertools.count()
    for name, tensor in fused(official).items():
        if IN_FLOAT8.fullmatch(name):
            turn = next(turns)
            kind = kinds[turn % len(kinds)]
            data, exact[name] = quantised(tensor, kind, turn)
            writer.add_tensor(name, data, raw_dtype=GGMLQuantizationType[kind])
            continue
        exact[name] = tensor.float()
        array = tensor.float().contiguous().numpy()
        if tensor.ndim > 4:  # ggml has four axes
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(tensor.shape))
            array = array.reshape(tensor.shape[0], -1)
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, exact
