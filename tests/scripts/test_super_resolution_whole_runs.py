"""Super resolution from stage 1 on, and in whole runs, on the drawn tiny checkpoint: images, many videos, drafts."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from forked import run_stage
from PIL import Image

from hunyuan_staged.encoders.image import pixels_of, resize_and_center_crop
from hunyuan_staged.files import contract
from hunyuan_staged.files.config import read_config
from hunyuan_staged.files.tensors import load_embeddings, load_latents, load_state
from hunyuan_staged.files.video import read_video, write_video
from hunyuan_staged.gallery import folders as gallery
from hunyuan_staged.weights.components import load_vae_encoder
from hunyuan_staged.weights.folder import open_model

SMALL = ["--video_length", 5, "--num_inference_steps", 2]


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    """200 x 90, of a ratio that no bucket has."""
    path = tmp_path_factory.mktemp("picture") / "any.png"
    pixels = np.random.default_rng(0).integers(0, 256, (9, 20, 3), np.uint8).repeat(10, 0).repeat(10, 1)
    Image.fromarray(pixels).save(path)
    return path


def encoded(model: Path, picture: Path, width: int, height: int) -> torch.Tensor:
    """The picture's latents at a size, by the VAE's encoder alone: the posterior's mode times the scaling factor."""
    encoder, config = load_vae_encoder(open_model(model, ("vae",)), device=torch.device("cpu"), dtype=torch.float32)
    pixels = pixels_of(resize_and_center_crop(Image.open(picture), height, width))[None, :, None]
    with torch.no_grad():
        return encoder(pixels).chunk(2, dim=1)[0] * config["scaling_factor"]


def check_images(folder: Path, model: Path, picture: Path, sizes: dict[str, tuple[int, int]]) -> None:
    """The embeddings hold the picture's latents at these sizes (width, height) and at no other."""
    tensors, _ = load_embeddings(folder)
    assert {name for name in tensors if name.startswith("image_latents")} == set(sizes)
    for name, size in sizes.items():
        expected = encoded(model, picture, *size)
        assert tensors[name].shape == expected.shape == (1, 32, 1, size[1] // 16, size[0] // 16)
        assert (tensors[name] - expected).norm() / expected.norm() < 1e-5


def test_stage_1_encodes_the_image_at_both_sizes(tmp_path, tiny_super_resolution, picture):
    """Each from the picture itself; stage 2 takes them."""
    folder = tmp_path / "out"
    args = ["--model_path", tiny_super_resolution, "--image_path", picture, "--output_dir", folder]
    status, said = run_stage(1, *args, "--super_resolution", "demo_hd", said=tmp_path / "said")
    assert status == 0, said
    sizes = {"image_latents": (176, 80), "image_latents_demo_hd": (368, 160)}
    check_images(folder, tiny_super_resolution, picture, sizes)
    assert run_stage(2, "--input_dir", folder, *SMALL, said=tmp_path / "said")[0] == 0
    status, said = run_stage(2, "--input_dir", folder, "--super_resolution", "demo_hd", said=tmp_path / "said")
    assert status == 0, said
    assert load_latents(folder, "demo_hd")[0].shape == (1, 32, 2, 10, 23)


def test_stage_1_encodes_the_image_at_every_size_of_two_enlargements(tmp_path, tiny_super_resolution, picture):
    model = tmp_path / "model"
    shutil.copytree(tiny_super_resolution, model)
    (model / "transformer" / "demo_i2v").rename(model / "transformer" / "480p_i2v")
    args = ["--model_path", model, "--image_path", picture, "--output_dir", tmp_path / "out", "--resolution", "480p"]
    status, said = run_stage(1, *args, "--super_resolution", "1080p", said=tmp_path / "said")
    assert status == 0, said
    sizes = {"image_latents": (944, 432), "image_latents_720p": (1392, 640), "image_latents_1080p": (2112, 976)}
    check_images(tmp_path / "out", model, picture, sizes)


def test_embeddings_without_the_larger_image_are_made_anew(tmp_path, tiny_super_resolution, picture):
    """As a job they would be done already, and stage 2 would ask for them for ever."""
    (tmp_path / "jobs.jsonl").write_text(json.dumps({"name": "one", "image_path": str(picture)}))
    args = ["--model_path", tiny_super_resolution, "--output_dir", tmp_path / "runs"]
    args += ["--jobs", tmp_path / "jobs.jsonl"]
    assert run_stage(1, *args, said=tmp_path / "said")[0] == 0
    for _ in range(2):
        status, said = run_stage(1, *args, "--super_resolution", "demo_hd", said=tmp_path / "said")
        assert status == 0, said
    assert "one: already done" in said
    assert contract.large_image_latents("demo_hd") in load_embeddings(tmp_path / "runs" / "one")[0]


# -- whole runs --


def whole_run(*flags: object) -> subprocess.CompletedProcess:
    command = ["bash", ROOT / "run_staged.sh", "--gpus", 1, "--super_resolution", "demo_hd", *SMALL, *flags]
    environment = os.environ | {"PYTHON": sys.executable}
    return subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, check=False)


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture(scope="module")
def single(tmp_path_factory, tiny_super_resolution) -> dict[int, Path]:
    """Whole runs of one video, by seed."""
    folders = {}
    for seed in (1, 2):
        folders[seed] = tmp_path_factory.mktemp(f"seed{seed}") / "out"
        flags = ["--model_path", tiny_super_resolution, "--prompt", "a red circle", "--seed", seed]
        result = whole_run(*flags, "--output_dir", folders[seed])
        assert result.returncode == 0, result.stderr
        assert result.stdout == f"{folders[seed]}/output_video_demo_hd.mp4\n"
    return folders


