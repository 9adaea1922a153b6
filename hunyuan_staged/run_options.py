"""What the options of all stages have in common: see options.py. Knows no torch."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from hunyuan_staged import versions
from hunyuan_staged.errors import InputError
from hunyuan_staged.files.event_log import OPTION, check_log
from hunyuan_staged.files.sniffing import require_weights
from hunyuan_staged.flags import flag
from hunyuan_staged.memory.cards import assumed_card
from hunyuan_staged.sampling import cache_settings

DEMO_CHECKPOINT = Path(__file__).with_name("demo") / "checkpoint"  # that ships, and is used where none is named
DEFAULT_OUTPUT_DIR = "./stage_outputs"
DEFAULT_DTYPE = "auto"  # bf16 on a GPU, fp32 on a CPU
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
DEFAULT_ASPECT_RATIO = "16:9"
CFG_PARALLEL = ("auto", "on", "off")
DEFAULT_CFG_PARALLEL = "auto"
WEIGHTS_DTYPES = ("fp8",)  # of the blocks, where it is not that of the run
DEFAULT_SAGE_BLOCKS = f"0-{versions.LAYERS - 1}"  # all, as in the official code
DEFAULT_FPS = 24
DEFAULT_COMPARISON_DIR = "./comparison"
DEFAULT_AMPLIFY = 8.0

# What an option may ask for at most: far beyond what the models were made for, and short of what no memory holds.
MAX_FPS = 240
MAX_JOBS = 10_000
MAX_SEED = 2**64 - 1
MAX_NAME_BYTES = 200  # of a file: file systems take 255, some of which a temporary name beside it needs

# Options that name a file for a part of the model; which part, weights.hub.PARTS says.
PART_FILES = ("text_encoder", "glyph_encoder", "vision_encoder", "vae")
# The same of super resolution.
LARGER_FILES = ("super_resolution_transformer", "super_resolution_upsampler")

FILES, WHAT, REWRITING, WEIGHTS, MEMORY = "files", "what to show", "rewriting", "weights", "memory"
STOPPING, VIDEO, SAMPLING, SPEED = "stopping and going on", "video", "sampling", "attention and memory"
LARGER = "super resolution"
CACHE = f"feature cache: steps are those of {cache_settings.CACHE_STEPS}, others in scale"
TILES = "tiles"
JOBS = "many videos"

# Help of options that several stages have.
DISABLE_OFFLOADING = "keep all weights on the device, or refuse"
STRICT = "refuse files that do not belong together, rather than warn of them"


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What every stage has."""

    dry_run: bool = flag(
        "print what the run would take, and stop: nothing is loaded or written", group="other", default=False
    )
    assume_gpu: str | None = flag(
        "with --dry_run: plan for a card that is not here, by its GB of memory or its name, as 24 or 4090 "
        "(default: what is here)",
        group="other",
        metavar="CARD",
    )
    log_json: str | None = flag(
        "add an event a line to this file, as JSON objects; a further run adds its own", group="other", metavar="FILE"
    )
    debug: bool = flag("show the traceback of an error", group="other", default=False)

    # Options that name a file or a folder.
    paths: ClassVar[tuple[str, ...]] = (
        *(
            "model_path",
            "input_dir",
            "output_dir",
            "image_path",
            "output_video",
            "rewrite_instructions",
            "jobs",
            "watch",
        ),
        *PART_FILES,
        OPTION,
    )

    def check(self) -> None:
        """Refuse what can be judged without reading a file; InputError names the option."""
        for name in self.paths:
            value = getattr(self, name, None)
            if value is None:
                continue
            if not value.strip():
                raise InputError("is empty", option=name)
            try:
                Path(value).exists()
            except OSError as error:
                raise InputError(f"{value}: {error.strerror}", option=name) from error
        if self.assume_gpu is not None:
            assumed_card(self.assume_gpu)
            if not self.dry_run:
                raise InputError("needs --dry_run: a card that is not here computes nothing", option="assume_gpu")
        if self.log_json is not None:
            check_log(self.log_json)


