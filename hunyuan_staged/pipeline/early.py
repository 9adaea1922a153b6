"""What a stage of a whole run loads and compiles before its turn, where that fits beside the stages that work meanwhile.

The launcher tells a stage that waits the flags of all. From them follow the plans of all, as --dry_run shows them, and
the weights. No number follows from any of it: in its turn the stage reads its input, plans and asks for its weights as
ever, and gets those that are there, if they are the ones.
"""

import contextlib
import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hunyuan_staged.attention.packages import reason_of
from hunyuan_staged.encoders.endpoint import LOCAL
from hunyuan_staged.memory import available
from hunyuan_staged.memory.budget import GIB, RESERVE, FreeMemory, gib
from hunyuan_staged.memory.cards import known_cards
from hunyuan_staged.parallel.environment import rank_info
from hunyuan_staged.parallel.threads import device_threads
from hunyuan_staged.parallel.world import World
from hunyuan_staged.pipeline import forecast
from hunyuan_staged.pipeline.decoding import DecodeSetup
from hunyuan_staged.pipeline.denoisers import Denoisers
from hunyuan_staged.pipeline.denoising import DenoiseSetup
from hunyuan_staged.pipeline.forecast_target import StagePlan, Target
from hunyuan_staged.pipeline.loaded_decoder import LoadedDecoder
from hunyuan_staged.pipeline.rehearsal import one_block, rehearse_decoding, rehearse_denoising, with_kernels
from hunyuan_staged.run_options import RunOptions
from hunyuan_staged.runtime.environment import Early, IsDue
from hunyuan_staged.weights.single_file import TransformerFile

# Of each process on a GPU, beside what torch allocates: its context, and kernels. Measured: 0.5 GiB.
CONTEXT = 3 * GIB // 4
PIECE = 2**24  # bytes of a file that are read ahead at a time
DUE = "the turn came first"
Capability = tuple[int, int] | None
SWITCH_SECONDS = 2e-4  # a piece of a file takes some milliseconds; Python's own are 5


@dataclass(frozen=True)
class Need:
    """Bytes of a GPU that a stage takes at most while it works, and those of its weights alone."""

    total: int
    resident: int


def load_early(
    options: Sequence[Any], own: int, is_due: IsDue, device: torch.device, imports: Callable[[], object] = bool
) -> Early:
    """What the stage of number `own`, counted from 0, has on the device before its turn: Denoisers or a LoadedDecoder.

    They have run once, where there is room and time for that: then nothing is left to be compiled. options: of the run's
    stages. imports: what stage 2 needs for that, and has time for beside the loading. Nothing, with the reason, where there
    is no room, and where something fails: whatever that is, the turn meets it again, and says so.
    """
    kept: list[Any] = []
    told = _trying("not loaded early", lambda: _load(options, own, is_due, device, kept, imports))
    return Early(kept[0] if kept else None, told)


def read_early(options: Sequence[Any], own: int, is_due: IsDue, gpu: tuple[int, Capability]) -> Early:
    """The same where the device has no room: the weights of stage 2 are read into the host's cache, if that has.

    gpu: its bytes that a stage may take, and its compute capability.
    """
    return Early(told=_trying("not read ahead", lambda: _read(options, own, is_due, gpu)))


def _trying(without: str, work: Callable[[], str]) -> str:
    """What `work` says, or without what the run goes on and why."""
    try:
        return work()
    except Exception as error:
        told = f"{without}: {reason_of(error)}"
    # Here and not above, where the error still holds what was loaded.
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return told


def _load(
    options: Sequence[Any],
    own: int,
    is_due: IsDue,
    device: torch.device,
    kept: list[Any],
    imports: Callable[[], object],
) -> str:
    """Fill `kept`; in a phrase what has come of that."""
    why_not = obstacle(options) or (DUE if is_due() else None)
    if why_not:
        return why_not
    info, free = rank_info(), available.free_memory(device)
    world = World(info.rank, info.size, device)
    plans = plan_processes(options, world, free, capability_of(device))
    needs, plan = list(map(need_of, plans)), plans[own][0]
    needed, room = peak(needs, own), sys.maxsize if free.device is None else free.device
    if getattr(plan.memory, "offloaded", 0) or needed > room:
        return f"not loaded early: {gib(needed)} needed, free: {free.describe()}"
    needs[own] = need_to_rehearse(plans[own])
    fits = peak(needs, own) <= room
    try:
        if isinstance(plan.setup, DenoiseSetup):
            # Of the model as it is before it is loaded, beside the rehearsal.
            rehearse = (
                partial(_rehearse_denoising, plan.setup, one_block(plan.setup), imports, is_due) if fits else None
            )
            told = _load_denoiser(plan.setup, kept, rehearse)
        else:
            told = _load_decoder(plan, kept, fits)
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()  # which is the other stage's
    return f"loaded early: {gib(plan.memory.resident)}, {told}"


def _rehearse_denoising(setup: DenoiseSetup, model: Any, imports: Callable[[], object], is_due: IsDue) -> str:
    """Import and try this stage's kernels, and compile what there is to be compiled on a copy of one block."""
    imports()
    if is_due():
        return f"not rehearsed: {DUE}"
    rehearse_denoising(with_kernels(setup), model)
    return "rehearsed"


