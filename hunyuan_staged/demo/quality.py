"""`python -m hunyuan_staged.demo.quality --model_path DIR --output_dir OUT`: what each setting costs and what it loses.

Every setting runs over the same held-out prompts and seeds: shapes and cards, known and new wordings. Against the exact
run of the same prompt it gives the relative error of the latents, PSNR and SSIM of the frames, their flicker, and what
the judge of evaluate.py finds right, with 95 % intervals. Settings that store weights otherwise (bf16, fp8, gguf-…)
compute in bf16. clips.jsonl has a line for each clip, and a run that was stopped goes on behind it; quality.json has the
table, quality.png loss against work with the Pareto line.
"""

import argparse
import copy
import json
import math
import multiprocessing
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from hunyuan_staged import presets
from hunyuan_staged.demo import stored_weights
from hunyuan_staged.errors import InputError, run_tool
from hunyuan_staged.files.atomic import check_output_dir, replacing
from hunyuan_staged.options import DenoiseOptions
from hunyuan_staged.parsing import Parser, tool_parser

CLIPS_FILE, TABLE_FILE, PLOT_FILE = "clips.jsonl", "quality.json", "quality.png"
EXACT = "exact"
KINDS = ("single", "card")  # of prompts: one shape that moves, a card with a word
WORDINGS = ("known", "new")
Z95 = 1.959964  # of the normal distribution, both sides
JUDGED = ("all four", "word")  # what makes a clip right, of a shape and of a card


def _settings() -> dict[str, dict[str, Any]]:
    """Stage 2's options of each setting, by its name."""
    found: dict[str, dict[str, Any]] = {EXACT: {}}
    found |= {name: {"preset": name} for name in presets.PRESETS if name != EXACT}
    found |= {f"steps-{steps}": {"num_inference_steps": steps} for steps in (20, 15, 10, 6)}
    found["guidance-1"] = {"guidance_scale": 1.0}
    found |= {f"guidance-to-{stop:g}": {"guidance_interval": f"0,{stop:g}"} for stop in (0.5, 0.8)}
    found |= {
        f"guidance-to-{stop:g}-reuse": {"guidance_interval": f"0,{stop:g}", "guidance_reuse": 1} for stop in (0.5, 0.8)
    }
    found["guidance-reuse-2"] = {"guidance_reuse": 2}
    for kind in ("deepcache", "teacache", "taylorcache"):
        found |= {f"{kind}-{n}": _cached(kind, step_interval=n) for n in (2, 3)}
        # Computed to the 9th step, and then every n-th.
        found |= {f"{kind}-9-{n}": _cached(kind, start_step=9, end_step=29, step_interval=n) for n in (3, 4)}
    found |= {f"firstblock-{value:g}": _cached("firstblock", threshold=value) for value in (0.05, 0.1)}
    found |= {f"magcache-{value:g}": _cached("magcache", threshold=value) for value in (0.03, 0.06, 0.15, 0.24)}
    found |= {f"teacache-at-{value:g}": _cached("teacache", threshold=value) for value in (0.05, 0.1, 0.2)}
    found["taylorcache-as-balanced"] = {"preset": "balanced", "cache_type": "taylorcache"}
    found["ssta"] = {"attn_mode": "flex-block-attn"}
    found["ssta-middle"] = {"attn_schedule": "exact:0-5,sparse:6-23,exact:24-29"}
    return found | {form: {} for form in stored_weights.FORMS}


def _cached(kind: str, **flags: float) -> dict[str, Any]:
    return {"enable_cache": True, "cache_type": kind} | {f"cache_{name}": value for name, value in flags.items()}


SETTINGS = _settings()


@dataclass(frozen=True)
class Clip:
    """One clip to make: a setting, and the prompt number of a kind in a wording."""

    setting: str
    kind: str
    wording: str
    number: int

    @property
    def key(self) -> str:
        return f"{self.setting}/{self.kind}/{self.wording}/{self.number}"


