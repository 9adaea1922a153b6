"""What a plan of --dry_run is for, and what all plans have in common."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from hunyuan_staged.errors import InputError
from hunyuan_staged.memory import budget
from hunyuan_staged.memory.budget import FreeMemory
from hunyuan_staged.memory.cards import Card, assumed_card, find_card
from hunyuan_staged.memory.expected import Expected
from hunyuan_staged.parallel.world import World
from hunyuan_staged.pipeline.common import free_memory, gpu_name, torch_dtype
from hunyuan_staged.run_options import DEFAULT_DTYPE, RunOptions
from hunyuan_staged.weights.folder import ModelFolder
from hunyuan_staged.weights.published import PublishedModel

PRODUCT, PRODUCT_SECONDS = 1024, 0.1  # the side of the matrices, and how long to multiply them
# Small products, as the demo's, reach far less of a CPU's rate than large ones: a step of 5.4 GFLOP took 1.1 s on two
# busy cores where a large product ran at 50 GFLOP/s.
CPU_REACHED = (0.1, 0.8)
UNKNOWN = "unknown: neither measured nor a card whose rate is known; --assume_gpu lists those"

TITLES = {1: "stage 1: prompt → embeddings", 2: "stage 2: embeddings → latents", 3: "stage 3: latents → video"}
LARGER = "stage 2: larger latents,"
INPUT_VIDEO = "stage 2: input video → latents"

Rows = dict[str, object]
FindTarget = Callable[[RunOptions, World], "Target"]


@dataclass(frozen=True)
class Target:
    """What a plan is for: the processes with their device, what each has free, what computes where that is known."""

    world: World
    free: FreeMemory
    card: Card | None
    assumed: bool = False


def card_of(options: RunOptions, device: torch.device) -> Card | None:
    """The card that --assume_gpu names, else this GPU, where the table has it, or this CPU."""
    if options.assume_gpu is not None:
        return assumed_card(options.assume_gpu)
    if device.type == "cuda":
        return find_card(gpu_name(device))
    return timed_cpu(torch_dtype(getattr(options, "dtype", None) or DEFAULT_DTYPE, device))


def target_of(options: RunOptions, world: World) -> Target:
    """What is here, or the card that --assume_gpu names in a host with enough memory. Every rank calls it.

    Of processes that are not there, on the first GPUs of this host, it is the one with the least free memory.
    """
    if options.assume_gpu is not None:
        card = assumed_card(options.assume_gpu)
        return Target(replace(world, device=torch.device("cuda")), budget.card(card.memory_gb), card, assumed=True)
    if world.device.type == "cuda" and world.size > 1 and world.store is None:
        worlds = [replace(world, device=torch.device("cuda", index)) for index in range(world.size)]
        found = [Target(one, free_memory(one), card_of(options, one.device)) for one in worlds]
        return min(found, key=lambda target: target.free.device or 0)
    return Target(world, free_memory(world), card_of(options, world.device))


@cache
def timed_cpu(dtype: torch.dtype) -> Card:
    """This machine's CPU, by the rate of a matrix product."""
    x = torch.ones(PRODUCT, PRODUCT, dtype=dtype)
    x @ x
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < PRODUCT_SECONDS:
        x @ x
        count += 1
    rate = 2.0 * PRODUCT**3 * count / (time.perf_counter() - started)
    return Card("this CPU, by a matrix product that was just timed", 0, rate / 1e12, reached=CPU_REACHED)


@dataclass(frozen=True)
class StagePlan:
    """The plan of a stage: its rows, the seconds it takes beside loading (None: not known), what follows it, and what it
    was made from: the setup, and how that is laid out in memory (BlockPlan, Decoding, EncodingPlan).

    title: of stage 2's, in the plan of a whole run.
    """

    rows: Rows
    expected: Expected | None
    config: Mapping[str, Any]
    shape: tuple[int, ...]
    setup: Any
    memory: Any
    title: str = ""


def planned(setup: Any, target: Target) -> Any:
    """A setup's memory plan; InputError where nothing fits, which on a machine without a GPU names --assume_gpu."""
    try:
        return setup.plan(target.free)
    except InputError as error:
        if target.free.device is not None:
            raise
        raise InputError(f"{error.text}; --assume_gpu plans for a card that is not here", error.option) from error


def finished(rows: Rows, expected: Expected | None, target: Target, *more: tuple[str, str]) -> Rows:
    """The rows with where the numbers are from, and the time, which is the last."""
    told = f"{expected} ({expected.how}: {target.card})" if expected else UNKNOWN
    free = {"free": f"{target.free.describe()} (assumed)"} if target.assumed else {}
    return rows | free | {name: text for name, text in more if text} | {"expected time": told}


def time_of_run(expected: Expected) -> str:
    """What a plan says of the time of all stages together."""
    return f"{expected} ({expected.how}); loading the weights and starting up come on top"


def figures(folder: ModelFolder, version: str, larger: str | None = None) -> tuple[str, str]:
    """Where the numbers are from, if not from this model's own configs. larger: the resolution of super resolution."""
    if not isinstance(folder, PublishedModel):
        return "figures", ""
    more = f" --super_resolution {larger}" if larger else ""
    command = f"python -m hunyuan_staged.download {version}{more} --model_path DIR"
    return "figures", f"the published model's, since {folder.missing}; to have it: {command}"
