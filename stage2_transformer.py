#!/usr/bin/env python3
"""Stage 2: text embeddings → video latents, by the denoising transformer."""

from __future__ import annotations

if __name__ == "__main__":
    # Else Ctrl-C within the imports below would be a traceback: it waits until utils.run_stage listens.
    import _signal

    _signal.pthread_sigmask(_signal.SIG_BLOCK, (_signal.SIGINT, _signal.SIGTERM))

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import utils
from hunyuan_staged.jobs.outcomes import ALREADY_DONE, DONE
from hunyuan_staged.options import DenoiseOptions
from hunyuan_staged.parsing import Parser, make_parser, parse
from hunyuan_staged.runtime.environment import Early, IsDue

if TYPE_CHECKING:
    from hunyuan_staged.pipeline.denoiser import Denoised
    from hunyuan_staged.pipeline.denoising import DenoiseSetup

EXAMPLE = """\
examples:
  python stage2_transformer.py --model_path ckpts/HunyuanVideo-1.5 --video_length 49
  torchrun --nproc-per-node 8 stage2_transformer.py --seed 7 --output_dir runs/seed7
  python stage2_transformer.py --super_resolution 1080p
"""

OPTIONS = DenoiseOptions


def build_parser() -> Parser:
    """The parser of DenoiseOptions."""
    return make_parser(DenoiseOptions, "stage2_transformer.py", __doc__ or "", EXAMPLE)


def stage2(run: utils.Run, options: DenoiseOptions) -> None:
    """Read the embeddings; then denoise, or enlarge the latents that are there by denoising at a larger size."""
    from hunyuan_staged.pipeline import denoising, jobs, upscaling, video_ahead

    if options.dry_run:
        from hunyuan_staged.pipeline import forecast_denoising

        for plan in forecast_denoising.plan_denoising(options, run.world, run):
            run.show_plan(plan.rows)
        return
    video_ahead.require_encoder()
    run.lock_all(jobs.locks(options))
    job = jobs.read(options)
    if options.super_resolution:
        upscaling.enlarge(options, job, run.world, partial(denoise, run), run)
    else:
        denoise(run, denoising.resolve(options, job, run.world, run))
    run.next_stage(*jobs.what_follows(options, job.config))


def denoise(run: utils.Run, setup: DenoiseSetup, reuse: bool = False) -> None:
    """Plan, load the transformer, denoise, write the latents; with `reuse` or --resume not where they are there already."""
    from hunyuan_staged.pipeline import denoising_records, jobs, previews
    from hunyuan_staged.pipeline.denoisers import Denoisers
    from hunyuan_staged.sampling import callbacks, preview_writer
    from hunyuan_staged.sampling.state import StateSaver

    options, steps = setup.options, setup.settings.num_inference_steps
    run.warn_or_refuse(setup.job.mismatch, strict=options.strict)
    denoisers = run.keep(Denoisers)
    free = denoisers.free(setup)
    plan = setup.plan(free)
    folder, identity = jobs.output_dir(options), denoising_records.identity(setup)
    if (reuse or options.resume or run.many) and (path := denoising_records.finished(setup, identity.digest())):
        run.info(f"{path} is there, made from the same: taken as it is")
        run.outcome = ALREADY_DONE
        return
    if options.stop_after is not None and options.stop_after >= steps:
        run.warn(callbacks.no_draft(options.stop_after, steps))
    looking = previews.make(setup, folder, run)
    saver = StateSaver(folder, identity, steps=steps, every=options.checkpoint_every, world=run.world, report=run)
    start = saver.load(setup.shape, resume=options.resume, lenient=run.many)
    callbacks.check_stopped(start.done, options.stop_after, steps)
    run.record_plan(denoising_records.rows(setup, plan, free, start.done))
    denoiser = denoisers.load(setup, plan, run)
    run.info(denoising_records.describe(setup))
    if run.world.is_main and not start.done and not setup.enlarges_to:
        preview_writer.remove(folder)
    watching = callbacks.watching(saver, run.interrupts, looking, options.stop_after)
    with run.timed("compute"):
        denoised = denoiser.run(setup, start, watching, run)
    run.outcome = DONE
    if run.world.is_main:
        saver.check(denoised.latents)
        write(run, setup, denoised, identity.digest())
        saver.remove()


def write(run: utils.Run, setup: DenoiseSetup, denoised: Denoised, made_from: str) -> None:
    """Write the latents and what the config is to say of them."""
    from hunyuan_staged.pipeline import denoising_records

    with run.timed("write"):
        path = denoising_records.write(setup, denoised, made_from)
    run.add_output(path, f"latents {list(denoised.latents.shape)} {denoised.latents.dtype}")


def group_size(run: utils.Run, options: DenoiseOptions, jobs: Sequence[DenoiseOptions]) -> int:
    """How many processes make a video together: as asked for, else what gives the most videos an hour."""
    from hunyuan_staged.pipeline import groups

    return options.gpus_per_job or groups.denoising_size(run.world, jobs)


def get_ready(options: DenoiseOptions, is_due: IsDue) -> Early:
    """What can be done while the stage before works."""
    from hunyuan_staged.pipeline import video_ahead, warming

    video_ahead.begin_trial()
    return warming.warm_denoising(options, is_due)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(DenoiseOptions, build_parser(), argv)
    return utils.run_jobs(2, options, stage2, group_size, get_ready)


if __name__ == "__main__":
    utils.run_script(main)
