"""What modulates the transformer's blocks: shift, scale and gate of the video's and the text's norms.

They depend on the timestep alone (with meanflow also on the one that the step leads to), neither on the prompt nor on the
guidance branch, and the linear maps that give them are a third of the model's weights. So a run computes them for all
of its steps while the weights are read, and keeps no such map.

Letters: C the width of the blocks.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from hunyuan_staged.models.embeddings import embed_time

NORMS = ("norm1", "norm1_context")  # of the video, of the text
PARTS = 6  # shift, scale, gate for attention, then for the feed-forward
_NAME = re.compile(rf"transformer_blocks\.(\d+)\.({'|'.join(NORMS)})\.linear\.(weight|bias)")

Times = tuple[float, float | None]  # a step's timestep, and for meanflow the one that it leads to


def is_modulation(name: str) -> bool:
    """Whether a tensor is of a linear map that gives modulations."""
    return bool(_NAME.fullmatch(name))


def modulation(norm: Any, temb: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Six [B, 1, C] from a norm that has its linear map: shift, scale, gate for attention, then for the feed-forward."""
    return norm.linear(F.silu(temb))[:, None].chunk(PARTS, dim=-1)


def block_modulation(block: Any, temb: torch.Tensor) -> torch.Tensor:
    """[2, 6, C], the video's and the text's, from a block that has its linear maps; temb [1, C]."""
    return torch.stack([torch.cat(modulation(getattr(block, norm), temb))[:, 0] for norm in NORMS])


def remove_linears(model: Any) -> dict[str, torch.Size]:
    """Take the linear maps of the modulations out of a model's blocks, in place. The shapes of their tensors, by name."""
    width = model.config.num_attention_heads * model.config.attention_head_dim
    shapes: dict[str, torch.Size] = {}
    for index, block in enumerate(model.transformer_blocks):
        for norm in NORMS:
            del getattr(block, norm).linear
            prefix = f"transformer_blocks.{index}.{norm}.linear"
            shapes |= {
                f"{prefix}.weight": torch.Size((PARTS * width, width)),
                f"{prefix}.bias": torch.Size((PARTS * width,)),
            }
    return shapes


def time_embeddings(model: Any, times: Sequence[Times], device: torch.device) -> list[torch.Tensor]:
    """The time embedding [1, C] of each of some steps, one by one, as the steps compute it."""
    found = []
    for timestep, timestep_r in times:
        following = None if timestep_r is None else torch.tensor([timestep_r], device=device)
        found.append(embed_time(model, torch.tensor([timestep], device=device), following))
    return found


def table_bytes(steps: int, blocks: int, width: int, itemsize: int) -> int:
    """What Modulations hold."""
    return steps * blocks * len(NORMS) * PARTS * width * itemsize


class Modulations:
    """The modulations of all blocks at some steps: a table [steps, blocks, 2, 6, C], filled by `add`.

    times: of the steps. tembs: the time embedding [1, C] of each, whose device and dtype the table has.
    """

    def __init__(self, times: Sequence[Times], tembs: Sequence[torch.Tensor], blocks: int) -> None:
        self._steps = {at: step for step, at in enumerate(times)}
        self._silu = [F.silu(temb) for temb in tembs]
        width = tembs[0].shape[1]
        self.table = tembs[0].new_empty(len(times), blocks, len(NORMS), PARTS, width)
        self._halves: dict[tuple[int, int], dict[str, torch.Tensor]] = {}
        self.missing = {(block, norm) for block in range(blocks) for norm in range(len(NORMS))}

    def cover(self, times: Sequence[Times]) -> bool:
        """Whether these steps are among those that they were made for."""
        return self._steps.keys() >= set(times)

    @torch.no_grad()
    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take the weight [6C, C] or the bias [6C] of a linear map; it is let go once the other one has come."""
        match = _NAME.fullmatch(name)
        assert match, name
        place = int(match[1]), NORMS.index(match[2])
        half = self._halves.setdefault(place, {})
        half[match[3]] = tensor
        if len(half) < 2:
            return
        # Step by step, as a step would: a product of all steps at once rounds differently.
        products = [F.linear(silu, half["weight"], half["bias"]) for silu in self._silu]
        self.table[:, *place] = torch.cat(products).view(len(products), PARTS, -1)
        del self._halves[place]
        self.missing.discard(place)

    def at(self, timestep: torch.Tensor, timestep_r: torch.Tensor | None) -> torch.Tensor:
        """[blocks, 2, 6, C] at a timestep [1], which had best be on the host: a device would have to be waited for."""
        assert not self.missing, f"{len(self.missing)} linear maps have not come yet"
        key = float(timestep), None if timestep_r is None else float(timestep_r)
        assert key in self._steps, f"timesteps {key} are none of those that the modulations were computed for"
        return self.table[self._steps[key]]


@torch.no_grad()
def hoist(model: Any, times: Sequence[Times]) -> Modulations:
    """The modulations of a loaded model at some steps; its linear maps are removed, in place."""
    device = model.x_embedder.proj.weight.device
    modulations = Modulations(times, time_embeddings(model, times, device), len(model.transformer_blocks))
    tensors = dict(model.named_parameters())
    for name in remove_linears(model):
        modulations.add(name, tensors[name])
    return modulations
