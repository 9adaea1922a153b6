#!/usr/bin/env python3
"""Stage 3: video latents → mp4, by the VAE's decoder."""

from __future__ import annotations

from collections.abc import Sequence

import utils
from hunyuan_staged.options import DecodeOptions
from hunyuan_staged.parsing import Parser, make_parser, parse

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
    from hunyuan_staged.pipeline import decoding
    from hunyuan_staged.pipeline.common import free_memory

    if options.dry_run:
        from hunyuan_staged.pipeline import forecast

        run.show_plan(forecast.plan_decoding(options, run.world, run).rows)
        return
    run.lock_all(decoding.locks(options))
    job = decoding.read_job(options, run)
    run.warn_or_refuse(job.mismatch, strict=options.strict)
    setup = decoding.resolve(options, job, run.world, run)
    free = free_memory(setup.world)
    plan = setup.plan(free)
    run.record_plan(setup.rows(plan, free, run.world.size))
    if other := decoding.replaced(options, job):
        run.warn(other)
    written = decoding.run(setup, plan, run)
    for path, what in written.files:
        run.add_output(path, what)
    if written.files:
        run.add_video(written.files[-1][0], written.frames, job.fps)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(DecodeOptions, build_parser(), argv)
    return utils.run_stage(
        "stage 3",
        options,
        check=DecodeOptions.check,
        body=lambda run, _: stage3(run, options),
        modules=("hunyuan_staged.pipeline.decoding",),
    )


if __name__ == "__main__":
    utils.run_script(main)
