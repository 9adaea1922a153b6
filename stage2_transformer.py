#!/usr/bin/env python3
"""Stage 2: text embeddings → video latents, by the denoising transformer."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import utils
from hunyuan_staged import geometry, options, versions
from hunyuan_staged.attention import modes
from hunyuan_staged.errors import InputError
from hunyuan_staged.files.atomic import check_output_dir
from hunyuan_staged.memory import budget, estimates, timings
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


def build_parser() -> argparse.ArgumentParser:
    """All flags of stage 2, with their defaults; those that follow from the transformer version say so."""
    parser = utils.make_parser("stage2_transformer.py", __doc__ or "", EXAMPLE)
    files = parser.add_argument_group("files")
    files.add_argument(
        "--input_dir", default=options.DEFAULT_OUTPUT_DIR, help="folder that stage 1 wrote (default: %(default)s)"
    )
    files.add_argument("--output_dir", help="where the latents go (default: --input_dir)")
    files.add_argument("--model_path", help="model folder or hub id (default: the one that stage 1 recorded)")
    utils.add_strict_flag(files)
    kept = parser.add_argument_group("stopping and going on")
    kept.add_argument(
        "--checkpoint_every",
        type=int,
        default=options.DEFAULT_CHECKPOINT_EVERY,
        help="save the state every so many steps, for --resume; 0: never (default: %(default)s)",
    )
    kept.add_argument(
        "--resume", action="store_true", help="go on from the state of a run that was stopped, if there is one"
    )
    video = parser.add_argument_group("video")
    video.add_argument(
        "--aspect_ratio",
        help=f"width:height (default: {options.DEFAULT_ASPECT_RATIO}, or the image's own for image to video)",
    )
    video.add_argument("--video_length", type=int, help="frames, 4n+1 (default: 121; 33 for the demo weights)")
    video.add_argument("--seed", type=int, default=options.DEFAULT_SEED, help="noise seed (default: %(default)s)")
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument(
        "--num_inference_steps", type=int, help="denoising steps (default by version: 50 for the base models)"
    )
    sampling.add_argument(
        "--guidance_scale",
        type=float,
        help="classifier-free guidance; 1 runs no negative prompt (default by version: 6.0 for the base models)",
    )
    sampling.add_argument(
        "--dtype",
        choices=(*utils.DTYPES, options.DEFAULT_DTYPE),
        help="of weights and activations (default: as stage 1)",
    )
    sampling.add_argument(
        "--lora",
        action="append",
        metavar="FILE[:WEIGHT]",
        help="add a LoRA adapter (safetensors) to the weights; may be given several times (default: none, and weight 1)",
    )
    speed = parser.add_argument_group("attention and memory")
    speed.add_argument(
        "--attn_mode",
        choices=modes.ATTN_MODES,
        help=f"attention kernel; flash takes the fastest exact one here (default: {modes.DEFAULT_ATTN_MODE})",
    )
    speed.add_argument("--use_sageattn", action="store_true", help="short for --attn_mode sageattn")
    speed.add_argument(
        "--sage_blocks_range",
        help=f"which blocks run sageattn, FIRST-LAST; the others run flash (default: {options.DEFAULT_SAGE_BLOCKS}, all)",
    )
    speed.add_argument(
        "--sparse_attn", action="store_true", help="short for --attn_mode flex-block-attn with the sparse weights"
    )
    speed.add_argument(
        "--cfg_parallel",
        choices=options.CFG_PARALLEL,
        default=options.DEFAULT_CFG_PARALLEL,
        help="the two guidance rows side by side on half of the processes each; auto: where they halve "
        "(default: %(default)s)",
    )
    speed.add_argument(
        "--no_compile", action="store_true", help="start at once, without torch.compile (GPU; each step is slower)"
    )
    speed.add_argument(
        "--weights_dtype",
        choices=options.WEIGHTS_DTYPES,
        help="store the linear weights of the blocks in float8 and compute in --dtype: half the memory (default: --dtype)",
    )
    offloading = utils.add_offload_flags(speed, blocks="blocks")
    offloading.add_argument("--offload_blocks", type=int, help="of so many blocks (default: as the GPU's memory asks)")
    add_cache_flags(parser)
    utils.add_run_flags(parser)
    return parser


def add_cache_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the feature cache; None where one is not given, so that a flag without its cache can be refused."""
    flags, types = cache_settings.CACHE_FLAGS, cache_settings.CACHE_TYPES
    group = parser.add_argument_group(
        "feature cache", f"steps are those of {cache_settings.CACHE_STEPS}, others in scale"
    )
    group.add_argument(
        "--enable_cache", action="store_true", help="let some steps take most of the transformer from those before"
    )
    group.add_argument(
        "--cache_type", choices=tuple(types), help=f"what is taken over (default: {cache_settings.DEFAULT_CACHE_TYPE})"
    )
    group.add_argument(
        "--cache_start_step",
        type=int,
        help=f"from this step on, counted from 0; it is computed (default: {flags['cache_start_step']})",
    )
    group.add_argument(
        "--cache_end_step", type=int, help=f"up to the step before this one (default: {flags['cache_end_step']})"
    )
    group.add_argument(
        "--cache_step_interval",
        type=int,
        help="every so manieth step between is computed; firstblock and magcache: at least "
        f"(default: {flags['cache_step_interval']})",
    )
    group.add_argument(
        "--no_cache_block_id",
        help="deepcache: the last blocks, which every step computes, N or N-LAST "
        f"(default: {types['deepcache']['no_cache_block_id']}, the last)",
    )
    group.add_argument(
        "--cache_threshold",
        type=float,
        help="firstblock and magcache: reuse while the change is below this "
        f"(default: {types['firstblock']['cache_threshold']} and {types['magcache']['cache_threshold']})",
    )


