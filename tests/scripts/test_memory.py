"""The stages with what there is: plans, choices and refusals, as a user meets them."""

import re
from pathlib import Path

import pytest
import torch
from folders import denoised, embed
from forked import Moment, run_ranks, run_stage

import stage2_transformer
import stage3_vae_decoder
from hunyuan_staged.decoding import planning
from hunyuan_staged.files.tensors import load_embeddings, load_frames, load_latents
from hunyuan_staged.memory import available, budget
from hunyuan_staged.weights import components
from hunyuan_staged.weights.folder import open_model

SMALL = ["--video_length", 9, "--num_inference_steps", 2]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, tiny_official) -> Path:
    """A folder as stage 1 leaves it."""
    return embed(tmp_path_factory.mktemp("inputs"), tiny_official)


@pytest.fixture(scope="module")
def resident(tmp_path_factory, inputs) -> torch.Tensor:
    """The latents of a run that keeps everything where it computes."""
    return run(inputs, tmp_path_factory.mktemp("resident"))[0]


def run(inputs: Path, folder: Path, *more: object) -> tuple[torch.Tensor, str]:
    """(latents, what was said) of stage 2."""
    arguments = ["--input_dir", inputs, "--output_dir", folder, *SMALL, *more]
    status, said = run_stage(2, *arguments, said=folder / "said")
    assert status == 0, said
    return load_latents(folder)[0], said


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def rows(said: str) -> dict[str, str]:
    """The plan that was printed."""
    return dict(re.findall(r"^([a-z ]+?)  +(\S.*)$", said, flags=re.MULTILINE))


# --dry_run


def test_stage_1_prints_its_plan_and_writes_nothing(tmp_path, tiny_official):
    arguments = ["--model_path", tiny_official, "--output_dir", tmp_path / "out", "--enable_offloading", "--dry_run"]
    status, said = run_stage(1, *arguments, said=tmp_path / "said")
    assert status == 0, said
    assert not (tmp_path / "out").exists()
    assert "loading" not in said and "done" not in said
    shown = rows(said)
    assert shown["version"] == "demo_t2v"
    assert re.fullmatch(r"(\d+) of \1 \(as asked\)", shown["offloaded layers"])
    assert re.fullmatch(r".* s \(an estimate: this CPU, .*\)", shown["expected time"])


def test_stage_2_prints_its_plan_and_writes_nothing(inputs, tmp_path):
    before = contents(inputs)
    arguments = ["--input_dir", inputs, *SMALL, "--offload_blocks", 1, "--weights_dtype", "fp8", "--dry_run"]
    status, said = run_stage(2, *arguments, said=tmp_path / "said")
    assert status == 0, said
    assert contents(inputs) == before
    assert "loading" not in said and "done" not in said
    shown = rows(said)
    assert shown["video"] == "160x96, 9 frames"
    assert shown["tokens"] == f"{3 * 6 * 10} of the video, {9 + 5} of the text"
    assert shown["steps"] == "2, guidance 6"
    assert shown["ranks"] == "1: 1 guidance branch x 1 sequence shard"
    assert shown["attention"].startswith("torch (no GPU")
    assert re.search(r"fp8; computed in torch\.float32", shown["weights"])
    assert re.match(r"1 of \d+ \(as asked\)", shown["offloaded blocks"])
    assert re.match(r"\d+ MiB: weights \d+ MiB, blocks in flight \d+ MiB; host: offloaded weights", shown["memory"])
    assert re.match(r"host \d", shown["free"])
    assert re.fullmatch(r".* s \(an estimate: this CPU, .*\)", shown["expected time"])


def test_a_plan_of_several_processes_is_printed_once(inputs, tmp_path):
    before = contents(inputs)
    ranks = run_ranks(2, 2, "--input_dir", inputs, *SMALL, "--dry_run", said=tmp_path / "said")
    assert [rank.status() for rank in ranks] == [0, 0], ranks[0].said()
    assert rows(ranks[0].said())["ranks"] == "2: 2 guidance branches x 1 sequence shard"
    assert ranks[1].said() == ""
    assert contents(inputs) == before


