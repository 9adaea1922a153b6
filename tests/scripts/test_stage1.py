"""stage1_text_encoder.py as a user calls it, on the drawn tiny checkpoint in both layouts."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from PIL import Image

from hunyuan_staged.files import contract, provenance
from hunyuan_staged.files.config import read_config
from hunyuan_staged.files.tensors import load_embeddings

PROMPT = 'a card that says "AB" and “C”'


def call(*args: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "stage1_text_encoder.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def done(tmp_path_factory, tiny_official):
    folder = tmp_path_factory.mktemp("stage1")
    result = call("--model_path", tiny_official, "--prompt", PROMPT, "--output_dir", folder)
    assert result.returncode == 0, result.stderr
    return folder, result


def test_embeddings_config_and_report(done, tiny_official):
    folder, result = done
    tensors, metadata = load_embeddings(folder)
    assert {name: list(tensor.shape) for name, tensor in tensors.items() if "negative" not in name} == {
        "prompt_embeds": [1, 1000, 64],
        "prompt_embeds_mask": [1, 1000],
        "prompt_embeds_2": [1, 256, 64],
        "prompt_embeds_mask_2": [1, 256],
    }
    # ByT5 is one token a byte, and one at the end.
    assert tensors["prompt_embeds_mask_2"].sum() == len('Text "AB". Text "C". ') + 1
    assert not tensors["negative_prompt_embeds_mask_2"].any()
    assert tensors["prompt_embeds_mask"].sum() > tensors["negative_prompt_embeds_mask"].sum() > 0
    assert tensors["prompt_embeds"].dtype == torch.float32, "auto is fp32 on a CPU"
    assert metadata["prompt"] == PROMPT
    assert (metadata["version"], metadata["task_type"]) == ("demo_t2v", "t2v")
    assert read_config(folder) == {
        "prompt": PROMPT,
        "negative_prompt": "",
        "model_path": str(tiny_official),
        "resolution": "demo",
        "transformer_version": "demo_t2v",
        "task_type": "t2v",
        "image_path": None,
        "dtype": "auto",
        "embeddings_sha256": provenance.sha256(folder / contract.EMBEDDINGS_FILE),
    }
    assert len(metadata["made_from_sha256"]) == 64
    assert result.stderr.splitlines()[-1].endswith(f"run_stage2.sh --input_dir={folder}")
    assert "prompt_embeds [1, 1000, 64]" in result.stderr
    assert "stage 1 done: load " in result.stderr


def test_both_layouts_give_the_same_bits(done, tmp_path, tiny_diffusers):
    result = call("--model_path", tiny_diffusers, "--prompt", PROMPT, "--output_dir", tmp_path)
    assert result.returncode == 0, result.stderr
    ours, theirs = load_embeddings(done[0])[0], load_embeddings(tmp_path)[0]
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_an_image_is_encoded_beside_the_text(tmp_path, tiny_official):
    Image.new("RGB", (300, 300), "red").save(tmp_path / "red.png")
    out = tmp_path / "out"
    given = ["--model_path", tiny_official, "--image_path", tmp_path / "red.png"]
    result = call("--output_dir", out, *given)
    assert result.returncode == 0, result.stderr
    tensors, _ = load_embeddings(out)
    assert tensors["image_latents"].shape == (1, 32, 1, 8, 8), "a square image takes the square bucket, 128 px"
    assert tensors["image_embeds"].ndim == 3
    assert tensors["image_embeds"].any()
    assert read_config(out)["transformer_version"] == "demo_i2v"
    fitted = call("--output_dir", out, *given, "--width", 160, "--height", 64)
    assert fitted.returncode == 0, fitted.stderr
    assert load_embeddings(out)[0]["image_latents"].shape == (1, 32, 1, 4, 10)


def test_a_prompt_without_quotes_needs_no_glyph_encoder(tmp_path, tiny_official):
    model = shutil.copytree(tiny_official, tmp_path / "model")
    shutil.rmtree(model / "text_encoder" / "Glyph-SDXL-v2")
    result = call("--model_path", model, "--prompt", "a cat", "--output_dir", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    result = call("--model_path", model, "--prompt", 'a "cat"', "--output_dir", tmp_path / "out2")
    assert result.returncode == 2
    assert "modelscope download --model AI-ModelScope/Glyph-SDXL-v2" in result.stderr
    assert "loading" not in result.stderr, "it is missed before the language model is loaded"
    assert not (tmp_path / "out2").exists()


def test_an_image_needs_the_parts_that_encode_it(tmp_path, tiny_official):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    model = shutil.copytree(tiny_official, tmp_path / "model")
    shutil.rmtree(model / "vision_encoder")
    given = ("--model_path", model, "--output_dir", tmp_path / "out")
    result = call(*given, "--image_path", tmp_path / "red.png")
    assert result.returncode == 2
    assert f"hf download black-forest-labs/FLUX.1-Redux-dev --local-dir {model}/vision_encoder/siglip" in result.stderr
    assert "loading" not in result.stderr, "it is missed before the language model is loaded"
    assert not (tmp_path / "out").exists()


def test_two_processes_do_the_work_once(done, tmp_path, tiny_official):
    launcher = ["bash", str(ROOT / "run_stage1.sh"), "--gpus", "2", "--model_path", str(tiny_official)]
    environment = os.environ | {"PYTHON": sys.executable}
    command = [*launcher, "--prompt", PROMPT, "--output_dir", str(tmp_path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("stage 1 done") == 1
    ours, theirs = load_embeddings(done[0])[0], load_embeddings(tmp_path)[0]
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_only_resolution_of_a_folder_is_taken_with_a_warning(tmp_path, tiny_official):
    """A command written for the real weights refused the demo's."""
    result = call("--model_path", tiny_official, "--resolution", "720p", "--output_dir", tmp_path)
    assert result.returncode == 0, result.stderr
    assert f"WARNING --resolution 720p: {tiny_official} holds demo alone, which is taken\n" in result.stderr
    assert read_config(tmp_path)["resolution"] == "demo"