def cache_flags(args: argparse.Namespace) -> dict[str, Any]:
    """The values of the cache's flags but --enable_cache and --cache_type, None where one is not given."""
    own = (name for names in cache_settings.CACHE_TYPES.values() for name in names)
    names = dict.fromkeys([*cache_settings.CACHE_FLAGS, *own])
    return {name: getattr(args, name) for name in names}


def check_cache(args: argparse.Namespace) -> None:
    """Refuse flags of a cache that is not enabled, or that its type does not have."""
    given = cache_flags(args)
    if not args.enable_cache:
        idle = [name for name, value in ({"cache_type": args.cache_type} | given).items() if value is not None]
        if idle:
            raise InputError(f"--{idle[0]} needs --enable_cache")
        return
    cache_settings.check_flags(args.cache_type or cache_settings.DEFAULT_CACHE_TYPE, given)


def attention_mode(args: argparse.Namespace) -> str:
    """The one mode that --attn_mode and its two shorthands ask for; InputError where they contradict each other."""
    asked = {"--attn_mode " + args.attn_mode: args.attn_mode} if args.attn_mode else {}
    if args.use_sageattn:
        asked["--use_sageattn"] = "sageattn"
    if args.sparse_attn:
        asked["--sparse_attn"] = modes.SPARSE_ATTN_MODE
    if len(set(asked.values())) > 1:
        raise InputError(f"{' and '.join(asked)} ask for different attention; give one of them")
    mode = next(iter(asked.values()), modes.DEFAULT_ATTN_MODE)
    if args.sage_blocks_range is not None and mode != "sageattn":
        raise InputError(f"--sage_blocks_range belongs to --attn_mode sageattn, not to {mode}")
    return mode


def sage_blocks(args: argparse.Namespace) -> range:
    """Which blocks --sage_blocks_range names; InputError where it is no range."""
    return versions.parse_block_range("--sage_blocks_range", args.sage_blocks_range or options.DEFAULT_SAGE_BLOCKS)


def adapter_files(args: argparse.Namespace) -> list[tuple[Path, float]]:
    """(file, weight) of each --lora FILE[:WEIGHT]; InputError where there is no such file, or the weight is no number."""
    found = []
    for text in args.lora or ():
        path, _, last = text.rpartition(":")
        try:
            file, weight = (text, 1.0) if not path or Path(text).is_file() else (path, float(last))
        except ValueError:
            file, weight = text, 1.0
        if not Path(file).is_file():
            raise InputError(f"--lora {text}: there is no file {file}; allowed is FILE[:WEIGHT]")
        if not math.isfinite(weight):
            raise InputError(f"--lora {text}: the weight {last} is not a finite number")
        found.append((Path(file), weight))
    return found


