"""`python -m hunyuan_staged.gallery RUNS`: one page with all jobs below a folder, and the command that finishes some.

A job is a folder with generation_config.json. The page needs no server and loads no script from elsewhere; run the
command again to bring it up to date.
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from hunyuan_staged.errors import InputError, one_line, run_tool, write_stdout
from hunyuan_staged.files.atomic import check_output_dir
from hunyuan_staged.parsing import Parser, tool_parser

PAGE = "index.html"
MANY = 50  # folders, of which a bar shows how many have been read


def build_parser() -> Parser:
    """All flags, with their defaults."""
    parser = tool_parser("hunyuan_staged.gallery", __doc__)
    parser.add_argument("runs", metavar="RUNS", type=Path, help="folder with jobs, at any depth")
    parser.add_argument("--output", metavar="FILE", type=Path, help=f"the page (default: {PAGE} in RUNS)")
    return parser


def make(args: argparse.Namespace) -> None:
    """Read the jobs, write the page, say what is in it."""
    root: Path = args.runs
    output: Path = args.output or root / PAGE
    if output.suffix.lower() not in (".html", ".htm") or output.is_dir():
        raise InputError(f"--output {output} is not the name of an .html file")
    from tqdm import tqdm

    from hunyuan_staged.gallery import folders, page

    found = folders.find(root)
    check_output_dir("--output", output.parent)
    bar = tqdm(found, desc="reading jobs", unit="job", disable=len(found) < MANY, dynamic_ncols=True)
    jobs = [folders.read(folder, root) for folder in bar]
    page.write(jobs, root.absolute().name, output)
    counts = Counter(job.status for job in jobs)
    shown = ", ".join(f"{counts[status]} {status}" for status in folders.STATUSES if counts[status])
    write_stdout(one_line(f"wrote {output}: {len(jobs)} jobs: {shown}") + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0, or 2 after one line that says what was refused."""
    return run_tool(build_parser(), make, argv)
