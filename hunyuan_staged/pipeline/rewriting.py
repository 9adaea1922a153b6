"""What stage 1 does first where --rewrite asks for it: the prompt, written out at length.

rewriter = rewriting.resolve(...); rewritten = rewriter.run(report)
"""

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from hunyuan_staged import geometry
from hunyuan_staged.encoders import endpoint, image, language_model, rewriting, text
from hunyuan_staged.encoders.endpoint import LOCAL, Endpoint, RewritingFailed
from hunyuan_staged.encoders.rewriting import Instructions, Rewritten
from hunyuan_staged.errors import InputError
from hunyuan_staged.files import contract, provenance
from hunyuan_staged.files.config import read_config
from hunyuan_staged.memory import budget, estimates, offloading
from hunyuan_staged.memory.budget import BlockPlan, BlockWeights, FreeMemory
from hunyuan_staged.options import EncodeOptions, offload_asked
from hunyuan_staged.parallel.world import World
from hunyuan_staged.pipeline.common import free_memory, torch_dtype
from hunyuan_staged.runtime.progress import SILENT, Reporter
from hunyuan_staged.versions import MAX_TEXT_TOKENS, TransformerVersion
from hunyuan_staged.weights import loading, whole_language_model
from hunyuan_staged.weights.folder import ModelFolder


@dataclass(frozen=True)
class Rewriter:
    """Who writes a prompt out, and by which instructions. server: None where the folder's own language model does, whose
    skeleton lies on the meta device. earlier: what a run into the same folder was answered to the same question."""

    options: EncodeOptions
    instructions: Instructions
    picture: Image.Image | None
    folder: ModelFolder
    world: World
    tokenizer: Any
    server: Endpoint | None
    skeleton: Any
    identity: str
    earlier: str | None

    @property
    def model(self) -> str:
        return self.server.model if self.server else LOCAL

    @property
    def dtype(self) -> torch.dtype:
        """bf16 on a GPU, in which the model was trained: the encoders' float16 can overflow in its last layers."""
        return torch_dtype(self.options.dtype, self.world.device)

    @property
    def weights(self) -> BlockWeights:
        """Of the whole language model, in bytes."""
        layers = self.skeleton.get_submodule(whole_language_model.LAYERS)
        return offloading.weights_of(self.skeleton, layers, self.dtype)

    def plan(self, free: FreeMemory) -> BlockPlan:
        """How the whole language model is laid out in memory; InputError where it does not fit."""
        weights = self.weights
        remedies = ["--rewrite URL, which asks a server", "no --rewrite"]
        asked = offload_asked(self.options, weights.count)
        working = estimates.LANGUAGE_WORKING
        return budget.plan_blocks("--rewrite local", weights, working, free, asked=asked, remedies=lambda: remedies)

    def describe(self) -> str:
        """Who writes, in a few words."""
        who = f"{self.server.model} at {self.server.url}" if self.server else "the text encoder's language model"
        return f"{who}, instructions {self.instructions.name}"

    def rows(self, free: FreeMemory) -> dict[str, object]:
        """The row that --dry_run prints; InputError as plan."""
        if self.earlier is not None:
            return {"rewriting": f"as in an earlier run: {self.earlier!r}"}
        if self.server is not None:
            return {"rewriting": f"{self.describe()}; asked before the encoding"}
        plan = self.plan(free)
        layout = plan.describe(self.weights.count, "layers")
        return {"rewriting": f"{self.describe()}: {budget.gib(plan.total)}, {self.dtype}, {layout}; freed afterwards"}

    def run(self, report: Reporter = SILENT) -> Rewritten:
        """The prompt at length; where there is none to be taken, a warning and the prompt itself, or with --strict
        InputError."""
        if self.earlier is not None:
            report.info(f"rewritten in an earlier run, and not again ({self.describe()}): {self.earlier!r}")
            return Rewritten(self.earlier, self.model, self.identity)
        try:
            prompt = self._accepted(self._answer(report))
        except RewritingFailed as error:
            if self.options.strict:
                raise InputError(f"{error}; --strict refuses that") from error
            report.warn(f"{error}; the prompt is used as it was given")
            return Rewritten(self.options.prompt)
        report.info(f"rewritten by {self.describe()}: {prompt!r}")
        return Rewritten(prompt, self.model, self.identity)

    def _accepted(self, answer: str) -> str:
        prompt = rewriting.accepted(answer, self.options.prompt)
        dropped = text.tokenise(self.tokenizer, prompt).dropped
        if dropped:
            count = MAX_TEXT_TOKENS + dropped
            raise RewritingFailed(f"the rewritten prompt has {count} tokens; at most {MAX_TEXT_TOKENS} are allowed")
        return prompt

    def _answer(self, report: Reporter) -> str:
        if self.server is None:
            return self._written_here(report)
        report.info(f"asking {self.describe()}")
        question = rewriting.messages(self.instructions, self.options.prompt, self.picture)
        with report.timed("rewrite"):
            return endpoint.ask(self.server, question, report.warn)

    def _written_here(self, report: Reporter) -> str:
        """The answer of the folder's language model, which is loaded whole, and freed again."""
        plan = self.plan(free_memory(self.world))
        report.info(f"{self.describe()}: {plan.describe(self.weights.count, 'layers')}")
        model = None
        try:
            with report.timed("load"):
                model = self._load(plan, report)
            with report.timed("rewrite"):
                return language_model.write(self.tokenizer, model, self.instructions, self.options.prompt, self.picture)
        finally:
            # The encoders need the memory; the hooks of offloaded layers and the layers hold each other.
            model = None
            gc.collect()
            if self.world.device.type == "cuda":
                torch.cuda.empty_cache()

    def _load(self, plan: BlockPlan, report: Reporter) -> Any:
        """The whole language model, as the plan says. Not in the rewriter's own skeleton, so that it can be freed."""
        vision = self.picture is not None
        skeleton = whole_language_model.whole_skeleton(self.folder, self.tokenizer, vision=vision)
        device, dtype = self.world.device, self.dtype

        def load(destinations: loading.Destinations) -> Any:
            return whole_language_model.load_whole(
                self.folder,
                skeleton,
                device=device,
                dtype=dtype,
                vision=vision,
                progress=report.progress,
                destinations=destinations,
            )

        model, layers = offloading.load_offloaded(
            skeleton,
            whole_language_model.LAYERS,
            plan.offloaded,
            load,
            device=device,
            dtype=dtype,
            world=self.world,
        )
        if layers:
            layers.hook()
        return model


