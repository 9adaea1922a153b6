"""Writes the parts of a HunyuanVideo-1.5 checkpoint, in the official layout or in diffusers'.

Both the demo checkpoint and the tests' tiny ones of random weights (tiny.py) go through these two writers.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hunyuan_staged.errors import InputError
from hunyuan_staged.versions import (
    SuperResolutionVersion,
    TransformerVersion,
    parse_version,
    super_resolution_named,
)

AnyVersion = TransformerVersion | SuperResolutionVersion
GLYPH_FOLDER = "Glyph-SDXL-v2"


@dataclass
class Modules:
    """The parts of a checkpoint: transformers' objects, and our modules where the weights are named as diffusers'.

    language_model: Qwen2_5_VLTextModel with all its layers; language_config: config.json in the hub's form.
    glyph_tokenizer and glyph_encoder (T5EncoderModel) already know the tokens of colors and fonts.
    vae: Vae. transformers: TransformerModules by version name, e.g. demo_t2v. upsamplers: those of the versions of
    super resolution, e.g. demo_hd_sr_distilled, as (module, its config).
    """

    tokenizer: Any
    language_config: dict[str, Any]
    language_model: Any
    glyph_tokenizer: Any
    glyph_encoder: Any
    image_processor: Any
    image_encoder: Any
    vae: Any
    transformers: dict[str, Any]
    upsamplers: dict[str, tuple[Any, dict[str, Any]]]
    colors: dict[str, int]
    fonts: dict[str, int]


def any_version(name: str) -> AnyVersion:
    """The version of a folder below transformer/, super resolution's too; InputError where it is none."""
    return super_resolution_named(name) or parse_version(name)


# --- the official layout ---------------------------------------------------------------------------------------------


def save_official(
    folder: str | Path,
    modules: Modules,
    *,
    versions: Sequence[str] | None = None,
    dtype: torch.dtype = torch.float32,
    shard_bytes: int | None = None,
    force_upcast: bool = False,
) -> Path:
    """Write the modules as `hf download tencent/HunyuanVideo-1.5` and its download guide leave them (facts.md).

    All weights in dtype; a transformer of more than shard_bytes in several files and an index. force_upcast: the VAE's
    values are too large for float16. The folder appears whole or not at all; InputError where something is there already.
    """
    with new_folder(Path(folder)) as root:
        _save_qwen(root / "text_encoder" / "llm", modules, dtype)
        write_glyph_configs(root / "text_encoder", modules.glyph_encoder.config, modules.colors, modules.fonts)
        save_glyph_weights(root / "text_encoder" / GLYPH_FOLDER, _weights(modules.glyph_encoder.encoder, dtype))
        _save_image_encoder(root / "vision_encoder" / "siglip", modules, dtype)
        for name in versions or tuple(modules.transformers):
            _save_official_transformer(
                root / "transformer" / name, modules.transformers[name], any_version(name), dtype, shard_bytes
            )
            if name in modules.upsamplers:
                _save_upsampler(root / "upsampler" / name, *modules.upsamplers[name], dtype)
        save_official_vae(root / "vae", modules.vae, dtype, force_upcast)
        write_scheduler(root)
    return Path(folder)


def save_super_resolution(
    folder: Path, version: SuperResolutionVersion, parts: tuple[Any, Any, dict[str, Any]], dtype: torch.dtype
) -> None:
    """Write transformer, upsampler and the upsampler's config where save_official writes them below a folder."""
    transformer, upsampler, config = parts
    _save_official_transformer(folder / "transformer" / version.name, transformer, version, dtype, None)
    _save_upsampler(folder / "upsampler" / version.name, upsampler, config, dtype)


def _save_upsampler(folder: Path, module: nn.Module, config: Mapping[str, Any], dtype: torch.dtype) -> None:
    _save_tensors(folder / "diffusion_pytorch_model.safetensors", _weights(module, dtype))
    write_json(folder / "config.json", config)


def write_scheduler(root: Path) -> None:
    """The official scheduler's config, below the checkpoint's folder."""
    config = {"_class_name": "FlowMatchDiscreteScheduler", "num_train_timesteps": 1000, "reverse": True}
    write_json(root / "scheduler" / "scheduler_config.json", config | {"shift": 1.0, "solver": "euler"})


