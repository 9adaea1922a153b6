"""A tiny HunyuanVideo-1.5 checkpoint of every part, with random weights: every stage runs end to end in seconds.

The trained demo checkpoint is built by the same functions, in other sizes. Same seed and sizes, same bytes.
"""

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hunyuan_staged.demo.checkpoint_writer import AnyVersion, Modules, any_version, save_diffusers, save_official
from hunyuan_staged.encoders.text import SYSTEM_PROMPT
from hunyuan_staged.errors import InputError
from hunyuan_staged.geometry import BUCKET_BASE
from hunyuan_staged.models.upsampler import build_upsampler
from hunyuan_staged.versions import SuperResolutionVersion, TransformerVersion

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
    """How large each part is. embeddings: of the language model; None: as many as tokens. Heads are heads x head_dim wide;
    the default draws tens of megabytes and runs in seconds.

    Most of the transformer's bytes are its glyph projection, which the architecture fixes at 2048 wide.
    """

    vocab: int = 512
    embeddings: int | None = None
    text_width: int = 64
    text_layers: int = 4
    text_heads: int = 4
    text_kv_heads: int = 2
    text_mlp: int = 128
    glyph_width: int = 64
    glyph_layers: int = 2
    glyph_heads: int = 4
    glyph_head_dim: int = 16
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


def draw_checkpoint(
    folder: str | Path,
    seed: int = 0,
    sizes: Sizes = TINY,
    layout: str = "official",
    versions: Sequence[str] = DEMO_VERSIONS,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a checkpoint of random weights and return its folder; the diffusers layout holds the first version only.

    Raises InputError for an unknown layout or version, and where something is in the folder already.
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
            colors=dict(COLORS),
            fonts=dict(FONTS),
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
        "vocab_size": sizes.embeddings or -(-len(tokenizer) // 64) * 64,
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
        "d_kv": sizes.glyph_head_dim,
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


def build_transformer(sizes: Sizes, version: AnyVersion) -> Any:
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
