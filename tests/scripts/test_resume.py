"""Stopping stage 2 and going on: the same bits as a run that was never stopped, or a refusal that says why."""

import contextlib
import json
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from folders import embed
from forked import Moment, run_ranks, run_stage
from safetensors.torch import load_file, save_file

from hunyuan_staged.errors import InputError
from hunyuan_staged.files import contract, provenance
from hunyuan_staged.files.tensors import load_embeddings, load_latents, load_state, save_embeddings, save_tensors
from hunyuan_staged.parallel.world import World
from hunyuan_staged.runtime.progress import Reporter
from hunyuan_staged.runtime.signals import Interrupted, Interrupts
from hunyuan_staged.sampling import callbacks
from hunyuan_staged.sampling.state import RunIdentity, StateSaver

STEPS = 6
SMALL = ["--video_length", 5, "--num_inference_steps", STEPS]
STEP = "hunyuan_staged.sampling.loop.euler_step"
GO_ON = "the same command with --resume goes on from there"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, tiny_official) -> Path:
    """A folder as stage 1 leaves it."""
    return embed(tmp_path_factory.mktemp("inputs"), tiny_official)


@pytest.fixture(scope="module")
def unstopped(tmp_path_factory, inputs) -> Path:
    """The latents of a run that nobody stopped."""
    folder = tmp_path_factory.mktemp("unstopped")
    status, said = run_stage(2, *arguments(inputs, folder), said=folder / "said")
    assert status == 0, said
    (folder / "said").unlink()
    return folder


def arguments(inputs: Path, output: Path, *more: object) -> list[object]:
    return ["--input_dir", inputs, "--output_dir", output, *SMALL, *more]


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "out"


def run(inputs: Path, folder: Path, *more: object, moment: Moment | None = None) -> tuple[int, str]:
    return run_stage(2, *arguments(inputs, folder, *more), said=folder.parent / "said", moment=moment)


def latents(folder: Path) -> torch.Tensor:
    return load_latents(folder)[0]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def errors(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith("error: ")]


def stopped(inputs: Path, folder: Path, *more: object, step: int = 3) -> Path:
    """A folder with the state of a run that SIGTERM stopped in a step."""
    status, said = run(inputs, folder, *more, moment=Moment(STEP, step, (signal.SIGTERM,)))
    assert status == 143, said
    return folder


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("step", [1, 4, STEPS])
def test_a_signal_saves_the_state_and_the_run_goes_on_to_the_same_bits(inputs, folder, unstopped, number, status, step):
    code, said = run(inputs, folder, moment=Moment(STEP, step, (number,)))
    assert code == status, said
    assert errors(said) == [f"error: stage 2 was interrupted by {number.name} after step {step} of {STEPS}; {GO_ON}"]
    assert "Traceback" not in said
    assert names(folder) == {contract.STATE_FILE}
    assert load_state(folder)[1]["step"] == str(step)
    code, said = run(inputs, folder, "--resume")
    assert code == 0, said
    assert f"going on after step {step} of {STEPS}" in said
    assert "tolerance" not in said
    assert (folder / contract.LATENTS_FILE).read_bytes() == (unstopped / contract.LATENTS_FILE).read_bytes()
    assert names(folder) == {contract.LATENTS_FILE, contract.CONFIG_FILE}, "the state is removed"


def test_a_killed_run_goes_on_from_its_last_state(inputs, folder, unstopped):
    code, _ = run(inputs, folder, "--checkpoint_every", 2, moment=Moment(STEP, 6, (signal.SIGKILL,)))
    assert code == 137
    assert {contract.STATE_FILE, contract.LOCK_FILE} <= names(folder)
    # The write of step 4's state runs beside step 5: where the kill came before it was done, step 2's is there, whole.
    step = int(load_state(folder)[1]["step"])
    assert step in (2, 4)
    code, said = run(inputs, folder, "--resume", "--checkpoint_every", 2)
    assert code == 0, said
    assert f"going on after step {step} of {STEPS}" in said
    assert torch.equal(latents(folder), latents(unstopped))
    assert names(folder) == {contract.LATENTS_FILE, contract.CONFIG_FILE}


def test_stopped_twice(inputs, folder, unstopped):
    stopped(inputs, folder, step=2)
    stopped(inputs, folder, "--resume", step=2)
    assert load_state(folder)[1]["step"] == "4"
    assert run(inputs, folder, "--resume")[0] == 0
    assert torch.equal(latents(folder), latents(unstopped))


