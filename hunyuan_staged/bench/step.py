"""bench stage2: a transformer with random weights on its device, and a guided step of it."""

import argparse
import time
from dataclasses import dataclass
from typing import Any

from hunyuan_staged import geometry, versions
from hunyuan_staged.memory.operations import TEXT_TOKENS


def random_model(config: dict[str, Any], device: Any, dtype: Any) -> Any:
    """A transformer with random weights, built in its dtype on the device, never on the host."""
    import torch

    from hunyuan_staged.models.modules import TransformerConfig, TransformerModules

    with torch.device("meta"):
        model = TransformerModules(TransformerConfig(**config))
    model = model.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for name, tensor in model.state_dict().items():
        fan = tensor[0].numel() if tensor.ndim > 1 else 64
        tensor.normal_(0, 0.7 / fan**0.5, generator=generator)
        if tensor.ndim == 1 and "norm" in name and name.endswith("weight"):
            tensor.add_(1.0)
    return model


@dataclass(frozen=True)
class Setup:
    """A full-size transformer on its device, and how it runs there; shape: of the latents; branches: of guidance."""

    world: Any
    layout: Any
    model: Any
    attention: Any
    modulations: Any
    block_weights: Any
    offloaded: int
    blocks: Any
    weights_bytes: int
    shape: tuple[int, int, int, int, int]
    branches: int
    compile: bool

    @property
    def cuda(self) -> bool:
        return self.world.device.type == "cuda"

    @property
    def inner(self) -> int:
        return self.model.config.num_attention_heads * self.model.config.attention_head_dim

    @property
    def denoiser(self) -> Any:
        """The model as stage 2 runs it."""
        from hunyuan_staged.pipeline.denoiser import Denoiser

        return Denoiser(self.model, self.modulations, self.blocks)

    def forward(self, layout: Any) -> Any:
        """The transformer's forward pass in this layout."""
        return self.denoiser.forward(self.attention, self.shape[2:], layout, compile=self.compile)

    def reset_peak(self) -> None:
        import torch

        if self.cuda:
            torch.cuda.reset_peak_memory_stats()

    def peak_gib(self) -> float | None:
        import torch

        return round(torch.cuda.max_memory_allocated() / 2**30, 2) if self.cuda else None


def set_up(args: argparse.Namespace, world: Any) -> Setup:
    """What args ask for, built on this rank's device; counting of its peak memory starts here."""
    import torch

    from hunyuan_staged.attention.choose import choose_attention
    from hunyuan_staged.memory import offloading
    from hunyuan_staged.models import modulations
    from hunyuan_staged.parallel.layout import make_layout
    from hunyuan_staged.sampling import precompute, schedule
    from hunyuan_staged.weights.quantization import fp8_rows

    device, dtype = world.device, torch.bfloat16
    height, width = geometry.size_for_ratio(args.resolution, args.aspect_ratio)
    branches = 2 if args.guidance_scale != 1 else 1
    layout = make_layout(world, branches, args.cfg_parallel)
    sage_blocks = versions.parse_block_range("--sage_blocks_range", args.sage_blocks_range)
    attention = choose_attention(args.attn_mode, device, dtype, sage_blocks)
    model = random_model({"num_layers": args.layers} if args.layers else {}, device, dtype)
    table = modulations.hoist(model, precompute.step_times(schedule.flow_sigmas(1, 1.0)))
    if args.weights_dtype == "fp8":
        fp8_rows.quantise_linears(model.transformer_blocks)
    block_weights = offloading.weights_of(model, model.transformer_blocks, dtype)
    offloaded = block_weights.count if args.enable_offloading else args.offload_blocks or 0
    blocks = offloading.stream_blocks(model, device, offloaded, world=world) if offloaded else None
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return Setup(
        world,
        layout,
        model,
        attention,
        table,
        block_weights,
        offloaded,
        blocks,
        weights_bytes=torch.cuda.memory_allocated() if device.type == "cuda" else 0,
        shape=geometry.latent_shape(args.video_length, height, width, 32),
        branches=branches,
        compile=not args.no_compile,
    )


class Step:
    """A guided step of denoising, from noise and a random prompt: called, it gives its seconds.

    One step of a one-step schedule is the whole work of any step: every guidance branch, guidance, Euler.
    """

    def __init__(self, setup: Setup, scale: float, forward: Any, layout: Any) -> None:
        import torch

        from hunyuan_staged.models.embeddings import Conditioning
        from hunyuan_staged.pipeline.denoiser import Inputs
        from hunyuan_staged.sampling import conditions, schedule

        self.setup, self.forward, self.layout = setup, forward, layout
        device, dtype = setup.world.device, torch.bfloat16
        generator = torch.Generator().manual_seed(1)
        text = torch.randn(1, TEXT_TOKENS, setup.model.config.text_embed_dim, generator=generator)
        empty = torch.zeros(1, 0, 0, device=device, dtype=dtype)
        branches = [Conditioning(text.to(device, dtype), empty, empty)] * setup.branches
        noise, condition = conditions.noise_and_condition(setup.shape, 0, device=device, dtype=dtype)
        self.inputs = Inputs(noise, condition, branches, schedule.flow_sigmas(1, 1.0), scale)

    def latents(self, cache: Any = None) -> Any:
        """The latents after the step, where given with a feature cache."""
        return self.setup.denoiser.denoise(self.forward, self.inputs, self.layout, cache)

    def __call__(self, cache: Any = None) -> float:
        import torch

        started = time.perf_counter()
        self.latents(cache)
        if self.setup.cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - started
