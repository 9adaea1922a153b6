"""A transformer in one safetensors file without a config: recognised by keys, shapes and dtypes.

Names are the official ones (q, k and v apart or in one), ComfyUI's or diffusers'. What a config would say follows from
the shapes; the version does not, and is given or guessed from the file's name.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hunyuan_staged.errors import InputError
from hunyuan_staged.geometry import BUCKET_BASE
from hunyuan_staged.models.modulations import is_modulation
from hunyuan_staged.models.modules import TransformerConfig, TransformerModules
from hunyuan_staged.versions import TASKS, SuperResolutionVersion, TransformerVersion, Version, make_version
from hunyuan_staged.weights.boundary import on_meta
from hunyuan_staged.weights.fingerprint import sampled_hash
from hunyuan_staged.weights.folder import ModelFolder
from hunyuan_staged.weights.key_maps import (
    COMFY_RULES,
    FUSED_RULES,
    TRANSFORMER_MAP,
    Named,
    diffusers_names,
    diffusers_tensors,
    refuse_names,
)
from hunyuan_staged.weights.loading import Progress
from hunyuan_staged.weights.part_files import PartFile
from hunyuan_staged.weights.quantization.contents import Contents, contents
from hunyuan_staged.weights.quantization.formats import GGUF, PLAIN, Format, recognise
from hunyuan_staged.weights.quantization.header import Header
from hunyuan_staged.weights.quantization.stored import Replacement

FLAG = "--transformer"
RULES = (*TRANSFORMER_MAP, *FUSED_RULES, *COMFY_RULES)
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "model.")
# Of the rotary embedding, by the width of a head; all published transformers have the first.
ROPE_AXES = {128: (16, 56, 56), 32: (8, 12, 12)}
LATENT_AND_CONDITION = 65  # in channels: latents, condition latents, mask
WITH_LOW_RESOLUTION = 98  # of super resolution: and the low-resolution latents with a mask of their own


def guess_version(name: str, *, meanflow: bool) -> TransformerVersion | None:
    """The version that a file's name speaks of; None where it does not say both resolution and task.

    Weights with an embedding for meanflow are step-distilled. Those for four steps have guidance distilled into them.
    """
    words = re.split(r"[^a-z0-9]+", name.lower())
    resolution = next((word for word in words if word in BUCKET_BASE), None)
    task = next((word for word in words if word in TASKS), None)
    if resolution is None or task is None:
        return None
    distilled = any("distil" in word or re.fullmatch(r"\d+steps?", word) for word in words)
    if meanflow:
        return make_version(resolution, task, step_distilled=True)
    return make_version(resolution, task, cfg_distilled=distilled, sparse="sparse" in words)


@dataclass(frozen=True)
class TransformerFile(ModelFolder):
    """A transformer's file that has been recognised, and the version it is taken for: a model of which there is nothing
    else.

    names: what each weight of the file is called without what all have before it. shapes: by diffusers' names. contents:
    the weights themselves.
    """

    header: Header = field(kw_only=True)
    kind: Format = field(kw_only=True)
    contents: Contents = field(kw_only=True)
    names: Mapping[str, str] = field(kw_only=True)
    shapes: Mapping[str, tuple[int, ...]] = field(kw_only=True)
    version: Version = field(kw_only=True)

    def describe(self) -> str:
        """A line for the log: what the file was taken for."""
        config = self.config()
        dtypes = {self.header.dtypes[name] for name in self.names}
        stored = [PLAIN[dtype] for dtype in PLAIN if dtype in dtypes]
        quantised = sorted(dtypes - PLAIN.keys())
        if quantised:
            form = f"GGUF {', '.join(quantised)}" if self.kind.name == GGUF else "float8 with its scales"
            stored = [f"{form}, kept so in the blocks", *stored]
        style = "official or ComfyUI's" if self.official else "diffusers'"
        return (
            f"{self.path.name}: taken for a transformer {self.version.name} of {config['num_layers']} blocks, "
            f"{len(self.names)} weights by {style} names, {' and '.join(stored)}"
        )

    def versions(self) -> list[str]:
        return [self.version.name]

    def flow_shift(self, version: str) -> float | None:
        """None: the file has no scheduler."""
        assert version == self.version.name
        return None

    def fingerprint(self, parts: Sequence[str], version: str | None = None) -> str:
        """A hash that tells these weights from others, by samples of the file."""
        assert list(parts) == ["transformer"] and version == self.version.name
        return sampled_hash(self.path).hex()

    def transformer_folder(self, version: str) -> Path:
        """The file itself: what messages name."""
        assert version == self.version.name
        return self.path

    def config(self) -> dict[str, Any]:
        """diffusers' arguments, from the shapes."""
        return derived_config(str(self.path), self.shapes, self.version)

    def keeping(self) -> dict[str, Replacement]:
        """What makes the layers of the blocks that keep their weights as the file has them, by diffusers' names."""
        found = {}
        for name, plain in self.names.items():
            make = self.contents.keeping(name)
            for target in (make and _targets(plain, official=self.official)) or ():
                if make and target.startswith("transformer_blocks.") and not is_modulation(target):
                    found[target] = make
        return found

    def tensors(
        self,
        *,
        device: torch.device,
        wanted: Callable[[str], bool],
        stays_on_host: Callable[[str], bool],
        progress: Progress,
        kept: Collection[str] = (),
    ) -> Iterator[Named]:
        """The tensors under diffusers' names, made wide but for those that are kept, which come as their layers hold
        them; the other arguments are those of components.transformer_tensors."""
        targets = {name: _targets(plain, official=self.official) or [] for name, plain in self.names.items()}

        def wanted_here(name: str) -> bool:
            return any(map(wanted, targets.get(name, ())))

        def in_map(name: str) -> bool:
            return all(map(stays_on_host, targets[name]))

        for _ in progress([self.path], desc="loading transformer", unit="file"):
            for name, weight in self.contents.read(wanted_here, device, in_map):
                plain, own = self.names[name], targets[name]
                if any(target in kept for target in own):
                    for target, leaves in zip(own, weight.leaves(len(own)), strict=True):
                        layer = target.removesuffix(".weight")
                        yield from ((f"{layer}.{leaf}", x) for leaf, x in leaves.items() if target in kept)
                if not all(target in kept for target in own):
                    pairs = (
                        diffusers_tensors(plain, weight.wide(), RULES) if self.official else [(plain, weight.wide())]
                    )
                    yield from (pair for pair in pairs or () if pair[0] not in kept)


