"""A loaded transformer, and what it makes of a setup of denoising.py: here alone a denoising is put together.

The demo and bench, which have no setup, take the parts: Denoiser.forward, Inputs and Denoiser.denoise.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from hunyuan_staged.attention.choose import AttentionMode
from hunyuan_staged.memory.offloading import StreamedBlocks, load_offloaded
from hunyuan_staged.models import transformer
from hunyuan_staged.models.embeddings import Conditioning
from hunyuan_staged.models.modulations import Modulations
from hunyuan_staged.parallel.layout import Layout
from hunyuan_staged.parallel.world import World
from hunyuan_staged.runtime.progress import SILENT, Reporter, quiet
from hunyuan_staged.sampling import cache, loop
from hunyuan_staged.sampling.callbacks import AfterStep, Callback, active
from hunyuan_staged.sampling.conditions import Condition
from hunyuan_staged.sampling.guidance import Guidance, guidance_branches
from hunyuan_staged.sampling.precompute import ModulationReader, step_times
from hunyuan_staged.sampling.recorder import Recorder
from hunyuan_staged.sampling.state import Start
from hunyuan_staged.weights import components
from hunyuan_staged.weights.loading import Destinations
from hunyuan_staged.weights.quantization import one_kind

if TYPE_CHECKING:
    from hunyuan_staged.pipeline.denoising import DenoiseSetup

BEGINNING = Start()


@dataclass(frozen=True)
class Denoised:
    """Latents [1, 32, T, h, w], float32, on the CPU; the seconds they took; (steps computed, reused from a cache)."""

    latents: torch.Tensor
    seconds: float
    steps: tuple[int, int]


@dataclass(frozen=True)
class Inputs:
    """What the loop starts from: noise [1, 32, T, h, w], the channels behind it (or what gives those of a step), the
    guidance branches, the schedule [steps + 1]. guidance, before_step: as of loop.Sampling."""

    noise: torch.Tensor
    condition: torch.Tensor | Condition
    branches: Sequence[Conditioning]
    sigmas: torch.Tensor
    guidance_scale: float
    guidance: Guidance | None = None
    before_step: Callable[[int], None] | None = None


@dataclass
class Denoiser:
    """A loaded transformer. modulations: of the last schedule, None where the model has kept their linear maps. layouts:
    by branches side by side and shards; their process groups serve every run."""

    model: Any
    modulations: Modulations | None = None
    blocks: StreamedBlocks | transformer.Blocks | None = None
    layouts: dict[tuple[int, int], Layout] = field(default_factory=dict)

    @classmethod
    def load(
        cls,
        reader: ModulationReader,
        sigmas: torch.Tensor,
        offloaded: int,
        world: World,
        progress: Callable[..., Iterable[Any]] = quiet,
    ) -> "Denoiser":
        """From the files of the reader's transformer, with the modulations of a schedule [steps + 1] computed.

        So many of the blocks stay on the host: where any do, every rank calls it. progress: of tensors.
        """
        modulations = reader.begin(sigmas)

        def load(destinations: Destinations) -> Any:
            return components.load_transformer(
                reader.folder,
                reader.version,
                device=reader.device,
                dtype=reader.dtype,
                progress=progress,
                skeleton=reader.skeleton,
                destinations=reader.destinations(modulations, destinations),
                adapt=reader.adapt,
            )

        model, blocks = load_offloaded(
            reader.skeleton,
            "transformer_blocks",
            offloaded,
            load,
            device=reader.device,
            dtype=reader.dtype,
            world=world,
        )
        return cls(model, modulations, blocks)

    def run(
        self,
        setup: "DenoiseSetup",
        start: Start = BEGINNING,
        callbacks: Sequence[Callback] = (),
        report: Reporter = SILENT,
        *,
        recorder: Recorder | None = None,
    ) -> Denoised:
        """Denoise. Every rank calls it, with as many callbacks of the same kinds; see sampling/callbacks.py.

        recorder: stands in the place of a cache, which the setup then has none of.
        """
        settings, dtype, device = setup.settings, setup.dtype, setup.world.device
        layout = setup.layout(self.layouts)
        started = time.perf_counter()
        times = step_times(setup.sigmas, use_meanflow=self.model.config.use_meanflow)
        if self.modulations and not self.modulations.cover(times):
            self.modulations = setup.modulations.read(setup.sigmas)
        forward = self.forward(setup.attention, setup.shape[2:], layout, compile=setup.compiled)
        prompts = guidance_branches(setup.job.embeddings, settings.guidance_scale, device=device, dtype=dtype)
        guidance = Guidance(setup.guidance) if setup.guidance else None
        before_step = (lambda step: forward.use(setup.attention_at(step))) if setup.by_step else None
        inputs = Inputs(*setup.inputs(), prompts, setup.sigmas, settings.guidance_scale, guidance, before_step)
        cached = cache.Cache(setup.caching, layout, forward.total) if setup.caching else None
        if cached:
            cached.restore(start.more, start.done, device, settings.branches)
        if guidance:
            guidance.restore(start.more, start.done, inputs.noise)
        if recorder:
            recorder.layout = layout
        with active(callbacks) as after_step:

            def on_step(index: int, latents: torch.Tensor, clean: Callable[[], torch.Tensor]) -> None:
                if cached:
                    report.set_postfix("{} computed, {} reused".format(*cached.counts))
                more = partial(_more_state, cached, guidance, setup.world, index + 1)
                after_step(AfterStep(index, latents, clean, more))

            latents = self.denoise(
                forward, inputs, layout, recorder or cached, start, progress=report.progress, on_step=on_step
            ).cpu()
        if cached:
            report.info("{}: {} steps computed, {} reused".format(cached.settings.type, *cached.counts))
        counts = cached.counts if cached else (settings.num_inference_steps - start.done, 0)
        return Denoised(latents, time.perf_counter() - started, counts)

    def forward(
        self, attention: AttentionMode, latent_size: Sequence[int], layout: Layout, *, compile: bool = False
    ) -> transformer.Transformer:
        """The forward for latents of (frames, height, width) on a layout."""
        frames, height, width = latent_size
        blocks: Any = self.blocks
        if compile and one_kind.are_mixed(self.model.transformer_blocks):
            blocks = one_kind.OneKind(self.model.transformer_blocks if blocks is None else blocks)
        return transformer.Transformer(
            self.model,
            attention,
            (frames, height, width),
            layout,
            blocks,
            modulations=self.modulations,
            compile=compile,
        )

    def denoise(
        self,
        forward: loop.VelocityModel,
        inputs: Inputs,
        layout: Layout,
        cached: Callable[..., torch.Tensor] | None = None,
        start: Start = BEGINNING,
        *,
        progress: Callable[..., Iterable[Any]] = quiet,
        on_step: loop.OnStep | None = None,
    ) -> torch.Tensor:
        """The loop over `forward`, from the inputs or from where a run was stopped; on_step as loop.denoise's."""
        return loop.denoise(
            forward,
            inputs.noise if start.latents is None else start.latents.to(inputs.noise.device),
            inputs.condition,
            inputs.branches,
            inputs.sigmas,
            loop.Sampling(
                inputs.guidance_scale,
                self.model.config.use_meanflow,
                layout,
                cached,
                start.done,
                inputs.guidance,
                inputs.before_step,
            ),
            progress=progress,
            on_step=on_step,
        )


def _more_state(
    cached: cache.Cache | None, guidance: Guidance | None, world: World, done: int
) -> dict[str, torch.Tensor]:
    """What a run goes on from after so many steps, beside the latents. Every rank must call it."""
    state = cached.tensors(world) if cached else {}
    return state | (guidance.tensors(done) if guidance else {})
