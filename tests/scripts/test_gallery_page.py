"""The gallery in a headless Chromium: it plays, ticks, and shows the command that finishes what is ticked."""

import json
import shlex
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import Browser, browser_path
from folders import embed
from forked import Moment, run_stage

from hunyuan_staged.files import contract
from hunyuan_staged.files.tensors import load_latents
from hunyuan_staged.files.video import write_video
from hunyuan_staged.gallery import command, page

pytestmark = pytest.mark.skipif(browser_path() is None, reason="there is no Chromium on this machine")

STEP = "hunyuan_staged.sampling.loop.euler_step"
PROMPT = "</script><img src=x onerror=document.title='owned'>\"' é 红"
PLAYS = "[...document.querySelectorAll('video')].filter((video) => video.currentTime > 0).length"
CARDS = "[...document.querySelectorAll('article')].filter((card) => !card.hidden)"
NAMES = f"{CARDS}.map((card) => card.querySelector('label').textContent)"


def clip(path: Path, *, seconds: int = 4) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (6 * seconds, 48, 80, 3), dtype=np.uint8)
    write_video(path, frames, 6, 48, 80)


def put(browser: Browser, field: str, value: str) -> list[str]:
    """Set a field, and the names of the cards that are then shown."""
    where = f"document.getElementById({json.dumps(field)})"
    browser.run(f"{where}.value = {json.dumps(value)}; {where}.dispatchEvent(new Event('input'))")
    return browser.run(NAMES)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_official) -> Path:
    """A finished job, one whose video is too large for the page, a stopped one, and a broken one."""
    root = tmp_path_factory.mktemp("gallery") / "runs"
    stopped = embed(root / "it's stopped", tiny_official, {"prompt": "a stopped one"})
    args = ["--input_dir", stopped, "--video_length", 5, "--num_inference_steps", 4, "--seed", 5]
    status, said = run_stage(2, *args, said=root / "said", moment=Moment(STEP, 2, (signal.SIGTERM,)))
    assert status == 143, said
    for name, length in (("finished", 1), ("large", 4)):
        (root / name).mkdir()
        config = {"prompt": PROMPT if name == "finished" else "b", "seed": length, "stage2_elapsed_time": length}
        (root / name / contract.CONFIG_FILE).write_text(json.dumps(config))
        clip(root / name / contract.VIDEO_FILE, seconds=length)
        clip(root / name / contract.PREVIEW_VIDEO, seconds=1)
    clip(stopped / contract.PREVIEW_VIDEO, seconds=1)
    (root / "broken").mkdir()
    (root / "broken" / contract.CONFIG_FILE).write_text("{")
    return root


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


