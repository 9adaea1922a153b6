#!/usr/bin/env python3
"""Stage 1: a prompt, and maybe an image, → embeddings for the transformer."""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import utils
from hunyuan_staged import geometry, options, versions
from hunyuan_staged.errors import InputError
from hunyuan_staged.files.atomic import check_output_dir
from hunyuan_staged.memory import budget, estimates

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from hunyuan_staged.versions import TransformerVersion
    from hunyuan_staged.weights.folder import ModelFolder

EXAMPLE = """\
examples:
  python stage1_text_encoder.py --model_path ckpts/HunyuanVideo-1.5 --prompt 'A cat walks on the grass, realistic style.'
  python stage1_text_encoder.py --model_path ckpts/HunyuanVideo-1.5 --prompt 'It turns its head' --image_path cat.jpg
"""


def build_parser() -> argparse.ArgumentParser:
    """All flags of stage 1, with their defaults."""
    parser = utils.make_parser("stage1_text_encoder.py", __doc__ or "", EXAMPLE)
    files = parser.add_argument_group("files")
    files.add_argument(
        "--model_path",
        help="model folder in the official or the diffusers layout, or a hub id (default: the demo weights)",
    )
    files.add_argument(
        "--output_dir", default=options.DEFAULT_OUTPUT_DIR, help="folder of the run (default: %(default)s)"
    )
    what = parser.add_argument_group("what to show")
    what.add_argument(
        "--prompt",
        default=options.DEFAULT_PROMPT,
        help="the video in words; texts in quotation marks are spelt out (default: %(default)r)",
    )
    what.add_argument(
        "--negative_prompt",
        default=options.DEFAULT_NEGATIVE_PROMPT,
        help="what guidance leads away from (default: empty)",
    )
    what.add_argument("--image_path", help="first frame: image to video (default: none, text to video)")
    weights = parser.add_argument_group("weights")
    weights.add_argument(
        "--resolution",
        help=f"480p, 720p, or another that the model has (default: {versions.DEFAULT_RESOLUTION}, else the model's own)",
    )
    weights.add_argument(
        "--dtype",
        choices=(*utils.DTYPES, options.DEFAULT_DTYPE),
        default=options.DEFAULT_DTYPE,
        help="of the whole run; stage 2 follows it (default: %(default)s, which is bf16 on a GPU and fp32 on a CPU)",
    )
    weights.add_argument("--cfg_distilled", action="store_true", help="the weights with guidance distilled into them")
    weights.add_argument("--step_distilled", action="store_true", help="the weights for 8 or 12 steps")
    weights.add_argument("--sparse_attn", action="store_true", help="the sparse weights (distilled, too)")
    utils.add_offload_flags(parser.add_argument_group("memory"), blocks="layers of the language model")
    utils.add_run_flags(parser)
    return parser


def check(args: argparse.Namespace) -> None:
    """Refuse every flag value that can be judged without reading the model."""
    utils.check_paths(args)
    if args.resolution is not None and args.resolution not in geometry.BUCKET_BASE:
        raise InputError(f"--resolution {args.resolution!r} is unknown; known: {', '.join(geometry.BUCKET_BASE)}")
    if args.step_distilled and (args.cfg_distilled or args.sparse_attn):
        raise InputError("--step_distilled excludes --cfg_distilled and --sparse_attn: no such weights are published")
    if args.image_path and not Path(args.image_path).is_file():
        raise InputError(f"--image_path {args.image_path} does not exist")
    check_output_dir("--output_dir", args.output_dir)


def demo_checkpoint(run: utils.Run) -> str:
    """The folder of the checkpoint that ships, which is used where none is named."""
    from hunyuan_staged.demo import CHECKPOINT

    run.log.warning(
        "no --model_path: using the demo weights, which know plain shapes, colours, motions and short words only; "
        "README.md says where the real weights come from"
    )
    return str(CHECKPOINT)


