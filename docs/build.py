#!/usr/bin/env python3
"""Write what the documentation takes from the code: `python docs/build.py`; `--check` only says what is out of date.

Between `<!-- built: NAME -->` and `<!-- end -->` a page holds what BLOCKS[NAME] gives. The measured figures come from
hunyuan_staged/memory/benchmarks.json, the flags from the parsers, the memory of each card from the memory plan.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
import tomllib
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "hunyuan_staged" / "memory" / "benchmarks.json"
PAGES = (
    "README.md",
    "README.zh.md",
    *(
        f"docs/{name}.md"
        for name in (
            "architecture",
            "benchmarks",
            "demo",
            "first_video",
            "flags",
            "memory",
            "model",
            "presets",
            "weights",
        )
    ),
)
BLOCK = re.compile(r"(<!-- built: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
STEPS = 50  # of the published base versions
LONG = 121  # frames
# README's rows: what is said of a card, and which row of the memory table (GB) it is
README_CARDS = (
    ("NVIDIA GeForce RTX 3060", "RTX 3060, 12 GB"),
    ("NVIDIA GeForce RTX 4060 Ti", "RTX 4060 Ti, 16 GB"),
    ("NVIDIA GeForce RTX 3090", "RTX 3090, 24 GB"),
    ("NVIDIA GeForce RTX 4090", "RTX 4090, 24 GB"),
    ("NVIDIA H100 80GB HBM3", "H100, 80 GB"),
)
VIDEOS = (("480p", 121), ("720p", 49), ("720p", 121))
FIRST_CARDS = ("12 GB", "24 GB", "80 GB")
# (resolution, frames, steps, guidance branches) by what first_video.md calls them
FIRST_RUNS = {
    "480p, 4 steps": ("480p", 121, 4, 1),
    "480p, 8 steps, step-distilled": ("480p", 121, 8, 1),
    "480p, 50 steps": ("480p", 121, 50, 2),
    "720p, 50 steps": ("720p", 121, 50, 2),
}
CHINESE = {
    "resident": "全部常驻显存",
    "blocks offloaded": "54 个块中的 {} 个放在主机内存",
    "minutes": "{} 分钟",
    "hours": "{} 小时",
}


@cache
def figures() -> dict[str, Any]:
    """The measured figures."""
    return json.loads(BENCHMARKS.read_text(encoding="utf-8"))


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("|" + "".join(f" {cell} |" if cell != "" else " |" for cell in line) for line in lines)


def percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}".replace("%", " %")


def code(text: str | None) -> str:
    return f"`{text}`" if text else ""


def number(value: float | None, unit: str = "") -> str:
    return "" if value is None else f"{value:g}{unit}"


# -- benchmarks.md --


def machine(row: dict[str, Any]) -> str:
    return "" if row["machine"] == "h100" else f"{figures()['machines'][row['machine']]['about']}; "


def steps() -> str:
    """Every measured step, the newest of a size first as the file has them."""
    rows = []
    for row in figures()["steps"]:
        notes = [] if row["branches"] == 2 else ["guidance 1: one branch"]
        notes += [] if row["weights"] == "bf16" else [f"weights stored in {row['weights']}"]
        notes += [] if row["fused"] else ["not fused"]
        notes += [f"{row['offloaded_blocks']} blocks offloaded"] if row["offloaded_blocks"] else []
        if row["parts"]:
            notes.append("attention {:g}, linear layers {:g}, rest {:g} s".format(*row["parts"]))
        notes += [row["note"]] if row.get("note") else []
        rows.append(
            (
                f"{row['resolution']}, {row['num_frames']} frames",
                row["attention"],
                number(row["seconds"]),
                number(row["first_step_extra"]),
                percent(row["share_of_peak"]),
                number(row["peak_gib"]),
                machine(row) + "; ".join(notes),
                code(row.get("command")),
                f"{row['commit']}, {row['date']}",
            )
        )
    columns = ("size", "attention", "seconds a step", "first step's extra, s", "share of peak", "peak, GiB")
    return table((*columns, "notes", "command", "commit, date"), rows)


def decodings() -> str:
    rows = []
    for row in figures()["decodings"]:
        tile = f"tiles of {row['tile_size']} px" if row["tile_size"] else "whole frames"
        piece = f", in pieces of {row['frames_per_piece']} frames" if row.get("frames_per_piece") else ""
        rows.append(
            (
                f"{row['width']}x{row['height']}, {row['num_frames']} frames",
                f"{tile}, {row['latent_frames_at_once']} latent frames at once{piece}",
                number(row["seconds"]),
                number(row["tile_seconds"]),
                percent(row["share_of_peak"]),
                number(row["peak_gib"]),
                number(row["host_gib"]),
                (machine(row) + row.get("note", "")).removesuffix("; "),
                code(row.get("command")),
                f"{row['commit']}, {row['date']}",
            )
        )
    columns = ("video", "how", "seconds", "one full tile, s", "share of peak", "peak, GiB", "host, GiB")
    return table((*columns, "notes", "command", "commit, date"), rows)


def other_software() -> str:
    rows = [
        (row["what"], row["num_frames"], row["seconds"], row.get("note", "")) for row in figures()["other_software"]
    ]
    return table(("what", "frames", "seconds a guided step", "notes"), rows)


def records(name: str) -> str:
    """The records of one topic, with as many columns as it has anything to say in."""
    rows = [row for row in figures()["records"] if row["table"] == name]
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "what": lambda row: row["what"],
        "measured": lambda row: row["figures"],
        "on": lambda row: machine(row).removesuffix("; "),
        "command": lambda row: code(row.get("command")),
        "commit, date": lambda row: ", ".join(row[key] for key in ("commit", "date") if row.get(key)),
    }
    used = {head: cell for head, cell in columns.items() if any(cell(row) for row in rows)}
    return table(tuple(used), [tuple(cell(row) for cell in used.values()) for row in rows])


def whole_table(name: str) -> str:
    """One of the tables that were measured by a single command, which stands below it."""
    found = figures()["tables"][name]
    where = figures()["machines"][found["machine"]]["about"]
    return (
        f"{table(found['columns'], found['rows'])}\n\n{where}, {found['commit']}, {found['date']}: `{found['command']}`"
    )


# -- README.md, README.zh.md, memory.md --


def measured_step(resolution: str, num_frames: int, attention: str = "flash4") -> dict[str, Any]:
    """The step that --dry_run's time rests on, with all blocks on the GPU."""
    wanted = {"resolution": resolution, "num_frames": num_frames, "attention": attention, "in_plan": True}
    wanted |= {"offloaded_blocks": 0, "fused": True}
    return next(row for row in figures()["steps"] if all(row[key] == value for key, value in wanted.items()))


