"""LoRA adapters: low-rank additions to the transformer's weights, fused into them as they are loaded.

W' = W + weight * alpha / rank * up @ down for each adapted W, summed in float32 before W takes the run's dtype. An
adapter's keys may be the official layout's or diffusers', as peft, diffusers or kohya's scripts write them.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from hunyuan_staged.errors import InputError
from hunyuan_staged.files.provenance import sha256
from hunyuan_staged.weights.key_maps import TRANSFORMER_MAP, Named, diffusers_tensors, to_official

# A key is [prefix]module.leaf; peft puts an adapter's name ("default") between the leaf's two words.
_PREFIX = re.compile(r"^(?:base_model\.model\.|transformer\.|diffusion_model\.|model\.)+")
_KOHYA = "lora_unet_"  # its module names have _ for every dot
_LEAF = re.compile(
    r"\.(?:(?P<down>lora_A(?:\.\w+)?\.weight|lora_down\.weight|lora\.down\.weight)"
    r"|(?P<up>lora_B(?:\.\w+)?\.weight|lora_up\.weight|lora\.up\.weight)|(?P<alpha>alpha))$"
)
_METADATA = "lora_adapter_metadata"  # diffusers' own, JSON, in a file's metadata


@dataclass(frozen=True)
class Addition:
    """scale * up [out, r] @ down [r, in], in the shape of a weight."""

    up: torch.Tensor
    down: torch.Tensor
    scale: float

    def to(self, weight: torch.Tensor) -> torch.Tensor:
        """The addition in float32, in the shape and on the device of `weight`."""
        up, down = (x.to(weight.device, torch.float32).flatten(1) for x in (self.up, self.down))
        return (self.scale * (up @ down)).view(weight.shape)


@dataclass(frozen=True)
class Adapters:
    """All adapters of a run: what is added to each of the transformer's weights, by diffusers' names; and for the record
    what was given: each one's file name, SHA-256 and weight."""

    additions: Mapping[str, Sequence[Addition]] = field(default_factory=dict)
    given: Sequence[Mapping[str, Any]] = ()

    def facts(self) -> list[list[Any]]:
        """What determines the result, as JSON: SHA-256 and weight of each adapter whose weight is not 0."""
        return [[one["sha256"], one["weight"]] for one in self.given if one["weight"]]

    def fused(self, tensors: Iterable[Named]) -> Iterator[Named]:
        """The transformer's tensors, those with additions in float32 and with them."""
        for name, tensor in tensors:
            for addition in self.additions.get(name, ()):
                tensor = tensor.float() + addition.to(tensor)
            yield name, tensor


def load(given: Sequence[tuple[Path, float]], shapes: Mapping[str, Sequence[int]]) -> Adapters:
    """The adapters of these (file, weight) for a transformer with weights of these shapes, by diffusers' names.

    InputError for a file that is no safetensors file, and for keys that are unknown or of another shape: the first
    three. One of weight 0 is checked, and adds nothing.
    """
    additions: dict[str, list[Addition]] = {}
    records = []
    modules = _modules(shapes)
    for file, weight in given:
        for name, addition in _read(file, shapes, modules):
            if weight:
                scaled = Addition(addition.up, addition.down, addition.scale * weight)
                additions.setdefault(name, []).append(scaled)
        records.append({"file": file.name, "sha256": sha256(file), "weight": weight})
    return Adapters(additions, records)


def _modules(shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[str, bool]]:
    """Every way to name a module that has a weight: (its own name, whether that is the official one)."""
    names = [name for name in shapes if name.endswith(".weight") and len(shapes[name]) > 1]
    # Both halves of a swapped weight, and the parts of a fused one, must be there: nothing is computed with these.
    blank = {name: torch.empty(tuple(shapes[name]), device="meta") for name in names}
    official = [name.removesuffix(".weight") for name in to_official(blank, TRANSFORMER_MAP)]
    own = [name.removesuffix(".weight") for name in names]
    found = {name: (name, True) for name in official} | {name: (name, False) for name in own}
    return {_KOHYA + name.replace(".", "_"): what for name, what in found.items()} | found