def pick_version(args: argparse.Namespace, folder: ModelFolder) -> TransformerVersion:
    """The version that the flags name; without --resolution the default one, else the first that the folder has."""
    offered = folder.resolutions()
    default = versions.DEFAULT_RESOLUTION if versions.DEFAULT_RESOLUTION in offered else next(iter(offered), None)
    resolution = args.resolution or default
    if resolution is None:
        raise InputError(f"{folder.path} holds no transformer version")
    version = versions.make_version(
        resolution,
        "i2v" if args.image_path else "t2v",
        cfg_distilled=args.cfg_distilled,
        step_distilled=args.step_distilled,
        sparse=args.sparse_attn,
    )
    if version.name not in folder.versions():
        raise InputError(f"{folder.path} has no transformer {version.name}; it holds {', '.join(folder.versions())}")
    return version


def plan_memory(
    run: utils.Run, args: argparse.Namespace, skeleton: Any, version: TransformerVersion, dtype: torch.dtype
) -> tuple[budget.BlockPlan, dict[str, object]]:
    """How the language model, the largest by far, is laid out in memory, and the rows that --dry_run prints.

    InputError where it does not fit.
    """
    from hunyuan_staged.memory import offloading

    weights = offloading.weights_of(skeleton, skeleton.layers, dtype)
    free, asked = run.free_memory(), utils.offload_asked(args, weights.count)
    remedies = ["--enable_offloading, or no flag about offloading" if asked == 0 else "a GPU with more memory"]
    fit = budget.plan_blocks(
        "the text encoder", weights, estimates.LANGUAGE_WORKING, free, asked=asked, remedies=remedies
    )
    return fit, {
        "version": version.name,
        "weights": f"{budget.gib(weights.total)} of the language model, {dtype}",
        **fit.rows(weights.count, free, "layers"),
        "ranks": 1,
        "expected time": "unknown: not measured",
    }


def load_language_model(
    run: utils.Run, args: argparse.Namespace, folder: ModelFolder, version: TransformerVersion, dtype: torch.dtype
) -> tuple[Any, Any]:
    """(tokenizer, language model), with as many of its layers on the host as the flags or the memory ask for."""
    from hunyuan_staged.memory import offloading
    from hunyuan_staged.weights import loading

    skeleton = folder.language_skeleton()
    fit, _ = plan_memory(run, args, skeleton, version, dtype)
    run.log.info(fit.describe(len(skeleton.layers), "layers"))

    def load(places: loading.Destinations) -> tuple[Any, Any]:
        return folder.load_language_model(
            device=run.device, dtype=dtype, progress=run.progress, skeleton=skeleton, places=places
        )

    (tokenizer, model), layers = offloading.load_offloaded(
        skeleton, "layers", fit.offloaded, load, device=run.device, dtype=dtype, world=run.world
    )
    if layers:
        layers.hook()
    return tokenizer, model


def encode_text(
    run: utils.Run, args: argparse.Namespace, folder: ModelFolder, version: TransformerVersion, dtype: torch.dtype
) -> dict[str, Any]:
    """The eight text tensors. The encoders are loaded one after the other, and the glyph encoder only for quoted text."""
    from hunyuan_staged.encoders import text

    with run.part("load"):
        tokenizer, model = load_language_model(run, args, folder, version, dtype)
    for name, prompt in (("--prompt", args.prompt), ("--negative_prompt", args.negative_prompt)):
        dropped = text.tokenise(tokenizer, prompt).dropped
        if dropped:
            run.log.warning(f"{name} is too long: its last {dropped} tokens are cut off")
    with run.part("compute"):
        tensors = text.language_embeddings(tokenizer, model, args.prompt, args.negative_prompt)
    del tokenizer, model
    gc.collect()  # the hooks of offloaded layers and the layers hold each other, and with them their memory
    glyph_tokenizer = glyph_model = None
    if text.glyph_text(args.prompt):
        with run.part("load"):
            glyph_tokenizer, glyph_model = folder.load_glyph_encoder(device=run.device, dtype=dtype)
    width = folder.transformer_config(version.name)["text_embed_2_dim"]
    with run.part("compute"):
        return tensors | text.glyph_embeddings(glyph_tokenizer, glyph_model, args.prompt, width=width, dtype=dtype)