def minutes_of(
    card: str, resolution: str, num_frames: int, steps: int = STEPS, branches: int = 2
) -> tuple[float, float]:
    """(least, most) minutes of the denoising loop: as measured on the card of the measurement, else by its dense rate."""
    from hunyuan_staged.geometry import video_tokens
    from hunyuan_staged.memory import expected
    from hunyuan_staged.memory.cards import assumed_card
    from hunyuan_staged.memory.operations import TEXT_TOKENS, step_flops
    from hunyuan_staged.versions import LAYERS

    step = measured_step(resolution, num_frames)
    forwards = steps * branches / 2  # of those with two branches
    seconds = forwards * step["seconds"] + step["first_step_extra"]
    if card == figures()["machines"][step["machine"]]["gpu"]:
        return seconds / 60, seconds / 60
    tokens = video_tokens(num_frames, step["height"], step["width"])
    one = step_flops(tokens, TEXT_TOKENS, layers=LAYERS, heads=16, width=128, mlp_ratio=4)
    found = expected.estimated(*[2 * forwards * one] * 2, assumed_card(card))
    assert found is not None, f"{card} has no rate"
    return found.least / 60, found.most / 60


def duration(least: float, most: float, chinese: bool) -> str:
    """Minutes, or hours from three of them on, e.g. "80 to 130 min"."""
    from hunyuan_staged.memory import expected

    text, unit = expected.duration(60 * least, 60 * most, " 到 " if chinese else " to ")
    return CHINESE[{"hours": "hours", "min": "minutes"}[unit]].format(text) if chinese else f"{text} {unit}"