def check(args: argparse.Namespace) -> None:
    """Refuse every flag value that can be judged without reading a file."""
    utils.check_paths(args)
    attention_mode(args)
    sage_blocks(args)
    check_cache(args)
    adapter_files(args)
    if args.video_length is not None:
        geometry.check_video_length(args.video_length)
    if args.aspect_ratio is not None:
        geometry.check_aspect_ratio(args.aspect_ratio)
    if args.num_inference_steps is not None and args.num_inference_steps < 1:
        raise InputError(f"--num_inference_steps {args.num_inference_steps} is not a positive number")
    if args.num_inference_steps is not None and args.num_inference_steps > options.MAX_STEPS:
        raise InputError(f"--num_inference_steps {args.num_inference_steps} is more than {options.MAX_STEPS}")
    if args.checkpoint_every < 0:
        raise InputError(f"--checkpoint_every {args.checkpoint_every} is neither 0 (never) nor a number of steps")
    if args.guidance_scale is not None and not 1 <= args.guidance_scale < 100:
        raise InputError(f"--guidance_scale {args.guidance_scale} is outside 1 to 100")
    if args.offload_blocks is not None and args.offload_blocks < 0:
        raise InputError(f"--offload_blocks {args.offload_blocks} is not a number of blocks")
    if not 0 <= args.seed < 2**64:
        raise InputError(f"--seed {args.seed} is outside 0 to 2^64 - 1")
    if args.output_dir is not None:
        check_output_dir("--output_dir", args.output_dir)


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
    args: argparse.Namespace, config: dict[str, Any], version: TransformerVersion, flow_shift: float, image_latents: Any
) -> Settings:
    """Every value from its flag, else from stage 1, else from the version."""
    if image_latents is None:
        height, width = geometry.size_for_ratio(version.resolution, args.aspect_ratio or options.DEFAULT_ASPECT_RATIO)
    else:
        height, width = (n * geometry.SPATIAL_RATIO for n in image_latents.shape[-2:])
        if args.aspect_ratio and geometry.size_for_ratio(version.resolution, args.aspect_ratio) != (height, width):
            raise InputError(f"--aspect_ratio {args.aspect_ratio} contradicts the image, which is {width}x{height}")
    return Settings(
        version,
        height,
        width,
        args.video_length or version.video_length,
        args.num_inference_steps or version.num_inference_steps,
        version.guidance_scale if args.guidance_scale is None else args.guidance_scale,
        flow_shift,
        args.dtype or config.get("dtype") or options.DEFAULT_DTYPE,
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
    args: argparse.Namespace,
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
    chosen = asdict(settings) | {"version": settings.version.name, "dtype": str(dtype), "seed": args.seed}
    device = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else run.device.type
    return RunIdentity(
        chosen
        | {
            "attn_mode": attention_mode(args),
            "sage_blocks_range": args.sage_blocks_range or options.DEFAULT_SAGE_BLOCKS,
            "sigmas": provenance.digest({"sigmas": sigmas}),
        }
        # Only where there are any: a state that was saved before there were caches, adapters and float8 stays good.
        | ({"weights_dtype": args.weights_dtype} if args.weights_dtype else {})
        | ({"cache": caching.record()} if caching else {})
        | ({"lora": adapters.facts()} if adapters.facts() else {})
        | {name: value for name, (value, _) in hashes.items()},
        {
            "processes": run.world.size,
            "cfg_parallel": args.cfg_parallel,
            "attention": attention.name,
            "device": device,
            "compiled": compiled(run, args),
            "torch": torch.__version__,
        },
        {"sigmas": "the schedule"} | {name: origin for name, (_, origin) in hashes.items()},
    )


def compiled(run: utils.Run, args: argparse.Namespace) -> bool:
    """Whether torch.compile fuses the blocks."""
    return run.device.type == "cuda" and not args.no_compile


def plan_memory(
    run: utils.Run,
    args: argparse.Namespace,
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

    config = skeleton.config
    rows, shards = plan_layout(run.world.size, guidance_rows(settings), args.cfg_parallel)
    weights = weights_of(skeleton, skeleton.transformer_blocks, dtype)
    patch = (config.patch_size_t, config.patch_size, config.patch_size)
    denoising = estimates.DenoisingSize(
        geometry.video_tokens(settings.video_length, settings.height, settings.width, patch),
        text_tokens,
        config.num_attention_heads * config.attention_head_dim,
        dtype.itemsize,
        attention.name,
        compiled(run, args),
        shards,
        widened_bytes(skeleton.transformer_blocks[0], dtype),
    )
    free, asked = run.free_memory(), utils.offload_asked(args, weights.count)
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
            float8=bool(args.weights_dtype),
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
        float8=bool(args.weights_dtype),
    )
    return fit, {
        "version": settings.version.name,
        "video": f"{settings.width}x{settings.height}, {settings.video_length} frames",
        "tokens": f"{denoising.video_tokens} of the video, {text_tokens} of the text",
        "steps": f"{settings.num_inference_steps}, guidance {settings.guidance_scale:g}",
        "weights": f"{budget.gib(weights.total)}, {args.weights_dtype or dtype}; computed in {dtype}",
        "attention": f"{attention.name} ({attention.reason})",
        "ranks": f"{run.world.size}: {Layout(rows, shards).describe()}",
        **fit.rows(weights.count, free),
        "expected time": "unknown: no such step has been measured" if seconds is None else f"{seconds:.0f} s ({gpu})",
    }


def guidance_rows(settings: Settings) -> int:
    """2 with guidance, else 1."""
    return 2 if settings.guidance_scale != 1 else 1


def settle_cache(
    args: argparse.Namespace,
    settings: Settings,
    version: TransformerVersion,
    model_config: dict[str, Any],
    warn: Callable[[str], Any],
) -> cache_settings.CacheSettings | None:
    """The cache of this run, if it has one."""
    if not args.enable_cache:
        return None
    if version.step_distilled:
        warn(f"{version.name} takes few, long steps, which have little in common: a cache costs it much")
    layers = model_config.get("num_layers", versions.LAYERS)
    return cache_settings.resolve(
        args.cache_type or cache_settings.DEFAULT_CACHE_TYPE, cache_flags(args), settings.num_inference_steps, layers
    )


def body(run: utils.Run, args: argparse.Namespace) -> None:
    """Read the embeddings, load the transformer, denoise, write the latents."""
    import torch

    from hunyuan_staged.attention.choose import choose_attention
    from hunyuan_staged.files import contract, provenance, tensors
    from hunyuan_staged.files.config import read_config, update_config
    from hunyuan_staged.memory.offloading import load_offloaded
    from hunyuan_staged.models import transformer
    from hunyuan_staged.models.embeddings import conditioning_of
    from hunyuan_staged.parallel.layout import make_layout
    from hunyuan_staged.sampling import conditions, loop, schedule, state
    from hunyuan_staged.weights import loading, lora
    from hunyuan_staged.weights.folder import open_model

    output_dir = Path(args.output_dir or args.input_dir)
    contract.require_file(Path(args.input_dir) / contract.CONFIG_FILE)
    if not args.dry_run:
        run.lock(output_dir / contract.LOCK_FILE, contract.STAGE_FILES[2])
    config = read_config(args.input_dir)
    embeddings, metadata = tensors.load_embeddings(args.input_dir)
    embeddings_hash = provenance.sha256(Path(args.input_dir) / contract.EMBEDDINGS_FILE)
    run.warn_or_refuse(
        provenance.embeddings_mismatch(args.input_dir, config, metadata, embeddings_hash), strict=args.strict
    )
    image_latents = embeddings.get("image_latents")
    model_path = args.model_path or config.get("model_path")
    if not model_path:
        raise InputError(f"{args.input_dir} records no model_path; give --model_path")

    folder = open_model(model_path, ("transformer", "scheduler"), run.progress)
    version = pick_version(config, folder.versions(), sparse=args.sparse_attn)
    flow_shift = folder.flow_shift(version.name) or version.flow_shift
    settings = settle(args, config, version, flow_shift, image_latents)
    for warning in version.warnings(settings.guidance_scale, settings.num_inference_steps):
        run.log.warning(warning)
    dtype = utils.torch_dtype(settings.dtype, run.device)
    model_config = folder.transformer_config(version.name)
    width = model_config.get("attention_head_dim", 128)
    attention = choose_attention(attention_mode(args), run.device, dtype, sage_blocks(args), head_width=width)
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
    skeleton = folder.transformer_skeleton(version.name, weights_dtype=args.weights_dtype)
    text_tokens = max(
        conditioning_of(embeddings, prefix, device=torch.device("cpu"), dtype=dtype).length for prefix in prefixes
    )
    caching = settle_cache(args, settings, version, model_config, run.log.warning)
    files = adapter_files(args)
    adapters = lora.load(files, folder.transformer_shapes(version.name)) if files else lora.Adapters()
    if args.dry_run:
        run.show_plan(plan_memory(run, args, settings, skeleton, dtype, attention, text_tokens)[1])
        return
    hashes = {
        "weights": (folder.fingerprint(["transformer"], version.name), model_path),
        contract.EMBEDDINGS_HASH: (embeddings_hash, args.input_dir),
    }
    facts = facts_of(run, args, settings, dtype, attention, hashes, caching, adapters)
    keeper = state.StateSaver(
        output_dir,
        facts,
        steps=settings.num_inference_steps,
        every=args.checkpoint_every,
        world=run.world,
        interrupts=run.interrupts,
        tell=run.log.info,
        warn=run.log.warning,
    )
    done, kept, more = keeper.load(shape, resume=args.resume)
    fit, _ = plan_memory(run, args, settings, skeleton, dtype, attention, text_tokens)
    layout = make_layout(run.world, guidance_rows(settings), args.cfg_parallel)
    run.log.info(f"attention: {attention.name} ({attention.reason}); layout: {layout.describe()}")
    run.log.info(fit.describe(len(skeleton.transformer_blocks)))

    with run.part("load"):

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
        f"shift {settings.flow_shift:g}, seed {args.seed}, {dtype}"
    )
    with run.part("compute"):
        started = time.perf_counter()
        forward = transformer.Transformer(model, attention, shape[2:], layout, blocks, compile=compiled(run, args))
        rows = [conditioning_of(embeddings, p, device=run.device, dtype=dtype) for p in prefixes]
        noise = schedule.initial_noise(shape, args.seed, dtype).to(run.device)
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
    with run.part("write"):
        chosen = {
            "height": settings.height,
            "width": settings.width,
            "num_inference_steps": settings.num_inference_steps,
            "guidance_scale": settings.guidance_scale,
            "flow_shift": settings.flow_shift,
            "seed": args.seed,
        }
        about = {
            "num_frames": settings.video_length,
            "attn_mode": attention.name,
            contract.EMBEDDINGS_HASH: embeddings_hash,
            contract.MADE_FROM: facts.digest(),
            **({"weights_dtype": args.weights_dtype} if args.weights_dtype else {}),
        }
        if caching:
            about["cache"] = json.dumps(caching.record())
        if adapters.given:
            about["lora"] = json.dumps(adapters.given)
        path = tensors.save_latents(output_dir, latents, {k: str(v) for k, v in (chosen | about).items()})
        additions = {
            "aspect_ratio": args.aspect_ratio or options.DEFAULT_ASPECT_RATIO,
            "video_length": settings.video_length,
            "stage2_elapsed_time": round(elapsed, 3),
        }
        update_config(output_dir, chosen | additions, source=args.input_dir)
        keeper.remove()
    run.add_output(path, f"latents {list(latents.shape)} {latents.dtype}")


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    return utils.run_stage("stage 2", args, check=check, body=lambda run, _: body(run, args))


if __name__ == "__main__":
    sys.exit(main())
