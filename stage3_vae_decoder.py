#!/usr/bin/env python3
"""Stage 3: video latents → mp4, by the VAE's decoder."""

from __future__ import annotations

if __name__ == "__main__":
    # Else Ctrl-C within the imports below would be a traceback: it waits until utils.run_stage listens.
    import _signal

    _signal.pthread_sigmask(_signal.SIG_BLOCK, (_signal.SIGINT, _signal.SIGTERM))

from collections.abc import Sequence

import utils
from hunyuan_staged.jobs.outcomes import ALREADY_DONE
from hunyuan_staged.options import DecodeOptions
from hunyuan_staged.parsing import Parser, make_parser, parse
from hunyuan_staged.runtime.environment import Early, IsDue

EXAMPLE = """\
examples:
  python stage3_vae_decoder.py --input_dir stage_outputs
  torchrun --nproc-per-node 8 stage3_vae_decoder.py --output_video cat.mp4
  python stage3_vae_decoder.py --tile_size 256 --tile_overlap 0.125
  python stage3_vae_decoder.py --latents base
"""

OPTIONS = DecodeOptions


def build_parser() -> Parser:
    """The parser of DecodeOptions."""
    return make_parser(DecodeOptions, "stage3_vae_decoder.py", __doc__ or "", EXAMPLE)


def stage3(run: utils.Run, options: DecodeOptions) -> None:
    """Read the latents, plan, load the decoder, decode, write the video."""
    from hunyuan_staged.pipeline import decode_jobs, decoding, decoding_records
    from hunyuan_staged.pipeline.loaded_decoder import LoadedDecoder

    if options.dry_run:
        from hunyuan_staged.pipeline import forecast

        run.show_plan(forecast.plan_decoding(options, run.world, run).rows)
        return
    run.lock_all(decode_jobs.locks(options))
    job = decode_jobs.read(options, run)
    run.warn_or_refuse(job.mismatch, strict=options.strict)
    setup = decoding.resolve(options, job, run.world, run)
    made_from = decoding_records.made_from(setup) if run.many else None
    if made_from and run.agree(decoding_records.is_written(setup, made_from)):
        run.outcome = ALREADY_DONE
        return
    decoders = run.keep(LoadedDecoder)
    free = decoders.free(setup.world)
    plan = setup.plan(free)
    run.record_plan(setup.rows(plan, free, run.world.size))
    if other := decode_jobs.replaced(options, job):
        run.warn(other)
    written = decoding.run(setup, plan, run, decoders, made_from)
    for path, what in written.files:
        run.add_output(path, what)
    if written.files:
        run.add_video(written.files[-1][0], written.frames, job.fps)


def group_size(run: utils.Run, options: DecodeOptions, jobs: Sequence[DecodeOptions]) -> int:
    """How many processes make a video together: as asked for, else what gives the most videos an hour."""
    from hunyuan_staged.pipeline import groups

    return options.gpus_per_job or groups.decoding_size(run.world, jobs)


def get_ready(options: DecodeOptions, is_due: IsDue) -> Early:
    """What can be done while the stage before works."""
    from hunyuan_staged.pipeline import warming

    return warming.warm_decoding(options, is_due)


def begin(options: DecodeOptions) -> None:
    """Have ffmpeg tried while torch is imported."""
    from hunyuan_staged.files import video

    video.begin_trial(options.video_encoder)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(DecodeOptions, build_parser(), argv)
    return utils.run_jobs(3, options, stage3, group_size, get_ready, begin)


if __name__ == "__main__":
    utils.run_script(main)
