"""Find a model's parts in either published layout, map its keys, and load it onto a device without a second copy.

The official layout is that of tencent/HunyuanVideo-1.5 on the hub, one transformer version per folder; the diffusers
layout that of hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-*. Modules are always diffusers' and transformers';
official weights are renamed on the way. A map is data, serves both ways, and is closed: a tensor that no rule names,
that a module lacks, or that is missing for a module is an error.
"""

import contextlib
import hashlib
import json
import os
import pickle
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from hunyuan_staged import InputError, float8, quiet, reading
from hunyuan_staged.versions import (
    BUCKET_BASE,
    DEFAULT_RESOLUTION,
    SKIPPED_LAYERS,
    Version,
    parse_version,
    version,
)

Progress = Callable[..., Iterable[Any]]
Named = tuple[str, torch.Tensor]

# The names that weights go by in a part's folder; with .index.json behind them they are sharded.
WEIGHTS = ("diffusion_pytorch_model.safetensors", "model.safetensors")
MAPPED_BYTES = 2**30
# Of each file a fingerprint reads so many pieces of so many bytes.
SAMPLES, SAMPLE_BYTES = 16, 2**16


@dataclass(frozen=True)
class Rule:
    """A module's name in the official layout and in diffusers; each # stands for a number, the same on both sides.

    With several diffusers names the official tensor holds them one after the other along its first axis. swap: the two
    halves of the first axis change places.
    """

    official: str
    diffusers: tuple[str, ...]
    swap: bool = False


def _rules(*pairs: tuple[str, str], fused: Sequence[Rule] = ()) -> tuple[Rule, ...]:
    return (*(Rule(official, (diffusers,)) for official, diffusers in pairs), *fused)


_REFINER = "txt_in.individual_token_refiner.blocks.#", "context_embedder.token_refiner.refiner_blocks.#"
_TEXT_TIME = "context_embedder.time_text_embed"

TRANSFORMER_MAP = _rules(
    ("img_in.proj", "x_embedder.proj"),
    ("time_in.mlp.0", "time_embed.timestep_embedder.linear_1"),
    ("time_in.mlp.2", "time_embed.timestep_embedder.linear_2"),
    ("time_r_in.mlp.0", "time_embed.timestep_embedder_r.linear_1"),
    ("time_r_in.mlp.2", "time_embed.timestep_embedder_r.linear_2"),
    ("txt_in.t_embedder.mlp.0", f"{_TEXT_TIME}.timestep_embedder.linear_1"),
    ("txt_in.t_embedder.mlp.2", f"{_TEXT_TIME}.timestep_embedder.linear_2"),
    ("txt_in.c_embedder.linear_1", f"{_TEXT_TIME}.text_embedder.linear_1"),
    ("txt_in.c_embedder.linear_2", f"{_TEXT_TIME}.text_embedder.linear_2"),
    ("txt_in.input_embedder", "context_embedder.proj_in"),
    *(
        (f"{_REFINER[0]}.{official}", f"{_REFINER[1]}.{diffusers}")
        for official, diffusers in (
            ("norm1", "norm1"),
            ("norm2", "norm2"),
            ("self_attn_proj", "attn.to_out.0"),
            ("mlp.fc1", "ff.net.0.proj"),
            ("mlp.fc2", "ff.net.2"),
            ("adaLN_modulation.1", "norm_out.linear"),
        )
    ),
    ("byt5_in.layernorm", "context_embedder_2.norm"),
    ("byt5_in.fc1", "context_embedder_2.linear_1"),
    ("byt5_in.fc2", "context_embedder_2.linear_2"),
    ("byt5_in.fc3", "context_embedder_2.linear_3"),
    ("vision_in.proj.0", "image_embedder.norm_in"),
    ("vision_in.proj.1", "image_embedder.linear_1"),
    ("vision_in.proj.3", "image_embedder.linear_2"),
    ("vision_in.proj.4", "image_embedder.norm_out"),
    ("cond_type_embedding", "cond_type_embed"),
    *(
        (f"double_blocks.#.{official}", f"transformer_blocks.#.{diffusers}")
        for official, diffusers in (
            ("img_mod.linear", "norm1.linear"),
            ("txt_mod.linear", "norm1_context.linear"),
            ("img_attn_q", "attn.to_q"),
            ("img_attn_k", "attn.to_k"),
            ("img_attn_v", "attn.to_v"),
            ("img_attn_q_norm", "attn.norm_q"),
            ("img_attn_k_norm", "attn.norm_k"),
            ("img_attn_proj", "attn.to_out.0"),
            ("txt_attn_q", "attn.add_q_proj"),
            ("txt_attn_k", "attn.add_k_proj"),
            ("txt_attn_v", "attn.add_v_proj"),
            ("txt_attn_q_norm", "attn.norm_added_q"),
            ("txt_attn_k_norm", "attn.norm_added_k"),
            ("txt_attn_proj", "attn.to_add_out"),
            ("img_mlp.fc1", "ff.net.0.proj"),
            ("img_mlp.fc2", "ff.net.2"),
            ("txt_mlp.fc1", "ff_context.net.0.proj"),
            ("txt_mlp.fc2", "ff_context.net.2"),
        )
    ),
    ("final_layer.linear", "proj_out"),
    fused=(
        Rule(f"{_REFINER[0]}.self_attn_qkv", tuple(f"{_REFINER[1]}.attn.to_{part}" for part in "qkv")),
        Rule("final_layer.adaLN_modulation.1", ("norm_out.linear",), swap=True),
    ),
)

