"""bench stage2: a transformer with random weights, or those of a file, on its device, and a guided step of it."""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hunyuan_staged import geometry, versions
from hunyuan_staged.errors import InputError
from hunyuan_staged.memory.operations import TEXT_TOKENS
from hunyuan_staged.options import needs_compiler

DEFAULT_GUIDANCE_SCALE = 6.0


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
class Run:
    """The run of which a step is timed: height and width in pixels. enlarges: where it is super resolution."""

    height: int
    width: int
    video_length: int
    guidance_scale: float
    enlarges: versions.SuperResolutionVersion | None = None

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """Of the latents."""
        return geometry.latent_shape(self.video_length, self.height, self.width, geometry.LATENT_CHANNELS)

    @property
    def branches(self) -> int:
        """Of guidance."""
        return 2 if self.guidance_scale != 1 else 1

    @property
    def sigmas(self) -> Any:
        """The schedule, [steps + 1]. One step of a one-step schedule is the whole work of any step of a base run."""
        from hunyuan_staged.sampling import schedule

        steps, shift = (self.enlarges.num_inference_steps, self.enlarges.flow_shift) if self.enlarges else (1, 1.0)
        return schedule.flow_sigmas(steps, shift)


def asked_run(args: argparse.Namespace) -> Run:
    """The run that args ask for; InputError where --super_resolution does not start from --resolution, or has a cache."""
    scale = args.guidance_scale
    if args.super_resolution is None:
        resolution = args.resolution or versions.DEFAULT_RESOLUTION
        size = geometry.size_for_ratio(resolution, args.aspect_ratio)
        return Run(*size, args.video_length, DEFAULT_GUIDANCE_SCALE if scale is None else scale)
    version = versions.super_resolution_version(args.super_resolution)
    if args.resolution not in (None, version.base):
        raise InputError(f"{args.resolution}: {version.name} enlarges {version.base}", option="resolution")
    if args.cache_type:
        raise InputError(f"{args.cache_type}: super resolution takes no cache", option="cache_type")
    base = geometry.size_for_ratio(version.base, args.aspect_ratio)
    size = geometry.enlarged_size(version.base, version.resolution, *base)
    return Run(*size, args.video_length, version.guidance_scale if scale is None else scale, version)


@dataclass(frozen=True)
class Setup:
    """A full-size transformer on its device, and how it runs there."""

    run: Run

    world: Any
    layout: Any
    model: Any
    attention: Any
    modulations: Any
    block_weights: Any
    offloaded: int
    blocks: Any
    weights_bytes: int
    compile: bool
    loading: dict[str, Any]

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
        return self.denoiser.forward(self.attention, self.run.shape[2:], layout, compile=self.compile)

    def reset_peak(self) -> None:
        import torch

        if self.cuda:
            torch.cuda.reset_peak_memory_stats()

    def peak_gib(self) -> float | None:
        import torch

        return round(torch.cuda.max_memory_allocated() / 2**30, 2) if self.cuda else None


def set_up(args: argparse.Namespace, world: Any) -> Setup:
    """What args ask for, built on this rank's device or read from a file; counting of its peak memory starts here."""
    import torch

    from hunyuan_staged.attention.choose import choose_attention
    from hunyuan_staged.memory import offloading
    from hunyuan_staged.parallel.layout import make_layout
    from hunyuan_staged.weights.quantization import fp8_matmul

    run = asked_run(args)
    device, dtype = world.device, torch.bfloat16
    layout = make_layout(world, run.branches, args.cfg_parallel)
    sage_blocks = versions.parse_block_range("--sage_blocks_range", args.sage_blocks_range)
    attention = choose_attention(args.attn_mode, device, dtype, sage_blocks)
    if args.fp8_matmul:
        if not args.weights_dtype:
            raise InputError("needs --weights_dtype fp8", option=fp8_matmul.OPTION)
        fp8_matmul.check(torch.cuda.get_device_capability(device) if device.type == "cuda" else None, dtype)
    model, table, blocks, loading = (_read if args.transformer else _draw)(args, run, world, dtype)
    if args.fp8_matmul:
        fp8_matmul.compute_in_float8(model.transformer_blocks)
    block_weights = offloading.weights_of(model, model.transformer_blocks, dtype)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return Setup(
        run,
        world,
        layout,
        model,
        attention,
        table,
        block_weights,
        _offloaded(args, block_weights.count),
        blocks,
        weights_bytes=torch.cuda.memory_allocated() if device.type == "cuda" else 0,
        compile=needs_compiler(args),
        loading=loading,
    )


