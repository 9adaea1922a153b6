"""The configs of the encoders, most as transformers' classes, built from the keys of the schema alone: what else a file
says, an attention implementation to be fetched and run, say, reaches nobody.
"""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from hunyuan_staged.errors import InputError
from hunyuan_staged.models.language import LanguageConfig
from hunyuan_staged.versions import SKIPPED_LAYERS
from hunyuan_staged.weights.key_maps import refuse_names
from hunyuan_staged.weights.schema import (
    GLYPH,
    IMAGE,
    IMAGE_PROCESSOR,
    LANGUAGE,
    ROPE_SCALING,
    VISION,
    picked,
    quoted,
    require_equal,
)

Config = Mapping[str, Any]  # what a config.json says


def language_config(content: Config, path: Path, skipped: int = SKIPPED_LAYERS) -> tuple[LanguageConfig, int]:
    """(the text config without the skipped layers, the number of layers left), from any form of config.json.

    path: where the content is from, for messages.
    """
    chosen, rope = _language_settings(content, path)
    kept = chosen["num_hidden_layers"] - skipped
    own = {field.name: chosen[field.name] for field in fields(LanguageConfig) if field.name in chosen}
    return LanguageConfig(**own | {"num_hidden_layers": kept, "rope_parameters": rope}), kept


def _language_settings(content: Config, path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the checked settings of the language model, those of its rotation)."""
    kind = content.get("model_type")
    if kind not in ("qwen2_5_vl", "qwen2_5_vl_text"):
        raise InputError(f"{path}: model_type is {quoted(kind)}; allowed are qwen2_5_vl and qwen2_5_vl_text")
    inner = content.get("text_config")
    if kind == "qwen2_5_vl" and isinstance(inner, dict):
        content = inner
    chosen = picked(content, LANGUAGE, path)
    needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    refuse_names(f"{path} lacks", [name for name in needed if name not in chosen])
    heads = chosen["num_attention_heads"]
    shared = chosen["num_key_value_heads"] = chosen.get("num_key_value_heads") or heads
    require_equal(
        path, f"hidden_size {chosen['hidden_size']} modulo {2 * heads}", chosen["hidden_size"] % (2 * heads), 0
    )
    require_equal(path, f"num_attention_heads {heads} modulo num_key_value_heads {shared}", heads % shared, 0)
    rope: dict[str, Any] = next(
        (content[name] for name in ("rope_parameters", "rope_scaling") if isinstance(content.get(name), dict)), {}
    )
    rope = picked(rope, ROPE_SCALING, f"{path}, rope_scaling")
    refuse_names(f"{path} lacks", [name for name in ("mrope_section",) if name not in rope])
    sections = rope["mrope_section"]
    require_equal(path, f"the sum of mrope_section {sections}", sum(sections), chosen["hidden_size"] // heads // 2)
    theta = rope.get("rope_theta", chosen.get("rope_theta", 1e6))
    return chosen, {"rope_type": "default", "mrope_section": sections, "rope_theta": theta}


def _whole_text_config(content: Config, path: Path) -> Any:
    """transformers' config of all layers of the language model."""
    from transformers import Qwen2_5_VLTextConfig

    chosen, rope = _language_settings(content, path)
    dropped = ("layer_types", "use_sliding_window", "rope_theta")
    return Qwen2_5_VLTextConfig(
        **{name: value for name, value in chosen.items() if name not in dropped},
        rope_parameters=rope,
        attn_implementation="sdpa",
        # The defaults would be warned of where the vocabulary is smaller.
        bos_token_id=None,
        eos_token_id=None,
    )


def whole_config(content: Config, path: Path, image_token: int) -> Any:
    """The config of the whole Qwen2.5-VL: all layers of the language model, and the vision tower.

    image_token: the id of the token that stands for a piece of an image.
    """
    from transformers import Qwen2_5_VLConfig

    inner = _whole_text_config(content, path)
    vision = content.get("vision_config")
    if not isinstance(vision, dict):
        raise InputError(f"{path} describes no vision tower (vision_config)")
    origin = f"{path}, vision_config"
    chosen = picked(vision, VISION, origin)
    needed = [name for name in VISION if name not in ("in_chans", "in_channels", "tokens_per_second", "hidden_act")]
    refuse_names(f"{origin} lacks", [name for name in needed if name not in chosen])
    width, heads = chosen["hidden_size"], chosen["num_heads"]
    require_equal(origin, f"hidden_size {width} modulo {4 * heads}", width % (4 * heads), 0)
    require_equal(origin, "out_hidden_size", chosen["out_hidden_size"], inner.hidden_size)
    unit = chosen["patch_size"] * chosen["spatial_merge_size"]
    require_equal(origin, f"window_size {chosen['window_size']} modulo {unit}", chosen["window_size"] % unit, 0)
    whole: Any = Qwen2_5_VLConfig(
        text_config=inner.to_dict(), vision_config=chosen, image_token_id=image_token, tie_word_embeddings=False
    )
    for part in (whole, whole.text_config, whole.vision_config):
        part._attn_implementation = "sdpa"
    return whole


def glyph_config(content: Config, path: Path) -> Any:
    from transformers import T5Config

    if content.get("model_type") != "t5":
        raise InputError(f"{path}: model_type is {quoted(content.get('model_type'))}; allowed is t5")
    chosen = picked(content, GLYPH, path)
    needed = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads", "feed_forward_proj")
    refuse_names(f"{path} lacks", [name for name in needed if name not in chosen])
    return T5Config(**chosen)


def image_config(content: Config, path: Path) -> Any:
    from transformers import SiglipVisionConfig

    kind = content.get("model_type")
    if kind not in ("siglip_vision_model", "siglip"):
        raise InputError(f"{path}: model_type is {quoted(kind)}; allowed are siglip_vision_model and siglip")
    inner = content.get("vision_config")
    chosen = picked(inner if kind == "siglip" and isinstance(inner, dict) else content, IMAGE, path)
    needed = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "image_size",
        "patch_size",
    )
    refuse_names(f"{path} lacks", [name for name in needed if name not in chosen])
    width, heads = chosen["hidden_size"], chosen["num_attention_heads"]
    require_equal(path, f"hidden_size {width} modulo num_attention_heads {heads}", width % heads, 0)
    if chosen["patch_size"] > chosen["image_size"]:
        raise InputError(
            f"{path}: patch_size is {chosen['patch_size']}; allowed is at most image_size {chosen['image_size']}"
        )
    return SiglipVisionConfig(**chosen, attn_implementation="sdpa")


def image_processor_config(content: Config, path: Path, side: int) -> dict[str, Any]:
    """The arguments of SigLIP's image processor; InputError where its pictures are not of the encoder's side (px)."""
    chosen = picked(content, IMAGE_PROCESSOR, path)
    refuse_names(f"{path} lacks", [name for name in ("size", "image_mean", "image_std") if name not in chosen])
    require_equal(path, "size", chosen["size"], {"height": side, "width": side})
    return chosen