@dataclass(frozen=True, kw_only=True)
class JobOptions(RunOptions):
    """What every stage has for many videos."""

    jobs: str | None = flag(
        "a video for each line, each in a folder of its own: a .jsonl of options, a .csv, or a .txt of prompts "
        "(default: one video)",
        group=JOBS,
        metavar="FILE",
    )
    watch: str | None = flag(
        "keep the model loaded, and take each job in FOLDER whose input is there and whose output is not, until a signal",
        group=JOBS,
        metavar="FOLDER",
    )

    def check(self) -> None:
        super().check()
        if self.watch is not None and self.jobs is not None:
            raise InputError("excludes --jobs: a watched folder says itself what there is to do", option="watch")
        if self.watch is not None and self.dry_run:
            raise InputError("excludes --dry_run: what comes into a folder is not known yet", option="watch")
        if self.watch is not None and not Path(self.watch).is_dir():
            raise InputError(f"{self.watch} is not a folder", option="watch")


@dataclass(frozen=True, kw_only=True)
class GroupOptions(JobOptions):
    """What stages 2 and 3 have for many videos beside."""

    seeds: str | None = flag(
        "a video for each seed, as 1-16 or 1,5,9, each in a folder of its own (default: one video)", group=JOBS
    )
    gpus_per_job: int | None = flag(
        "processes that make one video together, while others make others (default: what gives most videos an hour)",
        group=JOBS,
    )

    def check(self) -> None:
        super().check()
        for name in ("watch", "jobs"):
            if self.seeds is not None and getattr(self, name) is not None:
                raise InputError(f"excludes --{name}; run_staged.sh takes --seeds with --jobs", option="seeds")
        if self.seeds is not None:
            parse_seeds(self.seeds)
        if self.gpus_per_job is not None and self.gpus_per_job < 1:
            raise InputError(f"{self.gpus_per_job} is not a positive number", option="gpus_per_job")
        if self.gpus_per_job is not None and not (self.jobs or self.seeds or self.watch):
            raise InputError("belongs to --jobs, --seeds or --watch", option="gpus_per_job")


def parse_seeds(text: str) -> list[int]:
    """The seeds of 1-16, of 1,5,9, or of both together; InputError where it is neither."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,20})\s*(?:-\s*([0-9]{1,20})\s*)?", part)
        if not match:
            raise InputError(f"{text[:60]} is no list of seeds; allowed are 1-16, and 1,5,9", option="seeds")
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last or last > MAX_SEED:
            raise InputError(f"{part.strip()} is no range within 0 to 2^64 - 1", option="seeds")
        if last - first >= MAX_JOBS:
            raise InputError(f"{part.strip()} is more than {MAX_JOBS} seeds", option="seeds")
        found += range(first, last + 1)
    double = next((seed for seed in found if found.count(seed) > 1), None) if len(found) <= MAX_JOBS else None
    if double is not None:
        raise InputError(f"{text[:60]} has {double} twice", option="seeds")
    return found


def offload_help(blocks: str) -> str:
    """What --enable_offloading does; blocks: what the model's are called."""
    return f"keep the weights of all {blocks} in host memory until used (default: of as many as the GPU cannot hold)"


def part_help(part: str) -> str:
    """What an option does that names one file for a part of the model."""
    return f"one safetensors file instead of the model's {part} (default: none)"


def require_named(option: str, file: str) -> None:
    """InputError where the file that an option names is not there, or is none."""
    if not Path(file).is_file():
        raise InputError(f"{file} is no file" if Path(file).exists() else f"{file} does not exist", option=option)


def check_part_files(options: object) -> None:
    """InputError for a file that stands in the place of a part, and holds no weights, or without --super_resolution."""
    for name in LARGER_FILES:
        if getattr(options, name, None) is not None and getattr(options, "super_resolution", None) is None:
            raise InputError("belongs to --super_resolution", option=name)
    for name in (*PART_FILES, *LARGER_FILES):
        file = getattr(options, name, None)
        if file is not None:
            require_weights(name, Path(file))
