"""A run in small, before there is anything to compute: what its first step would compile, choose or import is there then.

Nothing else comes of it, and no other rank takes part.
"""

import copy
from collections import deque
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from hunyuan_staged.decoding import whole
from hunyuan_staged.decoding.frames import DecodeContext
from hunyuan_staged.decoding.planning import Decoding
from hunyuan_staged.models.modulations import Modulations
from hunyuan_staged.parallel.layout import LoneShare, plan_layout
from hunyuan_staged.parallel.world import World
from hunyuan_staged.pipeline.decoding import DecodeSetup
from hunyuan_staged.pipeline.denoiser import Denoiser
from hunyuan_staged.pipeline.denoising import DenoiseSetup
from hunyuan_staged.pipeline.loaded_decoder import LoadedDecoder
from hunyuan_staged.pipeline.settings import resolve_attention
from hunyuan_staged.sampling.guidance import guidance_branches
from hunyuan_staged.sampling.precompute import step_times
from hunyuan_staged.weights.quantization.stored import KEPT

SIDE = 8  # of decoded latents


def one_block(setup: DenoiseSetup) -> Any:
    """A copy of a setup's transformer, which is still on the meta device, with its first block alone, on the run's device.

    Its weights are whatever the memory holds. To a compiler it is the same model: it looks at shapes and dtypes.
    """
    blocks = setup.skeleton.transformer_blocks
    setup.skeleton.transformer_blocks = nn.ModuleList(blocks[:1])
    try:
        model = copy.deepcopy(setup.skeleton)
    finally:
        setup.skeleton.transformer_blocks = blocks
    for name, tensor in model.state_dict().items():
        path, _, leaf = name.rpartition(".")
        dtype = tensor.dtype if tensor.dtype in KEPT else setup.dtype
        empty = torch.empty(tensor.shape, dtype=dtype, device=setup.world.device)
        setattr(model.get_submodule(path), leaf, nn.Parameter(empty, requires_grad=False))
    return model.eval()


def with_kernels(setup: DenoiseSetup) -> DenoiseSetup:
    """A setup that was planned as for an assumed card, with the attention of this device, whose kernels are tried."""
    options = replace(setup.options, assume_gpu=None)
    model = setup.weights.count, setup.skeleton.config.attention_head_dim
    attention, by_step = resolve_attention(options, setup.settings, model, setup.world.device, setup.dtype)
    return replace(setup, options=options, attention=attention, by_step=by_step)


@torch.no_grad()
def rehearse_denoising(setup: DenoiseSetup, model: Any) -> None:
    """One forward of a setup, through the one block of a model."""
    settings, world, config = setup.settings, setup.world, model.config
    branches, shards = plan_layout(world.size, settings.branches, setup.cfg_parallel)
    layout = LoneShare(branches, shards, *divmod(world.rank, shards))
    times = step_times(setup.sigmas, use_meanflow=config.use_meanflow)[:1]
    width = config.num_attention_heads * config.attention_head_dim
    modulations = Modulations(times, [torch.zeros(1, width, device=world.device, dtype=setup.dtype)], 1)
    modulations.table.zero_()
    modulations.missing.clear()
    forward = Denoiser(model, modulations).forward(
        setup.attention_at(0), setup.shape[2:], layout, compile=setup.compiled
    )
    inputs = torch.zeros(1, config.in_channels, *setup.shape[2:], device=world.device, dtype=setup.dtype)
    (prompt,) = guidance_branches(setup.job.embeddings, 1.0, device=world.device, dtype=setup.dtype)
    (now, following), *_ = times
    forward(inputs, torch.tensor([now]), prompt, None if following is None else torch.tensor([following]))


def rehearse_decoding(setup: DecodeSetup, plan: Decoding, decoders: LoadedDecoder) -> None:
    """Decode small frames in three chunks, the first, one between and the last: kernels do not depend on the size."""
    decoder, config = setup.load(decoders)
    latents = torch.zeros(1, setup.job.latents.shape[1], 2 * plan.latent_frames_per_chunk + 1, SIDE, SIDE)
    alone = DecodeContext(World(0, 1, setup.world.device))
    small = replace(plan, tile_size=None, bands=1)
    deque(whole.decode_whole(decoder, latents, config, small, alone), maxlen=0)
