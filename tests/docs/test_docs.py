"""What docs/build.py writes is up to date; links lead somewhere; what a newcomer sees is small and says nothing private."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

MARKDOWN = [
    "README.md",
    "README.zh.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")),
]
FIGURES = json.loads((ROOT / "hunyuan_staged" / "memory" / "benchmarks.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def build():
    spec = importlib.util.spec_from_file_location("docs_build", ROOT / "docs" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    heads = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_pages_are_as_build_writes_them(build):
    for page in build.PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        assert build.built(text) == text, f"{page} is out of date: run python docs/build.py"


def test_every_block_is_on_a_page(build):
    used = {
        name for page in build.PAGES for _, name, _ in build.BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))
    }
    assert used == set(build.BLOCKS)


def test_check_tells_a_page_that_is_out_of_date(build, tmp_path, monkeypatch, capsys):
    for page in build.PAGES:
        (tmp_path / page).parent.mkdir(exist_ok=True)
        (tmp_path / page).write_text("<!-- built: versions -->\nold\n<!-- end -->\n", encoding="utf-8")
    (tmp_path / "README.md").write_text(build.built("<!-- built: versions -->\n<!-- end -->\n"), encoding="utf-8")
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setattr("sys.path", ["."])
    assert build.main(["--check"]) == 1
    assert (tmp_path / "docs" / "flags.md").read_text(encoding="utf-8").splitlines()[1] == "old"
    printed = capsys.readouterr().out
    assert "docs/flags.md is out of date: run python docs/build.py" in printed and "README.md is" not in printed
    assert build.main([]) == 0
    assert build.main(["--check"]) == 0


def test_minutes_are_measured_on_one_card_and_computed_on_others(build):
    least, most = build.minutes_of("NVIDIA H100 80GB HBM3", "720p", 121)
    assert least == most == (50 * 17.94 + 17.7) / 60
    # 12,285 TFLOP a step; at 71 TFLOP/s and a share of 0.5 to 0.8
    assert build.minutes_of("NVIDIA GeForce RTX 3090", "720p", 121) == pytest.approx((180.2, 288.4), rel=1e-3)


@pytest.mark.parametrize("page", MARKDOWN)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), f"{page}: {target}"


def test_the_readme_is_short_and_its_pictures_small():
    assert (ROOT / "README.md").stat().st_size <= 10_000
    assert (ROOT / "docs" / "demo.gif").stat().st_size <= 400_000
    assert (ROOT / "docs" / "clips.png").stat().st_size <= 100_000
    assert (ROOT / "docs" / "first_frame.png").stat().st_size <= 20_000
    assert (ROOT / "docs" / "gallery.png").stat().st_size <= 200_000


@pytest.mark.parametrize("page", [page for page in MARKDOWN if page not in ("docs/benchmarks.md", "docs/demo.md")])
def test_commits_stay_in_the_benchmarks(page):
    commits = {
        row["commit"] for kind in ("steps", "decodings", "records") for row in FIGURES[kind] if row.get("commit")
    }
    text = (ROOT / page).read_text(encoding="utf-8")
    assert len(commits) > 5
    assert not [commit for commit in commits if commit in text]


@pytest.mark.parametrize("kind", ["steps", "decodings", "records"])
def test_every_figure_says_where_it_was_measured(kind):
    for row in FIGURES[kind]:
        assert row["machine"] in FIGURES["machines"]
        if kind != "records" or row["table"] not in ("ideas", "published", "ceilings", "ranks", "loading"):
            assert re.fullmatch(r"[0-9a-f]{7}", row["commit"]) and re.fullmatch(r"2\d{3}-\d\d-\d\d", row["date"])
    assert all(row["command"] for row in FIGURES["steps"] + FIGURES["decodings"] if row["in_plan"])


def test_a_wheel_holds_the_demo_and_the_measured_times():
    """Every tracked file of the package that is no module is packed, but for pictures."""
    package = ROOT / "hunyuan_staged"
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"][
        "hunyuan_staged"
    ]
    packed = {path for pattern in patterns for path in package.glob(pattern) if path.is_file()}
    data = {path for path in tracked() if package in path.parents and path.suffix not in (".py", ".png")}
    assert len(data) > 25 and data - packed == set()


def test_no_tracked_file_names_a_folder_outside_the_repository():
    outside = "/".join(("..", "shared")).encode()
    files = tracked()
    assert len(files) > 100
    assert [path for path in files if outside in path.read_bytes()] == []


def test_the_example_of_python_md_runs(tmp_path):
    (example,) = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "docs" / "python.md").read_text(), re.MULTILINE | re.DOTALL
    )
    found = subprocess.run(
        [sys.executable, "-c", example],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout == "7 (1, 32, 9, 6, 10)\n8 (1, 32, 9, 6, 10)\nruns/red7/output_video.mp4\n"
    written = {
        path.parent.name: load_file(path)["latents"] for path in tmp_path.glob("runs/*/stage2_latents.safetensors")
    }
    assert set(written) == {"red7", "red8"} and not torch.equal(written["red7"], written["red8"])
