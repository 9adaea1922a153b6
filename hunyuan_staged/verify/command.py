"""`python -m hunyuan_staged.verify --model_path DIR`: do these weights, on this machine, give the published numbers?

Every part is there, with the published config, names, shapes and dtypes, finite, and of the hash that the hub gave
with it where the download noted that. Then, part by part, ours against
the classes of diffusers and transformers on these very weights. Status 0 if all checks pass, 1 if one fails.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hunyuan_staged.errors import InputError, one_line, run_tool
from hunyuan_staged.files.atomic import check_output_dir, replacing
from hunyuan_staged.parsing import Parser, tool_parser

FAILED = 1  # the exit status where a check fails
DEVICES = ("auto", "cpu", "cuda")


def build_parser() -> Parser:
    """All flags, with their defaults."""
    parser = tool_parser("hunyuan_staged.verify", __doc__)
    parser.add_argument("--model_path", help="model folder in either layout (default: the demo weights)")
    parser.add_argument("--version", metavar="VERSION", help="transformer version (default: all in the folder)")
    parser.add_argument(
        "--device", choices=DEVICES, default="auto", help="auto is the GPU if any (default: %(default)s)"
    )
    parser.add_argument(
        "--skip_hashes", action="store_true", help="do not read all files for the hashes that the download noted"
    )
    parser.add_argument("--json", metavar="FILE", help="write the JSON to this file, not to stdout")
    parser.add_argument("--report", metavar="FILE", help="also write what a bug report needs, as Markdown")
    return parser


def prepare(args: argparse.Namespace) -> Any:
    """The Verification that the flags ask for; InputError for what cannot be."""
    import torch

    from hunyuan_staged.demo import CHECKPOINT
    from hunyuan_staged.options import DEFAULT_DTYPE
    from hunyuan_staged.pipeline.common import torch_dtype
    from hunyuan_staged.verify.run import Verification, chosen_versions
    from hunyuan_staged.weights.folder import open_model
    from hunyuan_staged.weights.hub import PARTS

    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("cuda: there is no GPU that torch can use", option="device")
    gpu = args.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
    folder = open_model(args.model_path or CHECKPOINT, [part for part in PARTS if part != "upsampler"])
    dtype = torch_dtype(DEFAULT_DTYPE, device)
    return Verification(folder, chosen_versions(folder, args.version), device, dtype, not args.skip_hashes)


def run(args: argparse.Namespace) -> int:
    """Check, print, write; 0 or FAILED."""
    for flag in ("json", "report"):
        if getattr(args, flag):
            check_output_dir(f"--{flag}", Path(getattr(args, flag)).parent)
    verification = prepare(args)
    from transformers.utils.logging import disable_progress_bar

    from hunyuan_staged.verify import report

    disable_progress_bar()
    start, checks = time.monotonic(), []
    for check in verification.checks():
        checks.append(check)
        print(f"{'ok  ' if check.ok else 'FAIL'}  {check.part}: {one_line(check.what)}", file=sys.stderr, flush=True)
    seconds = time.monotonic() - start
    for line in report.table(checks):
        print(one_line(line) if "\n" in line else line)
    text = json.dumps(report.as_json(verification, checks, seconds), allow_nan=False)
    for flag, content in (("json", text + "\n"), ("report", None)):
        target = getattr(args, flag)
        if target:
            with replacing(target) as path:
                path.write_text(content or report.bug_report(verification, checks, seconds), encoding="utf-8")
    if not args.json:
        print(text)
    return 0 if all(check.ok for check in checks) else FAILED


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0, 1 where a check fails, 2 after one line that says what was refused."""
    return run_tool(build_parser(), run, argv, interrupted="the verification was interrupted")
