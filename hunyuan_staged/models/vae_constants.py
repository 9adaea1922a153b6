"""Numbers of the VAE that its plan needs, too. Knows no torch."""

from collections.abc import Mapping
from typing import Any

SCORES_AT_ONCE = 2**27  # of the mid block's attention
# Of the published VAE, where a config does not say.
VAE_CHANNELS = (128, 256, 512, 1024, 1024)
VAE_LAYERS = 2
# Its config, under diffusers' names. Source: tencent/HunyuanVideo-1.5, vae/config.json.
PUBLISHED_VAE = {
    "latent_channels": 32,
    "block_out_channels": VAE_CHANNELS,
    "layers_per_block": VAE_LAYERS,
    "spatial_compression_ratio": 16,
    "temporal_compression_ratio": 4,
    "scaling_factor": 1.03682,
}


def level_widths(config: Mapping[str, Any]) -> list[int]:
    """The channels of a VAE's levels, the encoder's first one first; the published ones where its config does not say."""
    return list(config.get("block_out_channels") or VAE_CHANNELS)


def is_published(config: Mapping[str, Any]) -> bool:
    """Whether a VAE is as wide as the published one, whose times were measured."""
    return level_widths(config) == list(VAE_CHANNELS)
