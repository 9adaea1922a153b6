"""Numbers of the VAE that its plan needs, too. Knows no torch."""

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
