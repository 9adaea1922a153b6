"""Writes a small HunyuanVideo-1.5 checkpoint of every part, in the official layout or in diffusers'.

With random weights (draw_checkpoint) it lets every stage run end to end in seconds, on a machine with no weights; the
trained demo checkpoint goes through the same two writers. Same seed and sizes, same bytes.
"""

import json
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hunyuan_staged.encoders.text import SYSTEM_PROMPT
from hunyuan_staged.errors import InputError
from hunyuan_staged.geometry import BUCKET_BASE
from hunyuan_staged.models.upsampler import build_upsampler
from hunyuan_staged.versions import (
    SuperResolutionVersion,
    TransformerVersion,
    parse_version,
    super_resolution_named,
)

Version = TransformerVersion | SuperResolutionVersion

LAYOUTS = ("official", "diffusers")
DEMO_VERSIONS = ("demo_t2v", "demo_i2v")

# As in Qwen2.5's tokenizer, and in its order; they follow the trained part of the vocabulary.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# How Qwen cuts text before its byte-level BPE.
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS = (
    SYSTEM_PROMPT,
    "system user assistant You are a helpful assistant.",
    "a red circle moves left over a dark blue background, two squares, one green, one yellow, drift apart",
    "a white star goes round in a circle above a two-tone grey and orange background while it grows and shrinks",
    "the purple triangle slides slowly to the right, then up, down and diagonally, on plain black ground",
    'a card with the letters "AB12" in quotation marks stands still; a sign that reads “HELLO” is seen from near',
    "a cat walks on the grass in the evening light, realistic style, the camera pans from left to right",
)
COLORS = {"white": 0, "black": 1, "darkslategray": 2, "dimgray": 3}
FONTS = {"en-Montserrat-Regular": 0, "en-Lato-Bold": 1, "cn-AlibabaPuHuiTi-Bold": 2, "jp-KosugiMaru-Regular": 3}


@dataclass(frozen=True)
class Sizes:
    """How large each part is. Heads are heads x head_dim wide; the default draws tens of megabytes and runs in seconds.

    Most of the transformer's bytes are its glyph projection, which the architecture fixes at 2048 wide.
    """

    vocab: int = 512
    text_width: int = 64
    text_layers: int = 4
    text_heads: int = 4
    text_kv_heads: int = 2
    text_mlp: int = 128
    glyph_width: int = 64
    glyph_layers: int = 2
    glyph_heads: int = 4
    glyph_mlp: int = 128
    image_width: int = 32
    image_layers: int = 1
    image_heads: int = 2
    image_size: int = 28
    image_patch: int = 14
    transformer_heads: int = 3
    transformer_head_dim: int = 32
    transformer_layers: int = 3
    transformer_rope: tuple[int, int, int] = (8, 12, 12)
    transformer_mlp_ratio: float = 4.0
    latent_channels: int = 32
    vae_channels: tuple[int, ...] = (16, 16, 32, 32, 64)
    vae_layers: int = 1
    upsampler_channels: int = 32
    upsampler_blocks: int = 1


TINY = Sizes()


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
    upsamplers: dict[str, tuple[Any, dict[str, Any]]] = field(default_factory=dict)
    colors: dict[str, int] = field(default_factory=lambda: dict(COLORS))
    fonts: dict[str, int] = field(default_factory=lambda: dict(FONTS))


