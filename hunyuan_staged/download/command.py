"""`python -m hunyuan_staged.download VERSION --model_path DIR`: all that a version needs, in the official layout.

Sizes and free disk come first. A file that is there is kept if its size and hash are the hub's; what an interrupted
run left of a file is gone on with; each file that arrives is checked, and its hash kept for verify.
"""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from hunyuan_staged.download import plan
from hunyuan_staged.download.remote import ENDPOINT_VARIABLES, ENDPOINTS, endpoint_of
from hunyuan_staged.download.sources import sources_of
from hunyuan_staged.errors import run_tool
from hunyuan_staged.files.atomic import check_output_dir
from hunyuan_staged.parsing import Parser, tool_parser
from hunyuan_staged.weights.hub import FOUR_STEPS_FILE, FOUR_STEPS_SOURCE, FOUR_STEPS_VERSION, HF, MODELSCOPE


def build_parser() -> Parser:
    """All flags, with their defaults."""
    parser = tool_parser("hunyuan_staged.download", __doc__)
    parser.add_argument("version", metavar="VERSION", help="transformer version, e.g. 720p_t2v or 480p_i2v_distilled")
    parser.add_argument("--model_path", required=True, help="the model folder; it is made where there is none")
    parser.add_argument("--super_resolution", metavar="RESOLUTION", help="also what enlarges to 720p or 1080p")
    parser.add_argument(
        "--four_steps",
        action="store_true",
        help=f"LightX2V's transformer for four steps in place of {FOUR_STEPS_VERSION}'s own",
    )
    parser.add_argument(
        "--endpoint", metavar="URL", help=f"mirror of {ENDPOINTS[HF]} (default: ${ENDPOINT_VARIABLES[HF]}, else itself)"
    )
    parser.add_argument(
        "--modelscope_endpoint",
        metavar="URL",
        help=f"mirror of {ENDPOINTS[MODELSCOPE]} (default: ${ENDPOINT_VARIABLES[MODELSCOPE]}, else itself)",
    )
    parser.add_argument("--dry_run", action="store_true", help="say what would be fetched, and stop")
    return parser


def run(args: argparse.Namespace) -> None:
    """List, say what is to come, check the space, fetch, check."""
    from tqdm import tqdm

    folder = Path(args.model_path).expanduser()
    check_output_dir("--model_path", folder)
    sources = sources_of(args.version, args.super_resolution, four_steps=args.four_steps)
    endpoints = {HF: endpoint_of(HF, args.endpoint), MODELSCOPE: endpoint_of(MODELSCOPE, args.modelscope_endpoint)}
    download = plan.make_download(folder, sources, endpoints)
    for remark in download.remarks:
        print(f"note: {remark}")
    rows = download.rows()
    width = max(len(row[0]) for row in rows)
    for place, size, repo in rows:
        print(f"{place:{width}}  {size:>10}  {repo}")
    total, missing = sum(file.size for file in download.files), download.missing_bytes
    print(
        f"{len(download.files)} files, {plan.size_text(total)}; to be fetched: {plan.size_text(missing)}; "
        f"free: {plan.size_text(download.free_bytes())}",
        flush=True,
    )
    plan.check_space(download)
    if args.dry_run:
        return
    plan.check_present(download, lambda files, **about: tqdm(files, disable=not files, dynamic_ncols=True, **about))
    plan.fetch(download, endpoints, lambda line: print(line, flush=True))
    print(f"all files are whole; next: {next_command(folder, args.version, four_steps=args.four_steps)}")


def next_command(folder: Path, version: str, *, four_steps: bool) -> str:
    """The command for what has been fetched: a proof of it, or of a single file, which has none, a video."""
    if four_steps:
        file = folder / FOUR_STEPS_SOURCE.into / FOUR_STEPS_FILE
        words = ["bash", "run_staged.sh", "--model_path", str(folder), "--resolution", version.partition("_")[0]]
        words += ["--transformer", str(file), "--four_steps", "--prompt", "A cat walks on the grass."]
        return shlex.join(words)
    return shlex.join(["python", "-m", "hunyuan_staged.verify", "--model_path", str(folder), "--version", version])


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0, or 2 after one line that says what was refused or what failed."""
    return run_tool(build_parser(), run, argv, interrupted="interrupted; the same command goes on from here")
