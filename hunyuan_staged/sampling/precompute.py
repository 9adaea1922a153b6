"""What of a run follows from its schedule alone: the modulations of the transformer's blocks at all its steps."""

import copy
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch

from hunyuan_staged.models.modulations import Modulations, Times, time_embeddings
from hunyuan_staged.sampling.schedule import timesteps_of
from hunyuan_staged.weights import components
from hunyuan_staged.weights.folder import ModelFolder
from hunyuan_staged.weights.key_maps import Named
from hunyuan_staged.weights.loading import NO_DESTINATIONS, Adapt, Destinations, assign_weights


def step_times(sigmas: torch.Tensor, *, use_meanflow: bool = False) -> list[Times]:
    """(timestep, for meanflow also the one that it leads to) of each step; sigmas [steps + 1]."""
    times = timesteps_of(sigmas).tolist()
    return [(time, following if use_meanflow else None) for time, following in pairwise(times)]


class ModulationReader:
    """Computes the modulations of a version's blocks from its file, keeping none of the weights that give them.

    skeleton: the model, on the meta device or not. shapes: of its linear maps, what modulations.remove_linears gave.
    adapt: as in load_transformer.
    """

    def __init__(
        self,
        folder: ModelFolder,
        version: str,
        skeleton: Any,
        shapes: dict[str, torch.Size],
        *,
        device: torch.device,
        dtype: torch.dtype,
        adapt: Adapt | None = None,
    ) -> None:
        self.folder, self.version, self.skeleton, self.shapes = folder, version, skeleton, shapes
        self.device, self.dtype, self.adapt = device, dtype, adapt

    def _read(self, wanted: Callable[[str], bool]) -> Iterable[Named]:
        tensors = components.transformer_tensors(self.folder, self.version, device=self.device, wanted=wanted)
        return self.adapt(tensors) if self.adapt else tensors

    @torch.no_grad()
    def begin(self, sigmas: torch.Tensor) -> Modulations:
        """The modulations of a schedule's steps, still to be filled. Reads the time embedding alone."""
        prefix = "time_embed."
        own = ((name.removeprefix(prefix), x) for name, x in self._read(lambda name: name.startswith(prefix)))
        module = copy.deepcopy(self.skeleton.time_embed).to("meta")
        module = assign_weights(module, own, self.dtype, self.device, self.folder.path)
        times = step_times(sigmas, use_meanflow=self.skeleton.config.use_meanflow)
        tembs = time_embeddings(SimpleNamespace(time_embed=module), times, self.device)
        return Modulations(times, tembs, len(self.skeleton.transformer_blocks))

    def destinations(self, modulations: Modulations, others: Destinations = NO_DESTINATIONS) -> Destinations:
        """`others`, and the modulations filled by the way."""
        return replace(others, consumed=self.shapes, take=modulations.add)

    def read(self, sigmas: torch.Tensor) -> Modulations:
        """The modulations of another schedule, from the file: one linear map after the other, nothing else is read."""
        modulations = self.begin(sigmas)
        nothing = torch.nn.Module()
        tensors = self._read(self.shapes.__contains__)
        assign_weights(nothing, tensors, self.dtype, self.device, self.folder.path, self.destinations(modulations))
        return modulations
