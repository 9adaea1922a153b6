"""The options of stage 1: see options.py. Knows no torch."""

from dataclasses import dataclass

from hunyuan_staged import geometry, versions
from hunyuan_staged.encoders import endpoint
from hunyuan_staged.errors import InputError
from hunyuan_staged.files.atomic import check_output_dir
from hunyuan_staged.flags import flag
from hunyuan_staged.run_options import (
    DEFAULT_DTYPE,
    DEFAULT_OUTPUT_DIR,
    DISABLE_OFFLOADING,
    DTYPES,
    FILES,
    MEMORY,
    REWRITING,
    WEIGHTS,
    WHAT,
    JobOptions,
    check_part_files,
    offload_help,
    part_help,
    require_named,
)


@dataclass(frozen=True, kw_only=True)
class EncodeOptions(JobOptions):
    """Stage 1: a prompt, and maybe an image, → embeddings for the transformer."""

    model_path: str | None = flag(
        "model folder in the official or the diffusers layout, folder of single files, transformer's file, or hub id "
        "(default: the demo weights)",
        group=FILES,
    )
    text_encoder: str | None = flag(part_help("text encoder"), group=FILES, metavar="FILE")
    glyph_encoder: str | None = flag(part_help("glyph encoder"), group=FILES, metavar="FILE")
    vision_encoder: str | None = flag(part_help("image encoder"), group=FILES, metavar="FILE")
    vae: str | None = flag(part_help("VAE"), group=FILES, metavar="FILE")
    transformer_version: str | None = flag(
        "of a transformer's file in --model_path, as 480p_t2v_distilled (default: guessed from its name)", group=FILES
    )
    output_dir: str = flag("folder of the run (default: %(default)s)", group=FILES, default=DEFAULT_OUTPUT_DIR)
    prompt: str = flag(
        "the video in words; texts in quotation marks are spelt out; given several times: as many videos "
        "(default: %(default)r)",
        group=WHAT,
        default="a red circle moves left over a dark blue background",
        each="prompts",
    )
    prompts: tuple[str, ...] = ()  # all that were given
    negative_prompt: str = flag("what guidance leads away from (default: empty)", group=WHAT, default="")
    image_path: str | None = flag("first frame: image to video (default: none, text to video)", group=WHAT)
    rewrite: str | None = flag(
        "write the prompt out at length first, as the model was trained: address of an OpenAI-compatible server "
        f"(its key: ${endpoint.KEY_VARIABLE}); {endpoint.API}: that of $T2V_REWRITE_BASE_URL, for an image of "
        f"$I2V_REWRITE_BASE_URL; {endpoint.LOCAL}: by the text encoder's own language model (default: off)",
        group=REWRITING,
        metavar=f"URL|{endpoint.API}|{endpoint.LOCAL}",
    )
    rewrite_model: str | None = flag(
        "the server's name of the model (default: $T2V_REWRITE_MODEL_NAME, for an image $I2V_REWRITE_MODEL_NAME)",
        group=REWRITING,
    )
    rewrite_instructions: str | None = flag(
        "what the rewriting model is told (default: the package's own, in English or Chinese)",
        group=REWRITING,
        metavar="FILE",
    )
    strict: bool = flag(
        "refuse what cannot be rewritten, rather than warn and take the prompt as it is", group=REWRITING, default=False
    )
    width: int | None = flag("px that the image is fitted to, with --height (default: its own shape)", group=WHAT)
    height: int | None = flag("px that the image is fitted to, with --width (default: its own shape)", group=WHAT)
    resolution: str | None = flag(
        f"480p, 720p, or another that the model has (default: {versions.DEFAULT_RESOLUTION}, else the model's own)",
        group=WEIGHTS,
    )
    super_resolution: str | None = flag(
        "prepare for stage 2's --super_resolution: weights that lead to it, an image's latents at its sizes, too",
        group=WEIGHTS,
        choices=tuple(versions.SUPER_RESOLUTION),
    )
    super_resolution_transformer: str | None = flag(
        "record its transformer's file, which stage 2 takes where it is given none (default: none)",
        group=WEIGHTS,
        metavar="FILE",
    )
    super_resolution_upsampler: str | None = flag(
        "record its latent upsampler's file, likewise (default: none)", group=WEIGHTS, metavar="FILE"
    )
    dtype: str = flag(
        "of the whole run; stage 2 follows it (default: %(default)s, which is bf16 on a GPU and fp32 on a CPU)",
        group=WEIGHTS,
        default=DEFAULT_DTYPE,
        choices=(*DTYPES, DEFAULT_DTYPE),
    )
    cfg_distilled: bool = flag("the weights with guidance distilled into them", group=WEIGHTS, default=False)
    step_distilled: bool = flag("the weights for 8 or 12 steps", group=WEIGHTS, default=False)
    sparse_attn: bool = flag("the sparse weights (distilled, too)", group=WEIGHTS, default=False)
    enable_offloading: bool = flag(
        offload_help("layers of the language model"), group=MEMORY, default=False, either="offloading"
    )
    disable_offloading: bool = flag(DISABLE_OFFLOADING, group=MEMORY, default=False, either="offloading")

    def check(self) -> None:
        super().check()
        if self.resolution is not None and self.resolution not in geometry.BUCKET_BASE:
            known = ", ".join(geometry.BUCKET_BASE)
            raise InputError(f"{self.resolution!r} is unknown; known: {known}", option="resolution")
        if self.step_distilled and (self.cfg_distilled or self.sparse_attn):
            raise InputError(
                "excludes --cfg_distilled and --sparse_attn: no such weights are published", option="step_distilled"
            )
        if self.image_path:
            require_named("image_path", self.image_path)
        check_part_files(self)
        if self.transformer_version is not None:
            versions.parse_version(self.transformer_version)
        self._check_rewriting()
        geometry.check_size(self.width, self.height)
        check_output_dir("--output_dir", self.output_dir)

    def _check_rewriting(self) -> None:
        if self.rewrite is None:
            for name in ("rewrite_model", "rewrite_instructions"):
                if getattr(self, name) is not None:
                    raise InputError("goes with --rewrite alone", option=name)
            return
        if self.rewrite_instructions is not None:
            require_named("rewrite_instructions", self.rewrite_instructions)
        if not self.prompt.strip() and not self.image_path:
            raise InputError("needs a --prompt to rewrite", option="rewrite")
        if self.rewrite != endpoint.LOCAL:
            endpoint.find_endpoint(self.rewrite, self.rewrite_model, "i2v" if self.image_path else "t2v")
        elif self.rewrite_model is not None:
            raise InputError("names a server's model; --rewrite local has its own", option="rewrite_model")