def encode_image(
    run: utils.Run, picture: Image.Image | None, folder: ModelFolder, version: TransformerVersion, dtype: torch.dtype
) -> dict[str, Any]:
    """image_embeds and image_latents, at the bucket nearest to the image's own ratio; nothing without an image."""
    if picture is None:
        return {}
    from hunyuan_staged.encoders import image

    height, width = geometry.nearest_size(version.resolution, picture.height / picture.width)
    fitted = image.resize_and_center_crop(picture, height, width)
    run.log.info(f"image {picture.width}x{picture.height} → {width}x{height}")
    with run.part("load"):
        processor, model = folder.load_image_encoder(device=run.device, dtype=dtype)
    with run.part("compute"):
        embeds = image.encode_image(processor, model, fitted)
    del processor, model
    with run.part("load"):
        encoder, config = folder.load_vae_encoder(device=run.device, dtype=dtype, progress=run.progress)
    with run.part("compute"):
        latents = image.encode_first_frame(encoder, fitted, config["scaling_factor"])
    return {"image_embeds": embeds, "image_latents": latents}


def body(run: utils.Run, args: argparse.Namespace) -> None:
    """Choose the version, encode text and image, write the embeddings and the config."""
    from hunyuan_staged.encoders import image, text
    from hunyuan_staged.files import contract, provenance
    from hunyuan_staged.files.config import update_config
    from hunyuan_staged.files.tensors import save_embeddings
    from hunyuan_staged.weights.folder import open_model

    # All that can be wrong is looked at first: the language model alone takes minutes to load.
    picture = image.load_image(args.image_path) if args.image_path else None
    if not args.dry_run:
        run.lock(Path(args.output_dir) / contract.LOCK_FILE, contract.STAGE_FILES[1])
    parts = ["text"] + ["glyph"] * bool(text.glyph_text(args.prompt)) + ["image", "vae"] * bool(picture)
    model_path = args.model_path or demo_checkpoint(run)
    folder = open_model(model_path, [*parts, "transformer"], run.progress)
    version = pick_version(args, folder)
    for part in parts:
        folder.require(part)
    dtype = utils.torch_dtype(args.dtype, run.device)
    if args.dry_run:
        run.show_plan(plan_memory(run, args, folder.language_skeleton(), version, dtype)[1])
        return
    run.log.info(f"transformer version {version.name}; encoding in {dtype} on {run.device}")
    tensors = encode_text(run, args, folder, version, dtype) | encode_image(run, picture, folder, version, dtype)

    recorded = str(Path(model_path).resolve()) if Path(model_path).exists() else model_path
    with run.part("write"):
        about = {"prompt": args.prompt, "negative_prompt": args.negative_prompt, "task_type": version.task}
        metadata = about | {"model": recorded, "version": version.name}
        source = about | {"version": version.name, "dtype": str(dtype), "weights": folder.fingerprint(parts)}
        source["image"] = provenance.sha256(args.image_path) if args.image_path else None
        metadata[contract.MADE_FROM] = provenance.digest(source)
        path = save_embeddings(args.output_dir, tensors, metadata)
        additions = {
            "model_path": recorded,
            "resolution": version.resolution,
            "transformer_version": version.name,
            "image_path": args.image_path,
            "dtype": args.dtype,
            contract.EMBEDDINGS_HASH: provenance.sha256(path),
        }
        config = update_config(args.output_dir, about | additions)
    shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items() if "negative" not in name)
    run.add_output(path, shapes)
    run.add_output(config, "the settings of the run")


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    return utils.run_stage("stage 1", args, check=check, body=lambda run, _: body(run, args), every_rank=False)


if __name__ == "__main__":
    sys.exit(main())