def test_stage_3_prints_its_plan_and_writes_nothing(tmp_path, tiny_official):
    folder = denoised(tmp_path / "run", tiny_official)
    before = contents(folder)
    target = tmp_path / "a.mp4"
    arguments = ["--input_dir", folder, "--tile_size", 64, "--output_video", target, "--dry_run"]
    status, said = run_stage(3, *arguments, said=tmp_path / "said")
    assert status == 0, said
    assert contents(folder) == before and sorted(path.name for path in tmp_path.iterdir()) == ["run", "said"]
    assert "loading" not in said and "done" not in said
    shown = rows(said)
    assert (shown["video"], shown["decoding"], shown["tiles"]) == ("160x96, 9 frames", "tiles of 64 px (as asked)", "8")
    status, said = run_stage(3, "--input_dir", folder, "--dry_run", said=tmp_path / "said")
    assert status == 0, said
    shown = rows(said)
    assert shown["decoding"] == "whole frames (the default)"
    assert shown["latent frames at once"] == "3" and "tiles" not in shown


# Offloading and float8


@pytest.mark.parametrize("flags", [["--enable_offloading"], ["--offload_blocks", "1"], ["--disable_offloading"]])
def test_wherever_the_weights_live_the_bits_are_the_same(inputs, tmp_path, resident, flags):
    latents, said = run(inputs, tmp_path, *flags)
    assert torch.equal(latents, resident)
    chosen = re.search(r"offloaded blocks: (.*) \(as asked\)", said)
    assert chosen, said
    assert ("none" in chosen[1]) == (flags == ["--disable_offloading"])


def test_without_a_flag_one_line_says_what_was_chosen(inputs, tmp_path, resident):
    latents, said = run(inputs, tmp_path)
    assert torch.equal(latents, resident)
    assert said.count("offloaded blocks: none (no GPU)") == 1


def test_two_processes_offload_to_one_copy(inputs, tmp_path, resident):
    out = tmp_path / "out"
    arguments = ["--input_dir", inputs, "--output_dir", out, *SMALL, "--enable_offloading"]
    ranks = run_ranks(2, 2, *arguments, said=tmp_path / "said")
    assert [rank.status() for rank in ranks] == [0, 0], ranks[0].said()
    latents = load_latents(out)[0]
    assert torch.equal(latents, resident), "a guidance branch each: the same arithmetic"


def test_float8_is_near_recorded_and_the_same_offloaded(inputs, tmp_path, resident):
    (tmp_path / "streamed").mkdir()
    latents, _ = run(inputs, tmp_path, "--weights_dtype", "fp8")
    assert 1e-4 < (latents - resident).norm() / resident.norm() < 0.1
    streamed, _ = run(inputs, tmp_path / "streamed", "--weights_dtype", "fp8", "--enable_offloading")
    assert torch.equal(latents, streamed)
    assert load_latents(tmp_path)[1]["weights_dtype"] == "fp8"


def test_a_state_in_other_weights_is_refused(inputs, tmp_path):
    out = tmp_path / "out"
    arguments = ["--input_dir", inputs, "--output_dir", out, *SMALL]
    moment = Moment("hunyuan_staged.sampling.loop.euler_step", 1, (15,))
    status, said = run_stage(2, *arguments, "--weights_dtype", "fp8", said=tmp_path / "said", moment=moment)
    assert status == 143, said
    status, said = run_stage(2, *arguments, "--resume", said=tmp_path / "said")
    assert status == 2
    assert "belongs to other settings: weights_dtype: was fp8, now None" in said
    # Where the weights live is no setting.
    flags = ["--weights_dtype", "fp8", "--enable_offloading", "--resume"]
    status, said = run_stage(2, *arguments, *flags, said=tmp_path / "said")
    assert status == 0, said


def test_stage_1_offloaded_gives_the_same_bits(tmp_path, tiny_official):
    tensors = []
    for name, flags in (("resident", []), ("offloaded", ["--enable_offloading"])):
        out = tmp_path / name
        arguments = ["--model_path", tiny_official, "--prompt", 'a "B"', "--output_dir", out, *flags]
        status, said = run_stage(1, *arguments, said=tmp_path / "said")
        assert status == 0, said
        assert ("offloaded layers: none (no GPU)" in said) == (not flags)
        tensors.append(load_embeddings(out)[0])
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--offload_blocks", "-1"], "--offload_blocks -1 is not a number of blocks"),
        (["--offload_blocks", "999"], "--offload_blocks 999 is more than the"),
        (["--offload_blocks", "2", "--enable_offloading"], "not allowed with argument"),
        (["--offload_blocks", "2", "--disable_offloading"], "not allowed with argument"),
        (["--weights_dtype", "int4"], "argument --weights_dtype: invalid choice: 'int4'"),
    ],
)
def test_contradictions_are_refused(inputs, tmp_path, flags, message):
    before = contents(inputs)
    status, said = run_stage(2, "--input_dir", inputs, *SMALL, *flags, said=tmp_path / "said")
    assert status == 2
    assert len([line for line in said.splitlines() if line.startswith("error: ")]) == 1 and message in said
    assert not re.search(r"(?m)^loading ", said) and contents(inputs) == before


