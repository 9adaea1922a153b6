"""What a denoising is known by, and what its plan, the log and its files say of it."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from hunyuan_staged.errors import InputError
from hunyuan_staged.files import contract, provenance, tensors
from hunyuan_staged.files.config import read_config, update_config
from hunyuan_staged.flags import options_of
from hunyuan_staged.memory import budget
from hunyuan_staged.memory.budget import FreeMemory, gib
from hunyuan_staged.options import DEFAULT_ASPECT_RATIO, DEFAULT_SAGE_BLOCKS, DenoiseOptions
from hunyuan_staged.parallel.layout import Layout, plan_layout
from hunyuan_staged.pipeline.common import gpu_name
from hunyuan_staged.pipeline.denoiser import Denoised
from hunyuan_staged.pipeline.denoising import DenoiseSetup
from hunyuan_staged.pipeline.jobs import output_dir
from hunyuan_staged.run_options import LARGER_FILES
from hunyuan_staged.sampling.state import RunIdentity
from hunyuan_staged.weights.single_file import TransformerFile

# Options of stage 2 that belong to one call and not to its result, or that name its folders.
OF_ONE_CALL = {
    "input_dir",
    "output_dir",
    "resume",
    "stop_after",
    "strict",
    "dry_run",
    "assume_gpu",
    "debug",
    "log_json",
}
OF_ONE_CALL |= {"jobs", "seeds", "gpus_per_job", "watch"}
FILE_OPTIONS = ("model_path", "transformer", "input_video", *LARGER_FILES)


def identity(setup: DenoiseSetup) -> RunIdentity:
    """All that the latents follow from, and what only rounds them. Reads samples of the weights."""
    options, settings, caching, adapters = setup.options, setup.settings, setup.caching, setup.adapters
    weights = setup.fingerprint()
    sigmas = setup.sigmas.tolist()
    chosen = asdict(settings) | {"version": settings.version.name, "dtype": str(setup.dtype), "seed": options.seed}
    return RunIdentity(
        chosen
        | {
            "attn_mode": options.attention_mode(),
            "sage_blocks_range": options.sage_blocks_range or DEFAULT_SAGE_BLOCKS,
            "sigmas": provenance.digest({"sigmas": sigmas}),
        }
        # Only where there are any: a state that was saved before there were caches, adapters and float8 stays good.
        | ({"weights_dtype": options.weights_dtype} if options.weights_dtype else {})
        | ({"fp8_matmul": True} if options.fp8_matmul else {})
        | ({"cache": caching.record()} if caching else {})
        | ({"attn_schedule": setup.by_step.record()} if setup.by_step else {})
        | ({"guidance": setup.guidance.record()} if setup.guidance else {})
        | ({"lora": adapters.facts()} if adapters.facts() else {})
        | ({"super_resolution": setup.enlarges_to} if setup.enlarges_to else {})
        | {"weights": weights, **setup.made_from},
        {
            "processes": setup.world.size,
            "cfg_parallel": options.cfg_parallel,
            "attention": ", ".join(setup.by_step.names) if setup.by_step else setup.attention.name,
            "device": gpu_name(setup.world.device) or setup.world.device.type,
            "compiled": setup.compiled,
            "torch": torch.__version__,
        },
        {
            "sigmas": "the schedule",
            "weights": setup.model_path,
            contract.EMBEDDINGS_HASH: options.input_dir,
            contract.LATENTS_HASH: str(output_dir(options)),
        },
        options_to_go_on(options),
    )


def options_to_go_on(options: DenoiseOptions) -> dict[str, Any]:
    """The options that are not the defaults, by name, as JSON; files with their whole paths, and not those of one call."""
    own = [option for option in options_of(DenoiseOptions) if option.name not in OF_ONE_CALL]
    given = {option.name: getattr(options, option.name) for option in own}
    found = {option.name: given[option.name] for option in own if given[option.name] != option.default}
    for name in FILE_OPTIONS:
        if found.get(name) and Path(found[name]).exists():  # else it is a hub id
            found[name] = str(Path(found[name]).absolute())
    if options.lora:
        found["lora"] = [f"{file.absolute()}:{weight:g}" for file, weight in options.adapter_files()]
    if output_dir(options) != Path(options.input_dir):
        found["input_dir"] = str(Path(options.input_dir).absolute())
    return found


def rows(setup: DenoiseSetup, plan: budget.BlockPlan, free: FreeMemory, done: int = 0) -> dict[str, object]:
    """The rows that --dry_run prints. done: steps that a stopped run has done."""
    settings, options, world = setup.settings, setup.options, setup.world
    layout = Layout(*plan_layout(world.size, settings.branches, setup.cfg_parallel))
    caching = setup.caching
    computed = f"float8 and {setup.dtype}" if options.fp8_matmul else setup.dtype
    steps = (
        f"{settings.num_inference_steps}, guidance {settings.guidance_scale:g}",
        setup.guidance and setup.guidance.describe(),
        caching and f"{caching.type} {'as it finds' if caching.reused is None else f'reuses {caching.reused}'}",
        done and f"{done} done already",
    )
    return {
        "version": settings.version.name,
        "video": f"{settings.width}x{settings.height}, {settings.video_length} frames",
        "tokens": f"{setup.size.video_tokens} of the video, {setup.text_tokens} of the text",
        "steps": ", ".join(word for word in steps if word),
        "weights": f"{gib(setup.weights.total)}, {options.weights_dtype or _held(setup)}; computed in {computed}",
        "attention": setup.attention_text,
        "ranks": f"{world.size}: {layout.describe()}{setup.heads.describe()}",
        **plan.rows(setup.weights.count, free),
    }


def _held(setup: DenoiseSetup) -> str:
    """What the weights are in, as the model or the file has them."""
    folder = setup.folder
    return folder.kind.name if isinstance(folder, TransformerFile) and folder.kind.name != "plain" else str(setup.dtype)


def finished(setup: DenoiseSetup, made_from: str) -> Path | None:
    """The latents of a setup, where they are there already; None where there are none, or others. made_from: as write."""
    folder, larger = output_dir(setup.options), setup.enlarges_to
    path = folder / contract.at_resolution(contract.LATENTS_FILE, larger)
    try:
        found = tensors.load_latents(folder, larger)[1].get(contract.MADE_FROM)
    except InputError:  # absent or broken
        return None
    if found != made_from or (larger is None and not _described(setup, folder)):
        return None
    return path


def _described(setup: DenoiseSetup, folder: Path) -> bool:
    """Whether the config tells of the latents; of a run that was killed in its last moment it does not."""
    config = read_config(folder) if (folder / contract.CONFIG_FILE).is_file() else {}
    steps = setup.settings.num_inference_steps
    return (config.get("seed"), config.get("num_inference_steps")) == (setup.options.seed, steps)


def describe(setup: DenoiseSetup) -> str:
    """One line for the log: all that shapes the video."""
    settings, options = setup.settings, setup.options
    schedule = f"sigmas {options.sigmas}" if settings.sigmas else f"shift {settings.flow_shift:g}"
    attention = setup.by_step.describe() if setup.by_step else setup.attention.name
    files = [f"{Path(file).name}:{weight:g}" for file, weight in options.adapter_files()]
    more = [
        options.preset and f"preset {options.preset}",
        options.weights_dtype and f"weights in {options.weights_dtype}",
        options.fp8_matmul and "products in float8",
        setup.caching and setup.caching.type,
        setup.guidance and setup.guidance.describe(),
    ]
    extra = "".join(f", {word}" for word in (*more, files and f"lora {' '.join(files)}") if word)
    return (
        f"{settings.version.name}: {settings.width}x{settings.height}, {settings.video_length} frames, "
        f"{settings.num_inference_steps} steps, guidance {settings.guidance_scale:g}, "
        f"{schedule}, seed {options.seed}, {setup.dtype}, attention {attention}{extra}; "
        f"prompt {setup.job.config.get('prompt')!r}"
    )


def optional_settings(setup: DenoiseSetup) -> dict[str, Any]:
    """What shapes the latents in some runs only: a file as the transformer, float8 weights, a cache, guidance at
    some steps, adapters; as text."""
    found: dict[str, Any] = {}
    if setup.options.weights_dtype:
        found["weights_dtype"] = setup.options.weights_dtype
    if setup.options.fp8_matmul:
        found["fp8_matmul"] = "on"
    if isinstance(setup.folder, TransformerFile):
        found["transformer_file"] = setup.folder.path.name
        found["transformer_file_version"] = setup.settings.version.name
    if setup.options.preset:
        found["preset"] = setup.options.preset
    if setup.caching:
        found["cache"] = json.dumps(setup.caching.record())
    if setup.by_step:
        found["attn_schedule"] = setup.options.attn_schedule
    if setup.guidance:
        found["guidance"] = json.dumps(setup.guidance.record())
    if setup.adapters.given:
        found["lora"] = json.dumps(setup.adapters.given)
    return found


def write(setup: DenoiseSetup, denoised: Denoised, made_from: str) -> Path:
    """Write the latents and what the config is to say of them; the path of the latents. made_from: RunIdentity.digest."""
    options, settings, latents = setup.options, setup.settings, denoised.latents
    chosen = {
        "height": settings.height,
        "width": settings.width,
        "num_inference_steps": settings.num_inference_steps,
        "guidance_scale": settings.guidance_scale,
        **({"sigmas": options.sigmas} if settings.sigmas else {"flow_shift": settings.flow_shift}),
        "seed": options.seed,
    }
    about = {
        "num_frames": settings.video_length,
        "attn_mode": setup.attention.name,
        **setup.made_from,
        contract.MADE_FROM: made_from,
        **optional_settings(setup),
    }
    folder, larger = output_dir(options), setup.enlarges_to
    metadata = {name: str(value) for name, value in (chosen | about).items()}
    path = tensors.save_latents(folder, latents, metadata, larger)
    if larger:
        return path  # the config describes the base run; what enlarged it is in the latents' metadata
    additions = {
        "aspect_ratio": f"{options.width}:{options.height}"
        if options.width
        else options.aspect_ratio or DEFAULT_ASPECT_RATIO,
        "video_length": settings.video_length,
        "attn_mode": setup.attention.name,
        **optional_settings(setup),
        "stage2_elapsed_time": round(denoised.seconds, 3),
    }
    update_config(folder, chosen | additions, source=options.input_dir)
    return path
