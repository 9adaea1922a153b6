"""What stage 2 does: text embeddings → video latents, by the denoising transformer.

    job = jobs.read(options)
    setup = denoising.resolve(options, job, world)
    denoiser = setup.load(setup.plan(free_memory(world)))
    result = denoiser.run(setup)

A Denoiser takes any number of setups of one model, one after the other.
"""

import os
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, TypeVar

import torch

from hunyuan_staged import geometry, versions
from hunyuan_staged.attention import modes
from hunyuan_staged.attention.by_step import AttentionByStep
from hunyuan_staged.attention.choose import AttentionMode
from hunyuan_staged.files import contract
from hunyuan_staged.memory import budget, estimates
from hunyuan_staged.memory.budget import BlockWeights, FreeMemory
from hunyuan_staged.memory.offloading import weights_of, widened_bytes
from hunyuan_staged.models.modulations import table_bytes
from hunyuan_staged.options import DEFAULT_CFG_PARALLEL, DenoiseOptions, needs_compiler, offload_asked
from hunyuan_staged.parallel.heads import HeadSplit, split_heads
from hunyuan_staged.parallel.layout import Layout, make_layout, plan_layout
from hunyuan_staged.parallel.world import World
from hunyuan_staged.pipeline import settings as resolving
from hunyuan_staged.pipeline.choices import remedies
from hunyuan_staged.pipeline.common import torch_dtype
from hunyuan_staged.pipeline.denoiser import Denoiser
from hunyuan_staged.pipeline.jobs import DenoiseJob
from hunyuan_staged.pipeline.settings import Settings
from hunyuan_staged.pipeline.transformers import choose_transformer, planned_skeleton
from hunyuan_staged.runtime.progress import SILENT, Reporter
from hunyuan_staged.sampling import conditions, schedule
from hunyuan_staged.sampling.cache_settings import CacheSettings
from hunyuan_staged.sampling.guidance import guidance_branches
from hunyuan_staged.sampling.guidance_plan import GuidancePlan
from hunyuan_staged.sampling.precompute import ModulationReader
from hunyuan_staged.weights import components, lora
from hunyuan_staged.weights.folder import ModelFolder
from hunyuan_staged.weights.single_file import TransformerFile

Setup = TypeVar("Setup", bound="DenoiseSetup")