def official_transformer_dict(config: Any, version: AnyVersion) -> dict[str, Any]:
    """The official config.json of a transformer, from its TransformerConfig."""
    enlarging = isinstance(version, SuperResolutionVersion)
    return {
        "_class_name": "HunyuanVideo_1_5_DiffusionTransformer",
        "patch_size": [config.patch_size_t, config.patch_size, config.patch_size],
        "in_channels": config.in_channels if enlarging else config.out_channels,
        "out_channels": config.out_channels,
        "concat_condition": not enlarging,
        "hidden_size": config.num_attention_heads * config.attention_head_dim,
        "heads_num": config.num_attention_heads,
        "mlp_width_ratio": config.mlp_ratio,
        "mm_double_blocks_depth": config.num_layers,
        "mm_single_blocks_depth": 0,
        "rope_dim_list": list(config.rope_axes_dim),
        "qkv_bias": True,
        "qk_norm": True,
        "qk_norm_type": "rms",
        "guidance_embed": False,
        "use_meanflow": config.use_meanflow,
        "text_projection": "single_refiner",
        "use_attention_mask": True,
        "text_states_dim": config.text_embed_dim,
        "text_states_dim_2": None,
        "text_pool_type": None,
        "rope_theta": int(config.rope_theta),
        "attn_mode": "flash",
        "glyph_byT5_v2": True,
        "vision_projection": "linear",
        "vision_states_dim": config.image_embed_dim,
        "use_cond_type_embedding": True,
        "ideal_resolution": version.resolution,
        "ideal_task": version.task if isinstance(version, TransformerVersion) else None,
    }


def official_vae_dict(config: Any) -> dict[str, Any]:
    """The official config.json of the VAE, from its VaeConfig."""
    return {
        "_class_name": "AutoencoderKLConv3D",
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "latent_channels": config.latent_channels,
        "block_out_channels": list(config.block_out_channels),
        "layers_per_block": config.layers_per_block,
        "ffactor_spatial": config.spatial_compression_ratio,
        "ffactor_temporal": config.temporal_compression_ratio,
        "sample_size": 256,
        "sample_tsize": 64,
        "scaling_factor": config.scaling_factor,
        "shift_factor": None,
        "downsample_match_channel": config.downsample_match_channel,
        "upsample_match_channel": config.upsample_match_channel,
    }


def _save_official_transformer(
    folder: Path, module: Any, version: Any, dtype: torch.dtype, shard_bytes: int | None
) -> None:
    from hunyuan_staged.weights.key_maps import TRANSFORMER_MAP, to_official

    _save_sharded(folder, "diffusion_pytorch_model", to_official(_weights(module, dtype), TRANSFORMER_MAP), shard_bytes)
    write_json(folder / "config.json", official_transformer_dict(module.config, version))


def save_official_vae(folder: Path, module: Any, dtype: torch.dtype, force_upcast: bool = False) -> None:
    """Write a Vae and its official config. force_upcast: its values are too large for float16."""
    from hunyuan_staged.weights.key_maps import VAE_MAP, to_official

    _save_tensors(folder / "diffusion_pytorch_model.safetensors", to_official(_weights(module, dtype), VAE_MAP))
    upcast = {"force_upcast": True} if force_upcast else {}
    write_json(folder / "config.json", official_vae_dict(module.config) | upcast)


def _save_qwen(folder: Path, modules: Modules, dtype: torch.dtype) -> None:
    """The hub's form: two shards, old key names, and a vision tower and lm_head, which stage 1 must not read."""
    save_tokenizer(modules.tokenizer, folder, save_jinja_files=False)
    write_json(folder / "config.json", modules.language_config)
    weights = {f"model.{name}": tensor for name, tensor in _weights(modules.language_model, dtype).items()}
    embeddings = weights["model.embed_tokens.weight"]
    unread = {
        "lm_head.weight": torch.zeros_like(embeddings[:8]),
        "visual.blocks.0.norm1.weight": torch.zeros(8, dtype=dtype),
        "visual.patch_embed.proj.weight": torch.zeros(8, 3, 2, 2, 2, dtype=dtype),
        "visual.merger.mlp.0.bias": torch.zeros(8, dtype=dtype),
    }
    names = list(weights)
    half = len(names) // 2
    files = shard_files("model", [[*names[:half], *unread], names[half:]])
    _save_files(folder, "model", weights | unread, files)


