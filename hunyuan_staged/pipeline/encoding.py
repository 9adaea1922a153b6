"""What stage 1 does: a prompt, and maybe an image, → embeddings for the transformer.

setup = encoding.resolve(options, encoding.read_image(options), world)
setup = setup.rewrite()
encoding_records.write(setup, encoding.encode(setup, plan))
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from hunyuan_staged import geometry, versions
from hunyuan_staged.encoders import image, text
from hunyuan_staged.encoders.rewriting import Rewritten
from hunyuan_staged.errors import InputError
from hunyuan_staged.files import contract
from hunyuan_staged.memory import budget, estimates, offloading
from hunyuan_staged.memory.budget import BlockPlan, BlockWeights, FreeMemory
from hunyuan_staged.options import EncodeOptions, offload_asked
from hunyuan_staged.parallel.world import World
from hunyuan_staged.pipeline import low_resolution, rewriting
from hunyuan_staged.pipeline.common import EncoderDtypes, Lock, encoder_dtypes
from hunyuan_staged.pipeline.image_encoding import encode_image, larger_sizes
from hunyuan_staged.pipeline.loaded_encoders import LoadedEncoders
from hunyuan_staged.pipeline.opening import open_for
from hunyuan_staged.pipeline.vae_encoding import EncodingPlan, plan_for_model
from hunyuan_staged.run_options import DEMO_CHECKPOINT, LARGER_FILES
from hunyuan_staged.runtime.environment import started_by_launcher
from hunyuan_staged.runtime.progress import SILENT, Reporter
from hunyuan_staged.versions import TransformerVersion
from hunyuan_staged.weights import components, encoder_components, loading
from hunyuan_staged.weights.folder import ModelFolder
from hunyuan_staged.weights.part_files import PartsFolder
from hunyuan_staged.weights.published import PublishedModel

DEMO_USED = (
    "no --model_path: using the demo weights, which know plain shapes, colours, motions and short words only; "
    "README.md says where the real weights come from"
)


def locks(options: EncodeOptions) -> list[Lock]:
    """What a run must lock before it writes."""
    return [(Path(options.output_dir) / contract.LOCK_FILE, contract.STAGE_FILES[1])]


def read_image(options: EncodeOptions) -> Image.Image | None:
    """The picture that is to be the first frame; None for text to video. InputError where it is none."""
    return image.load_image(options.image_path) if options.image_path else None


def pick_version(options: EncodeOptions, folder: ModelFolder, report: Reporter = SILENT) -> TransformerVersion:
    """The version that the options name; without a resolution the default one, else the first that the folder has.

    A folder of a single resolution has that one taken, with a warning. Where super resolution is to follow, those it can
    follow come first; InputError for one that it cannot, and for a size.
    """
    if isinstance(folder, PartsFolder):
        return _version_of_files(options, folder)
    offered = folder.resolutions()
    larger = options.super_resolution
    fitting = [name for name in offered if larger is None or versions.leads_to(name, larger)] or offered
    default = versions.DEFAULT_RESOLUTION if versions.DEFAULT_RESOLUTION in fitting else next(iter(fitting), None)
    resolution = options.resolution or default
    if resolution not in offered and len(offered) == 1:
        report.warn(f"--resolution {resolution}: {folder.path} holds {offered[0]} alone, which is taken")
        resolution = offered[0]
    if resolution is None:
        folder.require("transformer")
        raise InputError(folder.lacks(f"{versions.DEFAULT_RESOLUTION}_t2v"))
    version = versions.make_version(
        resolution,
        "i2v" if options.image_path else "t2v",
        cfg_distilled=options.cfg_distilled,
        step_distilled=options.step_distilled,
        sparse=options.sparse_attn,
    )
    if version.name not in folder.versions():
        raise InputError(folder.lacks(version.name))
    given = geometry.check_size(options.width, options.height)
    if larger and given:
        larger_sizes(version.resolution, larger, *given)
    elif larger:
        versions.super_resolution_chain(version.resolution, larger)
    return version


def _version_of_files(options: EncodeOptions, folder: PartsFolder) -> TransformerVersion:
    """The version of the transformer's file; InputError where the options ask for another."""
    version = versions.parse_version(folder.versions()[0])
    if options.resolution not in (None, version.resolution):
        raise InputError(f"{options.resolution}: {folder.path} holds {version.name}", option="resolution")
    if (version.task == "i2v") != bool(options.image_path):
        wanted = "an image: give --image_path" if version.task == "i2v" else "no image"
        raise InputError(f"{folder.path} holds {version.name}, which takes {wanted}")
    if options.super_resolution:
        versions.super_resolution_chain(version.resolution, options.super_resolution)
    return version


