"""Operations of a step and of decoding, and the peaks of GPUs."""

from typing import Any

# The practical peak of one H100 in dense bf16 products (measured: 8192^3 at about 790 TFLOP/s).
PEAK_TFLOPS = 790.0
TEXT_TOKENS = 256  # language tokens of a long prompt; the glyph and image rows are empty


def attention_flops(tokens: int, heads: float, width: int) -> float:
    """Multiply-adds of one attention over `tokens`, counted twice: 4 * N^2 * H * D."""
    return 4.0 * tokens**2 * heads * width


def linear_flops(video_tokens: int, text_tokens: int, inner: int, mlp_ratio: float) -> float:
    """Of one double-stream block: q, k, v, out and both feed-forward products, 2 * N * (4 + 2 * ratio) * C^2."""
    return 2.0 * (video_tokens + text_tokens) * (4 + 2 * mlp_ratio) * inner**2


def step_flops(
    video_tokens: int,
    text_tokens: int,
    *,
    layers: int,
    heads: int,
    width: int,
    mlp_ratio: float,
    shards: int = 1,
    attended: float = 1.0,
) -> float:
    """Of one forward through all blocks, on the process that has most of it.

    Attention is split by heads, and what is left of them by queries, but for sparse attention; what else there is by
    tokens; the text is on every process.

    Args:
        width: of a head.
        shards: that the tokens are split over.
        attended: the share of all keys that a query attends to.
    """
    share = heads / shards if attended == 1.0 else -(-heads // shards)
    attention = attended * attention_flops(video_tokens + text_tokens, share, width)
    return layers * (attention + linear_flops(-(-video_tokens // shards), text_tokens, heads * width, mlp_ratio))


def decoder_flops(config: dict[str, Any], latent_frames: int, height: int, width: int) -> float:
    """Of the VAE decoder's convolutions for latents of t x h x w: 2 * 27 * C * C' for each position of the product."""
    channels = list(config["block_out_channels"])[::-1]
    frames, positions = latent_frames, height * width
    spatial, temporal = config["spatial_compression_ratio"], config["temporal_compression_ratio"]
    total = (config["latent_channels"] + 4 * channels[0]) * channels[0] * frames * positions  # conv_in, the mid block
    for level, width_here in enumerate(channels):
        total += 2 * (config["layers_per_block"] + 1) * width_here**2 * frames * positions
        if 2**level < spatial:
            longer = 2 if 2**level < temporal else 1
            total += width_here * channels[level + 1] * 4 * longer * frames * positions
            frames, positions = (frames - 1) * longer + 1, positions * 4
    return 2.0 * 27 * (total + channels[-1] * config["out_channels"] * frames * positions)


def encoder_flops(config: dict[str, Any], frames: int, height: int, width: int) -> float:
    """Of the VAE encoder's convolutions for a video of T x H x W px, as decoder_flops."""
    channels, layers = list(config["block_out_channels"]), config["layers_per_block"]
    spatial, temporal = config["spatial_compression_ratio"], config["temporal_compression_ratio"]
    positions = height * width
    total = config["in_channels"] * channels[0] * frames * positions
    for level, width_here in enumerate(channels):
        total += 2 * layers * width_here**2 * frames * positions
        if 2**level < spatial:
            shorter = 2 if 2**level >= spatial // temporal else 1
            total += width_here * channels[level + 1] // (4 * shorter) * frames * positions
            frames, positions = (frames - 1) // shorter + 1, positions // 4
    # The mid block, conv_out.
    total += (4 * channels[-1] + 2 * config["latent_channels"]) * channels[-1] * frames * positions
    return 2.0 * 27 * total