def write_glyph_configs(folder: Path, config: Any, colors: Mapping[str, int], fonts: Mapping[str, int]) -> None:
    """google/byt5-small without its weights, and Glyph-SDXL-v2's tables, below text_encoder/. config: T5Config."""
    write_json(folder / GLYPH_FOLDER / "assets" / "color_idx.json", colors)
    write_json(folder / GLYPH_FOLDER / "assets" / "multilingual_10-lang_idx.json", fonts)
    _write_byt5(folder / "byt5-small", config.to_diff_dict() | {"vocab_size": 384, "is_encoder_decoder": True})


def _write_byt5(folder: Path, config: dict[str, Any]) -> None:
    config |= {"architectures": ["T5ForConditionalGeneration"], "tokenizer_class": "ByT5Tokenizer"}
    write_json(folder / "config.json", config)
    added = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False, "__type": "AddedToken"}
    special = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    extra = {"extra_ids": 125, "additional_special_tokens": [f"<extra_id_{i}>" for i in range(125)]}
    tokens = {name: {"content": token} | added for name, token in special.items()}
    write_json(folder / "tokenizer_config.json", tokens | extra | {"tokenizer_class": "ByT5Tokenizer"})
    write_json(
        folder / "special_tokens_map.json", special | {"additional_special_tokens": extra["additional_special_tokens"]}
    )


