"""stage2_transformer.py as a user calls it, on the drawn tiny checkpoint."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from folders import embed

from hunyuan_staged.files import contract, provenance
from hunyuan_staged.files.config import read_config
from hunyuan_staged.files.tensors import load_latents
from hunyuan_staged.sampling.schedule import flow_sigmas

SCRIPT = ROOT / "stage2_transformer.py"
SMALL = ["--video_length", "9", "--num_inference_steps", "2"]


def call(*args: object, processes: int = 1) -> subprocess.CompletedProcess:
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run([*launcher, str(SCRIPT), *map(str, args)], capture_output=True, text=True, check=False)


def latents(folder: Path) -> torch.Tensor:
    return load_latents(folder)[0]


@pytest.fixture(scope="module")
def done(tmp_path_factory, tiny_official):
    """One run that the tests of this module compare with."""
    folder = embed(tmp_path_factory.mktemp("stage2"), tiny_official)
    result = call("--input_dir", folder, *SMALL)
    assert result.returncode == 0, result.stderr
    return folder, result


def test_latents_config_and_report(done):
    folder, result = done
    tensor, metadata = load_latents(folder)
    assert tensor.shape == (1, 32, 3, 6, 10) and torch.isfinite(tensor).all() and tensor.std() > 0.1
    expected = {"height": "96", "width": "160", "num_frames": "9", "num_inference_steps": "2", "guidance_scale": "6.0"}
    expected |= {"seed": "42", "attn_mode": "torch", "flow_shift": "5.0"}
    assert expected.items() <= metadata.items()
    assert metadata["embeddings_sha256"] == provenance.sha256(folder / contract.EMBEDDINGS_FILE)
    config = read_config(folder)
    assert config["prompt"] == "a" and config["video_length"] == 9 and config["stage2_elapsed_time"] > 0
    assert (config["height"], config["width"], config["aspect_ratio"]) == (96, 160, "16:9")
    assert "no GPU: torch's scaled_dot_product_attention" in result.stderr
    assert "1 guidance branch x 1 sequence shard" in result.stderr
    assert result.stderr.splitlines()[-1].endswith(f"run_stage3.sh --input_dir={folder}")
    assert "[1, 32, 3, 6, 10]" in result.stderr + result.stdout


def again(done, tmp_path, *args, processes=1):
    result = call("--input_dir", done[0], "--output_dir", tmp_path, *SMALL, *args, processes=processes)
    assert result.returncode == 0, result.stderr
    return latents(tmp_path)


def test_the_same_seed_gives_the_same_bits_and_offloading_keeps_them(done, tmp_path):
    assert torch.equal(again(done, tmp_path, "--enable_offloading"), latents(done[0]))
    assert read_config(tmp_path)["prompt"] == "a", "the config follows the latents into --output_dir"


def test_another_seed_gives_another_video(done, tmp_path):
    assert (again(done, tmp_path, "--seed", 43) - latents(done[0])).abs().mean() > 0.1


def test_both_layouts_give_the_same_bits(done, tmp_path, tiny_diffusers):
    assert torch.equal(again(done, tmp_path, "--model_path", tiny_diffusers), latents(done[0]))


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_processes_give_what_one_gives(done, tmp_path, processes):
    one = latents(done[0])
    several = again(done, tmp_path, processes=processes)
    assert (several - one).norm() / one.norm() < 1e-5


def test_an_image_sets_the_size_and_a_ratio_against_it_is_refused(tmp_path, tiny_official):
    folder = embed(tmp_path, tiny_official, image=True)
    result = call("--input_dir", folder, *SMALL, "--aspect_ratio", "1:1")
    assert result.returncode == 2 and "--aspect_ratio 1:1 contradicts the image, which is 160x96" in result.stderr
    assert not (folder / contract.LATENTS_FILE).exists()
    result = call("--input_dir", folder, *SMALL, "--width", 96, "--height", 64)
    assert result.returncode == 2
    assert "--width 96 and --height 64 contradict the image's latents, which are 160x96; run stage 1" in result.stderr
    result = call("--input_dir", folder, *SMALL)
    assert result.returncode == 0, result.stderr
    assert latents(folder).shape == (1, 32, 3, 6, 10)


def test_an_image_for_weights_that_take_none_is_refused(tmp_path, tiny_official):
    folder = embed(tmp_path, tiny_official, {"transformer_version": "demo_t2v"}, image=True)
    result = call("--input_dir", folder, *SMALL)
    assert result.returncode == 2
    assert (
        "demo_t2v takes no image, and the embeddings hold one; run stage 1 without --image_path, or take i2v weights"
    ) in result.stderr


def test_given_sigmas_are_the_schedule(done, tmp_path):
    """The same numbers as the version's own schedule give: the same bits."""
    own = flow_sigmas(2, 5.0).tolist()
    assert own[0] == 1 and own[-1] == 0
    given = ",".join(repr(number) for number in own[:-1])
    result = call("--input_dir", done[0], "--output_dir", tmp_path, "--video_length", 5, "--sigmas", given)
    assert result.returncode == 0, result.stderr
    assert f"sigmas {given}" in result.stderr
    mine, metadata = load_latents(tmp_path)
    config = read_config(tmp_path)
    assert metadata["sigmas"] == config["sigmas"] == given and config["num_inference_steps"] == 2
    assert "flow_shift" not in metadata and "flow_shift" not in config
    both = call("--input_dir", done[0], "--output_dir", tmp_path, "--video_length", 5, "--num_inference_steps", 2)
    assert both.returncode == 0, both.stderr
    assert torch.equal(mine, latents(tmp_path))


