"""`python -m hunyuan_staged.compare A B`: how far two runs are apart, in their latents and in their videos.

A and B are output folders. Whatever both hold is compared: stage2_latents.safetensors, and stage3_frames.safetensors (as
decoded) or else output_video.mp4 (with what H.264 did to it). The last line on stdout is JSON, or with
--json a file is. Frames count from 0.

Letters: T frames, H x W px; C channels and t frames of h x w of the latents.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hunyuan_staged.compare.runs import PLOT_FILE, SIDE_BY_SIDE_FILE, compare
from hunyuan_staged.decoding import tiling
from hunyuan_staged.errors import one_line, run_tool
from hunyuan_staged.files.atomic import replacing
from hunyuan_staged.parsing import Parser, tool_parser
from hunyuan_staged.run_options import DEFAULT_AMPLIFY, DEFAULT_COMPARISON_DIR


def report(result: dict[str, Any]) -> list[str]:
    """The result as lines for people."""
    lines = []
    if latents := result["latents"]:
        place = f"latent frame {latents['worst_frame']} of {len(latents['per_frame'])}"
        lines.append(
            f"latents     relative error {latents['relative_error']:.3g}, largest {latents['worst']:.3g} in {place}"
        )
    if frames := result["frames"]:
        equal = f", {frames['equal_frames']} of them equal" if frames["equal_frames"] else ""
        size = f"{frames['num_frames']} frames of {frames['width']}x{frames['height']}{equal}"
        lines.append(f"frames      {frames['file']}: {size}")
        for name, form, unit in (("psnr", ".2f", " dB"), ("ssim", ".4f", ""), ("lpips", ".4f", "")):
            if not frames[name]:
                continue
            mean, worst = (f"{frames[name][key]:{form}}{unit}" for key in ("mean", "worst"))
            lines.append(f"{name.upper():12}mean {mean}, worst {worst} in frame {frames[name]['worst_frame']}")
        for run, seams in frames["seams"].items():
            told = "no tile border that could be told from other lines"
            if seams:
                told = f"{seams['ratio']:.2f} at tile borders against elsewhere, most {seams['worst']:.2f} at "
                told += f"{seams['worst_at']} px"
            lines.append(f"seams of {run.upper()}  {told}")
        if frames["flicker"]["a"] is not None:
            before, now = (f"{frames['flicker'][run]:.3g}" for run in "ab")
            lines.append(f"flicker     {before} in A, {now} in B")
    return lines + [f"note        {one_line(note)}" for note in result["notes"]]


def as_json(value: Any) -> Any:
    """The value with "inf" for an infinite number, which JSON has none for (and which float() reads)."""
    if isinstance(value, dict):
        return {name: as_json(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [as_json(inner) for inner in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    return value


def build_parser() -> Parser:
    """All flags, with their defaults."""
    parser = tool_parser("hunyuan_staged.compare", __doc__)
    parser.add_argument("a", metavar="A", type=Path, help="output folder of a run: the reference")
    parser.add_argument("b", metavar="B", type=Path, help="output folder of the run to compare with it")
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path(DEFAULT_COMPARISON_DIR),
        help=f"where {SIDE_BY_SIDE_FILE} and {PLOT_FILE} go (default: {DEFAULT_COMPARISON_DIR})",
    )
    parser.add_argument(
        "--tile_size",
        type=int,
        default=tiling.DEFAULT_TILE_SIZE,
        help="side of the tiles in px that stage 3 was run with (default: %(default)s)",
    )
    parser.add_argument(
        "--tile_overlap",
        type=float,
        default=tiling.DEFAULT_TILE_OVERLAP,
        help=f"their overlap, 0 to {tiling.MAX_OVERLAP} (default: %(default)s)",
    )
    parser.add_argument(
        "--amplify",
        type=float,
        default=DEFAULT_AMPLIFY,
        help="factor of the difference in the video (default: %(default)g)",
    )
    parser.add_argument("--no_video", action="store_true", help=f"do not write {SIDE_BY_SIDE_FILE}")
    parser.add_argument("--no_plot", action="store_true", help=f"do not write {PLOT_FILE}")
    parser.add_argument("--json", type=Path, help="write the JSON to this file, not to stdout")
    return parser


def run(args: argparse.Namespace) -> None:
    """Compare, and print."""
    from tqdm import tqdm

    result = compare(args, lambda iterable, **options: tqdm(iterable, dynamic_ncols=True, **options))
    text = json.dumps(as_json(result), allow_nan=False)
    if args.json:
        with replacing(args.json) as path:
            path.write_text(text + "\n", encoding="utf-8")
    for line in report(result):
        print(line)
    for path in result["written"]:
        print(f"wrote {one_line(path)}", file=sys.stderr)
    if args.json:
        print(f"wrote {one_line(args.json)}", file=sys.stderr)
    else:
        print(text)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0, or 2 after one line that says what was refused."""
    return run_tool(build_parser(), run, argv, interrupted="the comparison was interrupted")