def test_a_whole_run_to_a_size_whose_weights_are_not_there_is_refused_at_once(tmp_path, tiny_official):
    """Stage 1 warned, and stage 2 refused it when it had made the base run: after an hour, with real weights."""
    flags = ["--model_path", tiny_official, "--prompt", "a red circle", "--output_dir", tmp_path / "out"]
    result = whole_run(*flags)
    last = f"error: --super_resolution demo_hd: {tiny_official} has no upsampler/demo_hd_sr_distilled"
    assert (result.returncode, result.stderr.splitlines()[-1]) == (2, last)
    assert not (tmp_path / "out").exists()
    result = whole_run(*flags, "--seeds", "1-2")
    assert result.returncode == 3 and "loading" not in result.stderr
    assert f"a-red-circle-seed1: failed: {last.removeprefix('error: ')}" in result.stderr


def check_bits(folder: Path, single: Path) -> None:
    """Base and larger latents, and the video of the larger ones, are those of a run of its own."""
    for resolution in (None, "demo_hd"):
        assert torch.equal(load_latents(folder, resolution)[0], load_latents(single, resolution)[0])
    video = contract.at_resolution(contract.VIDEO_FILE, "demo_hd")
    assert (folder / video).read_bytes() == (single / video).read_bytes()
    assert not (folder / contract.VIDEO_FILE).exists(), "the larger ones alone are decoded"


def test_many_videos_are_enlarged_to_the_bits_of_single_runs(tmp_path, tiny_super_resolution, single):
    """One that is bad and one that fails do not end the others; what is done is not made again."""
    jobs, runs = tmp_path / "jobs.jsonl", tmp_path / "runs"
    lines: list[dict] = [{"name": f"seed{seed}", "prompt": "a red circle", "seed": seed} for seed in single]
    lines += [{"name": "bad", "num_inference_steps": 0}, {"name": "wide", "width": 176, "height": 96}]
    jobs.write_text("\n".join(map(json.dumps, lines)))
    flags = ["--model_path", tiny_super_resolution, "--jobs", jobs, "--output_dir", runs]
    result = whole_run(*flags)
    assert result.returncode == 3, result.stderr
    video = contract.at_resolution(contract.VIDEO_FILE, "demo_hd")
    assert result.stdout.splitlines() == [f"{runs}/seed{seed}/{video}" for seed in single]
    for seed, folder in single.items():
        check_bits(runs / f"seed{seed}", folder)
        assert load_latents(runs / f"seed{seed}", "demo_hd")[1]["num_inference_steps"] == "6", (
            "the 2 are the base run's"
        )
    assert "left out: jobs.jsonl:3 num_inference_steps 0" in result.stderr
    failure = json.loads((runs / "wide" / contract.FAILURE_FILE).read_text())
    assert failure["error"] == "176x96 is no size of demo, from which super resolution to demo_hd starts"
    assert not (runs / "bad").exists() and contract.LATENTS_FILE not in files(runs / "wide"), "found by stage 1"
    jobs.write_text("\n".join(map(json.dumps, lines[:2])))
    result = whole_run(*flags)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("seed1: already done") == 4 and "loading" not in result.stderr