def test_a_second_signal_leaves_at_once(inputs, folder):
    moment = Moment(STEP, 2, (signal.SIGTERM, signal.SIGTERM), pause=600)
    code, said = run(inputs, folder, moment=moment)
    assert code == 143, said
    # SIGTERM to a whole group is two: the group's, and the launcher's. The lock stayed.
    assert not folder.exists() or not {contract.STATE_FILE, contract.LOCK_FILE} & names(folder)
    code, said = run(inputs, folder, "--resume")
    assert code == 0, said
    assert names(folder) == {contract.LATENTS_FILE, contract.CONFIG_FILE}


def test_without_a_state_it_starts_from_the_beginning_and_says_so(inputs, folder, unstopped):
    code, said = run(inputs, folder, "--resume")
    assert code == 0, said
    assert f"no state of a stopped run in {folder}: starting from the beginning" in said
    assert torch.equal(latents(folder), latents(unstopped))


def test_a_state_that_nobody_asked_for_is_mentioned(inputs, folder, unstopped):
    stopped(inputs, folder)
    code, said = run(inputs, folder)
    assert code == 0, said
    assert f"{contract.STATE_FILE} holds the state of a run that was stopped; --resume would go on from it" in said
    assert torch.equal(latents(folder), latents(unstopped))


def test_checkpoint_every_0_saves_nothing(inputs, folder):
    code, said = run(inputs, folder, "--checkpoint_every", 0, moment=Moment(STEP, 3, (signal.SIGTERM,)))
    assert code == 143, said
    assert errors(said) == ["error: stage 2 was interrupted by SIGTERM; run the same command again"]
    assert not folder.exists()


@pytest.mark.parametrize(
    ("more", "difference"),
    [
        (["--seed", 43], "seed: was 42, now 43"),
        (["--num_inference_steps", 7], "num_inference_steps: was 6, now 7"),
        (["--guidance_scale", 5], "guidance_scale: was 6.0, now 5.0"),
        (["--video_length", 9], "video_length: was 5, now 9"),
        (["--aspect_ratio", "1:1"], "height: was 96, now 128; width: was 160, now 128"),
        (["--dtype", "bf16"], "dtype: was torch.float32, now torch.bfloat16"),
        (["--attn_mode", "torch"], "attn_mode: was flash, now torch"),
    ],
)
def test_a_state_of_other_settings_is_refused_with_the_difference(inputs, folder, stopped_once, more, difference):
    shutil.copytree(stopped_once, folder)
    before = (folder / contract.STATE_FILE).read_bytes()
    code, said = run(inputs, folder, "--resume", *more)
    assert code == 2, said
    assert len(errors(said)) == 1
    assert f"{contract.STATE_FILE} belongs to other settings: {difference}" in errors(said)[0]
    assert "loading" not in said, "it is refused before the weights are read"
    assert (folder / contract.STATE_FILE).read_bytes() == before
    assert names(folder) == {contract.STATE_FILE}


@pytest.fixture(scope="module")
def stopped_once(tmp_path_factory, inputs) -> Path:
    return stopped(inputs, tmp_path_factory.mktemp("stopped") / "out")


def test_other_embeddings_and_other_weights_are_refused(inputs, folder, stopped_once, tmp_path, tiny_official):
    shutil.copytree(stopped_once, folder)
    other = shutil.copytree(inputs, tmp_path / "other")
    path = other / contract.EMBEDDINGS_FILE
    tensors, metadata = load_embeddings(other)
    save_embeddings(other, tensors | {"prompt_embeds": tensors["prompt_embeds"] * 2}, metadata)
    code, said = run(other, folder, "--resume")
    assert code == 2
    new, old = provenance.sha256(path)[:12], provenance.sha256(inputs / contract.EMBEDDINGS_FILE)[:12]
    assert f"embeddings_sha256: was {old}… ({inputs}), now {new}… ({other})" in said

    model = shutil.copytree(tiny_official, tmp_path / "model")
    weights = model / "transformer" / "demo_t2v" / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    state["img_in.proj.bias"] = state["img_in.proj.bias"] + 1
    save_file(state, weights)
    code, said = run(inputs, folder, "--resume", "--model_path", model)
    assert code == 2
    assert re.search(rf"weights: was \w{{12}}… \({tiny_official}\), now \w{{12}}… \({model}\)", said), said


def test_a_moved_model_is_the_same_model(inputs, folder, stopped_once, unstopped, tmp_path, tiny_official):
    shutil.copytree(stopped_once, folder)
    model = shutil.copytree(tiny_official, tmp_path / "moved")
    code, said = run(inputs, folder, "--resume", "--model_path", model)
    assert code == 0, said
    assert torch.equal(latents(folder), latents(unstopped))


