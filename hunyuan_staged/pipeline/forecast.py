"""What --dry_run prints: the plan of a stage, or of all three, and how long it takes. Nothing is loaded or written.

What an earlier stage has not written yet is assumed; of a model that is not on disk the published numbers serve. The
rows of a plan say so.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hunyuan_staged import geometry, versions
from hunyuan_staged.decoding import timing
from hunyuan_staged.errors import InputError
from hunyuan_staged.files import contract
from hunyuan_staged.files.config import read_config
from hunyuan_staged.memory import expected as times
from hunyuan_staged.memory import operations
from hunyuan_staged.options import DecodeOptions, DenoiseOptions, EncodeOptions
from hunyuan_staged.parallel.world import World
from hunyuan_staged.pipeline import decode_jobs, decoding, encoding, encoding_records, low_resolution
from hunyuan_staged.pipeline.decode_jobs import DecodeJob
from hunyuan_staged.pipeline.forecast_denoising import assume_denoising, larger_options, likely_config
from hunyuan_staged.pipeline.forecast_done import NOTHING, StepsDone, is_done, steps_done
from hunyuan_staged.pipeline.forecast_target import (
    TITLES,
    FindTarget,
    Rows,
    StagePlan,
    Target,
    figures,
    finished,
    planned,
    target_of,
    time_of_run,
)
from hunyuan_staged.run_options import DEFAULT_ASPECT_RATIO
from hunyuan_staged.runtime.progress import SILENT, Reporter
from hunyuan_staged.weights.hub import diffusers_repository

TEMPLATE_TOKENS = 108  # of the chat round a prompt, which the language model reads, too


# -- stage 1 --


def plan_encoding(
    options: EncodeOptions, world: World, report: Reporter = SILENT, find_target: FindTarget = target_of
) -> StagePlan:
    """The plan of stage 1."""
    target = find_target(options, world)
    setup = encoding.resolve(options, encoding.read_image(options), target.world, report)
    plan = planned(setup, target)
    tokens = 2 * (TEMPLATE_TOKENS + operations.TEXT_TOKENS)  # of the prompt and of the negative one
    flops = 2.0 * tokens * setup.weights.total / setup.dtypes.text.itemsize
    expected = times.estimated(flops, flops, target.card) if target.card else None
    rows = finished(setup.rows(plan, target.free), expected, target, figures(setup.folder, setup.version.name))
    config = {
        "model_path": encoding_records.recorded_model(setup),
        "transformer_version": setup.version.name,
        "prompt": options.prompt,
        "dtype": options.dtype,
    }
    return StagePlan(rows, expected, config, (), setup, plan)


# -- stage 3 --


def plan_decoding(options: DecodeOptions, world: World, report: Reporter = SILENT) -> StagePlan:
    """The plan of stage 3, for the latents that are there, or for those of a run by default settings."""
    folder = Path(options.input_dir)
    asked = contract.resolution_asked(options.latents)
    there = [*contract.latents_present(folder), *[None] * (folder / contract.LATENTS_FILE).is_file()]
    if there if options.latents is None else asked in there:
        job = decode_jobs.read(options, report)
        report.warn_or_refuse(job.mismatch, strict=options.strict)
        return _plan_decoding(options, job, target_of(options, world), report)
    config = read_config(folder) if (folder / contract.CONFIG_FILE).exists() else {}
    config = likely_config(config, options)
    version = versions.parse_version(config["transformer_version"])
    height, width = geometry.size_for_ratio(version.resolution, DEFAULT_ASPECT_RATIO)
    shape = geometry.latent_shape(version.video_length, height, width, geometry.LATENT_CHANNELS)
    for larger in versions.super_resolution_chain(version.resolution, asked) if asked else ():
        shape = low_resolution.enlarged_shape(larger, shape)
    return assume_decoding(options, config, shape, world, report)


def assume_decoding(
    options: DecodeOptions,
    config: Mapping[str, Any],
    shape: tuple[int, ...],
    world: World,
    report: Reporter,
    find_target: FindTarget = target_of,
) -> StagePlan:
    """The plan of stage 3 for latents [1, C, t, h, w] that are not there."""
    job = DecodeJob(torch.zeros(1, 1, 1, 1, 1).expand(shape), "", dict(config), None)
    return _plan_decoding(options, job, find_target(options, world), report, f"latents {list(shape)}")


def _plan_decoding(
    options: DecodeOptions, job: DecodeJob, target: Target, report: Reporter, assumed: str = ""
) -> StagePlan:
    setup = decoding.resolve(options, job, target.world, report)
    plan = planned(setup, target)
    about = setup.config, setup.size, plan, options.tile_overlap, setup.world.size
    expected = None
    if target.card:
        expected = timing.decoding_time(target.card, *about)
    rows = setup.rows(plan, target.free, target.world.size)
    version = str(job.config.get("transformer_version") or f"{versions.DEFAULT_RESOLUTION}_t2v")
    rows = finished(rows, expected, target, ("assumed", assumed), figures(setup.model, version))
    return StagePlan(rows, expected, job.config, tuple(job.latents.shape), setup, plan)


# -- all three --


def world_of(processes: int, world: World) -> World:
    """The first of so many processes that are not there, on the device of this one; InputError for too few GPUs."""
    if world.device.type == "cuda" and processes > torch.cuda.device_count():
        raise InputError(f"{processes} processes share {torch.cuda.device_count()} GPUs; start one a GPU")
    return World(0, processes, world.device)


def plan_run(options: Sequence[Any], world: World, report: Reporter = SILENT) -> dict[str, Rows]:
    """The plans of a whole run in a folder of its own, by title; the last row is the time of all.

    options: as of plan_processes; world: of stages 2 and 3.
    """
    encode, denoise, *more = options
    here = World(0, 1, world.device)
    goes_on = denoise.resume and is_done(encode, here)
    done = [steps_done(one, here) if goes_on and isinstance(one, DenoiseOptions) else NOTHING for one in options]
    found = plan_processes([encoding_of_run(encode, denoise), denoise, *more], world, report, done=done)
    stages = [plan for plans in found for plan in plans]
    second = stages[1 : -1 if more else None]
    expected = times.total(stage.expected for stage in stages)
    if expected:
        told = time_of_run(expected)
    else:
        told = str(next(stage.rows for stage in stages[::-1] if not stage.expected)["expected time"])
    titles = [TITLES[1], *(plan.title for plan in second)]
    titles += [TITLES[3]] if more else []
    return dict(zip(titles, (stage.rows for stage in stages), strict=True)) | {"the whole run": {"time": told}}


def plan_processes(
    options: Sequence[Any],
    world: World,
    report: Reporter = SILENT,
    find_target: FindTarget = target_of,
    done: Sequence[StepsDone] | None = None,
) -> list[list[StagePlan]]:
    """The plans of what a whole run starts, one after the other: of a second stage 2 several, where it takes several runs.

    options: of stage 1, of stage 2, maybe of super resolution, and of stage 3; or of the first so many. find_target: what
    they are for. done: of each, the steps that need not be done again.
    """
    encode, denoise, *more = options
    done = done or [NOTHING] * len(options)
    first = plan_encoding(encode, World(0, 1, world.device), report, find_target)
    size, picture = geometry.check_size(encode.width, encode.height), encoding.read_image(encode)
    if picture is None:
        size = None
    elif size is None:
        version = versions.parse_version(first.config["transformer_version"])
        size = geometry.nearest_size(version.resolution, picture.height / picture.width)
    about = first.config, world, report, size, find_target
    found = [[first], assume_denoising(denoise, *about, done[1])]
    if len(more) == 2:
        found.append(assume_denoising(larger_options(more[0], found[1][0].shape), *about, done[2]))
    if more:
        shape = found[-1][-1].shape
        found.append([assume_decoding(more[-1], first.config, shape, world, report, find_target)])
    return found


def encoding_of_run(options: EncodeOptions, denoise: DenoiseOptions) -> EncodeOptions:
    """Stage 1's options in a plan: for a version that stage 2 is given alone, those of it as it is published."""
    name = denoise.transformer_version
    if not name or denoise.transformer or denoise.model_path:
        return options
    version = versions.parse_version(name)
    if version.task == "i2v" and not options.image_path:
        raise InputError(f"{name} makes videos from an image: give --image_path", option="transformer_version")
    return replace(
        options,
        model_path=diffusers_repository(version.name),
        resolution=version.resolution,
        cfg_distilled=version.cfg_distilled,
        step_distilled=version.step_distilled,
        sparse_attn=version.sparse,
    )