def _refuse(file: Path, what: str, keys: Sequence[str]) -> None:
    if keys:
        more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
        raise InputError(f"--lora {file}: {what}: {', '.join(keys[:3])}{more}")


def _read(
    file: Path, shapes: Mapping[str, Sequence[int]], modules: Mapping[str, tuple[str, bool]]
) -> Iterator[tuple[str, Addition]]:
    """What one file adds to which weight, at weight 1."""
    try:
        with safe_open(file, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no iterator)
            metadata = opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise InputError(f"--lora {file} is not a whole safetensors file ({error})") from error
    parts: dict[str, dict[str, tuple[str, torch.Tensor]]] = {}
    unknown = []
    for key, tensor in tensors.items():
        match = _LEAF.search(key)
        module = _PREFIX.sub("", key[: match.start()]) if match else ""
        if match is None or module not in modules:
            unknown.append(key)
            continue
        parts.setdefault(module, {})[match.lastgroup or ""] = key, tensor
    _refuse(file, "keys that are no adapter of this transformer", unknown)
    _refuse(
        file,
        "modules without both a down (lora_A) and an up (lora_B) weight",
        [module for module, part in parts.items() if not {"down", "up"} <= part.keys()],
    )
    if not parts:
        raise InputError(f"--lora {file} holds no tensors")
    scale_of = _scales(file, metadata)
    wrong, found = [], []
    for module, part in parts.items():
        (down_key, down), (up_key, up) = part["down"], part["up"]
        rank = down.shape[0] if down.ndim else 0
        alpha = part["alpha"][1].item() if "alpha" in part and part["alpha"][1].numel() == 1 else None
        name, is_official = modules[module]
        pairs = diffusers_tensors(f"{name}.weight", up, TRANSFORMER_MAP) if is_official and up.ndim else None
        for target, share in pairs or [(f"{name}.weight", up)]:
            shape = list(shapes.get(target, ()))
            inner = math.prod(shape[1:])
            if not rank or list(share.shape[:2]) != [shape[0], rank] or share.numel() != shape[0] * rank:
                wrong.append(f"{up_key} {list(up.shape)} for a weight {shape} and rank {rank}")
            elif down.numel() != rank * inner:
                wrong.append(f"{down_key} {list(down.shape)} for a weight {shape}")
            elif not all(x.is_floating_point() and torch.isfinite(x).all() for x in (share, down)):
                wrong.append(f"{up_key} or {down_key}, which hold NaN, Inf or whole numbers")
            else:
                found.append((target, Addition(share, down, scale_of(module, rank) if alpha is None else alpha / rank)))
    _refuse(file, "weights that do not fit", wrong)
    yield from found


def _scales(file: Path, metadata: Mapping[str, str]) -> Any:
    """alpha / rank by module and rank, as diffusers' metadata say; 1 without them (an adapter without alpha)."""
    try:
        recorded = json.loads(metadata.get(_METADATA, "{}"))
        config = {name.removeprefix("transformer."): value for name, value in recorded.items()}
        alpha = None if config.get("lora_alpha") is None else float(config["lora_alpha"])
        patterns = {_PREFIX.sub("", name): float(value) for name, value in (config.get("alpha_pattern") or {}).items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"--lora {file}: its {_METADATA} is not what diffusers writes ({error})") from error
    if config.get("use_dora"):
        raise InputError(f"--lora {file} is a DoRA adapter, which cannot be added to the weights; LoRA is allowed")
    root = bool(config.get("use_rslora"))

    def scale(module: str, rank: int) -> float:
        own = next((value for name, value in patterns.items() if f".{module}".endswith(f".{name}")), alpha)
        return 1.0 if own is None else own / (math.sqrt(rank) if root else rank)

    return scale