def test_a_long_prompt_is_cut_off_with_a_warning(tmp_path, tiny_official):
    result = call("--model_path", tiny_official, "--prompt", "red " * 1200, "--output_dir", tmp_path)
    assert result.returncode == 0, result.stderr
    assert "--prompt is too long: its last " in result.stderr
    assert load_embeddings(tmp_path)[0]["prompt_embeds_mask"].all()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--resolution", "999p"], "--resolution '999p' is unknown; known: demo, 360p, 480p, 720p, 1080p"),
        (["--cfg_distilled"], "has no transformer demo_t2v_distilled; it holds demo_i2v, demo_t2v"),
        (["--step_distilled", "--cfg_distilled"], "--step_distilled excludes --cfg_distilled and --sparse_attn"),
        (["--image_path", "nowhere.png"], "--image_path nowhere.png does not exist"),
        (["--image_path", str(ROOT / "LICENSE")], "LICENSE: not an image that Pillow can open"),
        (["--output_dir", str(ROOT / "LICENSE" / "x")], "LICENSE is not a folder"),
        (["--dtype", "int4"], "argument --dtype: invalid choice: 'int4'"),
        (["--model_path", "nowhere"], "nowhere"),
        (["--model_path", str(ROOT)], "is no model folder"),
    ],
)
def test_refusals_are_one_line_and_change_nothing(tmp_path, tiny_official, args, message):
    result = call("--model_path", tiny_official, "--output_dir", tmp_path / "out", *args)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert "loading" not in result.stderr, "refused before the language model is loaded"
    assert len([line for line in result.stderr.splitlines() if line.startswith("error: ")]) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script", ["stage1_text_encoder.py", "stage2_transformer.py", "stage3_vae_decoder.py"])
def test_help_is_grouped_with_defaults_and_an_example_and_loads_no_torch(script):
    code = (
        "import runpy, sys\n"
        f"sys.argv = [{script!r}, '--help']\n"
        "sys.path.insert(0, '.')\n"
        "try:\n"
        f"    runpy.run_path({script!r}, run_name='__main__')\n"
        "except SystemExit as left:\n"
        "    assert left.code == 0\n"
        "loaded = {'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "files:" in result.stdout
    assert "default: " in result.stdout
    assert "examples:\n  python " in result.stdout


def test_what_belongs_to_the_former_prompt_is_named(tmp_path, tiny_official):
    flags = ["--model_path", tiny_official, "--output_dir", tmp_path, "--prompt"]
    assert "former prompt" not in call(*flags, "one").stderr
    (tmp_path / contract.LATENTS_FILE).touch()
    assert "former prompt" not in call(*flags, "one").stderr
    result = call(*flags, "two")
    assert result.returncode == 0
    assert f"{tmp_path / contract.LATENTS_FILE}: of the former prompt 'one', until made anew" in result.stderr


def test_help_says_what_the_demo_knows():
    from hunyuan_staged.demo import scenes

    said = call("--help").stdout.partition("the demo weights know:")[2]
    assert [
        name for name in (*scenes.SHAPES, *scenes.COLORS, *scenes.BACKGROUNDS, *scenes.CARDS) if name not in said
    ] == []


def test_the_demo_names_words_that_it_does_not_know(tmp_path, tiny_official):
    result = call("--prompt", 'a cat on a "HELLO" card', "--output_dir", tmp_path, "--dry_run")
    assert result.returncode == 0, result.stderr
    warned = 'the demo weights do not know cat, "HELLO" on a card; --help says what they know. Real weights: python -m '
    assert result.stderr.count(warned) == 1
    other = call("--model_path", tiny_official, "--prompt", "a cat", "--output_dir", tmp_path, "--dry_run")
    assert other.returncode == 0 and "do not know" not in other.stderr


def test_without_a_model_path_the_demo_weights_are_used_and_named(tmp_path):
    from hunyuan_staged.demo import CHECKPOINT

    result = call("--output_dir", tmp_path)
    assert result.returncode == 0, result.stderr
    assert "no --model_path: using the demo weights, which know plain shapes" in result.stderr
    config = read_config(tmp_path)
    assert config["model_path"] == str(CHECKPOINT)
    assert config["transformer_version"] == "demo_t2v"
