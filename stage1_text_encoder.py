#!/usr/bin/env python3
"""Stage 1: a prompt, and maybe an image, → embeddings for the transformer."""

from __future__ import annotations

from collections.abc import Sequence

import utils
from hunyuan_staged.options import EncodeOptions
from hunyuan_staged.parsing import Parser, make_parser, parse

EXAMPLE = """\
examples:
  python stage1_text_encoder.py --model_path ckpts/HunyuanVideo-1.5 --prompt 'A cat walks on the grass, realistic style.'
  python stage1_text_encoder.py --model_path ckpts/HunyuanVideo-1.5 --prompt 'It turns its head' --image_path cat.jpg
"""

OPTIONS = EncodeOptions


def build_parser() -> Parser:
    """The parser of EncodeOptions."""
    return make_parser(EncodeOptions, "stage1_text_encoder.py", __doc__ or "", EXAMPLE)


def stage1(run: utils.Run, options: EncodeOptions) -> None:
    """Choose the version, encode text and image, write the embeddings and the config."""
    from hunyuan_staged.pipeline import encoding
    from hunyuan_staged.pipeline.common import free_memory

    # All that can be wrong is looked at first: the language model alone takes minutes to load.
    picture = encoding.read_image(options)
    run.lock_all(encoding.locks(options), unless=options.dry_run)
    setup = encoding.resolve(options, picture, run.world, run)
    free = free_memory(run.world)
    plan = setup.plan(free)
    if options.dry_run:
        run.show_plan(setup.rows(plan, free))
        return
    tensors = encoding.encode(setup, plan, run)
    with run.timed("write"):
        written = encoding.write(setup, tensors)
    for path, what in written:
        run.add_output(path, what)
    run.next_stage(2, options.output_dir)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(EncodeOptions, build_parser(), argv)
    return utils.run_stage(
        "stage 1", options, check=EncodeOptions.check, body=lambda run, _: stage1(run, options), every_rank=False
    )


if __name__ == "__main__":
    utils.run_script(main)
