#!/usr/bin/env python3
"""Stage 2: text embeddings → video latents, by the denoising transformer."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import utils
from hunyuan_staged import geometry, versions
from hunyuan_staged.attention import modes
from hunyuan_staged.errors import InputError
from hunyuan_staged.memory import budget, estimates, timings
from hunyuan_staged.options import (
    DEFAULT_ASPECT_RATIO,
    DEFAULT_DTYPE,
    DEFAULT_SAGE_BLOCKS,
    DenoiseOptions,
    offload_asked,
)
from hunyuan_staged.parsing import Parser, make_parser, parse
from hunyuan_staged.sampling import cache, cache_settings

if TYPE_CHECKING:
    from hunyuan_staged.sampling.state import RunIdentity
    from hunyuan_staged.versions import TransformerVersion
    from hunyuan_staged.weights.lora import Adapters

EXAMPLE = """\
examples:
  python stage2_transformer.py --model_path ckpts/HunyuanVideo-1.5 --video_length 49
  torchrun --nproc-per-node 8 stage2_transformer.py --seed 7 --output_dir runs/seed7
"""

OPTIONS = DenoiseOptions


def build_parser() -> Parser:
    """The parser of DenoiseOptions."""
    return make_parser(DenoiseOptions, "stage2_transformer.py", __doc__ or "", EXAMPLE)


@dataclass(frozen=True)
class Settings:
    """What a run is, after flags, config, embeddings and version have been brought together."""

    version: TransformerVersion
    height: int
    width: int
    video_length: int
    num_inference_steps: int
    guidance_scale: float
    flow_shift: float
    dtype: str


def settle(
    options: DenoiseOptions, config: dict[str, Any], version: TransformerVersion, flow_shift: float, image_latents: Any
) -> Settings:
    """Every value from its flag, else from stage 1, else from the version."""
    if image_latents is None:
        height, width = geometry.size_for_ratio(version.resolution, options.aspect_ratio or DEFAULT_ASPECT_RATIO)
    else:
        height, width = (n * geometry.SPATIAL_RATIO for n in image_latents.shape[-2:])
        if options.aspect_ratio and geometry.size_for_ratio(version.resolution, options.aspect_ratio) != (
            height,
            width,
        ):
            raise InputError(f"--aspect_ratio {options.aspect_ratio} contradicts the image, which is {width}x{height}")
    return Settings(
        version,
        height,
        width,
        options.video_length or version.video_length,
        options.num_inference_steps or version.num_inference_steps,
        version.guidance_scale if options.guidance_scale is None else options.guidance_scale,
        flow_shift,
        options.dtype or config.get("dtype") or DEFAULT_DTYPE,
    )


def pick_version(config: dict[str, Any], offered: Sequence[str], *, sparse: bool) -> TransformerVersion:
    """The version that stage 1 recorded, or the folder's only one; --sparse_attn takes the sparse weights beside it."""
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


# Which tensor of the embeddings is as wide as which entry of the transformer's config.
WIDTHS = {
    "prompt_embeds": "text_embed_dim",
    "negative_prompt_embeds": "text_embed_dim",
    "prompt_embeds_2": "text_embed_2_dim",
    "negative_prompt_embeds_2": "text_embed_2_dim",
    "image_embeds": "image_embed_dim",
}


def check_widths(embeddings: dict[str, Any], model_config: dict[str, Any], version: TransformerVersion) -> None:
    """InputError for embeddings that another model's encoders made, before the transformer is loaded."""
    for name, entry in WIDTHS.items():
        if name in embeddings and entry in model_config and embeddings[name].shape[2] != model_config[entry]:
            raise InputError(
                f"{name} is {embeddings[name].shape[2]} wide, and the transformer {version.name} takes "
                f"{model_config[entry]}; the embeddings belong to another model"
            )


