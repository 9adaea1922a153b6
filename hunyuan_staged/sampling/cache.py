"""Feature caches: some steps of the denoising loop take most of the transformer from the steps before.

A plan (CacheSettings) says which steps may be reused; a Cache holds, per guidance branch, what they are reused from: this
rank's shard of it. Off the plan, a step is what it is without a cache, bit for bit.

deepcache, taylorcache, magcache and teacache without a threshold follow a plan, and never make the host wait for a GPU.
firstblock and teacache with a threshold look at what is computed, and wait for one number at every step that they may
reuse. The number is summed over a branch's ranks in one order, so that all decide alike. A branch that did not run at the
step that it would take over from computes the step.

Letters: S video tokens, s this rank's; L text tokens; C channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hunyuan_staged.errors import InputError
from hunyuan_staged.sampling import cache_settings
from hunyuan_staged.sampling.cache_settings import CacheSettings

if TYPE_CHECKING:
    import torch

    from hunyuan_staged.parallel.layout import Layout
    from hunyuan_staged.parallel.world import World


# blocks(video [1, s, C], text [1, L, C], first, last) runs the blocks [first, last), all from first on with None;
# blocks.modulated(video) is what the first one makes of the video before its attention: see models/transformer.py.
Blocks = Callable[..., "tuple[torch.Tensor, torch.Tensor]"]


@dataclass
class BranchState:
    """What a guidance branch keeps: tensors [1, s, C] (text: [1, L, C]) and numbers, from its last computed step."""

    kept: dict[str, torch.Tensor] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)


TEXT, NUMBERS = "text", "numbers"  # of a branch's state; all other tensors are this rank's shard of the video
# The order of a branch's numbers in a file: of the types that follow a plan, and of those that adapt.
PLANNED_NUMBERS = ("step",)
ADAPTIVE_NUMBERS = {"firstblock": ("run",), "teacache": ("step", "sum")}


class Cache:
    """The state of one run's cache on this process.

    cache(branch, step, blocks, video, text) stands for blocks(video, text, 0, None)[0], the video [1, s, C] behind the
    last block. total: S, of the whole video.
    """

    def __init__(self, settings: CacheSettings, layout: Layout, total: int) -> None:
        self.settings, self.layout, self.total = settings, layout, total
        self.branches: dict[int, BranchState] = {}
        self._reused: dict[int, bool] = {}

    def __call__(self, branch: int, step: int, blocks: Blocks, video: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        state = self.branches.setdefault(branch, BranchState())
        strategies = ADAPTIVE if self.settings.adapts else PLANNED
        video, reused = strategies[self.settings.type](self, state, step, blocks, video, text)
        self._reused[step] = self._reused.get(step, True) and reused
        if step >= self.settings.last_reuse:
            # Branches run in their order, and those before this one need nothing more, either.
            self.branches = {number: state for number, state in self.branches.items() if number > branch}
        return video

    @property
    def _number_names(self) -> tuple[str, ...]:
        return ADAPTIVE_NUMBERS[self.settings.type] if self.settings.adapts else PLANNED_NUMBERS

    def may_reuse(self, branch: BranchState, step: int) -> bool:
        """Whether a branch may take over a step: by the plan, and from the step before it that the plan computes."""
        if not branch.kept or not self.settings.may_reuse(step):
            return False
        return self.settings.adapts or branch.numbers["step"] == self.settings.source(step)

    def keeps(self, step: int) -> bool:
        """Whether a later step may need what this one computes."""
        return self.settings.first_kept <= step < self.settings.last_reuse

    @property
    def counts(self) -> tuple[int, int]:
        """(computed, reused) steps so far; reused are those of which this process computed no guidance branch whole."""
        reused = sum(self._reused.values())
        return len(self._reused) - reused, reused

    @property
    def state_bytes(self) -> int:
        """What the state takes on this process now."""
        return sum(tensor.nbytes for branch in self.branches.values() for tensor in branch.kept.values())

    def tensors(self, world: World) -> dict[str, torch.Tensor]:
        """The state of all ranks as it goes into a file, by name, video tensors whole; of several ranks on the first alone,
        in host memory. Every rank must call it."""
        import torch

        from hunyuan_staged.parallel.exchange import gather_tensors

        own = self._own_tensors()
        if world.size == 1:
            return own
        found: dict[str, torch.Tensor] = {}
        for source in range(world.size):  # shard after shard of each branch
            for name, part in gather_tensors(world, own, source).items():
                video = name in found and not name.endswith((f".{TEXT}", f".{NUMBERS}"))
                found[name] = torch.cat([found[name], part], dim=1) if video else part
        return found

    def _own_tensors(self) -> dict[str, torch.Tensor]:
        """This rank's share of the state, by name."""
        import torch

        names = self._number_names
        found: dict[str, torch.Tensor] = {}
        for number, branch in sorted(self.branches.items()):
            for name, tensor in branch.kept.items():
                found[f"cache.{number}.{name}"] = tensor
            if branch.kept:
                values = [branch.numbers[name] for name in names]
                found[f"cache.{number}.{NUMBERS}"] = torch.tensor(values, dtype=torch.float64)
        return found

    def restore(self, tensors: Mapping[str, torch.Tensor], done: int, device: torch.device, branches: int) -> None:
        """Take over the state that `tensors` gave after `done` steps, on any layout. branches: of guidance, in all.

        InputError for a state that does not fit. The unconditional branch has none where it does not run.
        """
        holds = self.settings.first_kept < done <= self.settings.last_reuse
        for number in self.layout.my_branches(branches) if holds else ():
            prefix = f"cache.{number}."
            own = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
            numbers = own.pop(NUMBERS, None)
            if not own and number < branches - 1:
                continue
            names = self._number_names
            fits = bool(own) and (len(numbers) if numbers is not None else 0) == len(names)
            if not fits or any(name != TEXT and x.shape[1] != self.total for name, x in own.items()):
                raise InputError(
                    f"the saved state of {self.settings.type} does not fit this run; run without --resume to start "
                    "from the beginning"
                )
            kept = {name: (x if name == TEXT else self.layout.scatter(x)).to(device) for name, x in own.items()}
            values = numbers.tolist() if numbers is not None else []
            self.branches[number] = BranchState(kept, dict(zip(names, values, strict=True)))

    def mean_ratio(self, above: torch.Tensor, below: torch.Tensor) -> float:
        """As the function of that name, over this cache's layout."""
        return mean_ratio(self.layout, above, below)