@dataclass(frozen=True)
class DenoiseSetup:
    """A denoising whose options, embeddings and model have been brought together.

    skeleton: the transformer on the meta device. linears: what was taken out of it, for `modulations`. shape: of the
    latents. text_tokens: of the longer guidance branch. guidance: where not every step runs both branches. by_step: where
    the steps run different attention.
    """

    options: DenoiseOptions
    job: DenoiseJob
    world: World
    folder: ModelFolder
    model_path: str
    settings: Settings
    dtype: torch.dtype
    attention: AttentionMode
    skeleton: Any
    linears: dict[str, torch.Size]
    shape: tuple[int, int, int, int, int]
    text_tokens: int
    caching: CacheSettings | None
    guidance: GuidancePlan | None
    by_step: AttentionByStep | None
    adapters: lora.Adapters

    @property
    def compiled(self) -> bool:
        """Whether torch.compile fuses the blocks."""
        return self.world.device.type == "cuda" and needs_compiler(self.options)

    @property
    def enlarges_to(self) -> str | None:
        """The resolution of super resolution; None for a run of its own."""
        return None

    @property
    def made_from(self) -> dict[str, str]:
        """Hashes of what else than options, settings and weights the result follows from, as metadata calls them."""
        return {contract.EMBEDDINGS_HASH: self.job.embeddings_hash}

    def fingerprint(self) -> str:
        """The hash of the weights; reads samples of them."""
        return self.folder.fingerprint(["transformer"], self.settings.version.name)

    @property
    def cfg_parallel(self) -> str:
        """As asked; "auto" puts no branches side by side where one of them would wait at some steps."""
        auto = self.options.cfg_parallel == DEFAULT_CFG_PARALLEL
        return "off" if auto and self.guidance else self.options.cfg_parallel

    def attention_at(self, step: int) -> AttentionMode:
        """The attention of a step."""
        return self.by_step.modes[step] if self.by_step else self.attention

    @property
    def attention_text(self) -> str:
        """Which attention runs, and why."""
        return self.by_step.describe() if self.by_step else f"{self.attention.name} ({self.attention.reason})"

    @property
    def step_shares(self) -> list[float]:
        """How much of a step with all its guidance branches each step is."""
        steps, branches = self.settings.num_inference_steps, self.settings.branches
        return [len(self.guidance.branches(step)) / branches if self.guidance else 1.0 for step in range(steps)]

    @property
    def sigmas(self) -> torch.Tensor:
        """The schedule, [steps + 1]."""
        if self.settings.sigmas:
            return torch.tensor([*self.settings.sigmas, 0.0])
        return schedule.flow_sigmas(self.settings.num_inference_steps, self.settings.flow_shift)

    @property
    def modulations(self) -> ModulationReader:
        """What computes the modulations of a schedule from the file."""
        version, adapt = self.settings.version.name, self.adapters.fused if self.adapters.additions else None
        return ModulationReader(
            self.folder, version, self.skeleton, self.linears, device=self.world.device, dtype=self.dtype, adapt=adapt
        )

    def inputs(self) -> tuple[torch.Tensor, torch.Tensor | conditions.Condition]:
        """(starting noise [1, 32, T, h, w], condition channels, or what gives those of a step), on the device."""
        image = self.job.embeddings.get("image_latents")
        return conditions.noise_and_condition(
            self.shape, self.options.seed, image, device=self.world.device, dtype=self.dtype
        )

    @cached_property
    def weights(self) -> BlockWeights:
        """Of the transformer, in bytes, of what stays."""
        return weights_of(self.skeleton, self.skeleton.transformer_blocks, self.dtype)

    @cached_property
    def size(self) -> estimates.DenoisingSize:
        """What decides the working memory of a step."""
        config, settings = self.skeleton.config, self.settings
        patch = (config.patch_size_t, config.patch_size, config.patch_size)
        width, steps = config.num_attention_heads * config.attention_head_dim, settings.num_inference_steps
        side_by_side, shards = plan_layout(self.world.size, settings.branches, self.cfg_parallel)
        fused = self.world.device.type == "cuda"  # by Triton, which comes with torch: the compiler's kernels or ours
        return estimates.DenoisingSize(
            geometry.video_tokens(settings.video_length, settings.height, settings.width, patch),
            self.text_tokens,
            width,
            self.dtype.itemsize,
            self.by_step.hungriest if self.by_step else self.attention.name,
            fused,
            shards,
            widened_bytes(self.skeleton.transformer_blocks, self.dtype),
            table_bytes(steps, self.weights.count, width, self.dtype.itemsize),
            self.caching.kept(settings.branches // side_by_side) if self.caching else 0,
            self.heads.left / config.num_attention_heads,
        )

    def plan(self, free: FreeMemory, *, explain: bool = True) -> budget.BlockPlan:
        """How the transformer is laid out in memory; InputError where it does not fit. explain: with what would help."""
        return budget.plan_blocks(
            f"{self.settings.width}x{self.settings.height}, {self.settings.video_length} frames",
            self.weights,
            self.size.working,
            free,
            asked=offload_asked(self.options, self.weights.count),
            ranks=int(os.environ.get("LOCAL_WORLD_SIZE", self.world.size)),
            remedies=partial(remedies, self, free) if explain else tuple,
        )

    @property
    def heads(self) -> HeadSplit:
        """Which heads a process attends with."""
        shards = plan_layout(self.world.size, self.settings.branches, self.cfg_parallel)[1]
        return split_heads(self.skeleton.config.num_attention_heads, shards, by_queries=self.attention.any_queries)

    def layout(self, known: dict[tuple[int, int], Layout]) -> Layout:
        """The layout of a run, whose groups are made once. Every rank calls it. known: by branches side by side, shards."""
        branches = self.settings.branches
        kind = plan_layout(self.world.size, branches, self.cfg_parallel)
        if kind not in known:
            known[kind] = make_layout(self.world, branches, self.cfg_parallel)
        return known[kind]

    def load(
        self,
        plan: budget.BlockPlan,
        report: Reporter = SILENT,
        layouts: dict[tuple[int, int], Layout] | None = None,
        early: Denoiser | None = None,
    ) -> Denoiser:
        """Load the transformer as planned. Every rank calls it. layouts: whose groups there are already, see layout. early:
        what load_resident has loaded."""
        layouts = {} if layouts is None else layouts
        layout = self.layout(layouts)
        report.info(f"attention: {self.attention_text}; layout: {layout.describe()}{self.heads.describe()}")
        report.info(plan.describe(self.weights.count))
        with report.timed("load"):
            denoiser = early or self._load(plan.offloaded, report)
        denoiser.layouts = layouts
        return denoiser

    def load_resident(self) -> Denoiser:
        """The transformer with all its blocks on the device, not yet on a layout. No rank waits for another."""
        return self._load(0, SILENT)

    def _load(self, offloaded: int, report: Reporter) -> Denoiser:
        return Denoiser.load(self.modulations, self.sigmas, offloaded, self.world, report.progress)


def resolve(options: DenoiseOptions, job: DenoiseJob, world: World, report: Reporter = SILENT) -> DenoiseSetup:
    """Bring options, embeddings and model together; InputError where they do not fit. Loads no weights but adapters."""
    folder, path, version = choose_transformer(options, job.config, report)
    options = resolving.apply_preset(options, version)
    flow_shift = folder.flow_shift(version.name) or version.flow_shift
    image = job.embeddings.get("image_latents")
    settings = resolving.resolve_settings(options, job.config, version, flow_shift, image)
    return assemble(DenoiseSetup, options, job, world, (folder, path, settings), report)


def assemble(
    kind: type[Setup],
    options: DenoiseOptions,
    job: DenoiseJob,
    world: World,
    chosen: tuple[ModelFolder, str, Settings],
    report: Reporter,
    **more: Any,
) -> Setup:
    """A setup of a kind. chosen: model folder, its path or hub id, settings; more: what this kind has besides."""
    folder, path, settings = chosen
    version = settings.version
    file = folder.path if isinstance(folder, TransformerFile) else None
    for warning in resolving.sampling_warnings(options, settings, file):
        report.warn(warning)
    dtype = torch_dtype(settings.dtype, world.device)
    config = components.transformer_config(folder, version.name)
    layers, head_width = config.get("num_layers", versions.LAYERS), config.get("attention_head_dim", 128)
    attention, by_step = resolving.resolve_attention(options, settings, (layers, head_width), world.device, dtype)
    names = by_step.names if by_step else (attention.name,)
    if modes.SPARSE_ATTN_MODE in names and not version.sparse:
        report.warn(
            f"{version.name} was not trained for {modes.SPARSE_ATTN_MODE}; --sparse_attn takes weights that were"
        )
    resolving.check_widths(job.embeddings, config, version)
    channels = config.get("out_channels", geometry.LATENT_CHANNELS)
    shape = geometry.latent_shape(settings.video_length, settings.height, settings.width, channels)
    scale = settings.guidance_scale
    prompts = guidance_branches(job.embeddings, scale, device=torch.device("cpu"), dtype=dtype)
    caching = resolving.resolve_cache(options, settings, layers, folder, report.warn)
    files = options.adapter_files()
    adapters = lora.load(files, components.transformer_shapes(folder, version.name)) if files else lora.Adapters()
    for line in adapters.found:
        report.info(line)
    skeleton, linears = planned_skeleton(options, folder, version.name, adapters, (world.device, dtype))
    return kind(
        options=options,
        job=job,
        world=world,
        folder=folder,
        model_path=path,
        settings=settings,
        dtype=dtype,
        attention=attention,
        skeleton=skeleton,
        linears=linears,
        shape=shape,
        text_tokens=max(prompt.length for prompt in prompts),
        caching=caching,
        by_step=by_step,
        guidance=resolving.resolve_guidance(options, settings, caching),
        adapters=adapters,
        **more,
    )
