"""Adapters on disk: a safetensors file, or a folder of peft's or diffusers', and the scale that its settings give."""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from hunyuan_staged.errors import InputError
from hunyuan_staged.files.provenance import sha256
from hunyuan_staged.weights.boundary import read_json, require_regular
from hunyuan_staged.weights.loading import require_float
from hunyuan_staged.weights.lora_keys import without_prefix
from hunyuan_staged.weights.schema import quoted

# (module, rank) → what its low-rank product is multiplied by, where the file has no alpha of its own for the module
Scale = Callable[[str, int], float]

SETTINGS = "adapter_config.json"  # peft's, beside the weights
PEFT_WEIGHTS = "adapter_model.safetensors"
FOLDER_WEIGHTS = (PEFT_WEIGHTS, "pytorch_lora_weights.safetensors")  # peft's, diffusers'
ADAPTER_FOLDER = "default"  # peft's name for an adapter without one, and so of its folder
MAX_ALPHA = 1e6  # trainers give about the rank
_METADATA = "lora_adapter_metadata"  # diffusers' own, JSON, in a file's metadata


@dataclass(frozen=True)
class AdapterFile:
    """What was read: the file, its tensors, its scale, and what is recorded of it (name and hashes)."""

    given: Path
    tensors: Mapping[str, torch.Tensor]
    scale: Scale
    record: Mapping[str, Any]


def read(given: Path) -> AdapterFile:
    """An adapter's file or folder. InputError where there are no weights in it, where they are no whole safetensors file,
    and where its settings are broken or those of another kind than LoRA."""
    file = _weights(given) if given.is_dir() else given
    require_regular(file)
    try:
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (no iterator)
                require_float(f"--lora {given}: {name}", opened.get_slice(name).get_dtype())
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no iterator)
            metadata = opened.metadata() or {}
    except InputError:
        raise
    except (SafetensorError, OSError) as error:
        raise InputError(f"--lora {given} is not a whole safetensors file ({error})") from error
    if not tensors:
        raise InputError(f"--lora {given} holds no tensors")
    record: dict[str, Any] = {"file": file.name, "sha256": sha256(file)}
    settings = file.with_name(SETTINGS)
    # Beside a file of another name it may belong to something else.
    if (given.is_dir() or file.name == PEFT_WEIGHTS) and settings.is_file():
        record["settings_sha256"] = sha256(settings)
        return AdapterFile(given, tensors, _scale(given, _peft(given, settings), SETTINGS), record)
    return AdapterFile(given, tensors, _scale(given, _diffusers(given, metadata), _METADATA), record)


def _weights(folder: Path) -> Path:
    """The weights in an adapter's folder, or in the one that peft made in it."""
    for place in (folder, folder / ADAPTER_FOLDER):
        for name in FOLDER_WEIGHTS:
            if (place / name).is_file():
                return place / name
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    held = ", ".join(file.name for file in files[:3]) or "no safetensors file"
    raise InputError(f"--lora {folder} holds {held}; allowed in a folder is {' or '.join(FOLDER_WEIGHTS)}")


def _peft(given: Path, path: Path) -> dict[str, Any]:
    config = read_json(path)
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise InputError(f"--lora {given}: {path.name} says peft_type {kind!r}; allowed is 'LORA'")
    return config


def _diffusers(given: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        recorded = json.loads(metadata.get(_METADATA, "{}"))
        return {name.removeprefix("transformer."): value for name, value in recorded.items()}
    except (ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"--lora {given}: its {_METADATA} is not what diffusers writes ({error})") from error


def _scale(given: Path, config: Mapping[str, Any], origin: str) -> Scale:
    """alpha / rank, or with rsLoRA alpha / sqrt(rank), by module and rank; 1 where the settings have no alpha."""
    if config.get("use_dora"):
        raise InputError(f"--lora {given} is a DoRA adapter, which cannot be added to the weights; LoRA is allowed")
    try:
        alpha = None if config.get("lora_alpha") is None else _number(config["lora_alpha"])
        patterns = {str(name): _number(value) for name, value in (config.get("alpha_pattern") or {}).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"--lora {given}: lora_alpha or alpha_pattern of its {origin}: {error}") from error
    for name in patterns:
        if not re.fullmatch(r"[\w.]+", name):
            raise InputError(f"--lora {given}: alpha_pattern {name!r} of its {origin}; allowed are names of modules")
    own = {without_prefix(name): value for name, value in patterns.items()}
    root = bool(config.get("use_rslora"))

    def scale(module: str, rank: int) -> float:
        chosen = next((value for name, value in own.items() if f".{module}".endswith(f".{name}")), alpha)
        return 1.0 if chosen is None else chosen / (math.sqrt(rank) if root else rank)

    return scale


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not is_alpha(value):
        raise ValueError(f"{quoted(value)} is not a number from {-MAX_ALPHA:g} to {MAX_ALPHA:g}")
    return float(value)


def is_alpha(value: float) -> bool:
    """Whether an adapter may have this alpha; NaN it may not."""
    return -MAX_ALPHA <= value <= MAX_ALPHA
