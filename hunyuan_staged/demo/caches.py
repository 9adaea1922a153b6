"""`python -m hunyuan_staged.demo.caches --model_path DIR --output_dir OUT`: what feature caches cost and save.

Held-out prompts are denoised without a cache and with each type at three strengths; with --attn_modes again in these
modes, in bfloat16 (`--types` with nothing behind it: the modes alone). caches.json gets the relative error of the
latents against exact attention in float32 without a cache, ‖A-B‖/‖A‖ in mean and at worst, the share of steps that was
computed, and, with --judge, what the clips get right; caches.png shows error and speed (needs
`pip install -e .[compare]`).
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hunyuan_staged.attention import modes
from hunyuan_staged.compare.measures import latent_errors
from hunyuan_staged.demo import evaluate
from hunyuan_staged.errors import InputError, run_tool
from hunyuan_staged.files import atomic
from hunyuan_staged.files.atomic import check_output_dir
from hunyuan_staged.parsing import Parser, tool_parser
from hunyuan_staged.runtime.progress import quiet

# From careful to bold: how many steps apart the computed ones are; the thresholds of those that adapt, whose interval is
# then 6.
INTERVALS = (2, 3, 5)
THRESHOLDS = {"firstblock": (0.02, 0.05, 0.1), "magcache": (0.03, 0.06, 0.15)}
STRENGTHS: dict[str, Sequence[dict[str, Any]]] = {
    **{name: [{"cache_step_interval": n} for n in INTERVALS] for name in ("deepcache", "teacache", "taylorcache")},
    **{
        name: [{"cache_step_interval": 6, "cache_threshold": threshold} for threshold in thresholds]
        for name, thresholds in THRESHOLDS.items()
    },
}


EXACT = "torch"  # the mode that the others are held against


def measure(
    pipelines: Mapping[str, evaluate.DemoPipeline],
    types: Sequence[str],
    prompts: int,
    *,
    judge: bool = False,
    progress: Any = quiet,
) -> list[dict[str, Any]]:
    """A row for each attention mode, type and strength, over so many prompts; each mode's first is without a cache.

    pipelines: by attention mode, the exact one first.
    """
    exact = next(iter(pipelines.values()))
    setting = exact.setting()
    settings: list[tuple[str, Any]] = [("none", None)]
    for name in types:
        settings += [(name, exact.caching(name, given)) for given in STRENGTHS[name]]
    plans = [(mode, *plan) for mode in pipelines for plan in settings]
    held_out = evaluate.held_out_prompts("single", prompts)
    found: list[dict[str, list]] = [{"error": [], "computed": [], "verdicts": []} for _ in plans]
    runs = [(number, plan) for number in range(prompts) for plan in range(len(plans))]
    for number, plan in progress(runs, desc="caches", unit="clip"):
        scene, prompt = held_out[number]
        mode, _, chosen = plans[plan]
        latents, (computed, _) = pipelines[mode].latents(prompt, evaluate.SEED + number, setting, chosen)
        if plan == 0:
            plain = latents
        found[plan]["error"].append(latent_errors(plain, latents)[0])
        found[plan]["computed"].append(computed / setting.steps)
        if judge:
            found[plan]["verdicts"].append(evaluate.judge(exact.decode(latents), scene))
    rows = []
    for (mode, name, chosen), values in zip(plans, found, strict=True):
        row: dict[str, Any] = {"attn_mode": mode, "type": name, "settings": chosen.record() if chosen else None}
        row |= {"prompts": prompts}
        row |= {"error": round(float(np.mean(values["error"])), 4), "worst_error": round(max(values["error"]), 4)}
        row["computed"] = round(float(np.mean(values["computed"])), 4)
        if judge:
            row["right"] = evaluate.shares(values["verdicts"])
        rows.append(row)
    return rows


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Error against how many times fewer steps are computed, a line for each type and attention mode."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    colors: dict[str, str] = {}
    for mode, name in dict.fromkeys((row["attn_mode"], row["type"]) for row in rows if row["settings"]):
        points = [
            (1 / row["computed"], row["error"]) for row in rows if (row["attn_mode"], row["type"]) == (mode, name)
        ]
        label, line = (name, "-") if mode == EXACT else (f"{name}, {mode}", "--")
        color = colors.setdefault(name, f"C{len(colors)}")
        axes.plot(*zip(*points, strict=True), marker="o", label=label, linestyle=line, color=color)
    axes.set(xlabel="steps / computed steps", ylabel="relative error of the latents", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic.replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)


def build_parser() -> Parser:
    parser = tool_parser("hunyuan_staged.demo.caches", __doc__)
    parser.add_argument("--model_path", type=Path, required=True, help="the demo checkpoint")
    parser.add_argument("--output_dir", type=Path, required=True, help="gets caches.json and caches.png")
    parser.add_argument("--types", nargs="*", choices=tuple(STRENGTHS), default=tuple(STRENGTHS), help="which caches")
    parser.add_argument("--attn_modes", nargs="*", choices=modes.ATTN_MODES, default=(), help="in which modes, too")
    parser.add_argument("--prompts", type=int, default=4, help="clips of each setting (default: %(default)s)")
    parser.add_argument("--judge", action="store_true", help="also decode and judge each clip")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and return the exit status: 0, or 2 after a line on what was refused."""
    return run_tool(build_parser(), run, argv)


def run(args: argparse.Namespace) -> None:
    """What the flags ask for. Raises InputError on what cannot be used."""
    import torch
    from tqdm import tqdm

    if args.prompts < 1:
        raise InputError(f"--prompts {args.prompts} is not a positive number")
    check_output_dir("--output_dir", args.output_dir)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipelines = {EXACT: evaluate.DemoPipeline(args.model_path, device)}
    for mode in args.attn_modes:
        name = f"{mode}, bfloat16" if mode in pipelines else mode
        pipelines[name] = evaluate.DemoPipeline(args.model_path, device, attn_mode=mode, dtype=torch.bfloat16)
    rows = measure(pipelines, args.types, args.prompts, judge=args.judge, progress=tqdm)
    with atomic.replacing(args.output_dir / "caches.json") as temporary:
        temporary.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if args.types:
        plot(rows, args.output_dir / "caches.png")
    for row in rows:
        cost = f"{row['computed']:6.1%} computed  error {row['error']:.4f}  worst {row['worst_error']:.4f}"
        right = f"  {row['right']['all four']:5.1f} % right" if args.judge else ""
        print(f"{row['attn_mode']:16} {row['type']:12} {cost}{right}")
    print(json.dumps(rows))


if __name__ == "__main__":
    sys.exit(main())