def test_a_draft_is_not_enlarged_and_is_finished_to_the_same_bits(tmp_path, tiny_super_resolution, single):
    folder = tmp_path / "out"
    flags = ["--model_path", tiny_super_resolution, "--prompt", "a red circle", "--seed", 1, "--output_dir", folder]
    result = whole_run(*flags, "--stop_after", 1)
    assert result.returncode == 0, result.stderr
    assert (result.stdout, load_state(folder)[1]["step"]) == ("", "1")
    assert result.stderr.count("loading transformer: 100%") == 1 and "loading VAE" not in result.stderr
    assert not {contract.LATENTS_FILE, contract.at_resolution(contract.LATENTS_FILE, "demo_hd")} & files(folder)
    result = whole_run(*flags, "--resume")
    assert result.returncode == 0, result.stderr
    assert "going on after step 1 of 2" in result.stderr
    check_bits(folder, single[1])


def test_a_draft_that_stage_2_finishes_is_enlarged_by_the_commands_that_are_named(
    tmp_path, tiny_super_resolution, single
):
    """By the gallery's, and by the last line of stage 2. Was: decoded at once, as if nothing had been asked for."""
    folder = tmp_path / "out"
    flags = ["--model_path", tiny_super_resolution, "--prompt", "a red circle", "--seed", 1, "--output_dir", folder]
    result = whole_run(*flags, "--stop_after", 1)
    assert result.returncode == 0, result.stderr
    assert read_config(folder)["super_resolution"] == "demo_hd"
    commands = gallery.read(folder, tmp_path).commands
    words = [shlex.split(command)[2:] for command in commands]
    status, said = run_stage(2, *words[0], said=tmp_path / "said")
    assert status == 0, said
    named = f"--input_dir={folder} --super_resolution=demo_hd"
    assert re.search(rf"next: bash \S*run_stage2\.sh {named}$", said.strip()), said
    assert [len(words), words[1]] == [3, [f"--input_dir={folder}", "--resume", *words[1][2:]]]
    for stage, flags in ((2, words[1]), (3, words[2])):
        status, said = run_stage(stage, *flags, said=tmp_path / "said")
        assert status == 0, said
    check_bits(folder, single[1])


@pytest.fixture(scope="module")
def apart(tmp_path_factory, tiny_super_resolution) -> tuple[Path, list[object]]:
    """(the model without super resolution, the flags that name its files)."""
    model, flags = tmp_path_factory.mktemp("apart") / "model", []
    shutil.copytree(tiny_super_resolution, model)
    for part in ("transformer", "upsampler"):
        file = model.parent / f"{part}.safetensors"
        (model / part / "demo_hd_sr_distilled" / "diffusion_pytorch_model.safetensors").rename(file)
        shutil.rmtree(model / part / "demo_hd_sr_distilled")
        flags += [f"--super_resolution_{part}", file]
    return model, flags


def test_a_draft_is_enlarged_with_the_files_that_it_was_started_with(tmp_path, apart, single):
    """Was: with the model's own, which this one has not."""
    (model, files), folder = apart, tmp_path / "out"
    flags = ["--model_path", model, *files, "--prompt", "a red circle", "--seed", 1, "--output_dir", folder]
    result = whole_run(*flags, "--stop_after", 1)
    assert result.returncode == 0, result.stderr
    assert "stage 2 then needs" not in result.stderr
    config = read_config(folder)
    assert [config[name[2:]] for name in files[::2]] == [str(file) for file in files[1::2]]
    for command in gallery.read(folder, tmp_path).commands:
        script, *words = shlex.split(command)[1:]
        status, said = run_stage(int(script[-4]), *words, said=tmp_path / "said")
        assert status == 0, said
    check_bits(folder, single[1])


