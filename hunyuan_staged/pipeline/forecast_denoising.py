"""The plan of stage 2 that --dry_run prints, super resolution included; forecast.py has the others."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hunyuan_staged import geometry, versions
from hunyuan_staged.encoders.text import glyph_text
from hunyuan_staged.files import contract
from hunyuan_staged.files.config import read_config
from hunyuan_staged.memory import expected as times
from hunyuan_staged.memory import operations
from hunyuan_staged.options import DecodeOptions, DenoiseOptions, offload_asked
from hunyuan_staged.parallel.world import World
from hunyuan_staged.pipeline import denoising, denoising_records, jobs, low_resolution, upscaling, vae_encoding
from hunyuan_staged.pipeline.choices import Goal, choices
from hunyuan_staged.pipeline.common import chosen_model
from hunyuan_staged.pipeline.denoising import DenoiseSetup
from hunyuan_staged.pipeline.denoising_time import denoising_time
from hunyuan_staged.pipeline.forecast_done import NOTHING, StepsDone, is_encoded, steps_done
from hunyuan_staged.pipeline.forecast_target import (
    INPUT_VIDEO,
    LARGER,
    TITLES,
    FindTarget,
    StagePlan,
    Target,
    figures,
    finished,
    planned,
    target_of,
)
from hunyuan_staged.pipeline.input_video import InputVideo, encoder_dtype
from hunyuan_staged.pipeline.opening import open_recorded
from hunyuan_staged.pipeline.transformers import choose_transformer
from hunyuan_staged.run_options import DEFAULT_ASPECT_RATIO, DEMO_CHECKPOINT
from hunyuan_staged.runtime.progress import SILENT, Reporter
from hunyuan_staged.weights import components
from hunyuan_staged.weights.published import model_for_plan

IMAGE_TOKENS = 729  # of SigLIP


def plan_denoising(
    options: DenoiseOptions, world: World, report: Reporter = SILENT, done: StepsDone | None = None
) -> list[StagePlan]:
    """The plans of stage 2, for what stage 1 wrote, or for a prompt that it might be given; several where super resolution
    takes several runs. done: the steps that need not be done again, None: as --resume finds them."""
    folder = Path(options.input_dir)
    if (folder / contract.EMBEDDINGS_FILE).exists():
        job = jobs.read(options)
        report.warn_or_refuse(job.mismatch, strict=options.strict)
        if done is None:
            done = steps_done(options, World(0, 1, world.device)) if options.resume else {}
        return _plans(options, job, target_of(options, world), report, done)
    config = read_config(folder) if (folder / contract.CONFIG_FILE).exists() else {}
    return assume_denoising(options, likely_config(config, options), world, report)


def likely_config(config: Mapping[str, Any], options: DenoiseOptions | DecodeOptions) -> dict[str, Any]:
    """The config with what stage 1 would record where nothing else is asked for: the demo's weights, or a version."""
    path = options.model_path or config.get("model_path") or str(DEMO_CHECKPOINT)
    if config.get("transformer_version") or Path(path).is_file():
        return {**config, "model_path": path}
    offered = model_for_plan(path, ("transformer",)).versions()
    default = f"{versions.DEFAULT_RESOLUTION}_t2v"
    plain = [name for name in offered if name.endswith("_t2v")]
    version = default if default in offered else next(iter(plain or offered), None)
    return {**config, "model_path": path, "transformer_version": version}


def assume_denoising(
    options: DenoiseOptions,
    config: Mapping[str, Any],
    world: World,
    report: Reporter,
    image_size: tuple[int, int] | None = None,
    find_target: FindTarget = target_of,
    done: StepsDone = NOTHING,
) -> list[StagePlan]:
    """The plans of stage 2 for embeddings that are not there. image_size: (H, W) in px of the image, if there is one; done:
    the steps that need not be done again."""
    job = assumed_job(options, config, image_size)
    assumed = f"a prompt of {operations.TEXT_TOKENS} tokens"
    return _plans(options, job, find_target(options, world), report, done, assumed)