def draw_checkpoint(
    folder: str | Path,
    seed: int = 0,
    sizes: Sizes = TINY,
    layout: str = "official",
    versions: Sequence[str] = DEMO_VERSIONS,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a checkpoint of random weights and return its folder; the diffusers layout holds the first version only.

    Raises InputError for an unknown layout or version, and where the folder exists already.
    """
    if layout not in LAYOUTS:
        raise InputError(f"layout {layout!r} is unknown; known: {', '.join(LAYOUTS)}")
    modules = build_modules(sizes, seed, versions)
    if layout == "official":
        return save_official(folder, modules, versions=versions, dtype=dtype)
    return save_diffusers(folder, modules, version=versions[0], dtype=dtype)


def build_modules(
    sizes: Sizes = TINY, seed: int = 0, versions: Sequence[str] = DEMO_VERSIONS, corpus: Sequence[str] = CORPUS
) -> Modules:
    """Every part with weights drawn by seed, float32, CPU, eval mode. The global random state is left alone."""
    with torch.random.fork_rng(devices=[]):  # the modules' own initialisation, which draw_weights replaces
        tokenizer = train_tokenizer(sizes.vocab, corpus)
        language_config = qwen_config(sizes, tokenizer)
        glyph_tokenizer = build_glyph_tokenizer(COLORS, FONTS)
        modules = Modules(
            tokenizer=tokenizer,
            language_config=language_config,
            language_model=build_language_model(language_config),
            glyph_tokenizer=glyph_tokenizer,
            glyph_encoder=build_glyph_encoder(sizes, len(glyph_tokenizer)),
            image_processor=build_image_processor(sizes),
            image_encoder=build_image_encoder(sizes),
            vae=build_vae(sizes),
            transformers={name: build_transformer(sizes, any_version(name)) for name in versions},
            upsamplers={
                name: build_enlarger(sizes, version)
                for name in versions
                if isinstance(version := any_version(name), SuperResolutionVersion)
            },
        )
    for part in ("language_model", "glyph_encoder", "image_encoder", "vae"):
        draw_weights(getattr(modules, part), f"{seed}/{part}")
    for name, transformer in modules.transformers.items():
        draw_weights(transformer, f"{seed}/{name}")
    for name, (upsampler, _) in modules.upsamplers.items():
        draw_weights(upsampler, f"{seed}/upsampler/{name}")
    return modules


@torch.no_grad()
def draw_weights(module: nn.Module, key: str) -> None:
    """Draw each parameter from a generator of its own, so that no other parameter or its order matters.

    Norm weights lie around 1; others have 0.7 / sqrt(fan-in), which keeps activations near 1 through every part.
    """
    for name, parameter in module.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(f"{key}/{name}".encode()))
        x = torch.randn(parameter.shape, generator=generator)
        if name.endswith("gamma") or (x.ndim == 1 and "norm" in name and name.endswith("weight")):
            parameter.copy_(1 + 0.1 * x)
        else:
            parameter.copy_(x * 0.7 / (x[0].numel() if x.ndim > 1 else 64) ** 0.5)
    module.eval().requires_grad_(False)


# --- parts -----------------------------------------------------------------------------------------------------------


def train_tokenizer(vocab: int, corpus: Sequence[str] = CORPUS) -> Any:
    """A Qwen2 tokenizer: byte-level BPE with up to vocab tokens trained on corpus, then Qwen's special tokens."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import Qwen2TokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=vocab, initial_alphabet=alphabet, show_progress=False)
    )
    trained = json.loads(bpe.to_str())["model"]
    ids = trained["vocab"] | {token: len(trained["vocab"]) + i for i, token in enumerate(SPECIAL_TOKENS)}
    return Qwen2TokenizerFast(
        vocab=ids,
        merges=[tuple(pair) for pair in trained["merges"]],
        unk_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=list(SPECIAL_TOKENS),
        padding_side="right",
        model_max_length=131072,
        chat_template=CHAT_TEMPLATE,
    )


