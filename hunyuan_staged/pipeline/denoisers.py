"""The transformer that is loaded, from one denoising to the next."""

import gc
from dataclasses import replace
from typing import Any

import torch

from hunyuan_staged.errors import InputError
from hunyuan_staged.memory.budget import BlockPlan, FreeMemory
from hunyuan_staged.parallel.layout import Layout
from hunyuan_staged.parallel.world import World
from hunyuan_staged.pipeline.common import free_memory
from hunyuan_staged.pipeline.denoiser import Denoiser
from hunyuan_staged.pipeline.denoising import DenoiseSetup
from hunyuan_staged.runtime.progress import SILENT, Reporter


class Denoisers:
    """One loaded transformer at a time: that of the last setup serves the next one of the same model.

    The processes' groups serve all of them.
    """

    def __init__(self) -> None:
        self._denoiser: Denoiser | None = None
        self._model: tuple[Any, ...] = ()
        self._offloaded = 0
        self._early = False  # whether it was loaded before anybody asked for it
        self._layouts: dict[tuple[int, int], Layout] = {}
        self._free: FreeMemory | None = None  # before anything was loaded

    def free(self, setup: DenoiseSetup) -> FreeMemory:
        """The memory that is free but for the transformer; every rank calls it.

        The groups are made first: on GPUs each takes memory of its own.
        """
        if self._free is None:
            setup.world.barrier("settings resolved")  # where another has failed, nobody waits for it in a group
            setup.layout(self._layouts)
            self._free = free_memory(setup.world, self._early)
        return self._free

    def load_early(self, setup: DenoiseSetup) -> None:
        """Have the setup's transformer on the device, all of it, for a `load` to come. No rank need call it."""
        self._denoiser, self._model, self._early = setup.load_resident(), model_of(setup), True

    def load(self, setup: DenoiseSetup, plan: BlockPlan, report: Reporter = SILENT) -> Denoiser:
        """The setup's transformer, laid out as planned. Every rank calls it."""
        model = model_of(setup)
        # More offloaded than a shorter video needs costs little; fewer would not leave a longer one its memory.
        if self._denoiser is None or model != self._model or plan.offloaded > self._offloaded:
            self.drop()
            self._denoiser = setup.load(plan, report, self._layouts)
            self._model, self._offloaded = model, plan.offloaded
        elif self._early:
            self._denoiser = setup.load(plan, report, self._layouts, self._denoiser)
        self._early = False
        return self._denoiser

    def drop(self) -> None:
        """Let go of it."""
        if self._denoiser is not None:
            self._denoiser = None
            gc.collect()  # offloaded blocks and their hooks hold each other
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def model_of(setup: DenoiseSetup) -> tuple[Any, ...]:
    """What decides the weights that are loaded, and how they are laid out."""
    options, version = setup.options, setup.settings.version.name
    offloading = options.enable_offloading, options.disable_offloading, options.offload_blocks
    where = setup.model_path, str(setup.folder.path)
    more = options.weights_dtype, options.fp8_matmul, options.lora, options.cfg_parallel, setup.enlarges_to
    return *where, version, setup.dtype, *more, offloading


def fits(setup: DenoiseSetup, processes: int, free: FreeMemory) -> bool:
    """Whether the denoising fits in so many processes' memory."""
    try:
        replace(setup, world=World(0, processes, setup.world.device)).plan(free, explain=False)
    except InputError:
        return False
    return True