@cache
def memory_rows() -> tuple[tuple[str, ...], ...]:
    """(card, stage 1, stage 2 at 720p, with fp8, stage 2 at 480p, stage 3) for each size of card, computed."""
    from hunyuan_staged.bench import cards

    return tuple(cards.table())


def first_video() -> str:
    """Minutes and memory on a card of 80, 24 and 12 GB."""
    gpus = {row["name"]: row for row in figures()["cards"]}
    plans = {row[0]: row for row in memory_rows()}
    rows = []
    for name, label in README_CARDS:
        plan = plans[f"{gpus[name]['memory_gb']} GB"]
        if plan[0] not in FIRST_CARDS:
            continue
        times = [duration(*minutes_of(name, *run), False) for run in FIRST_RUNS.values()]
        rows.append((label, *times, plan[1], plan[4], plan[2]))
    return table(("card", *FIRST_RUNS, "stage 1", "stage 2, 480p", "stage 2, 720p"), rows)


def where_the_weights_are(gigabytes: int, chinese: bool) -> str:
    """Where the transformer's blocks are on a card of so many GB, 720p, 121 frames."""
    cell = next(row[2] for row in memory_rows() if row[0] == f"{gigabytes} GB").partition(":")[0]
    if not chinese:
        return "all on the GPU" if cell == "resident" else cell.replace("offloaded", "in host memory")
    return CHINESE["resident"] if cell == "resident" else CHINESE["blocks offloaded"].format(cell.split()[0])


def readme_cards(chinese: bool = False) -> str:
    """README's five rows."""
    gpus = {row["name"]: row for row in figures()["cards"]}
    rows = []
    for name, label in README_CARDS:
        times = [duration(*minutes_of(name, *video), chinese) for video in VIDEOS]
        measured = name == figures()["machines"]["h100"]["gpu"]
        how = ("实测", "measured") if measured else ("估算", "computed")
        rows.append((label, where_the_weights_are(gpus[name]["memory_gb"], chinese), *times, how[not chinese]))
    if chinese:
        return table(("显卡", "权重（720p，121 帧）", "480p，121 帧", "720p，49 帧", "720p，121 帧", "时间"), rows)
    columns = ("card", "weights, 720p, 121 frames", "480p, 121 frames", "720p, 49 frames", "720p, 121 frames", "time")
    return table(columns, rows)


def all_cards() -> str:
    """Every card of the list: memory, rate, source of the rate, minutes at 720p."""
    rows = []
    for row in figures()["cards"]:
        times = [duration(*minutes_of(row["name"], *video), False) for video in VIDEOS]
        rows.append((row["name"], row["memory_gb"], row["bf16_tflops"], *times, row["source"]))
    videos = (f"{resolution}, {frames} frames" for resolution, frames in VIDEOS)
    return table(("card", "GB", "TFLOP/s, dense bf16", *videos, "source of the rate"), rows)


def memory_table() -> str:
    columns = ("card", "stage 1", "stage 2, 720p", "stage 2, 720p, `--weights_dtype fp8`", "stage 2, 480p")
    return table((*columns, "stage 3, 720p"), memory_rows())


# Of each size in the table of files, the slowest card that is listed.
FILE_CARDS = {
    8: "NVIDIA GeForce RTX 3070",
    12: "NVIDIA GeForce RTX 3060",
    16: "NVIDIA GeForce RTX 4060 Ti",
    24: "NVIDIA GeForce RTX 3090",
    80: "NVIDIA H100 80GB HBM3",
}


