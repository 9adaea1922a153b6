"""What to change for a denoising to fit that does not, with what each change takes and how long: a plan is made of each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import combinations
from typing import TYPE_CHECKING, Any

from hunyuan_staged import geometry
from hunyuan_staged.errors import InputError
from hunyuan_staged.memory import estimates
from hunyuan_staged.memory.budget import RESERVE, BlockPlan, FreeMemory, device_parts, gib
from hunyuan_staged.memory.expected import Expected
from hunyuan_staged.options import offload_asked
from hunyuan_staged.parallel.layout import plan_layout
from hunyuan_staged.parallel.world import World
from hunyuan_staged.pipeline.denoising_time import denoising_time
from hunyuan_staged.pipeline.forecast_target import card_of
from hunyuan_staged.pipeline.transformers import planned_skeleton

if TYPE_CHECKING:
    from hunyuan_staged.pipeline.denoising import DenoiseSetup

MOST_TOGETHER = 3  # changes that are tried together, where fewer do not help
MORE_GPUS = (2, 4, 8)
SMALLER = "480p"

# (what a user changes, the setup with it); None where there is nothing to change, or where that does not help.
Changed = tuple[str, "DenoiseSetup"]
Change = Callable[["DenoiseSetup"], Changed | None]


@dataclass(frozen=True)
class Goal:
    """What a plan has to do: fit into this memory; resident: with all blocks on the device, and RESERVE to spare."""

    free: FreeMemory
    resident: bool = False

    def plan(self, setup: "DenoiseSetup") -> BlockPlan | None:
        """The plan of a setup; None where it is not so."""
        try:
            plan = setup.plan(self.free, explain=False)
        except InputError:
            return None
        return None if self.resident and (plan.offloaded or plan.tight) else plan

    def room(self, setup: "DenoiseSetup") -> int:
        """Bytes for working memory, with as many blocks offloaded as may be."""
        asked = offload_asked(setup.options, setup.weights.count)
        offloaded = 0 if self.resident else setup.weights.count if asked is None else asked
        spared = RESERVE if self.resident else 0
        return (self.free.device or 0) - spared - sum(device_parts(setup.weights, 0, offloaded).values())


@dataclass(frozen=True)
class Choice:
    """What would do. changes: flags; plan: how it is laid out; expected: of the denoising loop, None: not known."""

    changes: str
    plan: BlockPlan
    expected: Expected | None

    def __str__(self) -> str:
        told = [gib(self.plan.total)]
        told += [f"{self.plan.offloaded} blocks offloaded"] if self.plan.offloaded else []
        told += [str(self.expected)] if self.expected else []
        return f"{self.changes} ({', '.join(told)})"


def choices(setup: "DenoiseSetup", goal: Goal) -> list[Choice]:
    """All changes that would reach a goal alone, fastest first; where none does, all pairs, then threes."""
    card = card_of(setup.options, setup.world.device)

    def tried(chosen: Sequence[Change]) -> Choice | None:
        said, trial = [], setup
        for change in chosen:
            changed = change(trial)
            if changed is None:
                return None
            said.append(changed[0])
            trial = changed[1]
        plan = goal.plan(trial)
        if plan is None:
            return None
        return Choice(" and ".join(said), plan, denoising_time(trial, plan, card) if card else None)

    changes = _changes(setup, goal)
    for count in range(1, MOST_TOGETHER + 1):
        found = [choice for chosen in combinations(changes, count) if (choice := tried(chosen))]
        if found:
            return sorted(found, key=lambda one: one.expected.most if one.expected else 0.0)
    return []


def remedies(setup: "DenoiseSetup", free: FreeMemory) -> list[str]:
    """What a refusal says would help."""
    found = [str(choice) for choice in choices(setup, Goal(free))]
    return found if free.device is not None else [*found, "a GPU"]


def _changes(setup: "DenoiseSetup", goal: Goal) -> list[Change]:
    """In the order in which they are made: the last two look for what fits."""
    options, computed = replace(setup.options, weights_dtype="fp8"), (setup.world.device, setup.dtype)

    @cache
    def float8_model() -> Any:
        return planned_skeleton(options, setup.folder, setup.settings.version.name, setup.adapters, computed)

    def float8(setup: "DenoiseSetup") -> Changed | None:
        if setup.options.weights_dtype:
            return None
        skeleton, linears = float8_model()
        return "--weights_dtype fp8", replace(_with(setup, weights_dtype="fp8"), skeleton=skeleton, linears=linears)

    made: list[Change] = [] if goal.resident else [_no_offloading_flag]
    made += [float8, _no_cache]
    if goal.free.device is None:
        return made
    return [*made, _split_further, _smaller, partial(_more_gpus, goal), partial(_shorter, goal)]


def _with(setup: "DenoiseSetup", **options: Any) -> "DenoiseSetup":
    return replace(setup, options=replace(setup.options, **options))


def _no_offloading_flag(setup: "DenoiseSetup") -> Changed | None:
    if offload_asked(setup.options, setup.weights.count) is None:
        return None
    left: dict[str, Any] = {"enable_offloading": False, "disable_offloading": False, "offload_blocks": None}
    return "no flag about offloading", _with(setup, **left)


def _no_cache(setup: "DenoiseSetup") -> Changed | None:
    if setup.caching is None:
        return None
    flag = "no --enable_cache" if setup.options.enable_cache and not setup.options.preset else "--disable_cache"
    return flag, replace(setup, caching=None)


def _split_further(setup: "DenoiseSetup") -> Changed | None:
    """The guidance branches one after the other: of each, a process then has fewer tokens."""
    side_by_side, _ = plan_layout(setup.world.size, setup.settings.branches, setup.cfg_parallel)
    return ("--cfg_parallel off", _with(setup, cfg_parallel="off")) if side_by_side > 1 else None


def _smaller(setup: "DenoiseSetup") -> Changed | None:
    old = setup.settings
    if setup.enlarges_to or old.version.resolution == SMALLER:
        return None
    height, width = geometry.nearest_size(SMALLER, old.height / old.width)
    if height * width >= old.height * old.width:
        return None
    return f"--resolution {SMALLER} in stage 1", _sized(setup, old.video_length, height, width)


def _more_gpus(goal: Goal, setup: "DenoiseSetup") -> Changed | None:
    for count in MORE_GPUS:
        if count > setup.world.size:
            larger = replace(setup, world=World(0, count, setup.world.device))
            if goal.plan(larger):
                return f"{count} GPUs", larger
    return None


def _shorter(goal: Goal, setup: "DenoiseSetup") -> Changed | None:
    old, latent_frames = setup.settings, setup.shape[2]
    frames = estimates.longest_video(goal.room(setup), max(1, setup.size.video_tokens // latent_frames), setup.size)
    if frames is None or frames >= old.video_length:
        return None
    flag = "--video_length {} or less" + " in the base run" * bool(setup.enlarges_to)
    return flag.format(frames), _sized(setup, frames, old.height, old.width)


def _sized(setup: "DenoiseSetup", frames: int, height: int, width: int) -> "DenoiseSetup":
    settings = replace(setup.settings, video_length=frames, height=height, width=width)
    return replace(setup, settings=settings, shape=geometry.latent_shape(frames, height, width, setup.shape[1]))
