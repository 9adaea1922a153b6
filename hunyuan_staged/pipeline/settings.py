"""What a denoising is, after options, config, embeddings and version have been brought together. Loads nothing."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hunyuan_staged import geometry, presets, schedule_rules, versions
from hunyuan_staged.attention import modes
from hunyuan_staged.attention.by_step import AttentionByStep, choose_by_step
from hunyuan_staged.attention.choose import AttentionMode
from hunyuan_staged.errors import InputError
from hunyuan_staged.options import DEFAULT_ASPECT_RATIO, DEFAULT_DTYPE, DenoiseOptions
from hunyuan_staged.pipeline import calibrations
from hunyuan_staged.pipeline.common import attention_for
from hunyuan_staged.sampling import cache_settings, guidance_plan
from hunyuan_staged.sampling.calibration import noise_levels
from hunyuan_staged.versions import SuperResolutionVersion, TransformerVersion, Version
from hunyuan_staged.weights.folder import ModelFolder

_NAMED_FOUR = re.compile(r"(?<!\d)4[-_ ]?steps?(?![a-z])")  # in the name of weights or of an adapter for four steps
MOST_FEW_STEPS = 8  # that such an adapter is run with


@dataclass(frozen=True)
class Settings:
    """What shapes a denoising, beside what goes into it."""

    version: Version
    height: int
    width: int
    video_length: int
    num_inference_steps: int
    guidance_scale: float
    flow_shift: float
    dtype: str
    sigmas: tuple[float, ...] | None = None  # where they are given rather than computed from steps and shift

    @property
    def branches(self) -> int:
        """Of guidance: 2 with it, else 1."""
        return 2 if self.guidance_scale != 1 else 1


def resolve_settings(
    options: DenoiseOptions, config: Mapping[str, Any], version: TransformerVersion, flow_shift: float, image: Any
) -> Settings:
    """Every value from its option, else from stage 1, else from the version. image: its latents [1, 32, 1, h, w] or None.

    InputError for an aspect ratio that is not the image's, and where weights and image disagree.
    """
    if version.task == "i2v" and image is None:
        raise InputError(
            f"{version.name} makes videos from an image, and the embeddings hold none; run stage 1 with --image_path, or "
            "take t2v weights"
        )
    if version.task == "t2v" and image is not None:
        raise InputError(
            f"{version.name} takes no image, and the embeddings hold one; run stage 1 without --image_path, or take i2v "
            "weights"
        )
    if image is None:
        given = geometry.check_size(options.width, options.height)
        ratio = options.aspect_ratio or DEFAULT_ASPECT_RATIO
        height, width = given or geometry.size_for_ratio(version.resolution, ratio)
    else:
        height, width = (n * geometry.SPATIAL_RATIO for n in image.shape[-2:])
        asked = options.aspect_ratio
        if asked and geometry.size_for_ratio(version.resolution, asked) != (height, width):
            raise InputError(f"--aspect_ratio {asked} contradicts the image, which is {width}x{height}")
        if geometry.check_size(options.width, options.height) not in (None, (height, width)):
            raise InputError(
                f"{options.width} and --height {options.height} contradict the image's latents, which are "
                f"{width}x{height}; run stage 1 with them",
                option="width",
            )
    sampling = resolve_sampling(options, version, flow_shift)
    length = options.video_length or version.video_length
    steps, guidance_scale, flow_shift = sampling
    sigmas = options.given_sigmas()
    steps = len(sigmas) if sigmas else steps
    return Settings(
        version, height, width, length, steps, guidance_scale, flow_shift, resolve_dtype(options, config), sigmas
    )


def apply_preset(options: DenoiseOptions, version: TransformerVersion) -> DenoiseOptions:
    """The options with the flags of their preset where none are given; InputError for weights that it is not for."""
    if options.preset in (None, presets.EXACT):
        return options
    if version.use_meanflow:
        raise InputError(
            f"{options.preset} is for weights of many steps, and {version.name} takes few", option="preset"
        )
    own = version.num_inference_steps
    steps = options.num_inference_steps or round(presets.PRESETS[options.preset].steps * own)
    found = presets.fill(options.preset, steps, vars(options))
    return replace(options, num_inference_steps=options.num_inference_steps if steps == own else steps, **found)


def resolve_sampling(options: DenoiseOptions, version: Version, flow_shift: float) -> tuple[int, float, float]:
    """(steps, guidance_scale, flow_shift), each from its option, else the version's; flow_shift: the version's."""
    sampling = {
        "num_inference_steps": version.num_inference_steps,
        "guidance_scale": version.guidance_scale,
        "flow_shift": flow_shift,
    }
    steps, guidance_scale, flow_shift = (sampling | schedule_rules.stated(options)).values()
    return int(steps), guidance_scale, flow_shift


def resolve_dtype(options: DenoiseOptions, config: Mapping[str, Any]) -> str:
    """The name of the dtype that is asked for, else stage 1's."""
    return options.dtype or config.get("dtype") or DEFAULT_DTYPE