def qwen_config(sizes: Sizes, tokenizer: Any) -> dict[str, Any]:
    """config.json in the form of Qwen2.5-VL-7B-Instruct's: the language part's settings at the top level."""
    half = sizes.text_width // sizes.text_heads // 2
    sections = [half - 2 * (half * 3 // 8), half * 3 // 8, half * 3 // 8]  # 16, 24, 24 of 64 in the 7B model
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_token_id": ids["<|vision_pad|>"],
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "hidden_act": "silu",
        "hidden_size": sizes.text_width,
        "initializer_range": 0.02,
        "intermediate_size": sizes.text_mlp,
        "max_position_embeddings": 128000,
        "max_window_layers": sizes.text_layers,
        "model_type": "qwen2_5_vl",
        "num_attention_heads": sizes.text_heads,
        "num_hidden_layers": sizes.text_layers,
        "num_key_value_heads": sizes.text_kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.41.2",
        "use_cache": True,
        "use_sliding_window": False,
        "vision_config": {
            "depth": 1,
            "hidden_act": "silu",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "in_chans": 3,
            "out_hidden_size": sizes.text_width,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [0],
            "tokens_per_second": 2,
            "temporal_patch_size": 2,
        },
        "rope_scaling": {"type": "mrope", "mrope_section": sections},
        "vocab_size": -(-len(tokenizer) // 64) * 64,
    }


def build_language_model(config: Mapping[str, Any]) -> nn.Module:
    from transformers import Qwen2_5_VLConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

    whole: Any = Qwen2_5_VLConfig.from_dict(json.loads(json.dumps(config)))  # a copy: from_dict edits what it gets
    return Qwen2_5_VLTextModel(whole.text_config)


def build_glyph_tokenizer(colors: Mapping[str, int], fonts: Mapping[str, int]) -> Any:
    from transformers import ByT5Tokenizer

    from hunyuan_staged.weights.encoder_components import glyph_tokens

    tokenizer = ByT5Tokenizer()
    tokenizer.add_tokens(glyph_tokens(colors, fonts), special_tokens=True)
    return tokenizer


def byt5_config(sizes: Sizes) -> dict[str, Any]:
    """config.json in the form of google/byt5-small's."""
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "d_ff": sizes.glyph_mlp,
        "d_kv": sizes.glyph_width // sizes.glyph_heads,
        "d_model": sizes.glyph_width,
        "decoder_start_token_id": 0,
        "dropout_rate": 0.1,
        "eos_token_id": 1,
        "feed_forward_proj": "gated-gelu",
        "initializer_factor": 1.0,
        "is_encoder_decoder": True,
        "layer_norm_epsilon": 1e-06,
        "model_type": "t5",
        "num_decoder_layers": 1,
        "num_heads": sizes.glyph_heads,
        "num_layers": sizes.glyph_layers,
        "pad_token_id": 0,
        "relative_attention_num_buckets": 32,
        "tie_word_embeddings": False,
        "tokenizer_class": "ByT5Tokenizer",
        "use_cache": True,
        "vocab_size": 384,
    }


def build_glyph_encoder(sizes: Sizes, vocab: int) -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(**(byt5_config(sizes) | {"vocab_size": vocab})))


def build_image_processor(sizes: Sizes) -> Any:
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    return SiglipImageProcessorPil(
        size={"height": sizes.image_size, "width": sizes.image_size},
        resample=3,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        rescale_factor=1 / 255,
    )


def build_image_encoder(sizes: Sizes) -> nn.Module:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    return SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=sizes.image_width,
            intermediate_size=2 * sizes.image_width,
            num_hidden_layers=sizes.image_layers,
            num_attention_heads=sizes.image_heads,
            image_size=sizes.image_size,
            patch_size=sizes.image_patch,
        )
    )


def any_version(name: str) -> Version:
    """The version of a folder below transformer/, super resolution's too; InputError where it is none."""
    return super_resolution_named(name) or parse_version(name)


def build_transformer(sizes: Sizes, version: Version) -> Any:
    from hunyuan_staged.models.modules import TransformerConfig, TransformerModules

    enlarging = isinstance(version, SuperResolutionVersion)
    config = TransformerConfig(
        in_channels=(3 * sizes.latent_channels + 2) if enlarging else (2 * sizes.latent_channels + 1),
        out_channels=sizes.latent_channels,
        num_attention_heads=sizes.transformer_heads,
        attention_head_dim=sizes.transformer_head_dim,
        num_layers=sizes.transformer_layers,
        mlp_ratio=sizes.transformer_mlp_ratio,
        text_embed_dim=sizes.text_width,
        text_embed_2_dim=sizes.glyph_width,
        image_embed_dim=sizes.image_width,
        rope_axes_dim=sizes.transformer_rope,
        target_size=BUCKET_BASE[version.resolution],
        task_type=version.task if isinstance(version, TransformerVersion) else None,
        use_meanflow=version.use_meanflow,
    )
    return TransformerModules(config)