def damaged(folder: Path, how: str) -> None:
    path = folder / contract.STATE_FILE
    tensors, metadata = load_state(folder)
    kept = tensors["latents"]
    if how == "cut short":
        path.write_bytes(path.read_bytes()[:-7])
    elif how == "no metadata":
        save_file(tensors, path)
    elif how == "another format":
        save_tensors(path, tensors, metadata | {"format": "9"})
    elif how == "edited settings":
        edited = json.loads(metadata["settings"]) | {"seed": 43}
        save_tensors(path, tensors, metadata | {"settings": json.dumps(edited)})
    elif how == "settings that are a list":
        save_tensors(path, tensors, metadata | {"settings": "[1]"})
    elif how == "a step too far":
        save_tensors(path, tensors, metadata | {"step": "7"})
    elif how == "NaN":
        save_tensors(path, {"latents": kept * float("nan")}, metadata)
    elif how == "another shape":
        save_tensors(path, {"latents": kept[..., :-1].contiguous()}, metadata)
    elif how == "another dtype":
        save_tensors(path, {"latents": kept.bfloat16()}, metadata)
    else:
        raise AssertionError(how)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("cut short", "is not a whole safetensors file"),
        ("no metadata", "is no state of stage 2 (KeyError('format'))"),
        ("another format", "its format is 9; this version reads 1"),
        ("edited settings", "its settings do not have the hash that it records"),
        ("settings that are a list", "is no state of stage 2"),
        ("a step too far", "step 7 of 6"),
        ("NaN", "latents holds NaN or Inf"),
        ("another shape", "allowed is 1 to 6 with [1, 32, 2, 6, 10] torch.float32"),
        ("another dtype", "latents [1, 32, 2, 6, 10] torch.bfloat16"),
    ],
)
def test_a_damaged_state_is_refused(inputs, folder, stopped_once, how, message):
    shutil.copytree(stopped_once, folder)
    damaged(folder, how)
    code, said = run(inputs, folder, "--resume")
    assert code == 2, said
    assert len(errors(said)) == 1
    assert message in errors(said)[0]
    assert "Traceback" not in said


# Several processes


@pytest.mark.parametrize(("first", "then"), [(2, 1), (2, 3)])
def test_a_state_goes_on_on_another_number_of_processes(inputs, folder, unstopped, first, then):
    """Only one of them gets the signal: they agree on it, and stop after the same step."""
    said = folder.parent / "said"
    moments = {1: Moment(STEP, 3, (signal.SIGTERM,))}
    ranks = run_ranks(2, first, *arguments(inputs, folder), said=said, moments=moments)
    assert [rank.status() for rank in ranks] == [143] * first, ranks[0].said()
    told = [line for rank in ranks for line in errors(rank.said())]
    assert told == [f"error: stage 2 was interrupted by SIGTERM after step 3 of {STEPS}; {GO_ON}"]
    assert names(folder) == {contract.STATE_FILE}
    ranks = run_ranks(2, then, *arguments(inputs, folder, "--resume"), said=said)
    assert [rank.status() for rank in ranks] == [0] * then, ranks[0].said()
    assert "will agree with an unstopped run within tolerance, not to the bit: processes: was 2, now" in ranks[0].said()
    expected = latents(unstopped)
    assert (latents(folder) - expected).norm() / expected.norm() < 1e-5


# The latents, and the disk


def test_latents_that_turn_nan_stop_the_loop_and_keep_the_last_good_state(inputs, folder, tmp_path, tiny_official):
    """Weights that make the latents so large in the first step that the second step's sums leave float32."""
    model = shutil.copytree(tiny_official, tmp_path / "model")
    weights = model / "transformer" / "demo_t2v" / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    state["final_layer.linear.weight"] = state["final_layer.linear.weight"] * 1e36
    state["img_in.proj.weight"] = state["img_in.proj.weight"] * 1e6
    save_file(state, weights)
    more = ("--model_path", model, "--checkpoint_every", 1)
    code, said = run(inputs, folder, *more)
    assert code == 2, said
    assert "error: the latents hold NaN or Inf after step 2 of 6, so the run stopped there" in said
    assert len(errors(said)) == 1
    assert f"the state before it is kept in {folder / contract.STATE_FILE}" in said
    tensors, metadata = load_state(folder)
    assert metadata["step"] == "1"
    assert torch.isfinite(tensors["latents"]).all()
    assert names(folder) == {contract.STATE_FILE}


def test_a_state_that_cannot_be_saved_is_told_and_the_run_goes_on(inputs, folder, unstopped):
    (folder / contract.STATE_FILE).mkdir(parents=True)
    (folder / contract.STATE_FILE / "x").touch()
    code, said = run(inputs, folder, "--checkpoint_every", 5)
    # The latents are there; what is in the state's place is not ours to remove.
    assert "the state could not be saved: cannot write" in said
    assert torch.equal(latents(folder), latents(unstopped))
    assert code == 0, said


