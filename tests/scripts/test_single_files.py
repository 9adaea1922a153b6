"""Models of single files, as a user calls the stages: files in the place of parts, and a folder of nothing but files."""

import json
from pathlib import Path

import part_writer as parts
import pytest
import torch
from folders import denoised
from forked import run_stage
from safetensors.torch import load_file
from transformer_writer import fused, save

from hunyuan_staged.files.tensors import load_latents
from hunyuan_staged.weights import components
from hunyuan_staged.weights.folder import open_model
from hunyuan_staged.weights.key_maps import TRANSFORMER_MAP, to_official

PROMPT = 'a card that says "A7"'


@pytest.fixture(scope="module")
def official(tiny_official) -> dict[str, dict[str, torch.Tensor]]:
    """The official weights of each version."""
    folder, found = open_model(tiny_official, ()), {}
    for version in ("demo_t2v", "demo_i2v"):
        model = components.load_transformer(folder, version, device=torch.device("cpu"), dtype=torch.float32)
        found[version] = to_official(dict(model.state_dict()), TRANSFORMER_MAP)
    return found


def embeddings(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "stage1_embeddings.safetensors")


def config(folder: Path) -> dict:
    return json.loads((folder / "generation_config.json").read_text())


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def stage(number: int, said: Path, *args: object) -> str:
    status, text = run_stage(number, *args, said=said)
    assert status == 0, text
    return text


def test_stage_1_with_a_file_for_every_part(tiny_official, tmp_path):
    from PIL import Image

    Image.new("RGB", (64, 48), (200, 30, 30)).save(tmp_path / "red.png")
    files = {
        "--text_encoder": save(tmp_path / "qwen.safetensors", parts.text(tiny_official)),
        "--glyph_encoder": save(tmp_path / "byt5.safetensors", parts.glyph(tiny_official)),
        "--vision_encoder": save(tmp_path / "sigclip.safetensors", parts.image(tiny_official)),
        "--vae": save(tmp_path / "vae.safetensors", parts.vae(tiny_official)),
    }
    asked = ("--model_path", tiny_official, "--prompt", PROMPT, "--image_path", tmp_path / "red.png")
    stage(1, tmp_path / "said", *asked, "--output_dir", tmp_path / "plain")
    given = [word for pair in files.items() for word in pair]
    said = stage(1, tmp_path / "said", *asked, *given, "--output_dir", tmp_path / "files")
    assert equal(embeddings(tmp_path / "plain"), embeddings(tmp_path / "files"))
    for file, title in (("qwen", "text encoder"), ("byt5", "glyph encoder"), ("vae", "VAE")):
        assert f"{file}.safetensors: taken for the {title}, " in said
    recorded = config(tmp_path / "files")
    assert {name: recorded[name.removeprefix("--")] for name in files} == {n: str(f) for n, f in files.items()}
    assert "vae" not in config(tmp_path / "plain")
    planned = stage(1, tmp_path / "said", *asked, *given, "--dry_run", "--output_dir", tmp_path / "none")
    assert "taken for the text encoder" in planned and not (tmp_path / "none").exists()


def test_stage_3_takes_its_vae_from_a_file_or_from_what_stage_1_recorded(tiny_official, tmp_path):
    path = save(tmp_path / "any.safetensors", parts.vae(tiny_official))
    frames = {}
    for name, model, recorded, given in (
        ("plain", tiny_official, {}, ()),
        ("given", tiny_official, {}, ("--vae", path)),
        ("recorded", tiny_official, {"vae": str(path)}, ()),
        ("beside", "none/there", {"vae": str(path)}, ("--dry_run",)),
    ):
        folder = tmp_path / name
        folder.mkdir()
        denoised(folder, model, **recorded)
        said = stage(3, tmp_path / "said", "--input_dir", folder, "--save_frames", *given)
        if name != "plain":
            assert "any.safetensors: taken for the VAE, " in said
        if "--dry_run" not in given:
            frames[name] = load_file(folder / "stage3_frames.safetensors")["frames"]
    # A config in the model folder tells the VAE's factor.
    assert torch.equal(frames["given"], frames["plain"]) and torch.equal(frames["recorded"], frames["plain"])