def facts_of(
    run: utils.Run,
    options: DenoiseOptions,
    settings: Settings,
    dtype: Any,
    attention: Any,
    hashes: dict[str, tuple[str, str]],
    caching: cache_settings.CacheSettings | None,
    adapters: Adapters,
) -> RunIdentity:
    """All that the latents follow from, and what only rounds them. hashes: of what goes in, each with where it lies."""
    import torch

    from hunyuan_staged.files import provenance
    from hunyuan_staged.sampling import schedule
    from hunyuan_staged.sampling.state import RunIdentity

    sigmas = schedule.flow_sigmas(settings.num_inference_steps, settings.flow_shift).tolist()
    chosen = asdict(settings) | {"version": settings.version.name, "dtype": str(dtype), "seed": options.seed}
    device = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else run.device.type
    return RunIdentity(
        chosen
        | {
            "attn_mode": options.attention_mode(),
            "sage_blocks_range": options.sage_blocks_range or DEFAULT_SAGE_BLOCKS,
            "sigmas": provenance.digest({"sigmas": sigmas}),
        }
        # Only where there are any: a state that was saved before there were caches, adapters and float8 stays good.
        | ({"weights_dtype": options.weights_dtype} if options.weights_dtype else {})
        | ({"cache": caching.record()} if caching else {})
        | ({"lora": adapters.facts()} if adapters.facts() else {})
        | {name: value for name, (value, _) in hashes.items()},
        {
            "processes": run.world.size,
            "cfg_parallel": options.cfg_parallel,
            "attention": attention.name,
            "device": device,
            "compiled": compiled(run, options),
            "torch": torch.__version__,
        },
        {"sigmas": "the schedule"} | {name: origin for name, (_, origin) in hashes.items()},
    )


def compiled(run: utils.Run, options: DenoiseOptions) -> bool:
    """Whether torch.compile fuses the blocks."""
    return run.device.type == "cuda" and not options.no_compile


def plan_memory(
    run: utils.Run,
    options: DenoiseOptions,
    settings: Settings,
    skeleton: Any,
    dtype: Any,
    attention: Any,
    text_tokens: int,
) -> tuple[budget.BlockPlan, dict[str, object]]:
    """How the transformer is laid out in memory, and the rows that --dry_run prints; InputError where it does not fit."""
    import torch

    from hunyuan_staged.memory.offloading import weights_of, widened_bytes
    from hunyuan_staged.parallel.layout import Layout, plan_layout
    from hunyuan_staged.pipeline import common

    config = skeleton.config
    rows, shards = plan_layout(run.world.size, guidance_rows(settings), options.cfg_parallel)
    weights = weights_of(skeleton, skeleton.transformer_blocks, dtype)
    patch = (config.patch_size_t, config.patch_size, config.patch_size)
    denoising = estimates.DenoisingSize(
        geometry.video_tokens(settings.video_length, settings.height, settings.width, patch),
        text_tokens,
        config.num_attention_heads * config.attention_head_dim,
        dtype.itemsize,
        attention.name,
        compiled(run, options),
        shards,
        widened_bytes(skeleton.transformer_blocks[0], dtype),
    )
    free, asked = common.free_memory(run.world), offload_asked(options, weights.count)
    fit = budget.plan_blocks(
        f"{settings.width}x{settings.height}, {settings.video_length} frames",
        weights,
        denoising.working,
        free,
        asked=asked,
        ranks=int(os.environ.get("LOCAL_WORLD_SIZE", run.world.size)),
        remedies=estimates.denoising_remedies(
            weights,
            denoising,
            free,
            asked=asked,
            num_frames=settings.video_length,
            float8=bool(options.weights_dtype),
            resolution=settings.version.resolution,
        ),
    )
    gpu = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else None
    seconds = timings.expected_seconds(
        gpu,
        denoising,
        fit.offloaded,
        layers=weights.count,
        rows=guidance_rows(settings),
        ranks=run.world.size,
        steps=settings.num_inference_steps,
        float8=bool(options.weights_dtype),
    )
    return fit, {
        "version": settings.version.name,
        "video": f"{settings.width}x{settings.height}, {settings.video_length} frames",
        "tokens": f"{denoising.video_tokens} of the video, {text_tokens} of the text",
        "steps": f"{settings.num_inference_steps}, guidance {settings.guidance_scale:g}",
        "weights": f"{budget.gib(weights.total)}, {options.weights_dtype or dtype}; computed in {dtype}",
        "attention": f"{attention.name} ({attention.reason})",
        "ranks": f"{run.world.size}: {Layout(rows, shards).describe()}",
        **fit.rows(weights.count, free),
        "expected time": "unknown: no such step has been measured" if seconds is None else f"{seconds:.0f} s ({gpu})",
    }


def guidance_rows(settings: Settings) -> int:
    """2 with guidance, else 1."""
    return 2 if settings.guidance_scale != 1 else 1