class Told(Reporter):
    """Keeps the lines that it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def info(self, text: str) -> None:
        self.lines.append(text)

    warn = info


@contextlib.contextmanager
def watched(saver: StateSaver, interrupts: Interrupts) -> Iterator[Callable[[int, torch.Tensor], None]]:
    """What the loop calls after a step."""
    with callbacks.active(callbacks.watching(saver, interrupts)) as after_step:
        yield lambda index, latents: after_step(callbacks.AfterStep(index, latents, lambda: latents))


def keeper(folder: Path, **options) -> tuple[StateSaver, list[str]]:
    told = Told()
    facts = RunIdentity({"seed": 1, "dtype": "torch.float32"}, {"processes": 1}, {})
    options = {"steps": 4, "every": 2, "world": World(0, 1, torch.device("cpu"))} | options
    return StateSaver(folder, facts, report=told, **options), told.lines


def test_a_signal_whose_state_cannot_be_saved_says_so(tmp_path):
    (tmp_path / contract.STATE_FILE / "x").mkdir(parents=True)

    def loop() -> None:
        with watched(kept, interrupts) as on_step:
            signal.raise_signal(signal.SIGTERM)
            on_step(0, torch.zeros(1, 32, 1, 2, 2))

    with Interrupts() as interrupts:
        kept, told = keeper(tmp_path)
        with pytest.raises(Interrupted, match="after step 1 of 4, whose state could not be saved: cannot write"):
            loop()
    assert any("cannot write" in line for line in told)


def test_no_step_waits_for_a_state_that_is_being_written(tmp_path, monkeypatch):
    """On a slow disk it did: the next one to be saved waited for it, and all other processes for that one."""
    release, written = threading.Event(), []

    def slow(step: int, *_: object) -> None:
        release.wait(60)
        written.append(step)

    with Interrupts() as interrupts:
        kept, _ = keeper(tmp_path, steps=9)
        monkeypatch.setattr(kept, "_write", slow)
        with watched(kept, interrupts) as on_step:
            for index in range(6):
                on_step(index, torch.ones(1, 32, 1, 2, 2))
            assert written == [] and kept.is_writing
            release.set()
            while kept.is_writing:
                time.sleep(0.01)
            on_step(6, torch.ones(1, 32, 1, 2, 2))
    assert written == [2, 7], "the one that was due at step 4 and 6 is of step 7"


def test_the_state_on_disk_is_always_of_a_good_step(tmp_path):
    """On a GPU the loop hears of NaN a step later: the writer looks for itself."""
    with Interrupts() as interrupts:
        kept, _ = keeper(tmp_path)
        with watched(kept, interrupts) as on_step:
            on_step(1, torch.ones(1, 32, 1, 2, 2))
        assert kept._write(3, {"latents": torch.full((1, 32, 1, 2, 2), float("nan"))}, None) is None
    tensors, metadata = load_state(tmp_path)
    assert (metadata["step"], tensors["latents"].mean().item()) == ("2", 1.0)
    kept.remove()
    assert names(tmp_path) == set()


def test_nan_names_its_step(tmp_path):
    with Interrupts() as interrupts:
        kept, _ = keeper(tmp_path)
        with pytest.raises(InputError, match="hold NaN or Inf after step 1 of 4"), watched(kept, interrupts) as on_step:
            on_step(0, torch.full((1, 32, 1, 2, 2), float("inf")))
    assert names(tmp_path) == set()


# The other stages


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stage_1_leaves_nothing_behind(tmp_path, folder, tiny_official, number, status):
    moment = Moment("hunyuan_staged.files.tensors._order_metadata", 1, (number,))  # within the write of the embeddings
    code, said = run_stage(
        1, "--model_path", tiny_official, "--output_dir", folder, said=tmp_path / "said", moment=moment
    )
    assert code == status, said
    assert errors(said) == [f"error: stage 1 was interrupted by {number.name}; run the same command again"]
    assert "Traceback" not in said
    assert not folder.exists()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("function", ["hunyuan_staged.files.video._command", "hunyuan_staged.decoding.blending.blend"])
def test_stage_3_leaves_nothing_behind(tmp_path, unstopped, folder, number, status, function):
    shutil.copytree(unstopped, folder)
    code, said = run_stage(
        3, "--input_dir", folder, "--tile_size", 64, said=tmp_path / "said", moment=Moment(function, 1, (number,))
    )
    assert code == status, said
    assert errors(said) == [f"error: stage 3 was interrupted by {number.name}; run the same command again"]
    assert "Traceback" not in said
    assert names(folder) == names(unstopped)