def pick_version(config: Mapping[str, Any], offered: Sequence[str], *, sparse: bool) -> TransformerVersion:
    """The version that stage 1 recorded, or the folder's only one; sparse takes the sparse weights beside it."""
    name = config.get("transformer_version")
    if name is None:
        if len(offered) != 1:
            raise InputError(
                f"{config.get('model_path')} holds {', '.join(offered)}, and the config does not say which one to take; "
                "run stage 1 again, or add transformer_version to generation_config.json"
            )
        name = offered[0]
    version = versions.parse_version(name)
    if sparse and not version.sparse:
        version = versions.make_version(version.resolution, version.task, sparse=True)
    return version


def sampling_warnings(options: DenoiseOptions, settings: Settings, file: Path | None = None) -> list[str]:
    """What to tell a user whose settings these weights were not made for. file: the transformer's, where it is one."""
    return [*_size_warnings(settings), *_version_warnings(options, settings, file)]


def _size_warnings(settings: Settings) -> list[str]:
    if isinstance(settings.version, SuperResolutionVersion):
        return []
    warning = geometry.size_warning(settings.version.resolution, settings.height, settings.width)
    return [warning] if warning else []


def _version_warnings(options: DenoiseOptions, settings: Settings, file: Path | None) -> list[str]:
    version = settings.version
    told = version.warnings(settings.guidance_scale, settings.num_inference_steps)
    if isinstance(version, SuperResolutionVersion):
        return told
    if not options.four_steps:
        names = [path.name for path in (file, *(path for path, _ in options.adapter_files())) if path]
        return told + [
            f"{name}: its name speaks of 4 steps, and this run takes {settings.num_inference_steps}; --four_steps takes "
            "4 steps, shift 5 and guidance 1"
            for name in names
            if _NAMED_FOUR.search(name.lower()) and settings.num_inference_steps > MOST_FEW_STEPS
        ]
    if options.lora or (version.cfg_distilled and file):
        return []
    return [f"--four_steps is for weights or an adapter made for it, and {version.name} has no adapter"]


# Which tensor of the embeddings is as wide as which entry of the transformer's config.
WIDTHS = {
    "prompt_embeds": "text_embed_dim",
    "negative_prompt_embeds": "text_embed_dim",
    "prompt_embeds_2": "text_embed_2_dim",
    "negative_prompt_embeds_2": "text_embed_2_dim",
    "image_embeds": "image_embed_dim",
}


def check_widths(
    embeddings: Mapping[str, Any],
    model_config: Mapping[str, Any],
    version: Version,
) -> None:
    """InputError for embeddings that another model's encoders made, before the transformer is loaded."""
    for name, entry in WIDTHS.items():
        if name in embeddings and entry in model_config and embeddings[name].shape[2] != model_config[entry]:
            raise InputError(
                f"{name} is {embeddings[name].shape[2]} wide, and the transformer {version.name} takes "
                f"{model_config[entry]}; the embeddings belong to another model"
            )


def resolve_cache(
    options: DenoiseOptions, settings: Settings, layers: int, folder: ModelFolder, warn: Callable[[str], object]
) -> cache_settings.CacheSettings | None:
    """The feature cache of a run of a transformer of so many layers, if it has one."""
    if not options.enable_cache:
        return None
    version = settings.version
    if version.use_meanflow:
        warn(f"{version.name} takes few, long steps, which have little in common: a cache costs it much")
    kind = options.cache_type or cache_settings.DEFAULT_CACHE_TYPE
    given = options.cache_options()
    calibrated = cache_settings.needs_calibration(kind, given)
    return cache_settings.resolve(
        kind,
        given,
        settings.num_inference_steps,
        layers,
        calibrations.find(folder, version.name) if calibrated else None,
        settings.sigmas or noise_levels(settings.num_inference_steps, settings.flow_shift),
    )


def resolve_guidance(
    options: DenoiseOptions, settings: Settings, caching: cache_settings.CacheSettings | None
) -> guidance_plan.GuidancePlan | None:
    """At which steps both guidance branches run; None where they do at every step."""
    steps = settings.num_inference_steps
    return guidance_plan.resolve(
        options.guidance_interval,
        options.guidance_reuse,
        steps=steps,
        guidance_scale=settings.guidance_scale,
        cached=caching.planned if caching else (),
    )


def resolve_attention(
    options: DenoiseOptions, settings: Settings, model: tuple[int, int], device: torch.device, dtype: torch.dtype
) -> tuple[AttentionMode, AttentionByStep | None]:
    """(the attention of all steps, that of each step where they differ). model: its layers, and how wide its heads are.

    Kernels are tried, unless --assume_gpu names a card. InputError for a mode that does not run.
    """
    layers, head_width = model
    choose = partial(attention_for, options, device=device, dtype=dtype, head_width=head_width)
    attention, schedule = choose(options.attention_mode()), options.attention_schedule()
    if not schedule:
        return attention, None
    modes.check_schedule(schedule, settings.num_inference_steps, layers)
    return attention, choose_by_step(schedule, settings.num_inference_steps, attention, choose)