def test_a_folder_of_single_files_through_all_stages(tiny_official, official, tmp_path):
    (tmp_path / "files").mkdir()
    files = parts.write_files(tiny_official, tmp_path / "files", fused(official["demo_t2v"]))
    (files / "vae" / "notes.txt").write_text("no weights")
    latents, frames = {}, {}
    for name, model in (("plain", tiny_official), ("files", files)):
        folder = tmp_path / f"of_{name}"
        said = stage(1, tmp_path / "said", "--model_path", model, "--prompt", PROMPT, "--output_dir", folder)
        said += stage(2, tmp_path / "said", "--input_dir", folder, "--video_length", 5, "--num_inference_steps", 2)
        said += stage(3, tmp_path / "said", "--input_dir", folder, "--save_frames")
        latents[name] = load_latents(folder)[0]
        frames[name] = load_file(folder / "stage3_frames.safetensors")["frames"]
    assert equal(embeddings(tmp_path / "of_plain"), embeddings(tmp_path / "of_files"))
    assert torch.equal(latents["plain"], latents["files"])
    # The factor shows in no shape: without a config it is the published one.
    assert frames["plain"].shape == frames["files"].shape
    assert "its name is taken to mean demo_t2v" in said and "taken for a transformer demo_t2v of" in said
    recorded = config(tmp_path / "of_files")
    assert (recorded["model_path"], recorded["transformer_version"]) == (str(files), "demo_t2v")
    planned = stage(1, tmp_path / "said", "--model_path", files, "--dry_run")
    assert "taken for a transformer demo_t2v of" in planned


def test_one_transformers_file_as_the_model_of_all_stages(tiny_official, official, tmp_path):
    path = save(tmp_path / "some.safetensors", official["demo_t2v"])
    parts.copy_small(tiny_official, tmp_path, "text_encoder/llm")
    text = save(tmp_path / "qwen.safetensors", parts.text(tiny_official))
    folder = tmp_path / "out"
    asked = ("--model_path", path, "--transformer_version", "demo_t2v", "--prompt", "a cat", "--output_dir", folder)
    stage(1, tmp_path / "said", *asked, "--text_encoder", text)
    said = stage(2, tmp_path / "said", "--input_dir", folder, "--video_length", 5, "--num_inference_steps", 2)
    assert "is taken to mean" not in said, "stage 1 recorded it"
    plain = tmp_path / "plain"
    stage(1, tmp_path / "said", "--model_path", tiny_official, "--prompt", "a cat", "--output_dir", plain)
    stage(2, tmp_path / "said", "--input_dir", plain, "--video_length", 5, "--num_inference_steps", 2)
    assert torch.equal(load_latents(folder)[0], load_latents(plain)[0])
    status, said = run_stage(3, "--input_dir", folder, said=tmp_path / "said")
    assert status == 2 and f"{path} is a transformer alone; give --vae FILE" in said


def test_what_is_refused_in_one_line(tiny_official, official, tmp_path):
    path = save(tmp_path / "some_demo_t2v.safetensors", official["demo_t2v"])
    twice = parts.write_files(tiny_official, tmp_path / "twice", official["demo_t2v"])
    save(twice / "more.safetensors", parts.text(tiny_official))
    save(twice / "style.safetensors", {"a.lora_A.weight": torch.ones(2, 2)})
    for args, message in (
        (("--model_path", path), f"{path} is a transformer alone; give --text_encoder FILE"),
        (
            ("--model_path", twice),
            "two files for the text encoder, more.safetensors and qwen.safetensors; name one by --t",
        ),
        (("--model_path", tiny_official, "--vae", tmp_path / "none"), f"--vae {tmp_path / 'none'} does not exist"),
        (
            ("--model_path", tiny_official, "--vae", tmp_path),
            f"--vae {tmp_path} is a folder; read is one file: safetensors in f",
        ),
        (("--model_path", tiny_official, "--vae", ""), "--vae is empty"),
        (("--model_path", tiny_official, "--text_encoder", path), "is a transformer; allowed is a text encoder"),
        (("--model_path", path, "--transformer_version", "odd"), "transformer version 'odd' is not of the form"),
        (
            ("--model_path", path, "--text_encoder", twice / "more.safetensors", "--resolution", "720p"),
            f"--resolution 720p: {path} holds demo_t2v",
        ),
    ):
        status, said = run_stage(1, *args, "--output_dir", tmp_path / "out", said=tmp_path / "said")
        last = said.strip().splitlines()[-1]
        assert status == 2 and message in last, said
        assert not (tmp_path / "out" / "stage1_embeddings.safetensors").exists()
