#!/usr/bin/env python3
"""Stage 1: a prompt, and maybe an image, → embeddings for the transformer."""

from __future__ import annotations

if __name__ == "__main__":
    # Else Ctrl-C within the imports below would be a traceback: it waits until utils.run_stage listens.
    import _signal

    _signal.pthread_sigmask(_signal.SIG_BLOCK, (_signal.SIGINT, _signal.SIGTERM))

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import utils
from hunyuan_staged.jobs.outcomes import ALREADY_DONE
from hunyuan_staged.options import EncodeOptions
from hunyuan_staged.parsing import Parser, make_parser, parse
from hunyuan_staged.run_options import DEMO_CHECKPOINT

EXAMPLE = """\
examples:
  python stage1_text_encoder.py --model_path ckpts/HunyuanVideo-1.5 --prompt 'A cat walks on the grass, realistic style.'
  python stage1_text_encoder.py --model_path ckpts/HunyuanVideo-1.5 --prompt 'It turns its head' --image_path cat.jpg

the demo weights know:
  circle, square, triangle, star; red, green, blue, yellow, orange, purple, cyan, white
  background black, dark blue, dark green, dark red, grey, brown, light blue, pink, or two-tone of two
  moves left, right, up, down, diagonally, in a circle; grows, shrinks; of two shapes: apart, together
  white, yellow, cyan or orange card or sign with 1 to 4 of A-Z and 0-9, in quotation marks
"""

OPTIONS = EncodeOptions


def build_parser() -> Parser:
    """The parser of EncodeOptions."""
    return make_parser(EncodeOptions, "stage1_text_encoder.py", __doc__ or "", EXAMPLE)


def warn_of_unknown_words(run: utils.Run, prompt: str) -> None:
    """Say what the demo weights do not know of a prompt."""
    from hunyuan_staged.demo.vocabulary import unknown

    if found := unknown(prompt):
        run.warn(
            f"the demo weights do not know {found}; --help says what they know. "
            "Real weights: python -m hunyuan_staged.download 480p_t2v --model_path DIR, then --model_path DIR"
        )


def stage1(run: utils.Run, options: EncodeOptions) -> None:
    """Choose the version, encode text and image, write the embeddings and the config."""
    from hunyuan_staged.pipeline import encoding, encoding_records
    from hunyuan_staged.pipeline.loaded_encoders import LoadedEncoders

    run.info(f"prompt {options.prompt!r}")  # first: what follows takes seconds to import
    if Path(options.model_path or DEMO_CHECKPOINT).resolve() == DEMO_CHECKPOINT.resolve():
        warn_of_unknown_words(run, options.prompt)
    if options.dry_run:
        from hunyuan_staged.pipeline import forecast

        run.show_plan(forecast.plan_encoding(options, run.world, run).rows)
        return
    # All that can be wrong is looked at first: the language model alone takes minutes to load.
    picture = encoding.read_image(options)
    run.lock_all(encoding.locks(options))
    setup = encoding.resolve(options, picture, run.world, run)
    encoders = run.keep(partial(LoadedEncoders, keep=run.many and not options.rewrite))
    plan, free = encoders.plan(setup)
    if run.many and encoding_records.is_written(setup):
        encoding_records.update_super_resolution(setup)
        run.outcome = ALREADY_DONE
        return
    run.record_plan(setup.rows(plan, free))
    if left := encoding_records.outdated(options):
        run.warn(left)
    setup = setup.rewrite(run)
    tensors = encoding.encode(setup, plan, run, encoders)
    with run.timed("write"):
        written = encoding_records.write(setup, tensors)
    for path, what in written:
        run.add_output(path, what)
    run.next_stage(2, [f"--input_dir={options.output_dir}"])


def main(argv: Sequence[str] | None = None) -> int:
    return utils.run_jobs(1, parse(EncodeOptions, build_parser(), argv), stage1)


if __name__ == "__main__":
    utils.run_script(main)