def write(runs: Path, output: Path) -> Path:
    """The page, with a limit that the large video is over."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "EMBEDDED_BYTES", (runs / "large" / contract.VIDEO_FILE).stat().st_size - 1)
        assert command.main([str(runs), "--output", str(output)]) == 0
    return output


def test_it_plays_ticks_and_shows_the_command_that_finishes(browser, runs, tmp_path, tiny_official):
    browser.open(write(runs, runs / "index.html"))
    browser.wait(f"{PLAYS} === 3")
    assert browser.run("document.title") == "runs" and browser.run("document.querySelectorAll('script').length") == 2
    assert put(browser, "sort", "name") == ["broken", "finished", "it's stopped", "large"]
    assert browser.run(f"{CARDS}[1].querySelector('.prompt').textContent") == PROMPT
    assert "is not JSON" in browser.run(f"{CARDS}[0].querySelector('.note').textContent")
    assert put(browser, "sort", "seconds")[:2] == ["large", "finished"]
    assert put(browser, "search", "SEED 5") == ["it's stopped"]
    assert put(browser, "search", "") and put(browser, "filter", "finished") == ["large", "finished"]
    put(browser, "filter", "")
    put(browser, "sort", "name")
    assert browser.run("document.getElementById('finish').hidden")
    assert browser.run(f"{CARDS}.map((card) => card.querySelector('input').disabled)") == [True, True, False, True]
    browser.run(f"{CARDS}[2].querySelector('input').click()")
    assert browser.run("document.getElementById('ticked').textContent") == "1 ticked; this finishes it:"
    denoise, decode = browser.run("document.getElementById('command').textContent").split(" &&\n  ")
    for stage, line in ((2, denoise), (3, decode)):
        assert shlex.split(line)[:2] == ["bash", str(Path(__file__).parents[2] / f"run_stage{stage}.sh")]
    browser.run("document.getElementById('copy').click()")
    browser.wait("document.getElementById('copy').textContent !== 'copy'")
    browser.run("document.getElementById('tick_none').click()")
    assert browser.run("document.getElementById('finish').hidden")
    browser.run("document.getElementById('tick_shown').click()")
    assert browser.run("document.getElementById('command').textContent") == f"{denoise} &&\n  {decode}"
    # What is shown really finishes the job, with the bits of a run that nobody stopped.
    whole = embed(tmp_path / "whole", tiny_official)
    words = shlex.split(denoise)[2:]
    assert words[1:] == ["--resume", "--video_length=5", "--seed=5", "--num_inference_steps=4"]
    folder = Path(words[0].removeprefix("--input_dir="))
    assert folder == runs / "it's stopped"
    copied = tmp_path / "copied"
    shutil.copytree(folder, copied)
    for args in ([f"--input_dir={copied}", *words[1:]], [f"--input_dir={whole}", *words[2:]]):
        status, said = run_stage(2, *args, said=tmp_path / "said")
        assert status == 0, said
    assert torch.equal(load_latents(copied)[0], load_latents(whole)[0])


def test_one_command_finishes_several_jobs_of_a_folder(browser, runs, tmp_path):
    """A job file and two stages, which load once; the bits of a job that is finished by itself."""
    folder = tmp_path / "many jobs"
    for name in ("one", "two", "it's stopped"):
        shutil.copytree(runs / "it's stopped", folder / name)
    assert command.main([str(tmp_path), "--output", str(tmp_path / "page.html")]) == 0
    browser.open(tmp_path / "page.html")
    browser.run("document.getElementById('tick_shown').click()")
    shown = browser.run("document.getElementById('command').textContent").splitlines()
    write, first, second, end, denoise, decode, alone, last = shown
    file = folder / "finish.jsonl"
    assert (write, end) == (f"cat > '{file}' <<'END'", "END")
    assert {json.loads(line)["name"] for line in (first, second)} == {"one", "two"}
    assert shlex.split(denoise)[2:] == [f"--jobs={file}", f"--input_dir={folder}", "--resume"]
    assert shlex.split(decode)[2:] == [f"--jobs={file}", f"--input_dir={folder}"]
    assert shlex.split(alone)[2] == f"--input_dir={folder}/it's stopped" and "run_stage3.sh" in last
    file.write_text(f"{first}\n{second}\n")
    for words in (shlex.split(denoise)[2:], shlex.split(alone)[2:-1]):
        status, said = run_stage(2, *words, said=tmp_path / "said")
        assert status == 0 and "going on after step 2 of 4" in said, said
    one, two, other = (load_latents(folder / name)[0] for name in ("one", "two", "it's stopped"))
    assert torch.equal(one, two) and torch.equal(one, other)


def test_a_page_without_its_videos_shows_the_previews(browser, runs, tmp_path):
    output = write(runs, runs / "moved.html")
    browser.open(output.rename(tmp_path / "moved.html"))
    browser.wait(f"{PLAYS} === 3")
    large = f"{CARDS}.find((card) => card.querySelector('label').textContent === 'large').querySelector('video')"
    assert browser.run(f"{large}.currentSrc").startswith("data:video/mp4;base64,")
    assert browser.run(f"{large}.duration") == 1


def test_a_page_of_many_jobs_plays_what_is_in_sight(browser, runs, tmp_path):
    """With a source in each of 200 videos none played: a browser has fewer players."""
    for number in range(200):
        shutil.copytree(runs / "finished", tmp_path / f"job {number}")
    assert command.main([str(tmp_path)]) == 0
    browser.open(tmp_path / "index.html")
    browser.wait(f"{PLAYS} > 2")
    browser.run("window.scrollTo(0, document.body.scrollHeight)")
    browser.wait("[...document.querySelectorAll('video')].at(-1).currentTime > 0")
    browser.wait("document.querySelectorAll('video[src]').length < 40")
    assert len(put(browser, "search", "job 17")) == 12, "17, 117, 170 to 179"