def resolve(
    options: EncodeOptions, folder: ModelFolder, version: TransformerVersion, picture: Image.Image | None, world: World
) -> Rewriter | None:
    """Who is to write the prompt out; None where nobody is. Loads no weights and asks nobody.

    Who writes sees a picture as the transformer will, cropped to the version's size for it.

    InputError where instructions cannot be read, and for a folder whose language model cannot write.
    """
    if options.rewrite is None:
        return None
    if picture is not None:
        size = geometry.nearest_size(version.resolution, picture.height / picture.width)
        picture = image.resize_and_center_crop(picture, *size)
    instructions = rewriting.read_instructions(options.rewrite_instructions, version.task, options.prompt)
    tokenizer = whole_language_model.load_language_tokenizer(folder)
    server = skeleton = None
    question: dict[str, Any] = {"prompt": options.prompt, "instructions": instructions.sha256}
    question["image"] = provenance.sha256(options.image_path) if options.image_path else None
    if options.rewrite == LOCAL:
        skeleton = whole_language_model.whole_skeleton(folder, tokenizer, vision=picture is not None)
        question["model"] = folder.fingerprint(["text"])
    else:
        server = endpoint.find_endpoint(options.rewrite, options.rewrite_model, version.task)
        question["model"] = server.model
    identity = provenance.digest(question)
    earlier = answered(options.output_dir, identity)
    return Rewriter(options, instructions, picture, folder, world, tokenizer, server, skeleton, identity, earlier)


def answered(output_dir: str, identity: str) -> str | None:
    """What the same question was answered to in an earlier run into the folder; None: it was not asked, or failed."""
    if not (Path(output_dir) / contract.CONFIG_FILE).is_file():
        return None
    config = read_config(output_dir)
    return config.get("rewritten_prompt") if config.get("rewrite_sha256") == identity else None