@dataclass(frozen=True)
class EncodeSetup:
    """An encoding whose options, image and model have been brought together. skeleton: the language model on the meta
    device, which is by far the largest part. rewriter: who is to write the prompt out, if anybody; rewritten: what came of
    it."""

    options: EncodeOptions
    picture: Image.Image | None
    model_path: str
    folder: ModelFolder
    parts: tuple[str, ...]  # that are loaded, keys of PARTS
    version: TransformerVersion
    dtypes: EncoderDtypes
    world: World
    skeleton: Any
    rewriter: rewriting.Rewriter | None = None
    rewritten: Rewritten | None = None

    @property
    def prompt(self) -> str:
        """What is encoded."""
        assert self.rewriter is None or self.rewritten is not None, "the prompt has not been rewritten yet"
        return self.rewritten.prompt if self.rewritten else self.options.prompt

    def rewrite(self, report: Reporter = SILENT) -> "EncodeSetup":
        """The same with its prompt written out at length, where that is asked for; see Rewriter.run."""
        return replace(self, rewritten=self.rewriter.run(report)) if self.rewriter else self

    @property
    def weights(self) -> BlockWeights:
        """Of the language model, in bytes."""
        return offloading.weights_of(self.skeleton, self.skeleton.layers, self.dtypes.text)

    @property
    def image_sizes(self) -> dict[str, tuple[int, int]]:
        """(height, width) of the image by resolution: the run's, at the bucket nearest to the image's own ratio, and those
        of the super resolution that is to follow. None without an image."""
        if self.picture is None:
            return {}
        given = geometry.check_size(self.options.width, self.options.height)
        size = given or geometry.nearest_size(self.version.resolution, self.picture.height / self.picture.width)
        return {self.version.resolution: size} | larger_sizes(
            self.version.resolution, self.options.super_resolution, *size
        )

    def plan_image(self, free: FreeMemory) -> EncodingPlan | None:
        """What the VAE's encoder takes for the image, at its largest size; InputError where it does not fit."""
        sizes = sorted(self.image_sizes.values(), key=math.prod)
        return plan_for_model((1, *sizes[-1]), self.folder, self.dtypes.image, free) if sizes else None

    def plan(self, free: FreeMemory, *, beside: int = 0) -> BlockPlan:
        """How the language model is laid out in memory; InputError where it, or what follows it, does not fit.

        beside: bytes of other parts.
        """
        self.plan_image(free)
        weights = self.weights
        asked = offload_asked(self.options, weights.count)
        remedies = ["--enable_offloading, or no flag about offloading" if asked == 0 else "a GPU with more memory"]
        if free.device is None:
            remedies = ["a GPU"]
        working = estimates.LANGUAGE_WORKING + beside
        return budget.plan_blocks("the text encoder", weights, working, free, asked=asked, remedies=lambda: remedies)

    def rows(self, plan: BlockPlan, free: FreeMemory) -> dict[str, object]:
        """The rows that --dry_run prints."""
        weights, of_image = self.weights, self.plan_image(free)
        return {
            "version": self.version.name,
            "weights": f"{budget.gib(weights.total)} of the language model, {self.dtypes.text}",
            **plan.rows(weights.count, free, "layers"),
            **({"image": f"{of_image.what} through the VAE's encoder, {of_image.memory}"} if of_image else {}),
            **(self.rewriter.rows(free) if self.rewriter else {}),
            "ranks": 1,
        }


