"""`python -m hunyuan_staged.calibrate --input_dir DIR`: what magcache, and teacache with a threshold, need to know of a
checkpoint, recorded in one run without a cache.

DIR is a folder that stage 1 wrote; the flags are stage 2's, and torchrun starts several processes as for stage 2. The
curve and the polynomial go beside the weights, else into the user's cache folder, where stage 2 finds them.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from hunyuan_staged.errors import InputError, one_line, run_tool
from hunyuan_staged.flags import options_of
from hunyuan_staged.options import DenoiseOptions
from hunyuan_staged.parsing import Parser, make_parser

# Flags of stage 2 with which a run is not the plain one, or that it has no use for here.
REFUSED = (
    "enable_cache",
    "guidance_interval",
    "guidance_reuse",
    "attn_schedule",
    "preset",
    "super_resolution",
    "resume",
    "dry_run",
)
EXAMPLE = """\
examples:
  python -m hunyuan_staged.calibrate --input_dir stage_outputs
  torchrun --nproc-per-node 8 -m hunyuan_staged.calibrate --input_dir stage_outputs --video_length 49
"""


def build_parser() -> Parser:
    """Stage 2's flags."""
    return make_parser(DenoiseOptions, "python -m hunyuan_staged.calibrate", __doc__ or "", EXAMPLE)


def content(setup: Any, numbers: dict[int, tuple[list[float], list[float], list[float]]]) -> dict[str, Any]:
    """A calibration as JSON, from what a Recorder saw of each branch."""
    from hunyuan_staged.sampling import recorder

    settings = setup.settings
    about = (
        f"{settings.version.name}, {settings.width}x{settings.height}, {settings.video_length} frames, "
        f"{settings.num_inference_steps} steps, shift {settings.flow_shift:g}, guidance {settings.guidance_scale:g}, "
        f"seed {setup.options.seed}, prompt {setup.job.config.get('prompt')!r}"
    )
    inputs = [one for found in numbers.values() for one in found[1]]
    changes = [one for found in numbers.values() for one in found[2]]
    curve = {
        "steps": settings.num_inference_steps,
        "flow_shift": settings.flow_shift,
        "ratios": [[1.0, *(round(one, 5) for one in found[0])] for _, found in sorted(numbers.items())],
        "source": about,
    }
    return {"teacache": {"coefficients": recorder.fit(inputs, changes), "source": about}, "magcache": [curve]}


def calibrate(args: argparse.Namespace) -> None:
    """What the flags ask for. Raises InputError on what cannot be used."""
    options = DenoiseOptions(**{option.name: getattr(args, option.name) for option in options_of(DenoiseOptions)})
    refused = next((name for name in REFUSED if getattr(options, name)), None)
    if refused:
        raise InputError("makes another run than a calibration, which is a plain one", option=refused)
    options.check()
    from hunyuan_staged.parallel.world import start_world, stop_world

    world = start_world()
    try:
        record(options, world)
    finally:
        stop_world(world)


def record(options: DenoiseOptions, world: Any) -> None:
    """Denoise once, and write what was recorded. Every rank calls it."""
    from hunyuan_staged.parallel.layout import Layout
    from hunyuan_staged.pipeline import calibrations, denoising, jobs
    from hunyuan_staged.pipeline.common import free_memory
    from hunyuan_staged.runtime.progress import LineBar, Reporter
    from hunyuan_staged.sampling.recorder import Recorder

    class Lines(Reporter):
        def progress(self, iterable: Any, **about: Any) -> Any:
            return LineBar(iterable, say=self.info, **about)

        def info(self, text: str) -> None:
            if world.is_main:
                print(one_line(text), file=sys.stderr)

        warn = info

    report = Lines()
    setup = denoising.resolve(options, jobs.read(options), world, report)
    recorder = Recorder(Layout())
    setup.load(setup.plan(free_memory(world)), report).run(setup, report=report, recorder=recorder)
    numbers = recorder.numbers(world)
    if world.is_main:
        path = calibrations.write(setup.folder, setup.settings.version.name, content(setup, numbers))
        print(f"wrote {path}")


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0, or 2 after one line that says what was refused."""
    return run_tool(build_parser(), calibrate, argv)


if __name__ == "__main__":
    sys.exit(main())
