"""The options of every stage: type, default, range, help and the rules between them, once. Knows no torch.

A user's default exists here alone. Parsers (parsing.py), the launcher and docs/flags.md come from these classes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hunyuan_staged import geometry, presets, schedule_rules, versions
from hunyuan_staged.attention import modes
from hunyuan_staged.decode_options import DecodeOptions as DecodeOptions
from hunyuan_staged.encode_options import EncodeOptions as EncodeOptions
from hunyuan_staged.errors import InputError
from hunyuan_staged.files.atomic import check_output_dir
from hunyuan_staged.files.sniffing import require_weights
from hunyuan_staged.flags import flag
from hunyuan_staged.run_options import (
    CACHE,
    CFG_PARALLEL,
    DEFAULT_ASPECT_RATIO,
    DEFAULT_CFG_PARALLEL,
    DEFAULT_DTYPE,
    DEFAULT_OUTPUT_DIR,
    DEFAULT_SAGE_BLOCKS,
    DISABLE_OFFLOADING,
    DTYPES,
    FILES,
    SAMPLING,
    SPEED,
    STOPPING,
    STRICT,
    VIDEO,
    WEIGHTS_DTYPES,
    GroupOptions,
    offload_help,
)
from hunyuan_staged.run_options import DEFAULT_FPS as DEFAULT_FPS
from hunyuan_staged.sampling import cache_settings
from hunyuan_staged.sampling.given_sigmas import parse_sigmas
from hunyuan_staged.upscale_options import UpscaleOptions
from hunyuan_staged.weights.lora_flags import parse_adapters


def offload_asked(options: "EncodeOptions | DenoiseOptions", count: int) -> int | None:
    """How many of `count` blocks the options want offloaded; None where they leave it open."""
    if options.enable_offloading:
        return count
    return 0 if options.disable_offloading else getattr(options, "offload_blocks", None)


@dataclass(frozen=True, kw_only=True)
class DenoiseOptions(UpscaleOptions, GroupOptions):
    """Stage 2: text embeddings → video latents, by the denoising transformer."""

    input_dir: str = flag("folder that stage 1 wrote (default: %(default)s)", group=FILES, default=DEFAULT_OUTPUT_DIR)
    output_dir: str | None = flag("where the latents go (default: --input_dir)", group=FILES)
    model_path: str | None = flag(
        "as in stage 1 (default: the one that stage 1 recorded)",
        group=FILES,
    )
    transformer: str | None = flag(
        "one safetensors or GGUF file instead of the model's transformer (default: none)", group=FILES, metavar="FILE"
    )
    transformer_version: str | None = flag(
        "of such a file, as 480p_t2v_distilled (default: guessed from its name, else as stage 1)", group=FILES
    )
    strict: bool = flag(STRICT, group=FILES, default=False)
    checkpoint_every: int = flag(
        "save the state every so many steps, for --resume; 0: never (default: %(default)s)", group=STOPPING, default=5
    )
    resume: bool = flag(
        "go on from the state of a run that was stopped, if there is one", group=STOPPING, default=False
    )
    preview_every: int = flag(
        "write preview.mp4 and preview.png every so many steps; 0: never (default: %(default)s)",
        group=STOPPING,
        default=0,
    )
    stop_after: int | None = flag(
        "stop after so many steps, with the state saved: a draft, which --resume goes on from (default: never)",
        group=STOPPING,
    )
    aspect_ratio: str | None = flag(
        f"width:height (default: {DEFAULT_ASPECT_RATIO}, or the image's own for image to video)", group=VIDEO
    )
    width: int | None = flag("px, a multiple of 16, with --height (default: by --aspect_ratio)", group=VIDEO)
    height: int | None = flag("px, a multiple of 16, with --width (default: by --aspect_ratio)", group=VIDEO)
    video_length: int | None = flag("frames, 4n+1 (default: 121; 33 for the demo weights)", group=VIDEO)
    seed: int = flag("noise seed (default: %(default)s)", group=VIDEO, default=42)
    preset: str | None = flag(
        "a set of flags for less work, see docs/presets.md; one that is given stands in its place (default: exact)",
        group=SAMPLING,
        choices=tuple(presets.PRESETS),
    )
    num_inference_steps: int | None = flag(
        "denoising steps (default by version: 50 for the base models)", group=SAMPLING
    )
    guidance_scale: float | None = flag(
        "classifier-free guidance; 1 runs no negative prompt (default by version: 6.0 for the base models)",
        group=SAMPLING,
    )
    guidance_interval: str | None = flag(
        "which share of the steps runs the negative prompt, e.g. 0,0.5: the first half (default: 0,1)",
        group=SAMPLING,
        metavar="START,STOP",
    )
    guidance_reuse: int | None = flag(
        "run it at one in so many of those steps, and go on with the last difference at all later ones; 0: without "
        "guidance there (default: 0)",
        group=SAMPLING,
    )
    flow_shift: float | None = flag("shift of the sigmas towards noise (default by version: 5 to 9)", group=SAMPLING)
    sigmas: str | None = flag(
        "the noise level of each step, from 1 down, as 1,0.94,0.8 (default: by --num_inference_steps and --flow_shift)",
        group=SAMPLING,
    )
    four_steps: bool = flag("4 steps, shift 5, guidance 1: for weights made so", group=SAMPLING, default=False)
    dtype: str | None = flag(
        "of weights and activations (default: as stage 1)", group=SAMPLING, choices=(*DTYPES, DEFAULT_DTYPE)
    )
    lora: tuple[str, ...] | None = flag(
        "add a LoRA adapter (file, or folder of peft) to the weights; may be given several times (default: none, weight 1)",
        group=SAMPLING,
        metavar="FILE[:WEIGHT]",
    )
    attn_mode: str | None = flag(
        f"attention kernel; flash takes the fastest exact one here (default: {modes.DEFAULT_ATTN_MODE})",
        group=SPEED,
        choices=modes.ATTN_MODES,
    )
    attn_schedule: str | None = flag(
        "modes by step, as exact:0-9,sparse:10-39, of some blocks as sparse:10-39@2-51; exact is flash, sparse "
        "flex-block-attn, and the other steps run --attn_mode (default: none)",
        group=SPEED,
        metavar="MODE:STEPS,…",
    )
    use_sageattn: bool = flag("short for --attn_mode sageattn", group=SPEED, default=False)
    sage_blocks_range: str | None = flag(
        f"which blocks run sageattn, FIRST-LAST; the others run flash (default: {DEFAULT_SAGE_BLOCKS}, all)",
        group=SPEED,
    )
    sparse_attn: bool = flag(
        "short for --attn_mode flex-block-attn with the sparse weights", group=SPEED, default=False
    )
    cfg_parallel: str = flag(
        "the two guidance branches side by side on half of the processes each; auto: where they halve "
        "(default: %(default)s)",
        group=SPEED,
        default=DEFAULT_CFG_PARALLEL,
        choices=CFG_PARALLEL,
    )
    compile: bool = flag("fuse the blocks by torch.compile, as with --fp8_matmul (GPU)", group=SPEED, default=False)
    weights_dtype: str | None = flag(
        "store the linear weights of the blocks in float8 and compute in --dtype: half the memory (default: --dtype)",
        group=SPEED,
        choices=WEIGHTS_DTYPES,
    )
    fp8_matmul: bool = flag(
        "with --weights_dtype fp8: also compute the blocks' products in float8 (Hopper and newer)",
        group=SPEED,
        default=False,
    )
    enable_offloading: bool = flag(offload_help("blocks"), group=SPEED, default=False, either="offloading")
    disable_offloading: bool = flag(DISABLE_OFFLOADING, group=SPEED, default=False, either="offloading")
    offload_blocks: int | None = flag(
        "of so many blocks (default: as the GPU's memory asks)", group=SPEED, either="offloading"
    )
    # None where one is not given, so that an option without its cache can be refused.
    enable_cache: bool = flag(
        "let some steps take most of the transformer from those before", group=CACHE, default=False, either="cache"
    )
    disable_cache: bool = flag("none, also where --preset has one", group=CACHE, default=False, either="cache")
    cache_type: str | None = flag(
        f"what is taken over (default: {cache_settings.DEFAULT_CACHE_TYPE})",
        group=CACHE,
        choices=tuple(cache_settings.CACHE_TYPES),
    )
    cache_start_step: int | None = flag(
        "from this step on, counted from 0; it is computed "
        f"(default: {cache_settings.CACHE_FLAGS['cache_start_step']})",
        group=CACHE,
    )
    cache_end_step: int | None = flag(
        f"up to the step before this one (default: {cache_settings.CACHE_FLAGS['cache_end_step']})", group=CACHE
    )
    cache_steps: str | None = flag(
        "which steps are computed, as 0-7,9,11, of the types that follow a plan (default: by the three others)",
        group=CACHE,
        metavar="STEPS",
    )
    cache_step_interval: int | None = flag(
        "one step in so many between is computed; firstblock and magcache: at least "
        f"(default: {cache_settings.CACHE_FLAGS['cache_step_interval']})",
        group=CACHE,
    )
    no_cache_block_id: str | None = flag(
        "deepcache: the last blocks, which every step computes, N or N-LAST "
        f"(default: {cache_settings.CACHE_TYPES['deepcache']['no_cache_block_id']}, the last)",
        group=CACHE,
    )
    cache_threshold: float | None = flag(
        "firstblock, magcache and, where it is given, teacache: reuse while the change is below this "
        f"(default: {cache_settings.CACHE_TYPES['firstblock']['cache_threshold']}, and magcache's by its calibration)",
        group=CACHE,
    )

    def check(self) -> None:
        super().check()
        self.attention_mode()
        self.sage_blocks()
        self.attention_schedule()
        self._check_cache()
        if self.fp8_matmul and not self.weights_dtype:
            raise InputError("needs --weights_dtype fp8", option="fp8_matmul")
        self.adapter_files()
        if self.transformer is not None:
            require_weights("transformer", Path(self.transformer), gguf=True)
        if self.video_length is not None:
            geometry.check_video_length(self.video_length)
        if self.aspect_ratio is not None:
            geometry.check_aspect_ratio(self.aspect_ratio)
        geometry.check_size(self.width, self.height, self.aspect_ratio)
        schedule_rules.check(self)
        for name in ("checkpoint_every", "preview_every"):
            given = getattr(self, name)
            if given < 0:
                raise InputError(f"{given} is neither 0 (never) nor a number of steps", option=name)
        if self.stop_after is not None and self.stop_after < 1:
            raise InputError(f"{self.stop_after} is not a positive number", option="stop_after")
        if self.offload_blocks is not None and self.offload_blocks < 0:
            raise InputError(f"{self.offload_blocks} is not a number of blocks", option="offload_blocks")
        if not 0 <= self.seed < 2**64:
            raise InputError(f"{self.seed} is outside 0 to 2^64 - 1", option="seed")
        if self.output_dir is not None:
            check_output_dir("--output_dir", self.output_dir)

    def attention_mode(self) -> str:
        """The one mode that attn_mode and its two shorthands ask for; InputError where they contradict each other."""
        asked = {f"--attn_mode {self.attn_mode}": self.attn_mode} if self.attn_mode else {}
        if self.use_sageattn:
            asked["--use_sageattn"] = "sageattn"
        if self.sparse_attn:
            asked["--sparse_attn"] = modes.SPARSE_ATTN_MODE
        if len(set(asked.values())) > 1:
            raise InputError(f"{' and '.join(asked)} ask for different attention; give one of them")
        mode = next(iter(asked.values()), modes.DEFAULT_ATTN_MODE)
        if self.sage_blocks_range is not None and mode != "sageattn":
            raise InputError(f"belongs to --attn_mode sageattn, not to {mode}", option="sage_blocks_range")
        return mode

    def given_sigmas(self) -> tuple[float, ...] | None:
        """The sigmas that are asked for, if any; InputError where they are none, or another option says otherwise."""
        if self.sigmas is None:
            return None
        for name in ("num_inference_steps", "flow_shift", "four_steps"):
            if getattr(self, name):
                raise InputError(f"and --{name} both set the schedule; give one of them", option="sigmas")
        return parse_sigmas(self.sigmas)

    def attention_schedule(self) -> tuple[modes.Stretch, ...]:
        """The modes of the steps that attn_schedule names."""
        return modes.parse_schedule(self.attn_schedule) if self.attn_schedule is not None else ()

    def sage_blocks(self) -> range:
        """Which blocks sage_blocks_range names; InputError where it is no range."""
        return versions.parse_block_range("--sage_blocks_range", self.sage_blocks_range or DEFAULT_SAGE_BLOCKS)

    def cache_options(self) -> dict[str, Any]:
        """The values of the cache's options but enable_cache and cache_type, None where one is not given."""
        own = (name for names in cache_settings.CACHE_TYPES.values() for name in names)
        names = dict.fromkeys([*cache_settings.CACHE_FLAGS, "cache_steps", *own])
        return {name: getattr(self, name) for name in names}

    def _check_cache(self) -> None:
        given = self.cache_options()
        of_preset = None if self.disable_cache else presets.cache_type(self.preset)
        if not self.enable_cache and not of_preset:
            idle = [name for name, value in ({"cache_type": self.cache_type} | given).items() if value is not None]
            if idle:
                raise InputError("needs --enable_cache", option=idle[0])
            return
        cache_settings.check_flags(self.cache_type or of_preset or cache_settings.DEFAULT_CACHE_TYPE, given)

    def adapter_files(self) -> list[tuple[Path, float]]:
        """(file or folder, weight) of each adapter; InputError where it holds no weights, or the weight is no number."""
        return parse_adapters(self.lora or ())


def needs_compiler(options: Any) -> bool:
    """Whether torch.compile fuses the blocks on a GPU. It does where products are computed in float8: no kernel of ours
    quantises what they take, and torch's own, one by one, make a step a fifth slower (H200)."""
    return bool(options.compile or options.fp8_matmul)