def build_enlarger(sizes: Sizes, version: SuperResolutionVersion) -> tuple[Any, dict[str, Any]]:
    """(latent upsampler, its config): of the 1080p kind for 1080p, else of the 720p kind."""
    channels, width = sizes.latent_channels, sizes.upsampler_channels
    config: dict[str, Any] = {"out_channels": channels}
    if version.resolution == "1080p":
        kind = "1080p"
        config |= {"z_channels": channels, "block_out_channels": [channels, width]}
        config |= {"num_res_blocks": sizes.upsampler_blocks}
    else:
        kind = "720p"
        config |= {"in_channels": channels, "hidden_channels": width}
        config |= {"num_blocks": sizes.upsampler_blocks, "global_residual": False}
    return build_upsampler(kind, config), config


def build_vae(sizes: Sizes) -> Any:
    from hunyuan_staged.models.vae_modules import Vae, VaeConfig

    config = VaeConfig(
        latent_channels=sizes.latent_channels, block_out_channels=sizes.vae_channels, layers_per_block=sizes.vae_layers
    )
    return Vae(config)


# --- the official layout ---------------------------------------------------------------------------------------------


def save_official(
    folder: str | Path,
    modules: Modules,
    *,
    versions: Sequence[str] | None = None,
    dtype: torch.dtype = torch.float32,
    shard_bytes: int | None = None,
) -> Path:
    """Write the modules as `hf download tencent/HunyuanVideo-1.5` and its download guide leave them (facts.md).

    All weights in dtype; a transformer of more than shard_bytes in several files and an index. The folder appears whole
    or not at all; InputError where it exists already.
    """
    with _new_folder(Path(folder)) as root:
        _save_qwen(root / "text_encoder" / "llm", modules, dtype)
        _save_byt5(root / "text_encoder" / "byt5-small", modules)
        _save_glyphs(root / "text_encoder" / "Glyph-SDXL-v2", modules, dtype)
        _save_image_encoder(root / "vision_encoder" / "siglip", modules, dtype)
        for name in versions or tuple(modules.transformers):
            _save_official_transformer(
                root / "transformer" / name, modules.transformers[name], any_version(name), dtype, shard_bytes
            )
            if name in modules.upsamplers:
                upsampler, config = modules.upsamplers[name]
                _save_tensors(
                    root / "upsampler" / name / "diffusion_pytorch_model.safetensors", _weights(upsampler, dtype)
                )
                _write_json(root / "upsampler" / name / "config.json", config)
        _save_official_vae(root / "vae", modules.vae, dtype)
        _write_json(
            root / "scheduler" / "scheduler_config.json",
            {
                "_class_name": "FlowMatchDiscreteScheduler",
                "num_train_timesteps": 1000,
                "reverse": True,
                "shift": 1.0,
                "solver": "euler",
            },
        )
    return Path(folder)


def official_transformer_dict(config: Any, version: Version) -> dict[str, Any]:
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
    _write_json(folder / "config.json", official_transformer_dict(module.config, version))


def _save_official_vae(folder: Path, module: Any, dtype: torch.dtype) -> None:
    from hunyuan_staged.weights.key_maps import VAE_MAP, to_official

    _save_tensors(folder / "diffusion_pytorch_model.safetensors", to_official(_weights(module, dtype), VAE_MAP))
    _write_json(folder / "config.json", official_vae_dict(module.config))