def test_a_given_size_is_taken_with_a_warning(done, tmp_path):
    result = call("--input_dir", done[0], "--output_dir", tmp_path, *SMALL, "--width", 96, "--height", 64)
    assert result.returncode == 0, result.stderr
    assert "96x64 is no size that demo was trained at; the nearest is 144x96" in result.stderr
    assert load_latents(tmp_path)[0].shape == (1, 32, 3, 4, 6)
    assert (read_config(tmp_path)["width"], read_config(tmp_path)["height"]) == (96, 64)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--video_length", "120"], "--video_length 120 is not 4n+1; the nearest are 117 and 121"),
        (["--aspect_ratio", "wide"], "--aspect_ratio 'wide' is not width:height"),
        (["--num_inference_steps", "0"], "--num_inference_steps 0 is not a positive number"),
        (["--guidance_scale", "0.5"], "--guidance_scale 0.5 is outside 1 to 100"),
        (["--guidance_scale", "nan"], "--guidance_scale nan is outside 1 to 100"),
        (["--width", "160"], "--width 160 needs --height beside it"),
        (["--width", "160", "--height", "100"], "--height 100 is not a multiple of 16 up to 4096"),
        (["--width", "8192", "--height", "96"], "--width 8192 is not a multiple of 16 up to 4096"),
        (
            ["--width", "160", "--height", "96", "--aspect_ratio", "16:9"],
            "--aspect_ratio 16:9 and --width, --height are two ways to say the size; give one",
        ),
        (["--sigmas", "1,0"], "--sigmas 1,0: '0' is not a number above 0 and up to 1"),
        (["--seed", "-1"], "--seed -1 is outside 0 to 2^64 - 1"),
        (["--use_sageattn", "--sparse_attn"], "--use_sageattn and --sparse_attn ask for different attention"),
        (
            ["--attn_mode", "torch", "--use_sageattn"],
            "--attn_mode torch and --use_sageattn ask for different attention",
        ),
        (["--use_sageattn"], "--attn_mode sageattn needs a GPU"),
        (["--sage_blocks_range", "0-9"], "--sage_blocks_range belongs to --attn_mode sageattn, not to flash"),
        (["--use_sageattn", "--sage_blocks_range", "9-0"], "--sage_blocks_range '9-0' is not FIRST-LAST"),
        (["--cfg_parallel", "on"], "--cfg_parallel on: the number of processes, 1, is odd; use auto or off"),
        (["--attn_mode", "flash3"], "--attn_mode flash3 needs a GPU"),
        (["--attn_mode", "quick"], "--attn_mode"),
        (["--enable_offloading", "--disable_offloading"], "not allowed with argument"),
        (["--model_path", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--output_dir", "/dev/null/x"], "--output_dir /dev/null/x: /dev/null is not a folder"),
    ],
)
def test_refusals_are_one_line_and_change_nothing(done, tmp_path, args, message):
    if torch.cuda.is_available() and "flash3" in args:
        pytest.skip("this refusal is for machines without a GPU")
    before = {path.name: path.stat().st_mtime_ns for path in done[0].iterdir()}
    result = call("--input_dir", done[0], "--output_dir", tmp_path / "out", *args)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr and "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if "error:" in line]
    assert len(errors) == 1
    assert not (tmp_path / "out").exists()
    assert before == {path.name: path.stat().st_mtime_ns for path in done[0].iterdir()}


def test_ssta_runs_on_a_cpu_with_a_warning(done, tmp_path):
    result = call("--input_dir", done[0], "--output_dir", tmp_path, *SMALL, "--attn_mode", "flex-block-attn")
    assert result.returncode == 0, result.stderr
    assert "was not trained for flex-block-attn; --sparse_attn takes weights that were" in result.stderr
    latents, metadata = load_latents(tmp_path)
    assert metadata["attn_mode"] == "flex-block-attn" and torch.isfinite(latents).all()
    # One tile in all: every token attends to every other, and to the zeros of the padding, so it is close to dense.
    dense = load_latents(done[0])[0]
    assert 0 < (latents - dense).norm() / dense.norm() < 0.5


def test_a_missing_stage_1_is_named(tmp_path):
    result = call("--input_dir", tmp_path)
    assert result.returncode == 2 and "stage1_text_encoder.py" in result.stderr


def test_a_version_that_the_folder_lacks_lists_those_it_has(tmp_path, tiny_official):
    folder = embed(tmp_path, tiny_official, {"transformer_version": "720p_t2v"})
    result = call("--input_dir", folder)
    assert result.returncode == 2 and "720p_t2v" in result.stderr and "demo_t2v" in result.stderr