_RESNET = ("norm1", "conv1.conv", "norm2", "conv2.conv")
_MID = (("block_1", "resnets.0"), ("block_2", "resnets.1"))
_MID_ATTENTION = (("norm", "norm"), ("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "proj_out"))

VAE_MAP = _rules(
    *(
        pair
        for coder, way, resample in (("encoder", "down", "downsample"), ("decoder", "up", "upsample"))
        for pair in (
            *((f"{coder}.{name}", f"{coder}.{name}") for name in ("conv_in.conv", "norm_out", "conv_out.conv")),
            *((f"{coder}.{way}.#.block.#.{name}", f"{coder}.{way}_blocks.#.resnets.#.{name}") for name in _RESNET),
            (f"{coder}.{way}.#.{resample}.conv.conv", f"{coder}.{way}_blocks.#.{resample}rs.0.conv.conv"),
            *((f"{coder}.mid.{a}.{name}", f"{coder}.mid_block.{b}.{name}") for a, b in _MID for name in _RESNET),
            *((f"{coder}.mid.attn_1.{a}", f"{coder}.mid_block.attentions.0.{b}") for a, b in _MID_ATTENTION),
        )
    )
)


@cache
def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(re.escape(name).replace(r"\#", r"(\d+)"))


def _fill(name: str, numbers: Sequence[str]) -> str:
    """`name` with its # replaced by numbers, in order."""
    parts = name.split("#")
    return "".join(part + number for part, number in zip(parts, [*numbers, ""], strict=True))


def diffusers_names(name: str, rules: Sequence[Rule]) -> tuple[Rule, list[str]] | None:
    """The rule for an official tensor, and its diffusers name or names; None where no rule names it."""
    module, _, leaf = name.rpartition(".")
    for rule in rules:
        match = _pattern(rule.official).fullmatch(module)
        if match:
            return rule, [f"{_fill(target, match.groups())}.{leaf}" for target in rule.diffusers]
    return None


def diffusers_tensors(name: str, tensor: torch.Tensor, rules: Sequence[Rule]) -> list[Named] | None:
    """One official tensor under its diffusers name or names; None where no rule names it.

    Raises InputError for a fused tensor that does not split evenly.
    """
    found = diffusers_names(name, rules)
    if found is None:
        return None
    rule, names = found
    count = 2 if rule.swap else len(names)
    if tensor.shape[0] % count:
        raise InputError(f"{name} has shape {list(tensor.shape)}; it holds {count} equal parts, one after the other")
    parts = tensor.chunk(count) if count > 1 else [tensor]
    parts = [torch.cat(parts[::-1])] if rule.swap else parts
    return list(zip(names, parts, strict=True))


def _refuse(what: str, names: Sequence[str]) -> None:
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise InputError(f"{what}: {', '.join(names[:3])}{more}")


def to_diffusers(state_dict: Mapping[str, torch.Tensor], rules: Sequence[Rule]) -> dict[str, torch.Tensor]:
    """An official state dict under diffusers' names; InputError names the tensors that no rule knows."""
    renamed = {name: diffusers_tensors(name, tensor, rules) for name, tensor in state_dict.items()}
    _refuse(
        "tensors that the official layout does not have", [name for name, pairs in renamed.items() if pairs is None]
    )
    return {name: tensor for pairs in renamed.values() for name, tensor in pairs or ()}


def to_official(state_dict: Mapping[str, torch.Tensor], rules: Sequence[Rule]) -> dict[str, torch.Tensor]:
    """A diffusers state dict under the official names.

    Raises InputError for tensors that no rule knows, and for some of a fused tensor's parts without the others.
    """
    official: dict[str, torch.Tensor] = {}
    unknown: list[str] = []
    half_fused: dict[str, None] = {}
    for name in state_dict:
        module, _, leaf = name.rpartition(".")
        found = next(
            (
                (rule, match.groups())
                for rule in rules
                for target in rule.diffusers
                if (match := _pattern(target).fullmatch(module))
            ),
            None,
        )
        if found is None:
            unknown.append(name)
            continue
        rule, numbers = found
        siblings = [f"{_fill(target, numbers)}.{leaf}" for target in rule.diffusers]
        absent = [sibling for sibling in siblings if sibling not in state_dict]
        half_fused |= dict.fromkeys(absent)
        if name == siblings[0] and not absent:
            parts = [state_dict[sibling] for sibling in siblings]
            parts = list(parts[0].chunk(2)[::-1]) if rule.swap else parts
            official[f"{_fill(rule.official, numbers)}.{leaf}"] = torch.cat(parts) if len(parts) > 1 else parts[0]
    _refuse("tensors that the diffusers layout does not have", unknown)
    _refuse("tensors missing beside those that they are fused with", list(half_fused))
    return official


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist") from error
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a JSON {type(content).__name__}, not an object")
    return content


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a part: the shards that an index lists, else the only file.

    Files of other names (an fp16 variant, say) count only where there is none of the usual name. Raises InputError
    where no weights are found, a listed shard is absent, or it is unclear which files belong together.
    """
    for name in WEIGHTS:
        index = folder / f"{name}.index.json"
        if index.is_file():
            listed = _read_json(index).get("weight_map")
            if not isinstance(listed, dict) or not all(isinstance(shard, str) for shard in listed.values()):
                raise InputError(f"{index} has no weight_map from tensors to files")
            files = [folder / Path(shard).name for shard in sorted(set(listed.values()))]
            _refuse(f"{folder} lacks shards that its index lists", [path.name for path in files if not path.is_file()])
            return files
        if (folder / name).is_file():
            return [folder / name]
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        expected = " or ".join(WEIGHTS)
        raise InputError(f"{folder} holds {len(files)} safetensors files; expected {expected}, alone or with its index")
    return files


def _read_ahead(path: Path, start: int, length: int) -> None:
    """Have the kernel read a part of a file into its cache; past the end, and where it takes no advice, nothing."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        os.posix_fadvise(file.fileno(), start, length, os.POSIX_FADV_WILLNEED)


def _tensors(
    files: Iterable[Path],
    wanted: Callable[[str], bool],
    device: torch.device,
    at_home: Callable[[str], bool] = lambda _: False,
) -> Iterator[Named]:
    """The tensors of safetensors files whose names are wanted, straight onto a device, a GPU by many threads.

    Those that are at_home, and on a CPU all, lie in the file's memory map; assign_weights copies them out of it. What has
    been read of a map stays resident until it is closed, so a file is opened anew after every MAPPED_BYTES. The disk
    works ahead by as much, on a thread of its own.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="read ahead") as thread:
        for path in files:
            read = 0
            try:
                with safe_open(path, "pt") as file:
                    names = [name for name in file.keys() if wanted(name)]  # noqa: SIM118 (no iterator)
                mapped = [name for name in names if device.type == "cpu" or at_home(name)]
                sent = set(names) - set(mapped)
                if sent:
                    yield from reading.tensors(path, sent, device)
                while mapped:
                    # The tensors lie in about the order of their names.
                    thread.submit(_read_ahead, path, read, 2 * MAPPED_BYTES)
                    unread = MAPPED_BYTES
                    with safe_open(path, "pt") as file:
                        while mapped and unread > 0:
                            name = mapped.pop(0)
                            tensor = file.get_tensor(name)
                            unread -= tensor.nbytes
                            read += tensor.nbytes
                            yield name, tensor
            except (SafetensorError, OSError, ValueError) as error:
                raise InputError(f"{path} is not a whole safetensors file ({error})") from error


@dataclass(frozen=True)
class Places:
    """Memory that some tensors of a module are to lie in, by name; fill: by this process, or by another one."""

    tensors: Mapping[str, torch.Tensor]
    fill: bool = True


NO_PLACES = Places({})


def assign_weights(
    module: nn.Module,
    tensors: Iterable[Named],
    dtype: torch.dtype,
    device: torch.device,
    origin: Path,
    places: Places = NO_PLACES,
) -> nn.Module:
    """Put named tensors in the place of a meta module's parameters, one by one, each in `dtype`, without gradients.

    Tensors of the module that are in float8 stay so; those that have a place of their own go there, the others to the
    device. Returns the module, in eval mode. InputError names what `origin` holds too much, what it lacks, and the first
    tensor of another shape.
    """
    state = module.state_dict()
    missing = dict.fromkeys(state)
    leftover = []

    def put(name: str, value: torch.Tensor) -> None:
        path, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(path), leaf, nn.Parameter(value, requires_grad=False))
        missing.pop(name, None)

    if not places.fill:
        for name, place in places.tensors.items():
            put(name, place)
    for name, tensor in tensors:
        if name not in state:
            leftover.append(name)
            continue
        if tensor.shape != state[name].shape:
            raise InputError(
                f"{origin}: {name} has shape {list(tensor.shape)}; its config says {list(state[name].shape)}"
            )
        if name in places.tensors:
            put(name, places.tensors[name].copy_(tensor))
            continue
        # Out of the file's map, or of the fused tensor: kernels round differently by how a tensor is aligned.
        copy = device.type == "cpu" or tensor.untyped_storage().nbytes() != tensor.nbytes
        stored = tensor.dtype if state[name].dtype == float8.STORED else dtype
        put(name, tensor.to(device, stored, copy=copy))
    _refuse(f"{origin} holds tensors that the model does not have", leftover)
    _refuse(f"{origin} lacks tensors of the model", list(missing))
    assert not any(buffer.is_meta for buffer in module.buffers()), "a buffer that no file holds must be made anew"
    return module.eval()


# What Python and torch raise over arguments that make no module.
_UNBUILDABLE = (ArithmeticError, AttributeError, AssertionError, LookupError, RuntimeError, TypeError, ValueError)


@contextlib.contextmanager
def _describing(origin: Path) -> Iterator[None]:
    """InputError where what `origin` says, a config, makes no model."""
    try:
        yield
    except InputError:
        raise
    except _UNBUILDABLE as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(f"{origin} does not describe a model that this suite can build ({reason})") from error


def _on_meta(build: Callable[[], Any], origin: Path) -> Any:
    """A module that has shapes but no memory yet; origin: the config that it is built from."""
    with _describing(origin), torch.device("meta"):
        return build()


@dataclass(frozen=True)
class Part:
    """Where a part of the model lies in each layout; for the official one, the command that fetches each folder.

    In a command {path} is the model folder.
    """

    title: str
    official: dict[str, str]
    diffusers: tuple[str, ...]


def _tencent(folder: str) -> dict[str, str]:
    return {folder: f'hf download tencent/HunyuanVideo-1.5 --include "{folder}/*" --local-dir {{path}}'}


_SIGLIP = "hf download black-forest-labs/FLUX.1-Redux-dev --local-dir {path}/vision_encoder/siglip"

PARTS = {
    "transformer": Part("transformer", _tencent("transformer"), ("transformer",)),
    "scheduler": Part("scheduler", _tencent("scheduler"), ("scheduler",)),
    "vae": Part("VAE", _tencent("vae"), ("vae",)),
    "text": Part(
        "text encoder",
        {"text_encoder/llm": "hf download Qwen/Qwen2.5-VL-7B-Instruct --local-dir {path}/text_encoder/llm"},
        ("text_encoder", "tokenizer"),
    ),
    "glyph": Part(
        "glyph encoder",
        {
            "text_encoder/byt5-small": "hf download google/byt5-small --local-dir {path}/text_encoder/byt5-small",
            "text_encoder/Glyph-SDXL-v2": "modelscope download --model AI-ModelScope/Glyph-SDXL-v2 "
            "--local_dir {path}/text_encoder/Glyph-SDXL-v2",
        },
        ("text_encoder_2", "tokenizer_2"),
    ),
    "image": Part(
        "image encoder",
        {f"vision_encoder/siglip/{folder}": _SIGLIP for folder in ("image_encoder", "feature_extractor")},
        ("image_encoder", "feature_extractor"),
    ),
}
_DIFFUSERS_FETCH = (
    'hf download hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-{version} --include "{folder}/*" --local-dir {path}'
)

_OFFICIAL_TRANSFORMER = {
    "heads_num": "num_attention_heads",
    "mm_double_blocks_depth": "num_layers",
    "mlp_width_ratio": "mlp_ratio",
    "rope_theta": "rope_theta",
    "text_states_dim": "text_embed_dim",
    "vision_states_dim": "image_embed_dim",
    "use_meanflow": "use_meanflow",
    "out_channels": "out_channels",
    "ideal_task": "task_type",
}
# What all published transformers have in common, and the only value that this suite runs; absent means this value.
_ONLY = {
    "mm_single_blocks_depth": 0,
    "guidance_embed": False,
    "concat_condition": True,
    "is_reshape_temporal_channels": False,
}
_OFFICIAL_VAE = {
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "latent_channels": "latent_channels",
    "block_out_channels": "block_out_channels",
    "layers_per_block": "layers_per_block",
    "ffactor_spatial": "spatial_compression_ratio",
    "ffactor_temporal": "temporal_compression_ratio",
    "downsample_match_channel": "downsample_match_channel",
    "upsample_match_channel": "upsample_match_channel",
    "scaling_factor": "scaling_factor",
}


# What decoding computes with, beside the module itself.
_VAE_NUMBERS = ("scaling_factor", "latent_channels", "spatial_compression_ratio", "temporal_compression_ratio")


def _renamed(config: Mapping[str, Any], names: Mapping[str, str], origin: str | Path) -> dict[str, Any]:
    _refuse(f"{origin} lacks", [name for name in names if name not in config])
    return {ours: config[official] for official, ours in names.items()}


def official_transformer_config(
    config: Mapping[str, Any], glyph_width: int, origin: str | Path = "the transformer's config"
) -> dict[str, Any]:
    """diffusers' arguments from an official transformer config; the glyph encoder's width is not in it, so it is given.

    Raises InputError for a key that is missing, for what no published version has and this suite does not run (_ONLY),
    and for an ideal_resolution that is unknown.
    """
    for name, allowed in _ONLY.items():
        if config.get(name, allowed) != allowed:
            raise InputError(f"{origin}: {name} is {config[name]!r}; this suite runs {name} = {allowed!r} only")
    arguments = _renamed(config, _OFFICIAL_TRANSFORMER, origin)
    needed = ("in_channels", "hidden_size", "patch_size", "rope_dim_list", "ideal_resolution")
    _refuse(f"{origin} lacks", [name for name in needed if name not in config])
    resolution = config["ideal_resolution"]
    if resolution not in BUCKET_BASE:
        raise InputError(f"{origin}: ideal_resolution is {resolution!r}; known: {', '.join(BUCKET_BASE)}")
    patch = config["patch_size"]
    return {
        **arguments,
        # latents, condition latents, mask
        "in_channels": 2 * config["in_channels"] + 1,
        "attention_head_dim": config["hidden_size"] // config["heads_num"],
        "patch_size_t": patch[0],
        "patch_size": patch[1],
        "rope_axes_dim": tuple(config["rope_dim_list"]),
        "text_embed_2_dim": glyph_width,
        "target_size": BUCKET_BASE[resolution],
    }


def official_vae_config(config: Mapping[str, Any], origin: str | Path = "the VAE's config") -> dict[str, Any]:
    """diffusers' arguments from an official VAE config.

    Raises InputError for a key that is missing, and for a shift of the latents, which no published VAE has.
    """
    if config.get("shift_factor"):
        raise InputError(f"{origin}: shift_factor is {config['shift_factor']!r}; this suite runs none")
    return _renamed(config, _OFFICIAL_VAE, origin)


def is_version(name: str) -> bool:
    """Whether a folder's name is that of a transformer version, which 720p_sr_distilled and the like are not."""
    try:
        parse_version(name)
    except InputError:
        return False
    return True


def _sampled(path: Path) -> bytes:
    """The hash of a file's size and of SAMPLES pieces of it, evenly spread, its beginning and its end among them."""
    size = path.stat().st_size
    found = hashlib.sha256(str(size).encode())
    try:
        with path.open("rb") as file:
            for index in range(SAMPLES):
                file.seek(max(0, size - SAMPLE_BYTES) * index // (SAMPLES - 1))
                found.update(file.read(SAMPLE_BYTES))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from error
    return found.digest()


def _arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """A diffusers config without the bookkeeping that from_config would drop."""
    return {name: value for name, value in config.items() if not name.startswith("_")}


@dataclass(frozen=True)
class ModelFolder:
    """A model on disk, in the official or the diffusers layout; each load_… reads its own part and nothing else.

    repo: the hub id that the folder is a snapshot of. Of its transformers a version's weights are downloaded when they
    are first read: the official repository holds ten of 33 GB each.
    """

    path: Path
    layout: str  # "official" or "diffusers"
    repo: str | None = None

    @property
    def official(self) -> bool:
        return self.layout == "official"

    def folders(self, part: str) -> list[Path]:
        """The folders of a part, which may be absent."""
        return [self.path / name for name in (PARTS[part].official if self.official else PARTS[part].diffusers)]

    def has(self, part: str) -> bool:
        return all(folder.is_dir() for folder in self.folders(part))

    def require(self, part: str) -> list[Path]:
        """The folders of a part; where one is absent, InputError names it and the command that downloads it."""
        folders = self.folders(part)
        for folder in folders:
            if not folder.is_dir():
                name = folder.relative_to(self.path).as_posix()
                raise InputError(
                    f"{self.path} has no {PARTS[part].title} ({name}); get it: {self._fetch_command(part, name)}"
                )
        return folders

    def _fetch_command(self, part: str, folder: str) -> str:
        if self.official:
            return PARTS[part].official[folder].format(path=self.path)
        known = part != "transformer" and self.has("transformer")
        version = self.versions()[0] if known else f"{DEFAULT_RESOLUTION}_t2v"
        return _DIFFUSERS_FETCH.format(version=version, folder=folder, path=self.path)

    # -- transformer --

    def versions(self) -> list[str]:
        """The transformer versions in the folder, by name; the super-resolution ones beside them are not counted."""
        (folder,) = self.require("transformer")
        if self.official:
            names = sorted(path.parent.name for path in folder.glob("*/config.json"))
            return [name for name in names if is_version(name)]
        return [self._diffusers_version(folder).name]

    def _diffusers_version(self, folder: Path) -> Version:
        path = folder / "config.json"
        config = _read_json(path)
        bases = {base: name for name, base in BUCKET_BASE.items()}
        base, task = config.get("target_size"), config.get("task_type")
        if base not in bases:
            raise InputError(f"{path}: target_size is {base!r}; known: {', '.join(map(str, bases))}")
        guider = self.path / "guider" / "guider_config.json"
        guidance = _read_json(guider).get("guidance_scale") if guider.is_file() else None
        meanflow = bool(config.get("use_meanflow"))
        return version(bases[base], str(task), step_distilled=meanflow, cfg_distilled=guidance == 1 and not meanflow)

    def fingerprint(self, parts: Sequence[str], version: str | None = None) -> str:
        """A hash that tells these weights from others: names, sizes and samples of all files of the parts.

        parts: keys of PARTS; of "transformer" only the version's folder counts. Where the folder lies and when it was
        written do not count. It reads about a megabyte of each file.
        """
        files = []
        for part in parts:
            folders = [folder for folder in self.folders(part) if folder.is_dir()]
            if part == "transformer":
                assert version is not None
                self._transformer_files(version)  # a hub repository's are downloaded now
                folders = [self._transformer_folder(version)]
            # hf download keeps its own notes in hidden folders.
            files += [
                (f"{part}/{path.relative_to(folder).as_posix()}", path)
                for folder in folders
                for path in sorted(folder.rglob("*"))
                if path.is_file() and not any(name.startswith(".") for name in path.relative_to(folder).parts)
            ]
        total = hashlib.sha256()
        for name, path in sorted(files):
            total.update(f"{name}\0".encode())
            total.update(_sampled(path))
        return total.hexdigest()

    def resolutions(self) -> list[str]:
        """The resolutions of the versions in the folder."""
        return sorted({parse_version(name).resolution for name in self.versions()})

    def _transformer_folder(self, version: str) -> Path:
        (folder,) = self.require("transformer")
        offered = self.versions()
        if version not in offered:
            raise InputError(f"{self.path} has no transformer {version}; it holds {', '.join(offered) or 'none'}")
        return folder / version if self.official else folder

    def _transformer_files(self, version: str) -> list[Path]:
        """A version's weights; of a hub repository they are downloaded now, if they are not in its cache."""
        folder = self._transformer_folder(version)
        if self.repo:
            _snapshot(self.repo, [f"{folder.relative_to(self.path).as_posix()}/*"], revision=self.path.name)
        return weight_files(folder)

    def transformer_config(self, version: str) -> dict[str, Any]:
        """diffusers' arguments of a version; InputError where the folder lacks it or this suite does not run it."""
        folder = self._transformer_folder(version)
        config = _read_json(folder / "config.json")
        if not self.official:
            return _arguments(config)
        shapes = (_shape(path, _GLYPH_IN) for path in self._transformer_files(version))
        shape = next((shape for shape in shapes if shape), None)
        if shape is None:
            raise InputError(f"{folder} lacks {_GLYPH_IN}, from which the glyph encoder's width is read")
        with _describing(folder / "config.json"):
            return official_transformer_config(config, shape[-1], folder / "config.json")

    def transformer_skeleton(self, version: str, *, weights_dtype: str | None = None) -> Any:
        """diffusers' HunyuanVideo15Transformer3DModel for a version, on the meta device: shapes without memory.

        weights_dtype "fp8": the linear weights of its blocks are to be stored in float8 (float8.py).
        """
        from diffusers import HunyuanVideo15Transformer3DModel

        config = self.transformer_config(version)
        origin = self._transformer_folder(version) / "config.json"
        model = _on_meta(lambda: HunyuanVideo15Transformer3DModel(**config), origin)
        if weights_dtype == "fp8":
            float8.quantise_linears(model.transformer_blocks)
        return model

    def transformer_shapes(self, version: str) -> dict[str, tuple[int, ...]]:
        """The shapes of a version's weights by diffusers' names; from its config, no weight is read."""
        return {name: tuple(x.shape) for name, x in self.transformer_skeleton(version).state_dict().items()}

    def load_transformer(
        self,
        version: str,
        *,
        device: torch.device,
        dtype: torch.dtype,
        progress: Progress = quiet,
        skeleton: nn.Module | None = None,
        places: Places = NO_PLACES,
        adapt: Callable[[Iterable[Named]], Iterable[Named]] = iter,
    ) -> nn.Module:
        """diffusers' HunyuanVideo15Transformer3DModel with a version's weights, in eval mode, without gradients.

        skeleton: what transformer_skeleton gave, by default in `dtype` throughout. places: where some tensors go; those
        that another process fills are not read. adapt: what the tensors, under diffusers' names and in the file's dtype,
        go through on their way.
        """
        folder = self._transformer_folder(version)
        model = self.transformer_skeleton(version) if skeleton is None else skeleton
        files = progress(self._transformer_files(version), desc="loading transformer", unit="shard")
        state = model.state_dict()

        def has_place(name: str) -> bool:
            found = diffusers_names(name, TRANSFORMER_MAP) if self.official else None
            return all(float8.stored_name(own, state) in places.tensors for own in (found[1] if found else [name]))

        def at_home(name: str) -> bool:
            return has_place(name) and not float8_blocks  # which the device quantises, far faster

        float8_blocks = any(tensor.dtype == float8.STORED for tensor in state.values())
        tensors = _tensors(files, lambda name: places.fill or not has_place(name), device, at_home)
        renamed = adapt(self._renamed(tensors, TRANSFORMER_MAP, folder))
        return assign_weights(model, float8.quantised(renamed, state, dtype), dtype, device, folder, places)

    def _renamed(self, tensors: Iterable[Named], rules: Sequence[Rule], origin: Path) -> Iterator[Named]:
        if not self.official:
            yield from tensors
            return
        for name, tensor in tensors:
            pairs = diffusers_tensors(name, tensor, rules)
            if pairs is None:
                raise InputError(f"{origin} holds {name}, which the official layout does not have")
            yield from pairs

    def flow_shift(self, version: str) -> float | None:
        """The schedule's shift where the folder records it for its version (diffusers layout), else None."""
        if self.official or not self.has("scheduler"):
            return None
        assert version in self.versions()
        shift = _read_json(self.folders("scheduler")[0] / "scheduler_config.json").get("shift")
        return None if shift is None else float(shift)

    # -- VAE --

    def vae_config(self) -> dict[str, Any]:
        """diffusers' arguments of the VAE: scaling_factor, latent_channels, the compression ratios, and the widths."""
        (folder,) = self.require("vae")
        config = _read_json(folder / "config.json")
        arguments = official_vae_config(config, folder / "config.json") if self.official else _arguments(config)
        for name in _VAE_NUMBERS:
            if not isinstance(arguments.get(name), (int, float)) or not arguments[name] > 0:
                raise InputError(
                    f"{folder / 'config.json'}: {name} is {arguments.get(name)!r}; allowed is a number above 0"
                )
        return arguments

    def vae_skeleton(self, coder: str) -> nn.Module:
        """The VAE's "encoder" or "decoder" on the meta device: shapes without memory."""
        from diffusers import AutoencoderKLHunyuanVideo15

        (folder,) = self.require("vae")
        config = self.vae_config()
        whole = _on_meta(lambda: AutoencoderKLHunyuanVideo15(**config), folder / "config.json")
        return whole.get_submodule(coder)

    def _load_coder(self, coder: str, device: torch.device, dtype: torch.dtype, progress: Progress) -> nn.Module:
        (folder,) = self.require("vae")
        model = self.vae_skeleton(coder)
        files = progress(weight_files(folder), desc=f"loading VAE {coder}", unit="shard")
        other = {"encoder": "decoder.", "decoder": "encoder."}[coder]
        tensors = _tensors(files, lambda name: not name.startswith(other), device)
        renamed = self._renamed(tensors, VAE_MAP, folder)
        own = ((name.removeprefix(f"{coder}."), tensor) for name, tensor in renamed)
        return assign_weights(model, own, dtype, device, folder)

    def load_vae_decoder(
        self, *, device: torch.device, dtype: torch.dtype, progress: Progress = quiet
    ) -> tuple[nn.Module, dict[str, Any]]:
        """(diffusers' HunyuanVideo15Decoder3D, the VAE's config); the encoder is not read."""
        return self._load_coder("decoder", device, dtype, progress), self.vae_config()

    def load_vae_encoder(
        self, *, device: torch.device, dtype: torch.dtype, progress: Progress = quiet
    ) -> tuple[nn.Module, dict[str, Any]]:
        """(diffusers' HunyuanVideo15Encoder3D, the VAE's config); the decoder is not read."""
        return self._load_coder("encoder", device, dtype, progress), self.vae_config()

    # -- encoders --

    def language_skeleton(self) -> Any:
        """The language model that load_language_model loads, on the meta device: shapes without memory."""
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

        origin = self.require("text")[0] / "config.json"
        config, _ = _language_config(origin)
        model = _on_meta(lambda: Qwen2_5_VLTextModel(config), origin)
        model.norm = nn.Identity()
        return model

    def load_language_model(
        self,
        *,
        device: torch.device,
        dtype: torch.dtype,
        progress: Progress = quiet,
        skeleton: Any = None,
        places: Places = NO_PLACES,
    ) -> tuple[Any, nn.Module]:
        """(tokenizer, Qwen2.5-VL's language model, whose last_hidden_state is the whole model's hidden_states[-3]).

        The vision tower, lm_head, the last two layers and the final norm are never read. skeleton: what language_skeleton
        gave. places: where some tensors go. Raises InputError where a file is absent or broken, and where weights and
        config do not fit.
        """
        folders = self.require("text")
        config, kept = _language_config(folders[0] / "config.json")
        model = self.language_skeleton() if skeleton is None else skeleton
        # Its frequencies are computed, not stored.
        model.rotary_emb = type(model.rotary_emb)(config).to(device)
        files = progress(weight_files(folders[0]), desc="loading text encoder", unit="shard")
        tensors = _tensors(
            files,
            lambda name: _language_key(name, kept) is not None,
            device,
            lambda name: _language_key(name, kept) in places.tensors,
        )
        renamed = ((_language_key(name, kept) or "", tensor) for name, tensor in tensors)
        tokenizer = _tokenizer(folders[-1], *_VOCABULARY)
        return tokenizer, assign_weights(model, renamed, dtype, device, folders[0], places)

    def load_glyph_encoder(self, *, device: torch.device, dtype: torch.dtype) -> tuple[Any, nn.Module]:
        """(ByT5 tokenizer, T5 encoder stack whose last_hidden_state is [1, L, 1472] in the published model)."""
        from transformers import T5EncoderModel

        folders = self.require("glyph")
        config = _glyph_config(folders[0] / "config.json")
        if self.official:
            tokenizer = _tokenizer(folders[0], _BYTES)
            assets = folders[1] / "assets"
            colors, fonts = (_read_json(assets / name) for name in ("color_idx.json", "multilingual_10-lang_idx.json"))
            tokenizer.add_tokens(glyph_tokens(colors, fonts), special_tokens=True)
            config.vocab_size = len(tokenizer)
            origin = folders[1] / "checkpoints" / "byt5_model.pt"
            tensors = _glyph_weights(origin)
        else:
            tokenizer = _tokenizer(folders[1], _BYTES)
            origin = folders[0]
            tensors = (
                (_GLYPH_SHARED if name == "shared.weight" else name.removeprefix("encoder."), tensor)
                for name, tensor in _tensors(weight_files(origin), lambda _: True, device)
            )
        model = _on_meta(lambda: T5EncoderModel(config).encoder, folders[0] / "config.json")
        return tokenizer, assign_weights(model, tensors, dtype, device, origin)

    def load_image_encoder(self, *, device: torch.device, dtype: torch.dtype) -> tuple[Any, nn.Module]:
        """(SigLIP's image processor in its Pillow form, SiglipVisionModel)."""
        from transformers import SiglipVisionModel
        from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

        encoder, processor = self.require("image")
        _read_json(encoder / "config.json")
        _read_json(processor / "preprocessor_config.json")
        weight_files(encoder)
        model: Any = SiglipVisionModel.from_pretrained(encoder, dtype=dtype, use_safetensors=True).to(device)
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()  # out of the file's map, as in assign_weights
        return SiglipImageProcessorPil.from_pretrained(processor), model.eval().requires_grad_(False)


_VOCABULARY = ("tokenizer.json", "vocab.json")
_BYTES = "tokenizer_config.json"  # a byte tokenizer has no vocabulary


def _language_config(path: Path) -> tuple[Any, int]:
    """(the text config without the skipped layers, the number of layers left), from any form of config.json."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLTextConfig

    content = _read_json(path)
    kind = content.get("model_type")
    if kind not in ("qwen2_5_vl", "qwen2_5_vl_text"):
        raise InputError(f"{path}: model_type is {kind!r}; allowed are qwen2_5_vl and qwen2_5_vl_text")
    whole = Qwen2_5_VLTextConfig if kind == "qwen2_5_vl_text" else Qwen2_5_VLConfig
    text: Any = whole.from_dict(content).get_text_config()
    kept = text.num_hidden_layers - SKIPPED_LAYERS
    if kept < 1:
        raise InputError(f"{path}: {text.num_hidden_layers} layers; at least {SKIPPED_LAYERS + 1} are needed")
    text.num_hidden_layers = kept
    text.layer_types = text.layer_types[:kept]
    return text, kept


def _glyph_config(path: Path) -> Any:
    from transformers import T5Config

    content = _read_json(path)
    if content.get("model_type") != "t5":
        raise InputError(f"{path}: model_type is {content.get('model_type')!r}; allowed is t5")
    return T5Config.from_dict(content)


def _tokenizer(folder: Path, *files: str) -> Any:
    """The tokenizer of a folder that holds one of these files.

    Without them transformers would make an empty tokenizer and say nothing. Raises InputError where there are none, or
    where transformers cannot read them.
    """
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in files):
        raise InputError(f"{folder} holds no tokenizer: {' or '.join(files)}")
    try:
        # Said outright: left to itself transformers asks the user whether to run code that the folder brings.
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{folder} holds no tokenizer that transformers can read ({reason})") from error


def _language_key(name: str, kept: int) -> str | None:
    """The language model's own name of a tensor of Qwen2.5-VL, whichever its prefix; None if it is not used."""
    for prefix in ("model.language_model.", "language_model.model.", "language_model.", "model."):
        if name.startswith(prefix):
            name = name.removeprefix(prefix)
            break
    if name.startswith(("visual.", "lm_head.")):
        return None
    layer = re.match(r"layers\.(\d+)\.", name)
    if name == "norm.weight" or (layer and int(layer[1]) >= kept):
        return None
    return name


def glyph_tokens(colors: Mapping[str, Any], fonts: Mapping[str, int]) -> list[str]:
    """Glyph-SDXL-v2's special tokens: <color-i> for each colour, <xx-font-i> for each font (language and number)."""
    return [f"<color-{i}>" for i in range(len(colors))] + [f"<{code[:2]}-font-{i}>" for code, i in fonts.items()]


_GLYPH_PREFIX = "module.text_tower.encoder."
_GLYPH_SHARED = "embed_tokens.weight"
_GLYPH_IN = "byt5_in.fc1.weight"


def _shape(path: Path, name: str) -> list[int] | None:
    """The shape of a tensor of a safetensors file, which is not read; None where it is not in it."""
    try:
        with safe_open(path, "pt") as file:
            return list(file.get_slice(name).get_shape()) if name in file.keys() else None  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a whole safetensors file ({error})") from error


def _glyph_weights(path: Path) -> Iterator[Named]:
    """The encoder's tensors of Glyph-SDXL-v2's byt5_model.pt; the one pickle that is read, and as bare tensors only."""
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = next(iter(str(error).splitlines()), "it is cut short")
        raise InputError(f"{path} is not a whole file of tensors ({reason})") from error
    if isinstance(content, dict) and "state_dict" in content:
        content = {
            name.removeprefix(_GLYPH_PREFIX): tensor
            for name, tensor in content["state_dict"].items()
            if name.startswith(_GLYPH_PREFIX)
        }
    if not isinstance(content, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in content.values()):
        raise InputError(f"{path} does not hold named tensors, alone or under state_dict")
    yield from content.items()


def open_model(model_path: str | Path, parts: Sequence[str], progress: Progress = quiet) -> ModelFolder:
    """The model folder at a path, or of a hub id, of which only these parts are downloaded (into the hub's own cache).

    parts: keys of PARTS. The hub shows its own progress bars, so `progress` has nothing to do. Raises InputError where
    the path is neither a folder in one of the two layouts nor a hub id, and where the hub cannot be reached.
    """
    assert all(part in PARTS for part in parts), parts
    try:
        path, repo = Path(model_path).expanduser(), None
        present = path.exists()
    except RuntimeError as error:
        raise InputError(f"{model_path}: there is no such user") from error
    except OSError as error:
        raise InputError(f"{model_path}: {error.strerror}") from error
    if not present:
        repo = str(model_path)
        path = _download(repo, parts)
    layout = _layout(path)
    if layout is None:
        raise InputError(
            f"{model_path} is no model folder: it has neither the official layout (transformer/<version>/config.json, "
            "vae/, …) nor diffusers' (model_index.json)"
        )
    return ModelFolder(path, layout, repo)


def _layout(path: Path) -> str | None:
    """Which layout a folder has, if any. The transformers tell; without them it is judged by what else there is."""
    if (path / "transformer" / "config.json").is_file():
        return "diffusers"
    if any(path.glob("transformer/*/config.json")):
        return "official"
    if (path / "model_index.json").is_file():
        return "diffusers"
    return "official" if any((path / name).is_dir() for part in PARTS.values() for name in part.official) else None


def _download(repo: str, parts: Sequence[str]) -> Path:
    """The snapshot of a hub repository: all configs, and the files of the parts but for the transformers' weights."""
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo):
        raise InputError(f"{repo} does not exist, and it is no hub id (owner/name) either")
    folders = {
        name for part in parts if part != "transformer" for name in (*PARTS[part].official, *PARTS[part].diffusers)
    }
    # Configs tell which layout and which versions there are; they are small, so all of them come.
    return _snapshot(repo, ["*.json", *(f"{folder}/*" for folder in sorted(folders))])


def _snapshot(repo: str, patterns: list[str], revision: str | None = None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, allow_patterns=patterns, revision=revision))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(f"{repo} is no folder here, and the hub did not give it ({reason})") from error
