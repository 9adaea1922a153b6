"""A loaded transformer, and what it makes of a setup of denoising.py."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from hunyuan_staged.memory.offloading import StreamedBlocks
from hunyuan_staged.models import transformer
from hunyuan_staged.models.modulations import Modulations
from hunyuan_staged.parallel.layout import Layout, make_layout
from hunyuan_staged.runtime.progress import SILENT, Reporter
from hunyuan_staged.sampling import cache, loop
from hunyuan_staged.sampling.callbacks import AfterStep, Callback, active
from hunyuan_staged.sampling.guidance import guidance_branches
from hunyuan_staged.sampling.precompute import step_times
from hunyuan_staged.sampling.state import Start

if TYPE_CHECKING:
    from hunyuan_staged.pipeline.denoising import DenoiseSetup

BEGINNING = Start()


@dataclass(frozen=True)
class Denoised:
    """Latents [1, 32, T, h, w], float32, on the CPU; the seconds they took; (steps computed, reused from a cache)."""

    latents: torch.Tensor
    seconds: float
    steps: tuple[int, int]


@dataclass
class Denoiser:
    """A loaded transformer. modulations: of the last schedule. layouts: by the number of guidance branches; their process
    groups serve every run."""

    model: Any
    modulations: Modulations
    blocks: StreamedBlocks | None = None
    layouts: dict[int, Layout] = field(default_factory=dict)

    def run(
        self,
        setup: "DenoiseSetup",
        start: Start = BEGINNING,
        callbacks: Sequence[Callback] = (),
        report: Reporter = SILENT,
    ) -> Denoised:
        """Denoise. Every rank calls it, with as many callbacks of the same kinds; see sampling/callbacks.py."""
        settings, dtype, device = setup.settings, setup.dtype, setup.world.device
        branches = settings.branches
        if branches not in self.layouts:
            self.layouts[branches] = make_layout(setup.world, branches, setup.options.cfg_parallel)
        layout = self.layouts[branches]
        started = time.perf_counter()
        if not self.modulations.cover(step_times(setup.sigmas, use_meanflow=self.model.config.use_meanflow)):
            self.modulations = setup.modulations.read(setup.sigmas)
        forward = transformer.Transformer(
            self.model,
            setup.attention,
            setup.shape[2:],
            layout,
            self.blocks,
            modulations=self.modulations,
            compile=setup.compiled,
        )
        prompts = guidance_branches(setup.job.embeddings, settings.guidance_scale, device=device, dtype=dtype)
        noise, condition = setup.inputs()
        cached = cache.Cache(setup.caching, layout, forward.total) if setup.caching else None
        if cached:
            cached.restore(start.more, start.done, device, branches)
        more = partial(cached.tensors, setup.world) if cached else dict
        with active(callbacks) as after_step:

            def on_step(index: int, latents: torch.Tensor, clean: Callable[[], torch.Tensor]) -> None:
                if cached:
                    report.set_postfix("{} computed, {} reused".format(*cached.counts))
                after_step(AfterStep(index, latents, clean, more))

            latents = loop.denoise(
                forward,
                noise if start.latents is None else start.latents.to(device),
                condition,
                prompts,
                setup.sigmas,
                loop.Sampling(settings.guidance_scale, self.model.config.use_meanflow, layout, cached, start.done),
                progress=report.progress,
                on_step=on_step,
            ).cpu()
        if cached:
            report.info("{}: {} steps computed, {} reused".format(cached.settings.type, *cached.counts))
        counts = cached.counts if cached else (settings.num_inference_steps - start.done, 0)
        return Denoised(latents, time.perf_counter() - started, counts)