# Too little memory: what is free is made up, for this process; the rest is the real thing.


def with_free(monkeypatch, device: int | None, host: int = 2**40) -> None:
    monkeypatch.setattr(available, "free_memory", lambda _: budget.FreeMemory(device, host))


@pytest.mark.parametrize(
    ("mebibytes", "helps"),
    [(1, "a GPU"), (20, r"--weights_dtype fp8 \(\d+ MiB, \d[\d.]* to \d[\d.]* (s|min)\), a GPU")],
)
def test_stage_2_refuses_what_does_not_fit_with_the_numbers(inputs, monkeypatch, capsys, mebibytes, helps):
    before = contents(inputs)
    with_free(monkeypatch, None, mebibytes * 2**20)
    assert stage2_transformer.main(["--input_dir", str(inputs), "--video_length", "9"]) == 2
    said = capsys.readouterr().err
    assert re.search(
        rf"error: 160x96, 9 frames needs \d+ MiB of host memory \(weights \d+ MiB\); free: host {mebibytes} MiB\. "
        rf"What would help: {helps}$",
        said,
    ), said
    assert "loading" not in said and contents(inputs) == before


def test_stage_2_offloads_what_does_not_fit(inputs, tmp_path, monkeypatch, capsys, resident):
    """A GPU that does not exist: the choice is that for one, and the device on which it runs the CPU."""
    skeleton_weights = 8 * 2**20
    with_free(monkeypatch, budget.RESERVE + skeleton_weights)
    arguments = ["--input_dir", inputs, "--output_dir", tmp_path, *SMALL]
    assert stage2_transformer.main(list(map(str, arguments))) == 0
    said = capsys.readouterr().err
    chosen = re.search(r"offloaded blocks: (\d+) of (\d+) \(all of them resident need \d+ MiB, \d+ MiB are free", said)
    assert chosen and 0 < int(chosen[1]) <= int(chosen[2]), said
    assert torch.equal(load_latents(tmp_path)[0], resident)


def with_room_for(monkeypatch, model_path: Path, spare: int = budget.RESERVE, **asked) -> None:
    """As much free memory as 192x320 px of a single frame take if decoded so."""
    model = open_model(model_path, ["vae"])
    weights = 4 * sum(tensor.numel() for tensor in components.vae_skeleton(model, "decoder").parameters())
    memory, request = budget.FreeMemory(None, 2**40), planning.Request(**asked)
    needed = planning.fit_decoding(components.vae_config(model), weights, 4, (1, 192, 320), memory, request).total
    with_free(monkeypatch, None, spare + needed)


def test_stage_3_takes_bands_of_whole_frames_and_then_smaller_tiles(tmp_path, tiny_official, monkeypatch, capsys):
    latents = torch.randn(1, 32, 1, 12, 20, generator=torch.Generator().manual_seed(5))
    folder = denoised(tmp_path, tiny_official, latents)
    arguments = ["--input_dir", str(folder), "--save_frames"]
    assert stage3_vae_decoder.main(arguments) == 0
    assert "whole frames (the default)" in capsys.readouterr().err
    whole = load_frames(folder)[0]
    need = r"would need \d+ MiB, \d+ MiB are free\)"

    with_room_for(monkeypatch, tiny_official, whole=True, bands=2)
    assert stage3_vae_decoder.main(arguments) == 0
    said = capsys.readouterr().err
    assert len(re.findall(rf"whole frames in 2 bands of rows \(in one piece they {need}", said)) == 1, said
    assert torch.equal(load_frames(folder)[0], whole)

    with_room_for(monkeypatch, tiny_official, tile_size=128)
    monkeypatch.setattr(planning, "BAND_COUNTS", (1,))
    assert stage3_vae_decoder.main(arguments) == 0
    said = capsys.readouterr().err
    assert len(re.findall(rf"8 tiles of 128 px \(whole frames {need}", said)) == 1, said
    assert stage3_vae_decoder.main([*arguments, "--tile_size", "256"]) == 0
    assert "tiles of 256 px (as asked)" in capsys.readouterr().err, "what is asked for wins"
    with_room_for(monkeypatch, tiny_official, spare=0, tile_size=128)
    assert stage3_vae_decoder.main([*arguments, "--disable_tiling"]) == 2
    said = capsys.readouterr().err
    assert re.search(
        r"needs \d+ MiB \(.*What would help: no flag about tiles \(\d+ MiB, \S+ to \S+ s\)$", said.strip()
    ), said
