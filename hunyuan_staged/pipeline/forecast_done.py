"""What of a run is there already, as a plan counts it: files made from the same, and the steps of a stopped stage 2."""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from hunyuan_staged.errors import InputError
from hunyuan_staged.files import contract
from hunyuan_staged.options import DecodeOptions, DenoiseOptions, EncodeOptions
from hunyuan_staged.parallel.world import World
from hunyuan_staged.pipeline import (
    decode_jobs,
    decoding,
    decoding_records,
    denoising,
    denoising_records,
    encoding,
    encoding_records,
    input_video,
    jobs,
    upscaling,
)
from hunyuan_staged.pipeline.common import chosen_model
from hunyuan_staged.pipeline.input_video import InputVideo
from hunyuan_staged.pipeline.opening import open_recorded
from hunyuan_staged.runtime.progress import SILENT
from hunyuan_staged.sampling.state import RunIdentity, StateSaver
from hunyuan_staged.versions import SUPER_RESOLUTION

# How many steps of a stage 2 need not be done again, by what a run of it enlarges to; None: of the base run.
StepsDone = Mapping[str | None, int]
NOTHING: StepsDone = MappingProxyType({})


def is_done(own: Any, world: World) -> bool:
    """Whether what a stage makes by these options is there, made from all that determines it."""
    here = replace(own, dry_run=False, assume_gpu=None)
    try:
        if isinstance(own, EncodeOptions):
            return _is_encoded(here, world)
        return _is_denoised(here, world) if isinstance(own, DenoiseOptions) else _is_decoded(here, world)
    except InputError:  # the stage itself will say what is wrong
        return False


def _is_encoded(own: EncodeOptions, world: World) -> bool:
    there = (Path(own.output_dir) / contract.EMBEDDINGS_FILE).is_file()
    return there and encoding_records.is_written(encoding.resolve(own, encoding.read_image(own), world))


def _is_denoised(own: DenoiseOptions, world: World) -> bool:
    file = contract.at_resolution(contract.LATENTS_FILE, own.super_resolution)
    if not (jobs.output_dir(own) / file).is_file():
        return False
    found: list[bool] = []

    def look(setup: denoising.DenoiseSetup) -> None:
        found.append(denoising_records.finished(setup, denoising_records.identity(setup).digest()) is not None)

    _look_at_runs(own, world, look)
    return all(found)


def _is_decoded(own: DecodeOptions, world: World) -> bool:
    setup = decoding.resolve(own, decode_jobs.read(own), world)
    return decoding_records.is_written(setup, decoding_records.made_from(setup))


def _look_at_runs(own: DenoiseOptions, world: World, look: Callable[[denoising.DenoiseSetup], None]) -> None:
    """Look at each run of a stage 2, by what lies in its folder; InputError at the first whose input is not there."""
    job = jobs.read(own)
    if own.super_resolution:
        encoded = partial(_require_encoded, own, job.config, world.device)
        upscaling.enlarge(own, job, world, lambda setup, _: look(setup), encode=encoded)
    else:
        look(denoising.resolve(own, job, world))


def is_encoded(own: DenoiseOptions, config: Mapping[str, Any], device: torch.device, video: InputVideo) -> bool:
    """Whether the latents of a video of the user's are there, made from the same."""
    path = chosen_model(own.model_path, own.input_dir, config)
    try:
        return input_video.is_encoded(video, own, partial(open_recorded, path, config, SILENT), device)
    except InputError:  # the stage itself will say what is wrong
        return False


def _require_encoded(own: DenoiseOptions, config: Mapping[str, Any], device: torch.device, video: InputVideo) -> None:
    if not is_encoded(own, config, device, video):
        raise InputError(f"{video.path} has not been encoded")


def steps_done(own: DenoiseOptions, world: World) -> StepsDone:
    """The steps that a stage 2 which goes on finds done, in finished latents or in a state.

    world: of one process. InputError, with --resume, for a state that is broken or of other settings, as of the stage
    itself; without it such a state counts for nothing. Of a video that is the input nothing is done before it is encoded.
    """
    folder = jobs.output_dir(own)
    sizes = None, *SUPER_RESOLUTION
    names = [
        contract.at_resolution(file, size) for file in (contract.STATE_FILE, contract.LATENTS_FILE) for size in sizes
    ]
    if not any((folder / name).is_file() for name in names):
        return NOTHING
    runs: list[tuple[denoising.DenoiseSetup, RunIdentity]] = []
    with contextlib.suppress(InputError):  # the plan says what is wrong; and what has no input yet has not begun
        here = replace(own, dry_run=False, assume_gpu=None)
        _look_at_runs(here, world, lambda setup: runs.append((setup, denoising_records.identity(setup))))
    return {setup.enlarges_to: _steps_done(setup, identity, folder) for setup, identity in runs}


def _steps_done(setup: denoising.DenoiseSetup, identity: RunIdentity, folder: Path) -> int:
    steps = setup.settings.num_inference_steps
    if denoising_records.finished(setup, identity.digest()):
        return steps
    saver = StateSaver(folder, identity, steps=steps, every=0, world=setup.world)
    return saver.load(setup.shape, resume=setup.options.resume, lenient=True).done