def _offloaded(args: argparse.Namespace, blocks: int) -> int:
    return blocks if args.enable_offloading else args.offload_blocks or 0


Model = tuple[Any, Any, Any, dict[str, Any]]  # model, modulations, blocks where some are offloaded, about the loading


def _draw(args: argparse.Namespace, run: Run, world: Any, dtype: Any) -> Model:
    """Random weights."""
    from hunyuan_staged.memory import offloading
    from hunyuan_staged.models import modulations
    from hunyuan_staged.sampling import precompute
    from hunyuan_staged.weights.published import super_resolution_config
    from hunyuan_staged.weights.quantization import fp8_rows

    config = super_resolution_config(run.enlarges) if run.enlarges else {}
    model = random_model(config | ({"num_layers": args.layers} if args.layers else {}), world.device, dtype)
    table = modulations.hoist(model, precompute.step_times(run.sigmas, use_meanflow=model.config.use_meanflow))
    if args.weights_dtype == "fp8":
        fp8_rows.quantise_linears(model.transformer_blocks)
    offloaded = _offloaded(args, len(model.transformer_blocks))
    blocks = offloading.stream_blocks(model, world.device, offloaded, world=world) if offloaded else None
    return model, table, blocks, {}


def _read(args: argparse.Namespace, run: Run, world: Any, dtype: Any) -> Model:
    """The weights of a file, as stage 2 reads them; InputError where others were asked for besides."""
    import torch

    from hunyuan_staged.models.modulations import remove_linears
    from hunyuan_staged.pipeline.denoiser import Denoiser
    from hunyuan_staged.sampling.precompute import ModulationReader
    from hunyuan_staged.weights import components
    from hunyuan_staged.weights.single_file import guess_version, open_transformer

    if run.enlarges or args.layers:
        raise InputError("takes neither --super_resolution nor --layers", option="transformer")
    path, resolution = Path(args.transformer), args.resolution or versions.DEFAULT_RESOLUTION

    def choose(meanflow: bool) -> versions.Version:
        guessed = guess_version(path.name, meanflow=meanflow)
        return guessed or versions.make_version(resolution, "t2v", step_distilled=meanflow)

    started = time.perf_counter()
    opened = open_transformer(path, choose)
    version, device = opened.version.name, world.device
    skeleton = components.transformer_skeleton(opened, version, weights_dtype=args.weights_dtype)
    reader = ModulationReader(opened, version, skeleton, remove_linears(skeleton), device=device, dtype=dtype)
    denoiser = Denoiser.load(reader, run.sigmas, _offloaded(args, len(skeleton.transformer_blocks)), world)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
    return (
        denoiser.model,
        denoiser.modulations,
        denoiser.blocks,
        {
            "transformer": opened.describe(),
            "load_seconds": round(time.perf_counter() - started, 2),
            "load_peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if cuda else None,
        },
    )


class Step:
    """The first step of a run, from noise and a random prompt: called, it gives its seconds.

    It is the whole work of any step: every guidance branch, guidance, Euler.
    """

    def __init__(self, setup: Setup, forward: Any, layout: Any, enlarged: Any = None) -> None:
        """enlarged [1, 32, T, H, W]: of super resolution, the latents that it sees, zeros where not given."""
        import torch

        from hunyuan_staged.models.embeddings import Conditioning
        from hunyuan_staged.pipeline.denoiser import Inputs
        from hunyuan_staged.sampling import conditions

        self.setup, self.forward, self.layout = setup, forward, layout
        device, dtype = setup.world.device, torch.bfloat16
        generator = torch.Generator().manual_seed(1)
        text = torch.randn(1, TEXT_TOKENS, setup.model.config.text_embed_dim, generator=generator)
        empty = torch.zeros(1, 0, 0, device=device, dtype=dtype)
        branches = [Conditioning(text.to(device, dtype), empty, empty)] * setup.run.branches
        condition: Any
        noise, condition = conditions.noise_and_condition(setup.run.shape, 0, device=device, dtype=dtype)
        if setup.run.enlarges:
            enlarged = torch.zeros_like(noise) if enlarged is None else enlarged
            condition = conditions.LowResolutionCondition(condition, enlarged)
        self.inputs = Inputs(noise, condition, branches, setup.run.sigmas[:2], setup.run.guidance_scale)

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