def save_glyph_weights(folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """Glyph-SDXL-v2's file, which holds the whole glyph encoder, of the encoder's weights."""
    named = {f"module.text_tower.encoder.{name}": tensor for name, tensor in weights.items()}
    (folder / "checkpoints").mkdir(parents=True)
    torch.save({"state_dict": named}, folder / "checkpoints" / "byt5_model.pt")


# --- diffusers' layout -----------------------------------------------------------------------------------------------


# The classes that read what is ours elsewhere.
_DIFFUSERS = {"transformer": "HunyuanVideo15Transformer3DModel", "vae": "AutoencoderKLHunyuanVideo15"}


def save_diffusers(
    folder: str | Path, modules: Modules, *, version: str | None = None, dtype: torch.dtype = torch.float32
) -> Path:
    """Write the modules as diffusers' pipelines save them, with one transformer: that of version, else the first.

    The image encoder is written whatever the task; model_index.json names it for i2v only. As save_official otherwise.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    parsed = parse_version(version or next(iter(modules.transformers)))
    with new_folder(Path(folder)) as root:
        transformer = modules.transformers[parsed.name]
        for part, module in (("transformer", transformer), ("vae", modules.vae)):
            write_json(root / part / "config.json", {"_class_name": _DIFFUSERS[part]} | asdict(module.config))
            _save_tensors(root / part / "diffusion_pytorch_model.safetensors", _weights(module, dtype))
        scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=parsed.flow_shift)
        scheduler.save_pretrained(root / "scheduler")
        guider = {"_class_name": "ClassifierFreeGuidance", "enabled": True, "guidance_scale": parsed.guidance_scale}
        write_json(root / "guider" / "guider_config.json", guider | {"start": 0.0, "stop": 1.0})
        _save_module(root / "text_encoder", modules.language_model, _weights(modules.language_model, dtype), "model")
        save_tokenizer(modules.tokenizer, root / "tokenizer")
        _save_module(root / "text_encoder_2", modules.glyph_encoder, _weights(modules.glyph_encoder, dtype), "model")
        save_tokenizer(modules.glyph_tokenizer, root / "tokenizer_2")
        _save_image_encoder(root, modules, dtype)
        index = {
            "guider": ["diffusers", "ClassifierFreeGuidance"],
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "text_encoder": ["transformers", "Qwen2_5_VLTextModel"],
            "text_encoder_2": ["transformers", "T5EncoderModel"],
            "tokenizer": ["transformers", "Qwen2Tokenizer"],
            "tokenizer_2": ["transformers", "ByT5Tokenizer"],
        } | {part: ["diffusers", name] for part, name in _DIFFUSERS.items()}
        pipeline = "HunyuanVideo15Pipeline"
        if parsed.task == "i2v":
            pipeline = "HunyuanVideo15ImageToVideoPipeline"
            index["feature_extractor"] = ["transformers", "SiglipImageProcessor"]
            index["image_encoder"] = ["transformers", "SiglipVisionModel"]
        write_json(root / "model_index.json", {"_class_name": pipeline, **index})
    return Path(folder)


# --- files -----------------------------------------------------------------------------------------------------------


def require_vacant(target: Path) -> None:
    """InputError where something is there already, but for an empty folder."""
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise InputError(f"{target} exists already; remove it or name another folder")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside target that becomes target at the end, so that half a checkpoint never looks whole."""
    require_vacant(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    try:
        yield work
        work.chmod(0o755)
        work.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _weights(module: nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The module's weights by name, on the CPU; those of one memory under several names keep the first only."""
    weights, seen = {}, set()
    for name, tensor in module.state_dict().items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            weights[name] = tensor.detach().to("cpu", dtype).contiguous()
    return weights


def shards_of(sizes: Mapping[str, int], limit: int | None) -> list[list[str]]:
    """Names by file, in order; each file within the limit, unless it holds one tensor. sizes: in bytes, by name."""
    shards: list[list[str]] = [[]]
    for name, size in sizes.items():
        if limit and shards[-1] and sum(sizes[other] for other in shards[-1]) + size > limit:
            shards.append([])
        shards[-1].append(name)
    return shards


def shard_files(stem: str, shards: Sequence[Sequence[str]]) -> dict[str, Sequence[str]]:
    """The names in each file, by the file's name, as the hub names several, or one."""
    if len(shards) == 1:
        return {f"{stem}.safetensors": shards[0]}
    return {f"{stem}-{n:05d}-of-{len(shards):05d}.safetensors": names for n, names in enumerate(shards, 1)}


def write_index(folder: Path, stem: str, files: Mapping[str, Sequence[str]], size: int) -> None:
    """The index of several files: which holds what. size: of all tensors, in bytes."""
    where = {name: file for file, names in files.items() for name in names}
    write_json(folder / f"{stem}.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": where})


def _save_sharded(folder: Path, stem: str, weights: Mapping[str, torch.Tensor], limit: int | None) -> None:
    """One file, or where that would pass the limit several and the index that lists them."""
    sizes = {name: tensor.nbytes for name, tensor in weights.items()}
    _save_files(folder, stem, weights, shard_files(stem, shards_of(sizes, limit)))


def _save_files(
    folder: Path, stem: str, weights: Mapping[str, torch.Tensor], files: Mapping[str, Sequence[str]]
) -> None:
    """The files of some weights, as shard_files names them, and of several the index."""
    for file, names in files.items():
        _save_tensors(folder / file, {name: weights[name] for name in names})
    if len(files) > 1:
        write_index(folder, stem, files, sum(tensor.nbytes for tensor in weights.values()))


def _save_module(folder: Path, module: Any, weights: Mapping[str, torch.Tensor], stem: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    module.config.save_pretrained(folder)
    _save_tensors(folder / f"{stem}.safetensors", weights)


def _save_image_encoder(root: Path, modules: Modules, dtype: torch.dtype) -> None:
    # transformers 5 dropped the prefix from the module; the published files have it.
    weights = {
        f"vision_model.{name.removeprefix('vision_model.')}": x
        for name, x in _weights(modules.image_encoder, dtype).items()
    }
    _save_module(root / "image_encoder", modules.image_encoder, weights, "model")
    modules.image_processor.save_pretrained(root / "feature_extractor")


def save_tokenizer(tokenizer: Any, folder: Path, **options: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder, **options)


def _save_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors lets nobody but the owner read


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