def _load_denoiser(setup: DenoiseSetup, kept: list[Any], rehearse: Callable[[], str] | None) -> str:
    """Load a transformer on a thread, beside the compiler's work."""
    with device_threads(1, "loading early", setup.world.device) as pool, _taking_turns():
        loading = pool.submit(load_denoiser, setup)
        told = _trying("not rehearsed", rehearse) if rehearse else "not rehearsed"
        kept.append(loading.result())
    return told


@contextlib.contextmanager
def _taking_turns() -> Iterator[None]:
    """Have the compiler, which is all Python, let the threads in that load, each of which needs the interpreter briefly."""
    former = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        yield
    finally:
        sys.setswitchinterval(former)


def _load_decoder(plan: StagePlan, kept: list[Any], rehearse: bool) -> str:
    decoders = load_decoder(plan.setup)
    kept.append(decoders)

    def work() -> str:
        rehearse_decoding(plan.setup, plan.memory, decoders)
        return "rehearsed"

    return _trying("not rehearsed", work) if rehearse else "not rehearsed"


def _read(options: Sequence[Any], own: int, is_due: IsDue, gpu: tuple[int, Capability]) -> str:
    why_not = obstacle(options)
    if why_not:
        return why_not
    free = FreeMemory(gpu[0], available.host_available())
    plans = plan_processes(options, World(0, rank_info().size, torch.device("cuda")), free, gpu[1])
    setup, busy = plans[own][0].setup, plans[0][0].memory.host
    files = weight_files(setup) if isinstance(setup, DenoiseSetup) else []
    return f"read ahead: {gib(read_ahead(files, free.host - busy, is_due))}"


def load_denoiser(setup: DenoiseSetup) -> Denoisers:
    """A setup's transformer."""
    denoisers = Denoisers()
    denoisers.load_early(setup)
    return denoisers


def load_decoder(setup: DecodeSetup) -> LoadedDecoder:
    """A setup's decoder."""
    decoders = LoadedDecoder()
    setup.load(decoders)
    return decoders


def weight_files(setup: DenoiseSetup) -> list[Path]:
    """Of its transformer."""
    folder = setup.folder
    return (
        [folder.path] if isinstance(folder, TransformerFile) else folder.transformer_files(setup.settings.version.name)
    )


def obstacle(options: Sequence[Any]) -> str | None:
    """Why the weights of a run are not known before its stages' turns, in a phrase; None where they are."""
    encode, *others = options
    if encode.jobs or any(one.jobs or one.seeds for one in others):
        return "many videos"
    if encode.rewrite == LOCAL:
        return "the prompt is rewritten here, which takes as long and more memory"
    if getattr(others[0], "input_video", None):
        return "a video is the input"
    return None


def plan_processes(
    options: Sequence[Any], world: World, free: FreeMemory, capability: Capability = None
) -> list[list[StagePlan]]:
    """The plans of a run's processes, one after the other, as if each had this memory; nothing is asked of a hub.

    No kernel is tried. capability: of the GPU; None where unknown.
    """
    alike = (card.name for card in known_cards() if capability and card.capability == capability)
    card = next(alike, None) or f"{(free.device or 0) / GIB + 1:.0f}"
    asked = [replace(one, dry_run=True, assume_gpu=None if free.device is None else card) for one in options]

    def find_target(_: RunOptions, world: World) -> Target:
        return Target(world, free, None)

    return forecast.plan_processes(asked, world, find_target=find_target)


def capability_of(device: torch.device) -> Capability:
    """CUDA's; None for a CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def need_of(plans: Sequence[StagePlan]) -> Need:
    """Of a process, from the plans of what it does one after the other."""
    return Need(max(plan.memory.total for plan in plans), max(plan.memory.resident for plan in plans))


def need_to_rehearse(plans: Sequence[StagePlan]) -> Need:
    """Of a stage that works in small while it loads; a denoising does so on a copy of all its weights but other blocks."""
    setup, most = plans[0].setup, need_of(plans).total
    if isinstance(setup, DenoiseSetup):
        most += setup.weights.rest + setup.weights.each  # see one_block
    return Need(most, most)


def peak(needs: Sequence[Need], own: int) -> int:
    """Bytes that must be free for the weights of stage `own` to be loaded before its turn.

    Each stage up to it must have room to work beside the weights of all that follow, which may be there by then.
    """
    beside = [sum(need.resident for need in needs[index + 1 :]) for index in range(own + 1)]
    most = max(need.total + others for need, others in zip(needs, beside, strict=False))
    return most + RESERVE + (len(needs) - 1) * CONTEXT


def read_ahead(files: Sequence[Path], room: int, is_due: IsDue) -> int:
    """Have the kernel hold files in its cache until the turn comes; how many bytes it was asked for.

    None where they do not fit into `room` bytes of host memory: what the running stage reads must stay there.
    """
    sizes = [path.stat().st_size for path in files]
    done = 0
    if sum(sizes) + RESERVE > room:
        return done
    for path, size in zip(files, sizes, strict=True):
        with path.open("rb") as file:
            for start in range(0, size, PIECE):
                if is_due():
                    return done
                length = min(PIECE, size - start)
                os.posix_fadvise(file.fileno(), start, length, os.POSIX_FADV_WILLNEED)
                os.pread(file.fileno(), 1, start + length - 1)  # which waits: one piece is under way at a time
                done += length
    return done