def test_a_recorded_file_that_is_gone_is_named(tmp_path, apart, single):
    """The config alone says it, so that the message says where; another one that is given will do."""
    (_, files), folder = apart, tmp_path / "out"
    shutil.copytree(single[1], folder)
    place = folder / contract.CONFIG_FILE
    recorded = {"super_resolution_transformer": str(tmp_path / "gone.safetensors")}
    place.write_text(json.dumps(read_config(folder) | recorded))
    args = ["--input_dir", folder, "--super_resolution", "demo_hd", "--dry_run"]
    status, said = run_stage(2, *args, said=tmp_path / "said")
    assert status == 2
    assert said.splitlines()[-1] == (
        f"error: {place} records super_resolution_transformer {tmp_path}/gone.safetensors, which does not exist; "
        "give --super_resolution_transformer"
    )
    assert run_stage(2, *args, *files[:2], said=tmp_path / "said")[0] == 0


def test_files_without_super_resolution_are_refused_by_stage_1(tmp_path, apart):
    args = ["--output_dir", tmp_path / "out", *apart[1][:2]]
    status, said = run_stage(1, *args, said=tmp_path / "said")
    message = "error: --super_resolution_transformer belongs to --super_resolution"
    assert (status, said.splitlines()[-1]) == (2, message) and not (tmp_path / "out").exists()


def test_embeddings_that_are_there_learn_what_is_to_follow(tmp_path, tiny_super_resolution, apart):
    """A job whose prompt is encoded is not encoded again for that."""
    larger = ["--super_resolution", "demo_hd"]
    args = ["--model_path", tiny_super_resolution, "--output_dir", tmp_path / "runs", "--jobs", tmp_path / "jobs.txt"]
    (tmp_path / "jobs.txt").write_text("a cat")
    asked = ([], None, None), (larger, "demo_hd", None), ([*larger, *apart[1]], "demo_hd", str(apart[1][3]))
    for more, recorded, file in (*asked, asked[0]):
        status, said = run_stage(1, *args, *more, said=tmp_path / "said")
        assert status == 0, said
        config = read_config(tmp_path / "runs" / "a-cat")
        assert config.get("super_resolution") == recorded
        assert config.get("super_resolution_upsampler") == file
    assert "a-cat: already done" in said and "loading" not in said


def test_many_drafts_are_not_enlarged(tmp_path, tiny_super_resolution, single):
    flags = ["--model_path", tiny_super_resolution, "--prompt", "a red circle", "--seeds", "1,2"]
    flags += ["--output_dir", tmp_path / "runs"]
    result = whole_run(*flags, "--stop_after", 1)
    assert (result.returncode, result.stdout) == (0, ""), result.stderr
    names = {seed: f"a-red-circle-seed{seed}" for seed in single}
    for name in names.values():
        assert load_state(tmp_path / "runs" / name)[1]["step"] == "1"
        assert contract.at_resolution(contract.STATE_FILE, "demo_hd") not in files(tmp_path / "runs" / name)
    result = whole_run(*flags)
    assert result.returncode == 0, result.stderr
    for seed, name in names.items():
        check_bits(tmp_path / "runs" / name, single[seed])


@pytest.mark.parametrize("many", [False, True])
def test_a_whole_run_enlarges_a_video(tmp_path, tiny_super_resolution, many):
    """There is no base run; the frame rate stays; the plan says the sizes."""
    clip, folder = tmp_path / "clip.mp4", tmp_path / "out"
    write_video(clip, np.full((9, 100, 200, 3), 90, np.uint8), 12, 100, 200)
    flags = ["--model_path", tiny_super_resolution, "--input_video", clip, "--output_dir", folder]
    flags += ["--prompt", "a red circle", *(["--seeds", 1] if many else [])]
    result = whole_run(*flags, "--dry_run")
    assert result.returncode == 0, result.stderr
    assert "352x176, 5 frames" in result.stdout and not folder.exists()
    result = whole_run(*flags)
    assert result.returncode == 0, result.stderr
    made = folder / "a-red-circle-seed1" if many else folder
    video = made / contract.at_resolution(contract.VIDEO_FILE, "demo_hd")
    assert result.stdout == f"{video}\n"
    frames, fps = read_video(video)
    assert (frames.shape, fps) == ((5, 176, 352, 3), 12)
    assert not {contract.LATENTS_FILE, contract.VIDEO_FILE} & files(made)
    result = whole_run(*flags, "--dry_run", "--resume")
    assert result.returncode == 0, result.stderr
    counted = ["1: 1 done, 0 to make"] * 4 if many else ["2, guidance 1, 2 done already"]
    assert re.findall(r"(?m)^(?:jobs|steps) +(.*)$", result.stdout) == counted