def clips(settings: Sequence[str], prompts: int) -> list[Clip]:
    """All clips: `prompts` prompts, spread over kinds and wordings, each with every setting, exact first."""
    kinds = [(kind, wording) for kind in KINDS for wording in WORDINGS]
    places = [(*kinds[i % len(kinds)], i // len(kinds)) for i in range(prompts)]
    return [Clip(setting, *place) for place in places for setting in dict.fromkeys((EXACT, *settings))]


# -- one clip --


class Instrument:
    """The demo, loaded once in a process; it remembers the exact clip of the prompt it is at."""

    def __init__(self, model_path: Path) -> None:
        import torch

        from hunyuan_staged.demo import evaluate

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._pipeline = evaluate.DemoPipeline(model_path, device)
        self._forms: dict[str, evaluate.DemoPipeline] = {}  # of those whose weights are stored otherwise
        self._prompts = cache(evaluate.held_out_prompts)
        self._reference: tuple[Any, tuple[Any, np.ndarray]] | None = None

    def __call__(self, clip: Clip) -> dict[str, Any]:
        """The line of clips.jsonl: work, errors against the exact clip, and the judge's verdict."""
        from hunyuan_staged.compare.measures import Flicker, latent_errors, psnr, ssim
        from hunyuan_staged.demo import evaluate

        scene, _ = self._scene(clip)
        latents, frames, work = self._generate(clip)
        exact_latents, exact = self._exact(clip)
        flicker, before = Flicker(), Flicker()
        pairs = [(a / np.float32(255), b / np.float32(255)) for a, b in zip(exact, frames, strict=True)]
        for a, b in pairs:
            before.add(a)
            flicker.add(b)
        return {
            "clip": clip.key,
            "evaluations": work,
            "error": latent_errors(exact_latents, latents)[0],
            "psnr": float(np.mean([min(100.0, psnr(a, b)) for a, b in pairs])),
            "ssim": float(np.mean([ssim(a, b) for a, b in pairs])),
            "flicker": (flicker.result() or 0.0) / (before.result() or 1.0),
            "right": {name: float(value) for name, value in evaluate.judge(frames, scene).items()},
        }

    def _scene(self, clip: Clip) -> Any:
        return self._prompts(clip.kind, clip.number + 1, new_wording=clip.wording == "new")[clip.number]

    def _exact(self, clip: Clip) -> tuple[Any, np.ndarray]:
        place = (clip.kind, clip.wording, clip.number)
        if self._reference is None or self._reference[0] != place:
            self._reference = place, self._generate(Clip(EXACT, *place))[:2]
        return self._reference[1]

    def _generate(self, clip: Clip) -> tuple[Any, np.ndarray, float]:
        """(latents, frames uint8 [T, H, W, 3], transformer evaluations)."""
        from hunyuan_staged.demo import evaluate

        options = DenoiseOptions(seed=evaluate.SEED + clip.number, **SETTINGS[clip.setting])
        pipeline = self._form(clip.setting) if clip.setting in stored_weights.FORMS else self._pipeline
        latents, work = pipeline.denoise(self._scene(clip)[1], options)
        return latents, self._pipeline.decode(latents), work

    def _form(self, form: str) -> Any:
        """The pipeline with its weights stored in a form, and computing in bf16."""
        import torch

        if form not in self._forms:
            made = copy.copy(self._pipeline)
            made.transformer, made.dtype = stored_weights.stored(made.transformer, form), torch.bfloat16
            self._forms[form] = made
        return self._forms[form]


# -- all clips --


def read_lines(path: Path) -> dict[str, dict[str, Any]]:
    """The clips that are done, by key. A last line that was cut off by a kill does not count."""
    done = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            found = json.loads(line)
        except ValueError:
            continue
        done[found["clip"]] = found
    return done


_instrument: Instrument | None = None


def _start(model_path: Path) -> None:
    global _instrument
    _instrument = Instrument(model_path)


def _measure(group: Sequence[Clip]) -> list[dict[str, Any]]:
    assert _instrument is not None
    return [_instrument(clip) for clip in group]


def measure(model_path: Path, wanted: Sequence[Clip], path: Path, processes: int) -> dict[str, dict[str, Any]]:
    """Make the clips that clips.jsonl at `path` lacks; all lines by key."""
    from tqdm import tqdm

    done = read_lines(path)
    groups: dict[tuple[str, str, int], list[Clip]] = {}
    for clip in wanted:
        if clip.key not in done:
            groups.setdefault((clip.kind, clip.wording, clip.number), []).append(clip)
    missing = sum(map(len, groups.values()))
    cut_off = path.is_file() and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as file, tqdm(total=missing, desc="quality", unit="clip") as bar:
        file.write("\n" if cut_off else "")
        for lines in _results(model_path, list(groups.values()), processes):
            for line in lines:
                done[line["clip"]] = line
                file.write(json.dumps(line) + "\n")
            file.flush()
            bar.update(len(lines))
    return {clip.key: done[clip.key] for clip in wanted}


def _results(model_path: Path, groups: Sequence[Sequence[Clip]], processes: int) -> Iterable[list[dict[str, Any]]]:
    if processes == 1 or not groups:
        instrument = Instrument(model_path) if groups else None
        for group in groups:
            assert instrument is not None
            yield [instrument(clip) for clip in group]
        return
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(processes, len(groups)), initializer=_start, initargs=(model_path,)) as pool:
        yield from pool.imap_unordered(_measure, groups)


# -- the table --


def interval(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share seen in `count` trials (Wilson 1927, "Probable inference")."""
    if not count:
        return 0.0, 1.0
    middle = share + Z95**2 / (2 * count)
    spread = Z95 * math.sqrt(share * (1 - share) / count + Z95**2 / (4 * count**2))
    scale = 1 + Z95**2 / count
    return (middle - spread) / scale, (middle + spread) / scale


def row(name: str, lines: Sequence[Mapping[str, Any]], exact_evaluations: float) -> dict[str, Any]:
    """A setting's row: work, means and worst values over its clips, and how many clips are right."""
    evaluations = float(np.mean([line["evaluations"] for line in lines]))
    right = [line["right"][what] for line in lines for what in JUDGED if what in line["right"]]
    share = float(np.mean(right)) if right else 0.0
    low, high = interval(share, len(right))
    errors = [line["error"] for line in lines]
    return {
        "setting": name,
        "clips": len(lines),
        "evaluations": evaluations,
        "less_work": exact_evaluations / evaluations,
        "error": float(np.mean(errors)),
        "worst_error": max(errors),
        "psnr": float(np.mean([line["psnr"] for line in lines])),
        "ssim": float(np.mean([line["ssim"] for line in lines])),
        "flicker": float(np.mean([line["flicker"] for line in lines])),
        "right": share,
        "right_interval": [low, high],
    }


def table(lines: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each setting, in the order in which they first come; exact is the measure of work."""
    by_setting: dict[str, list[Mapping[str, Any]]] = {}
    for key, line in lines.items():
        by_setting.setdefault(key.partition("/")[0], []).append(line)
    exact = float(np.mean([line["evaluations"] for line in by_setting[EXACT]]))
    return [row(name, found, exact) for name, found in by_setting.items()]


def pareto(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The settings that no other one beats in both work and error, from the most work to the least."""
    best = [
        one
        for one in rows
        if not any(
            other["evaluations"] <= one["evaluations"]
            and other["error"] <= one["error"]
            and (other["evaluations"], other["error"]) != (one["evaluations"], one["error"])
            for other in rows
        )
    ]
    return [one["setting"] for one in sorted(best, key=lambda one: -one["evaluations"])]


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Error against how many times fewer evaluations, with the Pareto line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for one in rows:
        axes.plot(one["less_work"], one["error"], "o", color="C0")
        axes.annotate(
            one["setting"], (one["less_work"], one["error"]), fontsize=8, xytext=(4, 4), textcoords="offset points"
        )
    line = [next(one for one in rows if one["setting"] == name) for name in pareto(rows)]
    axes.plot([one["less_work"] for one in line], [one["error"] for one in line], "--", color="C1", label="Pareto line")
    axes.set(xlabel="times fewer transformer evaluations", ylabel="relative error of the latents", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)


def build_parser() -> Parser:
    parser = tool_parser("hunyuan_staged.demo.quality", __doc__)
    parser.add_argument("--model_path", type=Path, required=True, help="the demo checkpoint")
    parser.add_argument("--output_dir", type=Path, required=True, help=f"gets {CLIPS_FILE}, {TABLE_FILE}, {PLOT_FILE}")
    parser.add_argument(
        "--settings", nargs="*", choices=tuple(SETTINGS), default=tuple(SETTINGS), help="which ones (default: all)"
    )
    parser.add_argument("--prompts", type=int, default=64, help="over how many prompts (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=1, help="side by side (default: %(default)s)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and return the exit status: 0, or 2 after a line on what was refused."""
    return run_tool(build_parser(), run, argv)


def run(args: argparse.Namespace) -> None:
    """What the flags ask for. Raises InputError on what cannot be used."""
    for name in ("prompts", "processes"):
        if getattr(args, name) < 1:
            raise InputError(f"{getattr(args, name)} is not a positive number", option=name)
    check_output_dir("--output_dir", args.output_dir)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    wanted = clips(args.settings, args.prompts)
    rows = table(measure(args.model_path, wanted, args.output_dir / CLIPS_FILE, args.processes))
    result = {"prompts": args.prompts, "rows": rows, "pareto": pareto(rows)}
    with replacing(args.output_dir / TABLE_FILE) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    plot(rows, args.output_dir / PLOT_FILE)
    for one in rows:
        low, high = (100 * value for value in one["right_interval"])
        print(
            f"{one['setting']:16} {one['less_work']:5.2f} times less work  error {one['error']:.4f}, worst "
            f"{one['worst_error']:.4f}  {one['psnr']:5.1f} dB  SSIM {one['ssim']:.4f}  flicker {one['flicker']:.2f}  "
            f"right {100 * one['right']:5.1f} % ({low:.1f} to {high:.1f})"
        )
    print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(main())