def weights_table() -> str:
    """What stage 2 takes by the transformer's file, and the minutes of its loop."""
    from hunyuan_staged.bench import file_cards

    assert tuple(FILE_CARDS) == file_cards.CARDS
    rows: list[tuple[object, ...]] = [(name, code(flags), *cells) for name, flags, *cells in file_cards.table(STEPS)]
    for what, flags, steps, branches in (
        ("minutes, 4 steps", "--four_steps", 4, 1),
        ("minutes, 50 steps", "", STEPS, 2),
    ):
        times = [duration(*minutes_of(card, "480p", LONG, steps, branches), False) for card in FILE_CARDS.values()]
        rows.append((what, code(flags) if flags else "", *times))
    columns = [
        f"{size} GB ({name.removeprefix('NVIDIA ').removeprefix('GeForce ')})" for size, name in FILE_CARDS.items()
    ]
    return table(("file", "command", *columns), rows)


def last_on_h200(rows: Sequence[dict[str, Any]], **wanted: object) -> dict[str, Any]:
    """The row that was measured last with all of these."""
    wanted["machine"] = "h200"
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())][-1]


def headline(chinese: bool = False) -> str:
    """README's numbers."""
    steps, slow = figures()["steps"], figures()["other_software"][0]
    step = last_on_h200(steps, resolution="720p", num_frames=121, attention="flash4", offloaded_blocks=0)
    streamed = next(r for r in steps if r["in_plan"] and (r["offloaded_blocks"], r["attention"]) == (54, "cudnn"))
    video = {"num_frames": 121, "height": 720, "tile_size": None}
    decoding = last_on_h200(figures()["decodings"], **video, latent_frames_at_once=2, frames_per_piece=4)
    marked = {row["headline"]: row for row in figures()["records"] if "headline" in row}
    two, bands, run = (marked[name] for name in ("a step on two GPUs", "in bands", "whole run"))
    tables = figures()["tables"]
    cached = next(row for row in tables["cache_speed"]["rows"] if row[0] == "teacache")
    share = percent(step["share_of_peak"])
    if chinese:
        lines = [
            f"**{step['seconds']:.1f} 秒**，{step['peak_gib']:g} GiB：720p、121 帧、带引导的一步，达到该卡实测峰值的 "
            f"{share}；两块 GPU 为 {two['seconds']:.1f} 秒；diffusers 原样运行需 {slow['seconds']} 秒（H100）。",
            f"**{streamed['peak_gib']:g} GiB**：所有块放在主机内存时的显存峰值，每步 {streamed['seconds']:.1f} 秒"
            "（H100，cuDNN 注意力）。",
            f"**{decoding['seconds']:.1f} 秒**：整帧解码这 121 帧，显存峰值 {decoding['peak_gib']:.1f} GiB；分行带解码为 "
            f"{bands['seconds']:.1f} 秒、{bands['peak_gib']:.1f} GiB，结果相同。",
            f"**{run['seconds']:.0f} 秒**：49 帧、4 步的整次运行，其中启动 {run['startup']:.0f} 秒。",
            f"**{cached[2]} 倍**：`--enable_cache --cache_type teacache` 对 50 步的加速，误差见 "
            "[caches.md](docs/caches.md)。",
            f"**{tables['exactness']['rows'][0][1]}**：Transformer 与官方实现的相对误差（float32）；2、3、4 个进程与单进程"
            "结果一致。",
        ]
    else:
        lines = [
            f"**{step['seconds']:.1f} s** and {step['peak_gib']:g} GiB for a guided step of 720p, 121 frames: {share} of "
            f"the card's peak; {two['seconds']:.1f} s on two. diffusers as shipped takes {slow['seconds']} s (H100).",
            f"**{streamed['peak_gib']:g} GiB** for it with all blocks in host memory, {streamed['seconds']:.1f} s a step "
            "(H100, cuDNN).",
            f"**{decoding['seconds']:.1f} s** to decode those 121 frames whole, in {decoding['peak_gib']:.1f} GiB; "
            f"{bands['seconds']:.1f} s for the same in {bands['peak_gib']:.1f} GiB.",
            f"**{run['seconds']:.0f} s** for a whole run of 49 frames in 4 steps, {run['startup']:.0f} of them start-up.",
            f"**{cached[2]} times** as fast over 50 steps with `--enable_cache --cache_type teacache` "
            "([its cost](docs/caches.md)).",
            f"**{tables['exactness']['rows'][0][1]}** relative distance of the transformer from the official "
            "implementation, in float32; 2, 3 and 4 processes give what one gives.",
        ]
    return "\n".join(f"{position}. {line}" for position, line in enumerate(lines, 1))


