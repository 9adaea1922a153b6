"""A small VAE decoder of the real structure, and what it makes of drawn latents by tiles and by whole frames."""

import torch

from hunyuan_staged.decoding import frames, tiled, whole
from hunyuan_staged.decoding.frames import DecodeContext, FrameBatch
from hunyuan_staged.decoding.planning import Decoding
from hunyuan_staged.decoding.tiling import CHUNK_SIZES, Tiling
from hunyuan_staged.models.vae_modules import VaeConfig, VaeDecoder, VaeEncoder
from hunyuan_staged.parallel.world import World

ALONE = World(0, 1, torch.device("cpu"))


CONFIG = {
    "scaling_factor": 1.03682,
    "latent_channels": 32,
    "spatial_compression_ratio": 16,
    "temporal_compression_ratio": 4,
}


def tiny_decoder(seed: int = 0, layers: int = 0) -> torch.nn.Module:
    """A decoder of the real structure, with the fewest channels that it allows."""
    torch.manual_seed(seed)
    return VaeDecoder(VaeConfig(block_out_channels=(4, 4, 4, 8, 32), layers_per_block=layers)).requires_grad_(False)


def draw_latents(frames: int, height: int, width: int) -> torch.Tensor:
    return torch.randn(1, 32, frames, height, width, generator=torch.Generator().manual_seed(5))


def decode_tiles(
    decoder, latents, config, *, tile_size, tile_overlap, latent_frames_per_chunk=CHUNK_SIZES[0], **options
):
    return tiled.decode_frames(
        decoder,
        latents,
        config,
        Tiling(tile_size, tile_overlap, latent_frames_per_chunk),
        frames.DecodeContext(**options),
    )


def decoded(*args, **options) -> frames.FrameBatch:
    """All batches of decode_frames as one, its floats [1, 3, T, H, W]."""
    blocks = list(decode_tiles(*args, **options))
    floats = [block.floats for block in blocks if block.floats is not None]
    return frames.FrameBatch(
        torch.cat([block.frames for block in blocks]),
        torch.cat(floats).permute(3, 0, 1, 2)[None] if floats else None,
    )


def roughened(module: torch.nn.Module) -> torch.nn.Module:
    """The module with gammas and biases that are no ones and noughts."""
    for parameter in module.parameters():
        if parameter.ndim != 5:
            parameter.add_(torch.randn(parameter.shape) * 0.3)
    return module


def rough_decoder(layers: int = 1) -> torch.nn.Module:
    """A small decoder of the real structure."""
    return roughened(tiny_decoder(layers=layers))


def rough_encoder() -> torch.nn.Module:
    """A small encoder of the real structure."""
    torch.manual_seed(1)
    config = VaeConfig(block_out_channels=(4, 4, 8, 16, 64), layers_per_block=1)
    return roughened(VaeEncoder(config).requires_grad_(False))


def decode(
    latents, *, latent_frames_per_chunk=2, bands=1, frames_per_piece=None, world=ALONE, decoder=None, **options
) -> FrameBatch | None:
    """All batches as one; None on the other ranks."""
    how = Decoding(None, latent_frames_per_chunk, "", {}, bands, frames_per_piece)
    context = DecodeContext(world, as_float=True, **options)
    batches = list(whole.decode_whole(decoder or rough_decoder(), latents, CONFIG, how, context))
    if not batches:
        return None
    return FrameBatch(torch.cat([b.frames for b in batches]), torch.cat([b.floats for b in batches]))
