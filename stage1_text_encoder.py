#!/usr/bin/env python3
"""Stage 1: a prompt, and maybe an image, → embeddings for the transformer."""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import utils
from hunyuan_staged import geometry, versions
from hunyuan_staged.errors import InputError
from hunyuan_staged.memory import budget, estimates
from hunyuan_staged.options import EncodeOptions, offload_asked
from hunyuan_staged.parsing import Parser, make_parser, parse

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

OPTIONS = EncodeOptions


def build_parser() -> Parser:
    """The parser of EncodeOptions."""
    return make_parser(EncodeOptions, "stage1_text_encoder.py", __doc__ or "", EXAMPLE)


def demo_checkpoint(run: utils.Run) -> str:
    """The folder of the checkpoint that ships, which is used where none is named."""
    from hunyuan_staged.demo import CHECKPOINT

    run.log.warning(
        "no --model_path: using the demo weights, which know plain shapes, colours, motions and short words only; "
        "README.md says where the real weights come from"
    )
    return str(CHECKPOINT)


def pick_version(options: EncodeOptions, folder: ModelFolder) -> TransformerVersion:
    """The version that the flags name; without --resolution the default one, else the first that the folder has."""
    offered = folder.resolutions()
    default = versions.DEFAULT_RESOLUTION if versions.DEFAULT_RESOLUTION in offered else next(iter(offered), None)
    resolution = options.resolution or default
    if resolution is None:
        raise InputError(f"{folder.path} holds no transformer version")
    version = versions.make_version(
        resolution,
        "i2v" if options.image_path else "t2v",
        cfg_distilled=options.cfg_distilled,
        step_distilled=options.step_distilled,
        sparse=options.sparse_attn,
    )
    if version.name not in folder.versions():
        raise InputError(f"{folder.path} has no transformer {version.name}; it holds {', '.join(folder.versions())}")
    return version


def plan_memory(
    run: utils.Run, options: EncodeOptions, skeleton: Any, version: TransformerVersion, dtype: torch.dtype
) -> tuple[budget.BlockPlan, dict[str, object]]:
    """How the language model, the largest by far, is laid out in memory, and the rows that --dry_run prints.

    InputError where it does not fit.
    """
    from hunyuan_staged.memory import offloading
    from hunyuan_staged.pipeline import common

    weights = offloading.weights_of(skeleton, skeleton.layers, dtype)
    free, asked = common.free_memory(run.world), offload_asked(options, weights.count)
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
    run: utils.Run, options: EncodeOptions, folder: ModelFolder, version: TransformerVersion, dtype: torch.dtype
) -> tuple[Any, Any]:
    """(tokenizer, language model), with as many of its layers on the host as the flags or the memory ask for."""
    from hunyuan_staged.memory import offloading
    from hunyuan_staged.weights import loading

    skeleton = folder.language_skeleton()
    fit, _ = plan_memory(run, options, skeleton, version, dtype)
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
    run: utils.Run, options: EncodeOptions, folder: ModelFolder, version: TransformerVersion, dtype: torch.dtype
) -> dict[str, Any]:
    """The eight text tensors. The encoders are loaded one after the other, and the glyph encoder only for quoted text."""
    from hunyuan_staged.encoders import text

    with run.timed("load"):
        tokenizer, model = load_language_model(run, options, folder, version, dtype)
    for name, prompt in (("--prompt", options.prompt), ("--negative_prompt", options.negative_prompt)):
        dropped = text.tokenise(tokenizer, prompt).dropped
        if dropped:
            run.log.warning(f"{name} is too long: its last {dropped} tokens are cut off")
    with run.timed("compute"):
        tensors = text.language_embeddings(tokenizer, model, options.prompt, options.negative_prompt)
    del tokenizer, model
    gc.collect()  # the hooks of offloaded layers and the layers hold each other, and with them their memory
    glyph_tokenizer = glyph_model = None
    if text.glyph_text(options.prompt):
        with run.timed("load"):
            glyph_tokenizer, glyph_model = folder.load_glyph_encoder(device=run.device, dtype=dtype)
    width = folder.transformer_config(version.name)["text_embed_2_dim"]
    with run.timed("compute"):
        return tensors | text.glyph_embeddings(glyph_tokenizer, glyph_model, options.prompt, width=width, dtype=dtype)


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
    with run.timed("load"):
        processor, model = folder.load_image_encoder(device=run.device, dtype=dtype)
    with run.timed("compute"):
        embeds = image.encode_image(processor, model, fitted)
    del processor, model
    with run.timed("load"):
        encoder, config = folder.load_vae_encoder(device=run.device, dtype=dtype, progress=run.progress)
    with run.timed("compute"):
        latents = image.encode_first_frame(encoder, fitted, config["scaling_factor"])
    return {"image_embeds": embeds, "image_latents": latents}


def body(run: utils.Run, options: EncodeOptions) -> None:
    """Choose the version, encode text and image, write the embeddings and the config."""
    from hunyuan_staged.encoders import image, text
    from hunyuan_staged.files import contract, provenance
    from hunyuan_staged.files.config import update_config
    from hunyuan_staged.files.tensors import save_embeddings
    from hunyuan_staged.pipeline import common
    from hunyuan_staged.weights.folder import open_model

    # All that can be wrong is looked at first: the language model alone takes minutes to load.
    picture = image.load_image(options.image_path) if options.image_path else None
    if not options.dry_run:
        run.lock(Path(options.output_dir) / contract.LOCK_FILE, contract.STAGE_FILES[1])
    parts = ["text"] + ["glyph"] * bool(text.glyph_text(options.prompt)) + ["image", "vae"] * bool(picture)
    model_path = options.model_path or demo_checkpoint(run)
    folder = open_model(model_path, [*parts, "transformer"], run.progress)
    version = pick_version(options, folder)
    for part in parts:
        folder.require(part)
    dtype = common.torch_dtype(options.dtype, run.device)
    if options.dry_run:
        run.show_plan(plan_memory(run, options, folder.language_skeleton(), version, dtype)[1])
        return
    run.log.info(f"transformer version {version.name}; encoding in {dtype} on {run.device}")
    tensors = encode_text(run, options, folder, version, dtype) | encode_image(run, picture, folder, version, dtype)

    recorded = str(Path(model_path).resolve()) if Path(model_path).exists() else model_path
    with run.timed("write"):
        about = {"prompt": options.prompt, "negative_prompt": options.negative_prompt, "task_type": version.task}
        metadata = about | {"model": recorded, "version": version.name}
        picture_hash = provenance.sha256(options.image_path) if options.image_path else None
        source = {
            "version": version.name,
            "dtype": str(dtype),
            "weights": folder.fingerprint(parts),
            "image": picture_hash,
        }
        metadata[contract.MADE_FROM] = provenance.digest({**about, **source})
        path = save_embeddings(options.output_dir, tensors, metadata)
        additions = {
            "model_path": recorded,
            "resolution": version.resolution,
            "transformer_version": version.name,
            "image_path": options.image_path,
            "dtype": options.dtype,
            contract.EMBEDDINGS_HASH: provenance.sha256(path),
        }
        config = update_config(options.output_dir, about | additions)
    shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items() if "negative" not in name)
    run.add_output(path, shapes)
    run.add_output(config, "the settings of the run")


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(EncodeOptions, build_parser(), argv)
    return utils.run_stage(
        "stage 1", options, check=EncodeOptions.check, body=lambda run, _: body(run, options), every_rank=False
    )


if __name__ == "__main__":
    sys.exit(main())