def scores(columns: Sequence[str], names: dict[str, str]) -> str:
    """What the demo checkpoint gets right, from its own scores.json."""
    found = json.loads((ROOT / "hunyuan_staged" / "demo" / "scores.json").read_text(encoding="utf-8"))
    known, new = (found[f"shape clips, {wording} wording"] for wording in ("known", "new"))
    rows = [(names.get(name, name), f"{share:g} %", f"{new[name]:g} %") for name, share in known.items()]
    return table(columns, rows)


# -- flags.md, model.md --


def commands() -> list[ModuleType]:
    """What has a table of flags, in their order."""
    import stage1_text_encoder
    import stage2_transformer
    import stage3_vae_decoder
    from hunyuan_staged import fit_preview
    from hunyuan_staged.cluster import command as cluster
    from hunyuan_staged.compare import command as compare
    from hunyuan_staged.download import command as download
    from hunyuan_staged.gallery import command as gallery
    from hunyuan_staged.verify import command as verify

    return [
        stage1_text_encoder,
        stage2_transformer,
        stage3_vae_decoder,
        compare,
        download,
        verify,
        fit_preview,
        gallery,
        cluster,
    ]


def meaning_and_default(action: argparse.Action) -> tuple[str, str]:
    """The help of a flag, taken apart: what it means, and its default as the help has it, else as the parser has it."""
    text = (action.help or "") % {**vars(action), "prog": ""}
    meaning, found, default = text.partition("(default")
    if not found:
        return text, "off" if action.nargs == 0 else "none" if action.default is None else str(action.default)
    return meaning.strip(" ;"), re.sub(r"^[: ]+|\)$", "", default.strip())


def flag_rows(parser: argparse.ArgumentParser) -> list[tuple[str, str, str, str]]:
    rows = []
    for action in parser._actions:
        flag = next((name for name in action.option_strings if name.startswith("--")), None)
        if flag in (None, "--help"):
            continue
        if action.choices:
            takes = ", ".join(map(str, action.choices))
        elif action.nargs == 0:
            takes = "nothing"
        else:
            kind = getattr(action.type, "__name__", "text") if action.type else "text"
            takes = {"int": "a whole number", "float": "a number"}.get(kind, action.metavar or "text")
        meaning, default = meaning_and_default(action)
        rows.append((f"`{flag}`", takes, default, meaning))
    return rows


def flags() -> str:
    parts = []
    for module in commands():
        parser = module.build_parser()
        rows = [tuple(cell.replace("|", "\\|").replace("\n", " ") for cell in row) for row in flag_rows(parser)]
        parts.append(f"## {parser.prog}\n\n{table(('flag', 'takes', 'default', 'meaning'), rows)}")
    return "\n\n".join(parts)


def versions_table() -> str:
    """Guidance, shift and steps of the published transformer versions, as the code has them."""
    from hunyuan_staged.versions import parse_version

    names = ["480p_t2v", "480p_i2v", "720p_t2v", "720p_i2v", "480p_t2v_distilled", "480p_i2v_distilled"]
    names += ["720p_t2v_distilled", "720p_i2v_distilled", "720p_t2v_distilled_sparse", "720p_i2v_distilled_sparse"]
    names += ["480p_i2v_step_distilled", "demo_t2v", "demo_i2v"]
    found = [parse_version(name) for name in names]
    rows = [
        (v.name, f"{v.guidance_scale:g}", f"{v.flow_shift:g}", v.num_inference_steps, v.video_length) for v in found
    ]
    return table(("version", "guidance", "shift", "steps", "frames"), rows)