def assumed_job(
    options: DenoiseOptions, config: Mapping[str, Any], image_size: tuple[int, int] | None
) -> jobs.DenoiseJob:
    """What stage 1 might leave: embeddings of the right widths, and nothing in them."""
    folder, _, version = choose_transformer(options, config, SILENT)
    widths = components.transformer_config(folder, version.name)
    embeddings: dict[str, torch.Tensor] = {}
    glyphs = len(glyph_text(config.get("prompt") or "").encode())
    for prefix in ("", "negative_"):
        for part, tokens in (("", operations.TEXT_TOKENS), ("_2", 0 if prefix else glyphs)):
            width = widths["text_embed_2_dim" if part else "text_embed_dim"]
            embeddings[f"{prefix}prompt_embeds{part}"] = torch.ones(1, 1, 1).expand(1, tokens, width)
            embeddings[f"{prefix}prompt_embeds_mask{part}"] = torch.ones(1, tokens, dtype=torch.int64)
    if version.task == "i2v":
        size = image_size or geometry.size_for_ratio(version.resolution, options.aspect_ratio or DEFAULT_ASPECT_RATIO)
        shape = geometry.latent_shape(1, *size, geometry.LATENT_CHANNELS)
        embeddings["image_embeds"] = torch.ones(1, 1, 1).expand(1, IMAGE_TOKENS, widths["image_embed_dim"])
        embeddings["image_latents"] = torch.zeros(1, 1, 1, 1, 1).expand(shape)
        larger = options.super_resolution
        for further in versions.super_resolution_chain(version.resolution, larger) if larger else ():
            shape = low_resolution.enlarged_shape(further, shape)
            embeddings[contract.large_image_latents(further.resolution)] = torch.zeros(1, 1, 1, 1, 1).expand(shape)
    return jobs.DenoiseJob(embeddings, "", {**config, "transformer_version": version.name}, None)


def _plans(
    options: DenoiseOptions,
    job: jobs.DenoiseJob,
    target: Target,
    report: Reporter,
    done: StepsDone,
    assumed: str = "",
) -> list[StagePlan]:
    if not options.super_resolution:
        return [_plan(denoising.resolve(options, job, target.world, report), target, done, assumed)]
    plans: list[StagePlan] = []
    upscaling.enlarge(
        options,
        job,
        target.world,
        lambda setup, _: plans.append(_plan(setup, target, done, assumed)),
        report,
        lambda video: plans.append(_plan_video(video, options, job.config, target, report)),
    )
    return plans


def _plan_video(
    video: InputVideo, options: DenoiseOptions, config: Mapping[str, Any], target: Target, report: Reporter
) -> StagePlan:
    """The plan of encoding a video of the user's."""
    path = chosen_model(options.model_path, options.input_dir, config)
    folder = open_recorded(path, config, report, planned=True)
    dtype = encoder_dtype(target.world.device)
    plan = vae_encoding.plan_for_model(video.size, folder, dtype, target.free, target.world.size)
    vae = components.vae_config(folder)
    expected = vae_encoding.encoding_time(plan, vae, target.card) if target.card else None
    version = str(config.get("transformer_version") or f"{versions.DEFAULT_RESOLUTION}_t2v")
    rows = plan.rows(target.free)
    if is_encoded(options, config, target.world.device, video):
        expected, rows = times.measured(0), rows | {"encoding": "done already"}
    rows = finished(rows, expected, target, figures(folder, version))
    return StagePlan(rows, expected, config, video.shape, video, plan, INPUT_VIDEO)


def _plan(setup: DenoiseSetup, target: Target, done: StepsDone, assumed: str) -> StagePlan:
    plan, steps = planned(setup, target), done.get(setup.enlarges_to, 0)
    expected = denoising_time(setup, plan, target.card, steps) if target.card else None
    version = setup.settings.version.name
    base, larger = setup.job.config.get("transformer_version"), setup.enlarges_to
    rows = denoising_records.rows(setup, plan, target.free, steps)
    left_to_us = offload_asked(setup.options, setup.weights.count) is None
    resident = choices(setup, Goal(target.free, resident=True)) if plan.offloaded and left_to_us else []
    rows = finished(
        rows,
        expected,
        target,
        ("resident with", ", ".join(map(str, resident))),
        ("assumed", assumed),
        figures(setup.folder, base if larger and base else version, larger),
    )
    config = {**setup.job.config, "transformer_version": version}
    title = f"{LARGER} {version}" if larger else TITLES[2]
    return StagePlan(rows, expected, config, setup.shape, setup, plan, title)


def larger_options(options: DenoiseOptions, shape: tuple[int, ...]) -> DenoiseOptions:
    """Those of super resolution for latents [1, C, t, h, w] that are not there yet, whatever lies in their folder."""
    return replace(options, video_length=(shape[2] - 1) * geometry.TEMPORAL_RATIO + 1)