def resolve(
    options: EncodeOptions, picture: Image.Image | None, world: World, report: Reporter = SILENT
) -> EncodeSetup:
    """Bring options, image and model together; InputError where they do not fit. Loads no weights."""
    model_path = options.model_path
    if not model_path:
        report.warn(DEMO_USED)
        model_path = str(DEMO_CHECKPOINT)
    parts = ["text"] + ["glyph"] * bool(text.glyph_text(options.prompt)) + ["image", "vae"] * bool(picture)
    folder = open_for(options, model_path, [*parts, "transformer"], report)
    version = pick_version(options, folder, report)
    for part in parts:
        folder.origin(part)
    if not options.dry_run and folder.config_alone(version.name):
        report.warn(
            f"{folder.path} has no weights of {version.name}, its config alone: stage 2 needs --transformer FILE"
        )
    target = None if options.dry_run or isinstance(folder, PartsFolder) else options.super_resolution
    files_given = all(getattr(options, name) for name in LARGER_FILES)
    if target and not files_given and (lacking := low_resolution.missing_weights(folder, version.resolution, target)):
        if started_by_launcher() is not None:  # stage 2 will be given no more, and says so when the base run is done
            raise InputError(f"{target}: {lacking}", option="super_resolution")
        report.warn(f"{lacking}; stage 2 then needs --super_resolution_transformer and --super_resolution_upsampler")
    dtypes = encoder_dtypes(options.dtype, world.device)
    skeleton = encoder_components.language_skeleton(folder)
    rewriter = None
    if not isinstance(folder, PublishedModel):  # which has no tokenizer
        rewriter = rewriting.resolve(options, folder, version, picture, world)
    return EncodeSetup(options, picture, model_path, folder, tuple(parts), version, dtypes, world, skeleton, rewriter)


def encode(
    setup: EncodeSetup, plan: BlockPlan, report: Reporter = SILENT, encoders: LoadedEncoders | None = None
) -> dict[str, torch.Tensor]:
    """All tensors of the embeddings. One part of the model is loaded at a time, unless `encoders` keeps them."""
    report.info(f"transformer version {setup.version.name}; encoding in {setup.dtypes} on {setup.world.device}")
    found, options = encoders or LoadedEncoders(), setup.options
    key = setup.folder.identity, setup.version.name, setup.dtypes, setup.prompt, options.negative_prompt
    text_tensors = found.text("prompts", key, partial(encode_text, setup, plan, found, report))
    return text_tensors | encode_image(setup, found, report)


def load_language_model(setup: EncodeSetup, plan: BlockPlan, report: Reporter = SILENT) -> tuple[Any, Any]:
    """(tokenizer, language model), with as many of its layers on the host as the plan says."""
    report.info(plan.describe(len(setup.skeleton.layers), "layers"))
    device, dtype = setup.world.device, setup.dtypes.text

    def load(destinations: loading.Destinations) -> tuple[Any, Any]:
        return encoder_components.load_language_model(
            setup.folder,
            device=device,
            dtype=dtype,
            progress=report.progress,
            skeleton=setup.skeleton,
            destinations=destinations,
        )

    (tokenizer, model), layers = offloading.load_offloaded(
        setup.skeleton, "layers", plan.offloaded, load, device=device, dtype=dtype, world=setup.world
    )
    if layers:
        layers.hook()
    return tokenizer, model


def encode_text(
    setup: EncodeSetup, plan: BlockPlan, encoders: LoadedEncoders, report: Reporter = SILENT
) -> dict[str, torch.Tensor]:
    """The eight text tensors. The encoders are loaded one after the other, and the glyph encoder only for quoted text."""
    options, folder, dtype = setup.options, setup.folder, setup.dtypes.glyph
    model_of = folder.identity, setup.dtypes
    with report.timed("load"):
        load = partial(load_language_model, setup, plan, report)
        tokenizer, model = encoders.get("text", (*model_of, plan.offloaded), load)
    for name, prompt in (("--prompt", setup.prompt), ("--negative_prompt", options.negative_prompt)):
        dropped = text.tokenise(tokenizer, prompt).dropped
        if dropped:
            report.warn(f"{name} is too long: its last {dropped} tokens are cut off")
    with report.timed("compute"):
        key = *model_of, options.negative_prompt  # most jobs have the same
        encode = partial(text.language_embeddings, tokenizer, model)
        tensors = encode(setup.prompt)
        tensors |= encoders.text("negative", key, partial(encode, options.negative_prompt, negative=True))
    del tokenizer, model, encode
    encoders.release("text")
    glyph_tokenizer = glyph_model = None
    if text.glyph_text(setup.prompt):
        with report.timed("load"):
            load = partial(encoder_components.load_glyph_encoder, folder, device=setup.world.device, dtype=dtype)
            glyph_tokenizer, glyph_model = encoders.get("glyph", model_of, load)
    width = components.transformer_config(folder, setup.version.name)["text_embed_2_dim"]
    with report.timed("compute"):
        tensors |= text.glyph_embeddings(glyph_tokenizer, glyph_model, setup.prompt, width=width, dtype=dtype)
    del glyph_tokenizer, glyph_model
    encoders.release("glyph")
    return tensors