def modules() -> str:
    """Every module of the package with the first sentence of its docstring, a folder at a time."""
    package = ROOT / "hunyuan_staged"
    folders = [package, *sorted(path for path in package.rglob("*") if (path / "__init__.py").is_file())]
    lines = []
    for folder in folders:
        files = sorted(path for path in folder.glob("*.py") if path.name not in ("__init__.py", "__main__.py"))
        if not files:
            continue
        lines.append(f"| **{folder.relative_to(ROOT)}/** | |")
        for path in files:
            doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            sentence = re.split(r"(?<=\.)\s", " ".join(doc.split()).replace("|", "\\|"), maxsplit=1)[0]
            lines.append(f"| `{path.name}` | {sentence} |")
    return "\n".join(["| module | what it is |", "| --- | --- |", *lines])


def layers() -> str:
    """Who may import whom, as import-linter holds it: names in brackets are not there yet."""
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]
    lines = [re.sub(r"\(\w+\)( : )?", "", line).replace(" : ", " | ") for line in contract[0]["layers"]]
    return "\n".join(["```", *lines, "```"])


def presets_table() -> str:
    """Each preset's flags for the published base versions, and what a video takes on the card of the measurement."""
    from hunyuan_staged import presets
    from hunyuan_staged.memory import timings

    step, rows = measured_step("720p", 121), []
    for name, preset in presets.PRESETS.items():
        steps = round(preset.steps * STEPS)
        computed = presets.computed_steps(preset.computed, steps) if preset.computed else range(steps)
        reused = set(range(steps)) - set(computed)
        worth = timings.steps_worth([1.0] * steps, presets.cache_type(name), reused)
        assert worth is not None
        seconds = worth * step["seconds"] + step["first_step_extra"]
        flags_there = code(presets.described(name, STEPS)) or "none"
        rows.append(
            (code(name), flags_there, f"{len(computed)} of {STEPS}", f"{STEPS / worth:.2f}", f"{seconds:.0f} s")
        )
    columns = ("preset", "flags, of 50 steps", "steps computed", "times fewer operations", "720p, 121 frames, H100")
    return table(columns, rows)


BLOCKS: dict[str, Callable[[], str]] = {
    "steps": steps,
    "decodings": decodings,
    "other_software": other_software,
    **{name: lambda name=name: whole_table(name) for name in figures()["tables"]},
    **{name: lambda name=name: records(name) for name in {row["table"]: None for row in figures()["records"]}},
    "cards": readme_cards,
    "cards_zh": lambda: readme_cards(chinese=True),
    "all_cards": all_cards,
    "memory_table": memory_table,
    "weights_table": weights_table,
    "first_video": first_video,
    "headline": headline,
    "headline_zh": lambda: headline(chinese=True),
    "scores": lambda: scores(("right", "known sentences", "new sentences"), {}),
    "scores_zh": lambda: scores(
        ("正确", "见过的句式", "新句式"),
        {"color": "颜色", "background": "背景", "direction": "方向", "shape": "形状", "all four": "四项全对"},
    ),
    "flags": flags,
    "presets": presets_table,
    "versions": versions_table,
    "modules": modules,
    "layers": layers,
}


def built(text: str) -> str:
    """A page with every block written anew. Raises KeyError for a block that nothing writes."""
    return BLOCK.sub(lambda found: f"{found[1]}{BLOCKS[found[2]]()}\n{found[3]}", text)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="docs/build.py", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if a page is out of date")
    check = parser.parse_args(argv).check
    sys.path.insert(0, str(ROOT))
    stale = []
    for name in PAGES:
        text = (ROOT / name).read_text(encoding="utf-8")
        new = built(text)
        if new != text:
            stale.append(name)
            if not check:
                (ROOT / name).write_text(new, encoding="utf-8")
    for name in stale:
        print(f"{name} {'is out of date: run python docs/build.py' if check else 'written'}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