def _save_qwen(folder: Path, modules: Modules, dtype: torch.dtype) -> None:
    """The hub's form: two shards, old key names, and a vision tower and lm_head, which stage 1 must not read."""
    _save_tokenizer(modules.tokenizer, folder, save_jinja_files=False)
    _write_json(folder / "config.json", modules.language_config)
    weights = {f"model.{name}": tensor for name, tensor in _weights(modules.language_model, dtype).items()}
    embeddings = weights["model.embed_tokens.weight"]
    unread = {
        "lm_head.weight": torch.zeros_like(embeddings[:8]),
        "visual.blocks.0.norm1.weight": torch.zeros(8, dtype=dtype),
        "visual.patch_embed.proj.weight": torch.zeros(8, 3, 2, 2, 2, dtype=dtype),
        "visual.merger.mlp.0.bias": torch.zeros(8, dtype=dtype),
    }
    names = list(weights)
    shards = (
        {name: weights[name] for name in names[: len(names) // 2]} | unread,
        {name: weights[name] for name in names[len(names) // 2 :]},
    )
    files: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _save_tensors(folder / file, shard)
        files |= dict.fromkeys(shard, file)
    size = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": files})


def _save_byt5(folder: Path, modules: Modules) -> None:
    """google/byt5-small without its weights: Glyph-SDXL-v2's file holds the whole encoder."""
    config = modules.glyph_encoder.config.to_diff_dict() | {"vocab_size": 384, "is_encoder_decoder": True}
    config |= {"architectures": ["T5ForConditionalGeneration"], "tokenizer_class": "ByT5Tokenizer"}
    _write_json(folder / "config.json", config)
    added = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False, "__type": "AddedToken"}
    special = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    extra = {"extra_ids": 125, "additional_special_tokens": [f"<extra_id_{i}>" for i in range(125)]}
    tokens = {name: {"content": token} | added for name, token in special.items()}
    _write_json(folder / "tokenizer_config.json", tokens | extra | {"tokenizer_class": "ByT5Tokenizer"})
    _write_json(
        folder / "special_tokens_map.json", special | {"additional_special_tokens": extra["additional_special_tokens"]}
    )


def _save_glyphs(folder: Path, modules: Modules, dtype: torch.dtype) -> None:
    _write_json(folder / "assets" / "color_idx.json", modules.colors)
    _write_json(folder / "assets" / "multilingual_10-lang_idx.json", modules.fonts)
    stack = _weights(modules.glyph_encoder.encoder, dtype)
    weights = {f"module.text_tower.encoder.{name}": tensor for name, tensor in stack.items()}
    (folder / "checkpoints").mkdir(parents=True)
    torch.save({"state_dict": weights}, folder / "checkpoints" / "byt5_model.pt")


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
    with _new_folder(Path(folder)) as root:
        transformer = modules.transformers[parsed.name]
        for part, module in (("transformer", transformer), ("vae", modules.vae)):
            _write_json(root / part / "config.json", {"_class_name": _DIFFUSERS[part]} | asdict(module.config))
            _save_tensors(root / part / "diffusion_pytorch_model.safetensors", _weights(module, dtype))
        scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=parsed.flow_shift)
        scheduler.save_pretrained(root / "scheduler")
        guider = {"_class_name": "ClassifierFreeGuidance", "enabled": True, "guidance_scale": parsed.guidance_scale}
        _write_json(root / "guider" / "guider_config.json", guider | {"start": 0.0, "stop": 1.0})
        _save_module(root / "text_encoder", modules.language_model, _weights(modules.language_model, dtype), "model")
        _save_tokenizer(modules.tokenizer, root / "tokenizer")
        _save_module(root / "text_encoder_2", modules.glyph_encoder, _weights(modules.glyph_encoder, dtype), "model")
        _save_tokenizer(modules.glyph_tokenizer, root / "tokenizer_2")
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
        _write_json(root / "model_index.json", {"_class_name": pipeline, **index})
    return Path(folder)


# --- files -----------------------------------------------------------------------------------------------------------


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside target that becomes target at the end, so that half a checkpoint never looks whole."""
    if target.exists():
        raise InputError(f"{target} exists already; remove it or name another folder")
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


def _save_sharded(folder: Path, stem: str, weights: Mapping[str, torch.Tensor], limit: int | None) -> None:
    """One file, or where that would pass the limit several and the index that lists them, as the hub names them."""
    shards: list[dict[str, torch.Tensor]] = [{}]
    for name, tensor in weights.items():
        if limit and shards[-1] and sum(x.nbytes for x in shards[-1].values()) + tensor.nbytes > limit:
            shards.append({})
        shards[-1][name] = tensor
    if len(shards) == 1:
        _save_tensors(folder / f"{stem}.safetensors", weights)
        return
    files: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        _save_tensors(folder / file, shard)
        files |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": sum(x.nbytes for x in weights.values())}, "weight_map": files}
    _write_json(folder / f"{stem}.safetensors.index.json", index)


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


def _save_tokenizer(tokenizer: Any, folder: Path, **options: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder, **options)


def _save_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors lets nobody but the owner read


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