def settle_cache(
    options: DenoiseOptions,
    settings: Settings,
    version: TransformerVersion,
    model_config: dict[str, Any],
    warn: Callable[[str], Any],
) -> cache_settings.CacheSettings | None:
    """The cache of this run, if it has one."""
    if not options.enable_cache:
        return None
    if version.step_distilled:
        warn(f"{version.name} takes few, long steps, which have little in common: a cache costs it much")
    layers = model_config.get("num_layers", versions.LAYERS)
    return cache_settings.resolve(
        options.cache_type or cache_settings.DEFAULT_CACHE_TYPE,
        options.cache_options(),
        settings.num_inference_steps,
        layers,
    )


def body(run: utils.Run, options: DenoiseOptions) -> None:
    """Read the embeddings, load the transformer, denoise, write the latents."""
    import torch

    from hunyuan_staged.attention.choose import choose_attention
    from hunyuan_staged.files import contract, provenance, tensors
    from hunyuan_staged.files.config import read_config, update_config
    from hunyuan_staged.memory.offloading import load_offloaded
    from hunyuan_staged.models import transformer
    from hunyuan_staged.models.embeddings import conditioning_of
    from hunyuan_staged.parallel.layout import make_layout
    from hunyuan_staged.pipeline import common
    from hunyuan_staged.sampling import conditions, loop, schedule, state
    from hunyuan_staged.weights import loading, lora
    from hunyuan_staged.weights.folder import open_model

    output_dir = Path(options.output_dir or options.input_dir)
    contract.require_file(Path(options.input_dir) / contract.CONFIG_FILE)
    if not options.dry_run:
        run.lock(output_dir / contract.LOCK_FILE, contract.STAGE_FILES[2])
    config = read_config(options.input_dir)
    embeddings, metadata = tensors.load_embeddings(options.input_dir)
    embeddings_hash = provenance.sha256(Path(options.input_dir) / contract.EMBEDDINGS_FILE)
    run.warn_or_refuse(
        provenance.embeddings_mismatch(options.input_dir, config, metadata, embeddings_hash), strict=options.strict
    )
    image_latents = embeddings.get("image_latents")
    model_path = options.model_path or config.get("model_path")
    if not model_path:
        raise InputError(f"{options.input_dir} records no model_path; give --model_path")

    folder = open_model(model_path, ("transformer", "scheduler"), run.progress)
    version = pick_version(config, folder.versions(), sparse=options.sparse_attn)
    flow_shift = folder.flow_shift(version.name) or version.flow_shift
    settings = settle(options, config, version, flow_shift, image_latents)
    for warning in version.warnings(settings.guidance_scale, settings.num_inference_steps):
        run.log.warning(warning)
    dtype = common.torch_dtype(settings.dtype, run.device)
    model_config = folder.transformer_config(version.name)
    width = model_config.get("attention_head_dim", 128)
    attention = choose_attention(options.attention_mode(), run.device, dtype, options.sage_blocks(), head_width=width)
    if attention.name == modes.SPARSE_ATTN_MODE and not version.sparse:
        run.log.warning(f"{version.name} was not trained for {attention.name}; --sparse_attn takes weights that were")
    check_widths(embeddings, model_config, version)
    shape = geometry.latent_shape(
        settings.video_length,
        settings.height,
        settings.width,
        model_config.get("out_channels", geometry.LATENT_CHANNELS),
    )
    prefixes = ("negative_", "") if guidance_rows(settings) == 2 else ("",)
    skeleton = folder.transformer_skeleton(version.name, weights_dtype=options.weights_dtype)
    text_tokens = max(
        conditioning_of(embeddings, prefix, device=torch.device("cpu"), dtype=dtype).length for prefix in prefixes
    )
    caching = settle_cache(options, settings, version, model_config, run.log.warning)
    files = options.adapter_files()
    adapters = lora.load(files, folder.transformer_shapes(version.name)) if files else lora.Adapters()
    if options.dry_run:
        run.show_plan(plan_memory(run, options, settings, skeleton, dtype, attention, text_tokens)[1])
        return
    hashes = {
        "weights": (folder.fingerprint(["transformer"], version.name), model_path),
        contract.EMBEDDINGS_HASH: (embeddings_hash, options.input_dir),
    }
    facts = facts_of(run, options, settings, dtype, attention, hashes, caching, adapters)
    keeper = state.StateSaver(
        output_dir,
        facts,
        steps=settings.num_inference_steps,
        every=options.checkpoint_every,
        world=run.world,
        interrupts=run.interrupts,
        tell=run.log.info,
        warn=run.log.warning,
    )
    done, kept, more = keeper.load(shape, resume=options.resume)
    fit, _ = plan_memory(run, options, settings, skeleton, dtype, attention, text_tokens)
    layout = make_layout(run.world, guidance_rows(settings), options.cfg_parallel)
    run.log.info(f"attention: {attention.name} ({attention.reason}); layout: {layout.describe()}")
    run.log.info(fit.describe(len(skeleton.transformer_blocks)))

    with run.timed("load"):

        def load(places: loading.Destinations) -> Any:
            return folder.load_transformer(
                version.name,
                device=run.device,
                dtype=dtype,
                progress=run.progress,
                skeleton=skeleton,
                places=places,
                adapt=adapters.fused,
            )

        model, blocks = load_offloaded(
            skeleton,
            "transformer_blocks",
            fit.offloaded,
            load,
            device=run.device,
            dtype=dtype,
            world=run.world,
        )
    run.log.info(
        f"{version.name}: {settings.width}x{settings.height}, {settings.video_length} frames, "
        f"{settings.num_inference_steps} steps, guidance {settings.guidance_scale:g}, "
        f"shift {settings.flow_shift:g}, seed {options.seed}, {dtype}"
    )
    with run.timed("compute"):
        started = time.perf_counter()
        forward = transformer.Transformer(model, attention, shape[2:], layout, blocks, compile=compiled(run, options))
        rows = [conditioning_of(embeddings, p, device=run.device, dtype=dtype) for p in prefixes]
        noise = schedule.initial_noise(shape, options.seed, dtype).to(run.device)
        cached = None
        if caching:
            cached = cache.Cache(caching, layout, forward.total)
            cached.restore(more, done, run.device, len(rows))

        def after_step(i: int, latents: torch.Tensor) -> None:
            if cached:
                run.set_postfix("{} computed, {} reused".format(*cached.counts))
            on_step(i, latents)

        with keeper.watching(partial(cached.tensors, run.world) if cached else dict) as on_step:
            latents = loop.denoise(
                forward,
                noise if kept is None else kept.to(run.device),
                conditions.condition_channels(noise, image_latents),
                rows,
                schedule.flow_sigmas(settings.num_inference_steps, settings.flow_shift),
                guidance_scale=settings.guidance_scale,
                use_meanflow=model.config.use_meanflow,
                layout=layout,
                cache=cached,
                start=done,
                progress=run.progress,
                on_step=after_step,
            ).cpu()
        elapsed = time.perf_counter() - started
    if cached:
        run.log.info("{}: {} steps computed, {} reused".format(cached.settings.type, *cached.counts))
    if not run.world.is_main:
        return
    if not torch.isfinite(latents).all():
        raise InputError(keeper.not_finite(settings.num_inference_steps))
    with run.timed("write"):
        chosen = {
            "height": settings.height,
            "width": settings.width,
            "num_inference_steps": settings.num_inference_steps,
            "guidance_scale": settings.guidance_scale,
            "flow_shift": settings.flow_shift,
            "seed": options.seed,
        }
        about = {
            "num_frames": settings.video_length,
            "attn_mode": attention.name,
            contract.EMBEDDINGS_HASH: embeddings_hash,
            contract.MADE_FROM: facts.digest(),
            **({"weights_dtype": options.weights_dtype} if options.weights_dtype else {}),
        }
        if caching:
            about["cache"] = json.dumps(caching.record())
        if adapters.given:
            about["lora"] = json.dumps(adapters.given)
        path = tensors.save_latents(output_dir, latents, {k: str(v) for k, v in (chosen | about).items()})
        additions = {
            "aspect_ratio": options.aspect_ratio or DEFAULT_ASPECT_RATIO,
            "video_length": settings.video_length,
            "stage2_elapsed_time": round(elapsed, 3),
        }
        update_config(output_dir, chosen | additions, source=options.input_dir)
        keeper.remove()
    run.add_output(path, f"latents {list(latents.shape)} {latents.dtype}")


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(DenoiseOptions, build_parser(), argv)
    return utils.run_stage("stage 2", options, check=DenoiseOptions.check, body=lambda run, _: body(run, options))


if __name__ == "__main__":
    sys.exit(main())
