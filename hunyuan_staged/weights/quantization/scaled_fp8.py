"""Weights that a file holds in float8 with a scale, w = q x scale.

Three conventions: LightX2V's X.weight_scale [out, 1]; ComfyUI's older X.scale_weight, one number, with a tensor scaled_fp8;
its newer X.weight_scale, with X.comfy_quant or _quantization_metadata in the header. NVIDIA ModelOpt's is the last without
these. Scales of activations are left out: those of the run are its own.
"""

import json

import torch
from safetensors import safe_open

from hunyuan_staged.errors import InputError
from hunyuan_staged.weights.key_maps import refuse_names
from hunyuan_staged.weights.quantization.header import Header

MARKER = "scaled_fp8"
SCALES = ("weight_scale", "scale_weight")
UNUSED = ("input_scale", "scale_input", "comfy_quant")
HEADER_ENTRY = "_quantization_metadata"
TYPES = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}  # by what a file calls them
SCALE_TYPES = ("F32", "BF16", "F16")
FORMATS = ("float8_e4m3fn", "float8_e5m2")


def is_scaled(header: Header) -> bool:
    """Whether a file has weights in float8, with scales or without."""
    return any(dtype in TYPES for dtype in header.dtypes.values())


def weights(header: Header) -> list[str]:
    """The tensors that are weights; InputError where what stands beside them is not of this format."""
    named = _layer_formats(header)
    refuse_names(
        f"{header.path}: quantised in a format other than {' and '.join(FORMATS)}",
        [f"{layer} in {kind}" for layer, kind in named.items() if kind not in FORMATS],
    )
    return [name for name in header.shapes if not (name == MARKER or name.rpartition(".")[2] in (*SCALES, *UNUSED))]


def _layer_formats(header: Header) -> dict[str, object]:
    """By layer, the format that the file itself says."""
    found: dict[str, object] = {}
    try:
        recorded = json.loads(header.metadata.get(HEADER_ENTRY, "{}"))
        found |= {name: layer.get("format") for name, layer in recorded.get("layers", {}).items()}
        with safe_open(header.path, "pt") as file:
            for name in header.shapes:
                if name.endswith(".comfy_quant"):
                    content = json.loads(bytes(file.get_tensor(name).flatten().to(torch.uint8).tolist()))
                    found[name.removesuffix(".comfy_quant")] = content.get("format")
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise InputError(
            f"{header.path}: what it says of its quantisation is not what ComfyUI writes ({error})"
        ) from error
    return found


def read_scales(header: Header) -> dict[str, torch.Tensor]:
    """The scale of each weight that has one, float32, [1] or [out, 1].

    InputError for a scale without a float8 weight, weights without a scale beside others with one, a scale of another
    shape, and one that is no number from 0 on, or so large that the weights would not be finite.
    """
    found, wrong = {}, []
    with safe_open(header.path, "pt") as file:
        for name, shape in header.shapes.items():
            layer, _, leaf = name.rpartition(".")
            if leaf not in SCALES:
                continue
            weight = f"{layer}.weight"
            rows = (header.shapes.get(weight) or [0])[0]
            if header.dtypes.get(weight) not in TYPES or weight in found:
                wrong.append(f"{name}, without a float8 weight of its own")
            elif shape not in ([], [1], [1, 1], [rows], [rows, 1]) or header.dtypes[name] not in SCALE_TYPES:
                wrong.append(f"{name} {header.dtypes[name]} {shape} for a weight {header.shapes[weight]}")
            else:
                scale = file.get_tensor(name).float().view(-1, 1)
                largest = scale * torch.finfo(TYPES[header.dtypes[weight]]).max
                if not (torch.isfinite(largest) & (scale >= 0)).all():
                    wrong.append(f"{name}, which holds what is no finite number from 0 on, or makes weights infinite")
                found[weight] = scale
    refuse_names(f"{header.path}: scales that do not fit", wrong)
    bare = [name for name, dtype in header.dtypes.items() if dtype in TYPES and name not in found and name != MARKER]
    if found:
        refuse_names(f"{header.path}: float8 weights without a scale", bare)
    return found


def dequantised(tensor: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """A tensor of a file: in float8, it is made float32 and multiplied by its scale, if there is one."""
    if tensor.dtype not in TYPES.values():
        return tensor
    wide = tensor.float()
    return wide if scale is None else wide * scale.to(wide.device).view(-1, *[1] * (wide.ndim - 1))