def _are_diffusers(names: Iterable[str]) -> bool:
    return any(name.startswith("transformer_blocks.") for name in names)


def _targets(name: str, *, official: bool) -> list[str] | None:
    """The diffusers tensor or tensors that a file's tensor holds; None where there is none."""
    if not official:
        return [name]
    found = diffusers_names(name, RULES)
    return found and found[1]


def _without_prefix(names: Sequence[str]) -> dict[str, str]:
    prefix = next((prefix for prefix in PREFIXES if all(name.startswith(prefix) for name in names)), "")
    return {name: name.removeprefix(prefix) for name in names}


def _shapes(what: str, header: Header, names: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    """Shapes by diffusers' names; InputError for names that are unknown or say the same twice."""
    official = not _are_diffusers(names.values())
    found: dict[str, tuple[int, ...]] = {}
    unknown, twice, uneven = [], [], []
    for name, plain in names.items():
        targets, shape = _targets(plain, official=official), header.shapes[name]
        if targets is None:
            unknown.append(name)
            continue
        if len(targets) > 1 and (not shape or shape[0] % len(targets)):
            uneven.append(f"{name} {shape}")
            continue
        twice += [name for target in targets if target in found]
        own = (shape[0] // len(targets), *shape[1:]) if shape else ()
        found |= dict.fromkeys(targets, own)
    refuse_names(f"{what} holds tensors that no transformer of this suite has", unknown)
    refuse_names(f"{what} holds tensors of q, k and v that do not divide into three", uneven)
    refuse_names(f"{what} holds tensors for what others have", twice)
    return found


def _with_patch_axes(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """GGUF has four axes at most: the patch embedding of patches of one position may have lost those of length 1."""
    name = "x_embedder.proj.weight"
    found = shapes.get(name, ())
    return shapes | ({name: (*found, *[1] * (5 - len(found)))} if 2 <= len(found) < 5 else {})


def derived_config(what: str, shapes: Mapping[str, Sequence[int]], version: Version) -> dict[str, Any]:
    """diffusers' arguments from the shapes by diffusers' names; InputError for what is no transformer of this suite."""
    needed = {
        "x_embedder.proj.weight": 5,
        "transformer_blocks.0.attn.norm_q.weight": 1,
        "transformer_blocks.0.ff.net.0.proj.weight": 2,
        "context_embedder.proj_in.weight": 2,
        "context_embedder_2.linear_1.weight": 2,
        "image_embedder.linear_1.weight": 2,
        "proj_out.weight": 2,
    }
    refuse_names(f"{what} lacks tensors of the transformer", [name for name in needed if name not in shapes])
    refuse_names(
        f"{what} is no transformer of this suite",
        [f"{name} {list(shapes[name])}" for name, axes in needed.items() if len(shapes[name]) != axes],
    )
    patch, first, mlp, text, glyph, image, out = (shapes[name] for name in needed)
    width, channels, frames, side, _ = patch
    (head,) = first
    if head not in ROPE_AXES or not width or width % head:
        allowed = " or ".join(map(str, ROPE_AXES))
        raise InputError(f"{what}: heads are {head} wide in a width of {width}; allowed are {allowed}")
    allowed_channels = WITH_LOW_RESOLUTION if isinstance(version, SuperResolutionVersion) else LATENT_AND_CONDITION
    if channels != allowed_channels:
        raise InputError(f"{what} takes {channels} channels; those of {version.name} are {allowed_channels}")
    return {
        "in_channels": channels,
        "out_channels": out[0] // max(1, frames * side * side),
        "num_attention_heads": width // head,
        "attention_head_dim": head,
        "num_layers": _count(shapes, "transformer_blocks."),
        "num_refiner_layers": _count(shapes, "context_embedder.token_refiner.refiner_blocks."),
        "mlp_ratio": mlp[0] / width,
        "patch_size_t": frames,
        "patch_size": side,
        "text_embed_dim": text[1],
        "text_embed_2_dim": glyph[1],
        "image_embed_dim": image[0],
        "rope_axes_dim": ROPE_AXES[head],
        "use_meanflow": _has_meanflow(shapes),
        "target_size": BUCKET_BASE[version.resolution],
        "task_type": getattr(version, "task", None),  # none for super resolution, which serves every task
    }


def _count(shapes: Iterable[str], stem: str) -> int:
    return 1 + max(int(match[1]) for name in shapes if (match := re.match(rf"{re.escape(stem)}(\d{{1,4}})\.", name)))


def _has_meanflow(shapes: Iterable[str]) -> bool:
    return any(name.startswith("time_embed.timestep_embedder_r.") for name in shapes)


def open_transformer(
    path: Path, choose: Callable[[bool], Version], flag: str = FLAG, seen: PartFile | None = None
) -> TransformerFile:
    """Recognise a transformer's file. choose: the version, by whether the weights are meanflow's; flag: that named it.
    seen: the file where it has been looked at, which is not read once more.

    InputError for a format that is not read, for tensors that are unknown, absent or of another shape (the first three),
    and for a version that these weights cannot be.
    """
    what = f"{flag} {path}"
    header, kind = (seen.header, seen.kind) if seen else recognise(flag, path)
    held = seen.contents if seen else contents(header)
    names = _without_prefix(held.names)
    shapes = _with_patch_axes(_shapes(what, header, names))
    meanflow = _has_meanflow(shapes)
    version = choose(meanflow)
    if version.use_meanflow != meanflow:
        has, allowed = ("has", "a step-distilled version") if meanflow else ("lacks", "another version")
        raise InputError(f"{what} {has} time_r_in, and is no {version.name}; allowed is {allowed}")
    layout = "diffusers" if _are_diffusers(names.values()) else "official"
    found = TransformerFile(
        path, layout, header=header, kind=kind, contents=held, names=names, shapes=shapes, version=version
    )
    model = on_meta(lambda: TransformerModules(TransformerConfig(**derived_config(what, shapes, version))), path)
    expected = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    refuse_names(f"{what} lacks tensors of the transformer", [name for name in expected if name not in shapes])
    refuse_names(f"{what} holds tensors that the model does not have", [n for n in shapes if n not in expected])
    wrong = [f"{name} {list(shapes[name])}, not {list(x)}" for name, x in expected.items() if shapes[name] != x]
    refuse_names(f"{what} holds tensors that do not fit each other", wrong)
    return found
