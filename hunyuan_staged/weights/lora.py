"""LoRA adapters: additions to the transformer's weights, fused into them as they are loaded.

W' = W + weight * alpha / rank * up @ down for each adapted W, and W' = W + weight * diff where an adapter has a whole
delta of a weight or a bias, summed in float32 before W takes the run's dtype.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hunyuan_staged.errors import InputError
from hunyuan_staged.weights import lora_files, lora_keys
from hunyuan_staged.weights.key_maps import Named, refuse_names, split

Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Addition:
    """scale * up [out, r] @ down [r, in], in the shape of a weight; without a down, scale * up in that shape."""

    up: torch.Tensor
    down: torch.Tensor | None
    scale: float

    def to(self, weight: torch.Tensor) -> torch.Tensor:
        """The addition in float32, in the shape and on the device of `weight`."""
        up = self.up.to(weight.device, torch.float32)
        if self.down is None:
            return (self.scale * up).view(weight.shape)
        down = self.down.to(weight.device, torch.float32)
        return (self.scale * (up.flatten(1) @ down.flatten(1))).view(weight.shape)


@dataclass(frozen=True)
class Adapters:
    """All adapters of a run: what is added to each of the transformer's weights, by diffusers' names; for the record what
    was given: each one's file name, SHA-256 and weight; and for the log a line about each."""

    additions: Mapping[str, Sequence[Addition]] = field(default_factory=dict)
    given: Sequence[Mapping[str, Any]] = ()
    found: Sequence[str] = ()

    def facts(self) -> list[list[Any]]:
        """What determines the result, as JSON: hashes and weight of each adapter whose weight is not 0."""
        hashes = ("sha256", "weight", "settings_sha256")
        return [[one[name] for name in hashes if name in one] for one in self.given if one["weight"]]

    def fused(self, tensors: Iterable[Named]) -> Iterator[Named]:
        """The transformer's tensors, those with additions in float32 and with them."""
        for name, tensor in tensors:
            for addition in self.additions.get(name, ()):
                tensor = tensor.float() + addition.to(tensor)
            yield name, tensor


def load(given: Sequence[tuple[Path, float]], shapes: Shapes) -> Adapters:
    """The adapters of these (file or folder, weight) for a transformer with weights of these shapes, by diffusers' names.

    InputError for what is no safetensors file, for adapters of another kind than LoRA, by name, and for keys that are
    unknown or of another shape: the first three. One of weight 0 is checked, and adds nothing.
    """
    additions: dict[str, list[Addition]] = {}
    records, lines = [], []
    modules = lora_keys.named_modules(shapes)
    for path, weight in given:
        adapter = lora_files.read(path)
        found, line = _additions(adapter, shapes, modules)
        for name, addition in found if weight else ():
            additions.setdefault(name, []).append(Addition(addition.up, addition.down, addition.scale * weight))
        records.append({**adapter.record, "weight": weight})
        lines.append(f"LoRA {path.name}: {line}; weight {weight:g}")
    return Adapters(additions, records, lines)


def _additions(
    adapter: lora_files.AdapterFile, shapes: Shapes, modules: Mapping[str, lora_keys.Module]
) -> tuple[list[tuple[str, Addition]], str]:
    """What one adapter adds to which tensor at weight 1, and a line of what was found in it."""
    culprit = f"--lora {adapter.given}"
    kind = lora_keys.other_kind(adapter.tensors)
    if kind:
        raise InputError(f"{culprit} is a {kind} adapter; LoRA is allowed")
    parts, unknown, twice = lora_keys.group(adapter.tensors, modules)
    # A low rank of a vector is none.
    unknown += [
        part[leaf]
        for module, part in parts.items()
        for leaf in ("down", "up")
        if leaf in part and len(shapes[f"{modules[module].names[0]}.weight"]) < 2
    ]
    refuse_names(f"{culprit}: keys that are no adapter of this transformer", unknown)
    refuse_names(f"{culprit}: keys for what another key has", twice)
    halves = [name for name, part in parts.items() if ("down" in part) != ("up" in part) or set(part) == {"alpha"}]
    refuse_names(f"{culprit}: modules without both a down (lora_A) and an up (lora_B) weight", halves)
    found: list[tuple[str, Addition]] = []
    wrong: list[str] = []
    for module, part in parts.items():
        one = _ModuleReader(adapter, modules[module], part, shapes, wrong)
        if "up" in part:
            found += one.low_rank(module)
        for leaf, tensor in (("diff", "weight"), ("diff_b", "bias")):
            if leaf in part:
                found += one.delta(leaf, tensor)
    refuse_names(f"{culprit}: weights that do not fit", wrong)
    _refuse_overlap(culprit, parts, modules)
    styles = dict.fromkeys(modules[module].style for module in parts)
    deltas = sum("diff" in part for part in parts.values()), sum("diff_b" in part for part in parts.values())
    told = [f"{count} {what} deltas" for count, what in zip(deltas, ("weight", "bias"), strict=True) if count]
    named = f"{' and '.join(styles)} names"
    return found, ", ".join([f"{len(parts)} of {len(parts)} modules ({named})", *told])