def mean_ratio(layout: Layout, above: torch.Tensor, below: torch.Tensor) -> float:
    """Over all ranks of the branch: the sum of `above` [..] over the sum of `below` [..]; waits for the device."""
    import torch

    sums = torch.stack([above.sum(dtype=torch.float32), below.sum(dtype=torch.float32)])
    over, under = layout.total(sums).tolist()
    return over / under if under else math.inf


def _deepcache(
    cache: Cache, branch: BranchState, step: int, blocks: Blocks, video: torch.Tensor, text: torch.Tensor
) -> tuple[torch.Tensor, bool]:
    """Reused steps take what the last computed one had before the last blocks, and compute those."""
    edge = cache.settings.edge
    if cache.may_reuse(branch, step):
        return blocks(branch.kept["video"], branch.kept[TEXT], edge, None)[0], True
    video, text = blocks(video, text, 0, edge)
    if cache.keeps(step):
        branch.kept, branch.numbers = {"video": video, TEXT: text}, {"step": float(step)}
    return blocks(video, text, edge, None)[0], False


def _taylor(order: int) -> Callable[..., tuple[torch.Tensor, bool]]:
    """Reused steps add to their own input what all blocks added at the last computed step, or its Taylor expansion.

    Derivatives by step are differences between computed steps, as many as `order`. Source: TaylorSeer, arXiv 2503.06923;
    order 0 is what the official code calls teacache (its schedule is fixed, too), and what magcache does at its steps.
    """

    def run(
        cache: Cache, branch: BranchState, step: int, blocks: Blocks, video: torch.Tensor, text: torch.Tensor
    ) -> tuple[torch.Tensor, bool]:
        if cache.may_reuse(branch, step):
            ahead = step - branch.numbers["step"]
            for power in range(len(branch.kept)):
                video = video.add(branch.kept[f"order{power}"], alpha=ahead**power / math.factorial(power))
            return video, True
        out = blocks(video, text, 0, None)[0]
        if cache.keeps(step):
            terms = [out - video]
            for power in range(min(order, len(branch.kept))):
                terms.append((terms[power] - branch.kept[f"order{power}"]) / (step - branch.numbers["step"]))
            branch.kept = {f"order{power}": term for power, term in enumerate(terms)}
            branch.numbers = {"step": float(step)}
        return out, False

    return run


def _firstblock(
    cache: Cache, branch: BranchState, step: int, blocks: Blocks, video: torch.Tensor, text: torch.Tensor
) -> tuple[torch.Tensor, bool]:
    """All steps compute the first block. Where it adds nearly what it added at the last computed step (mean absolute
    difference over mean absolute value, below the threshold), the rest adds what it added then.

    Source: First Block Cache of ParaAttention; diffusers/hooks/first_block_cache.py.
    """
    settings = cache.settings
    assert settings.threshold is not None
    first, text = blocks(video, text, 0, 1)
    change = first - video
    if cache.may_reuse(branch, step) and branch.numbers["run"] < settings.interval - 1:
        before = branch.kept["change"]
        if cache.mean_ratio((change - before).abs(), before.abs()) < settings.threshold:
            branch.numbers["run"] += 1
            return first + branch.kept["residual"], True
    out = blocks(first, text, 1, None)[0]
    if cache.keeps(step):
        branch.kept, branch.numbers = {"change": change, "residual": out - first}, {"run": 0.0}
    return out, False


def _teacache(
    cache: Cache, branch: BranchState, step: int, blocks: Blocks, video: torch.Tensor, text: torch.Tensor
) -> tuple[torch.Tensor, bool]:
    """Reused steps add to their own input what all blocks added at the last computed one, while the sum since then of a
    polynomial of the relative change of the first block's modulated input from step to step is below the threshold.

    Source: TeaCache, arXiv 2411.19108.
    """
    settings, modulated = cache.settings, blocks.modulated(video)  # type: ignore[attr-defined]
    assert settings.threshold is not None
    if cache.may_reuse(branch, step):
        before = branch.kept["input"]
        branch.numbers["sum"] += settings.expected_change(cache.mean_ratio((modulated - before).abs(), before.abs()))
        branch.kept["input"] = modulated
        if branch.numbers["sum"] < settings.threshold and step - branch.numbers["step"] < settings.interval:
            return video + branch.kept["order0"], True
    out = blocks(video, text, 0, None)[0]
    if cache.keeps(step):
        branch.kept = {"order0": out - video, "input": modulated}
        branch.numbers = {"step": float(step), "sum": 0.0}
    return out, False


Strategy = Callable[..., "tuple[torch.Tensor, bool]"]
PLANNED: dict[str, Strategy] = {
    "deepcache": _deepcache,
    "teacache": _taylor(0),
    "taylorcache": _taylor(cache_settings.TAYLOR_ORDER),
    "magcache": _taylor(0),
}
ADAPTIVE: dict[str, Strategy] = {"firstblock": _firstblock, "teacache": _teacache}
