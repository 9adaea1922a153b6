"""The configs of a model's parts: official ones to diffusers' arguments."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from hunyuan_staged.errors import InputError
from hunyuan_staged.geometry import BUCKET_BASE
from hunyuan_staged.versions import SKIPPED_LAYERS
from hunyuan_staged.weights.key_maps import refuse_names


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist") from error
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a JSON {type(content).__name__}, not an object")
    return content


# What Python and torch raise over arguments that make no module.
_UNBUILDABLE = (ArithmeticError, AttributeError, AssertionError, LookupError, RuntimeError, TypeError, ValueError)


@contextlib.contextmanager
def describing(origin: Path) -> Iterator[None]:
    """InputError where what `origin` says, a config, makes no model."""
    try:
        yield
    except InputError:
        raise
    except _UNBUILDABLE as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(f"{origin} does not describe a model that this suite can build ({reason})") from error


def on_meta(build: Callable[[], Any], origin: Path) -> Any:
    """A module that has shapes but no memory yet; origin: the config that it is built from."""
    with describing(origin), torch.device("meta"):
        return build()


_OFFICIAL_TRANSFORMER = {
    "heads_num": "num_attention_heads",
    "mm_double_blocks_depth": "num_layers",
    "mlp_width_ratio": "mlp_ratio",
    "rope_theta": "rope_theta",
    "text_states_dim": "text_embed_dim",
    "vision_states_dim": "image_embed_dim",
    "use_meanflow": "use_meanflow",
    "out_channels": "out_channels",
}
# What all published transformers have in common, and the only value that this suite runs; absent means this value.
_ONLY = {
    "mm_single_blocks_depth": 0,
    "guidance_embed": False,
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
VAE_NUMBERS = ("scaling_factor", "latent_channels", "spatial_compression_ratio", "temporal_compression_ratio")


def renamed_keys(config: Mapping[str, Any], names: Mapping[str, str], origin: str | Path) -> dict[str, Any]:
    refuse_names(f"{origin} lacks", [name for name in names if name not in config])
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
    arguments = renamed_keys(config, _OFFICIAL_TRANSFORMER, origin)
    needed = ("in_channels", "hidden_size", "patch_size", "rope_dim_list", "ideal_resolution")
    refuse_names(f"{origin} lacks", [name for name in needed if name not in config])
    resolution = config["ideal_resolution"]
    if resolution not in BUCKET_BASE:
        raise InputError(f"{origin}: ideal_resolution is {resolution!r}; known: {', '.join(BUCKET_BASE)}")
    patch = config["patch_size"]
    return {
        **arguments,
        "in_channels": _input_channels(config, origin),
        "attention_head_dim": config["hidden_size"] // config["heads_num"],
        "patch_size_t": patch[0],
        "patch_size": patch[1],
        "rope_axes_dim": tuple(config["rope_dim_list"]),
        "text_embed_2_dim": glyph_width,
        "target_size": BUCKET_BASE[resolution],
        "task_type": config.get("ideal_task"),  # none for super resolution, which serves every task
    }


def _input_channels(config: Mapping[str, Any], origin: str | Path) -> int:
    """How many channels an official transformer takes; InputError where they are of no transformer that this suite runs.

    With concat_condition there are condition latents and a mask beside the in_channels. Super resolution has none of it
    and counts all its channels: latents, the image's latents and mask, the low-resolution latents and mask.
    """
    latents = config["out_channels"]
    concat = config.get("concat_condition", True)
    channels = 2 * config["in_channels"] + 1 if concat else config["in_channels"]
    if channels not in (2 * latents + 1, 3 * latents + 2):
        raise InputError(
            f"{origin}: in_channels {config['in_channels']} with concat_condition {concat} is an input of {channels} "
            f"channels; this suite runs {2 * latents + 1} and {3 * latents + 2} only"
        )
    return channels


def official_vae_config(config: Mapping[str, Any], origin: str | Path = "the VAE's config") -> dict[str, Any]:
    """diffusers' arguments from an official VAE config.

    Raises InputError for a key that is missing, and for a shift of the latents, which no published VAE has.
    """
    if config.get("shift_factor"):
        raise InputError(f"{origin}: shift_factor is {config['shift_factor']!r}; this suite runs none")
    return renamed_keys(config, _OFFICIAL_VAE, origin)


def without_bookkeeping(config: Mapping[str, Any]) -> dict[str, Any]:
    """A diffusers config without the bookkeeping that from_config would drop."""
    return {name: value for name, value in config.items() if not name.startswith("_")}


def language_config(path: Path) -> tuple[Any, int]:
    """(the text config without the skipped layers, the number of layers left), from any form of config.json."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLTextConfig

    content = read_json(path)
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


def glyph_config(path: Path) -> Any:
    from transformers import T5Config

    content = read_json(path)
    if content.get("model_type") != "t5":
        raise InputError(f"{path}: model_type is {content.get('model_type')!r}; allowed is t5")
    return T5Config.from_dict(content)