def _refuse_overlap(
    culprit: str, parts: Mapping[str, Mapping[str, str]], modules: Mapping[str, lora_keys.Module]
) -> None:
    """InputError where two modules of an adapter are the same weights by two names."""
    seen: dict[str, str] = {}
    for module in parts:
        for name in modules[module].names:
            if name in seen:
                raise InputError(f"{culprit}: {module} and {seen[name]} are two names of one module")
            seen[name] = module


@dataclass(frozen=True)
class _ModuleReader:
    """Cuts what an adapter has for a module into additions to diffusers' tensors; what does not fit goes to `wrong`."""

    adapter: lora_files.AdapterFile
    module: lora_keys.Module
    part: Mapping[str, str]
    shapes: Shapes
    wrong: list[str]

    def _split(self, key: str, leaf: str) -> list[tuple[str, torch.Tensor]]:
        """(diffusers' tensor, its share of the first axis); none where the axis does not divide evenly."""
        tensor, rule = self.adapter.tensors[key], self.module.rule
        count = 2 if rule.swap else len(rule.diffusers)
        if not tensor.ndim or tensor.shape[0] % count:
            self.wrong.append(f"{key} {list(tensor.shape)}, which does not divide into {count} equal parts")
            return []
        names = [f"{name}.{leaf}" for name in self.module.names]
        return list(zip(names, split(tensor, rule), strict=True))

    def low_rank(self, module: str) -> Iterator[tuple[str, Addition]]:
        """up and down. A down serves all parts of a fused module."""
        up_key, down_key = self.part["up"], self.part["down"]
        down, up = self.adapter.tensors[down_key], self.adapter.tensors[up_key]
        rank = down.shape[0] if down.ndim else 0
        for name, share in self._split(up_key, "weight"):
            shape = list(self.shapes[name])
            if not rank or list(share.shape[:2]) != [shape[0], rank] or share.numel() != shape[0] * rank:
                self.wrong.append(f"{up_key} {list(up.shape)} for a weight {shape} and rank {rank}")
            elif down.numel() != rank * math.prod(shape[1:]):
                self.wrong.append(f"{down_key} {list(down.shape)} for a weight {shape}")
            elif not (_computable(share) and _computable(down)):
                self.wrong.append(f"{up_key} or {down_key}, which hold NaN, Inf or whole numbers")
            else:
                yield name, Addition(share, down, self._scale(module, rank))

    def _scale(self, module: str, rank: int) -> float:
        if "alpha" not in self.part:
            return self.adapter.scale(module, rank)
        key = self.part["alpha"]
        alpha = self.adapter.tensors[key]
        if alpha.numel() != 1 or not lora_files.is_alpha(alpha.item()):
            limit = lora_files.MAX_ALPHA
            self.wrong.append(f"{key} {list(alpha.shape)}, which is not one number from {-limit:g} to {limit:g}")
            return 0.0
        return alpha.item() / rank

    def delta(self, leaf: str, tensor: str) -> Iterator[tuple[str, Addition]]:
        """A whole delta of the module's weight or bias."""
        key = self.part[leaf]
        for name, share in self._split(key, tensor):
            shape = list(self.shapes.get(name, ()))
            if not shape:
                self.wrong.append(f"{key}, whose module has no {tensor}")
            elif list(share.shape) != shape:
                self.wrong.append(f"{key} {list(self.adapter.tensors[key].shape)} for a {tensor} {shape}")
            elif not _computable(share):
                self.wrong.append(f"{key}, which holds NaN, Inf or whole numbers")
            else:
                yield name, Addition(share, None, 1.0)


def _computable(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and bool(torch.isfinite(tensor).all())
