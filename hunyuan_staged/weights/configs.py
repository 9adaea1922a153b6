"""The configs of the transformer and the VAE: checked, and official ones as diffusers' arguments."""

from collections import ChainMap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hunyuan_staged.attention import ssta
from hunyuan_staged.errors import InputError
from hunyuan_staged.geometry import BUCKET_BASE, LATENT_CHANNELS
from hunyuan_staged.weights.key_maps import refuse_names
from hunyuan_staged.weights.schema import (
    DIFFUSERS_TRANSFORMER,
    DIFFUSERS_VAE,
    OFFICIAL_TRANSFORMER,
    OFFICIAL_VAE,
    check,
    quoted,
    require_equal,
    require_rope,
)

_OFFICIAL_TRANSFORMER = {
    "heads_num": "num_attention_heads",
    "mm_double_blocks_depth": "num_layers",
    "mlp_width_ratio": "mlp_ratio",
    "text_states_dim": "text_embed_dim",
    "vision_states_dim": "image_embed_dim",
    "out_channels": "out_channels",
}
# What all published transformers have in common, and the only value that this suite runs; absent means this value.
_ONLY = {
    "mm_single_blocks_depth": 0,
    "guidance_embed": False,
    "is_reshape_temporal_channels": False,
}
# Those of the official class, for keys that a config lacks.
_DEFAULTS = {"use_meanflow": False, "rope_theta": 256, "rope_dim_list": [16, 56, 56], "ideal_task": None}
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


def renamed_keys(config: Mapping[str, Any], names: Mapping[str, str], origin: str | Path) -> dict[str, Any]:
    refuse_names(f"{origin} lacks", [name for name in names if name not in config])
    return {ours: config[official] for official, ours in names.items()}


def official_transformer_config(
    given: dict[str, Any], glyph_width: int, origin: str | Path = "the transformer's config"
) -> dict[str, Any]:
    """diffusers' arguments from an official transformer config; the glyph encoder's width is not in it, so it is given.

    Raises InputError for a key that is missing, for what no published version has and this suite does not run (_ONLY),
    and for an ideal_resolution that is unknown.
    """
    config = ChainMap(given, _DEFAULTS)
    for name, allowed in _ONLY.items():
        if config.get(name, allowed) != allowed:
            raise InputError(f"{origin}: {name} is {quoted(config[name])}; this suite runs {name} = {allowed!r} only")
    check(config, OFFICIAL_TRANSFORMER, origin)
    arguments = renamed_keys(config, _OFFICIAL_TRANSFORMER, origin)
    needed = ("in_channels", "hidden_size", "patch_size", "ideal_resolution")
    refuse_names(f"{origin} lacks", [name for name in needed if name not in config])
    resolution = config["ideal_resolution"]
    if not isinstance(resolution, str) or resolution not in BUCKET_BASE:
        raise InputError(f"{origin}: ideal_resolution is {quoted(resolution)}; known: {', '.join(BUCKET_BASE)}")
    refuse_other_ssta(config.get("attn_param"), origin)
    patch, heads = config["patch_size"], config["heads_num"]
    require_equal(
        origin, f"hidden_size {config['hidden_size']} modulo heads_num {heads}", config["hidden_size"] % heads, 0
    )
    require_rope(origin, "rope_dim_list", config["rope_dim_list"], config["hidden_size"] // heads)
    return {
        **arguments,
        "in_channels": _input_channels(config, origin),
        "attention_head_dim": config["hidden_size"] // heads,
        "patch_size_t": patch[0],
        "patch_size": patch[1],
        "rope_axes_dim": tuple(config["rope_dim_list"]),
        "rope_theta": config["rope_theta"],
        "use_meanflow": bool(config["use_meanflow"]),
        "text_embed_2_dim": glyph_width,
        "target_size": BUCKET_BASE[resolution],
        "task_type": config["ideal_task"],  # none for super resolution, which serves every task
    }


def refuse_other_ssta(given: Any, origin: object) -> None:
    """InputError where a config's attn_param, null in the published ones, asks for another sparse attention than ours."""
    ours = {
        "tile_size": list(ssta.TILE),
        "win_size": [list(ssta.WINDOW)],
        "ssta_topk": ssta.TOP_K,
        "ssta_lambda": ssta.SIMILARITY_WEIGHT,
    }
    if given is None:
        return
    if not isinstance(given, dict):
        raise InputError(f"{origin}: attn_param is {quoted(given)}; allowed is an object, or null")
    for name, value in given.items():
        same = name in ours and value in (ours[name], list(ssta.WINDOW) if name == "win_size" else ours[name])
        if not same:
            allowed = quoted(ours[name]) if name in ours else ", ".join(ours)
            raise InputError(f"{origin}: attn_param's {quoted(name)} is {quoted(value)}; allowed is {allowed}")


def _input_channels(config: Mapping[str, Any], origin: str | Path) -> int:
    """How many channels an official transformer takes; InputError where they are of no transformer that this suite runs.

    With concat_condition there are condition latents and a mask beside the in_channels. Super resolution has none of it
    and counts all its channels: latents, the image's latents and mask, the low-resolution latents and mask.
    """
    latents = config["out_channels"]
    concat = config.get("concat_condition", True)
    channels = 2 * config["in_channels"] + 1 if concat else config["in_channels"]
    if channels not in _inputs(latents):
        raise InputError(
            f"{origin}: in_channels {config['in_channels']} with concat_condition {concat} is an input of {channels} "
            f"channels; this suite runs {2 * latents + 1} and {3 * latents + 2} only"
        )
    return channels


def _inputs(latents: int) -> tuple[int, int]:
    """How many channels a transformer takes: of the base model, and of super resolution."""
    return 2 * latents + 1, 3 * latents + 2


def diffusers_transformer_config(config: Mapping[str, Any], origin: object) -> dict[str, Any]:
    """diffusers' arguments from its own transformer config; what a config lacks is the class's default."""
    check(config, DIFFUSERS_TRANSFORMER, origin)
    heads = config.get("attention_head_dim", 128)
    require_rope(origin, "rope_axes_dim", config.get("rope_axes_dim", (16, 56, 56)), heads)
    latents = config.get("out_channels", LATENT_CHANNELS)
    allowed = _inputs(latents)
    if config.get("in_channels", allowed[0]) not in allowed:
        raise InputError(f"{origin}: in_channels is {config['in_channels']}; allowed are {allowed[0]} and {allowed[1]}")
    return without_bookkeeping(config)


def diffusers_vae_config(config: Mapping[str, Any], origin: object) -> dict[str, Any]:
    """diffusers' arguments from its own VAE config; InputError for a key that is missing."""
    refuse_names(f"{origin} lacks", [name for name in DIFFUSERS_VAE if name not in config])
    check(config, DIFFUSERS_VAE, origin)
    return without_bookkeeping(config)


def official_vae_config(config: Mapping[str, Any], origin: str | Path = "the VAE's config") -> dict[str, Any]:
    """diffusers' arguments from an official VAE config.

    Raises InputError for a key that is missing, and for a shift of the latents, which no published VAE has.
    """
    if config.get("shift_factor"):
        raise InputError(f"{origin}: shift_factor is {quoted(config['shift_factor'])}; this suite runs none")
    check(config, OFFICIAL_VAE, origin)
    return renamed_keys(config, _OFFICIAL_VAE, origin)


def without_bookkeeping(config: Mapping[str, Any]) -> dict[str, Any]:
    """A diffusers config without the bookkeeping that from_config would drop."""
    return {name: value for name, value in config.items() if not name.startswith("_")}
