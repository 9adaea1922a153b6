"""`python -m hunyuan_staged.verify`: the demo passes; what is absent, broken, not as published or wrong in ours fails."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file

from hunyuan_staged.demo.tiny import draw_checkpoint
from hunyuan_staged.verify import checks, published, second_reading, transformer, vae
from hunyuan_staged.verify.command import main
from hunyuan_staged.verify.hashes import check_hashes, known_hash
from hunyuan_staged.verify.run import Verification, chosen_versions
from hunyuan_staged.weights import components
from hunyuan_staged.weights.folder import open_model
from hunyuan_staged.weights.key_maps import TRANSFORMER_MAP, VAE_MAP

CPU = torch.device("cpu")


def verified(folder: Path, capsys, *flags: str) -> tuple[int, dict, str]:
    """(status, the JSON, the table) of a run."""
    status = main(["--model_path", str(folder), "--device", "cpu", *flags])
    lines = capsys.readouterr().out.splitlines()
    return status, json.loads(lines[-1]), "\n".join(lines[:-1])


def failures(result: dict) -> dict[str, str]:
    return {f"{check['part']}: {check['what']}": check["note"] for check in result["checks"] if not check["ok"]}


@pytest.fixture
def copy(tiny_official, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_official, folder)
    return folder


def edit_weights(path: Path, name: str, change) -> None:
    tensors = load_file(path)
    tensors[name] = change(tensors[name])
    save_file(tensors, path)


def test_the_demo_passes_as_a_user_calls_it(tmp_path):
    """All parts of image to video, in one command, from a folder of its own."""
    words = ["--version", "demo_i2v", "--device", "cpu", "--json", "result.json", "--report", "report.md"]
    command = [sys.executable, "-m", "hunyuan_staged.verify", *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["ok"] and result["versions"] == ["demo_i2v"] and result["dtype"] == "torch.float32"
    measured = {f"{one['part']}: {one['what']}": one["value"] for one in result["checks"] if one["value"] is not None}
    assert list(measured) == [
        "text: embeddings, conditional",
        "text: embeddings, unconditional",
        "glyph: embeddings",
        "image: features",
        "vae decoder: a clip",
        "vae encoder: a clip",
        "transformer demo_i2v: forward, conditional, torch",
        "transformer demo_i2v: forward, unconditional, torch",
        "attention: torch",
    ]
    assert max(measured.values()) < 1e-5
    table = run.stdout.splitlines()
    assert table[0].split() == ["part", "check", "error", "bound", "why,", "or", "what", "was", "found"]
    assert len(table) == 1 + len(result["checks"]) and all("  ok  " in line for line in table[1:])
    report = (tmp_path / "report.md").read_text()
    assert table[1] in report and f"torch: {torch.__version__}" in report
    assert "transformer/demo_i2v/config.json" in report and str(ROOT) not in report


def test_diffusers_layout_in_bf16_passes(tiny_diffusers):
    """bf16 as on a GPU: what diffusers wants in the weights' dtype is given so."""
    folder = open_model(tiny_diffusers, ["text"])
    found = list(Verification(folder, chosen_versions(folder, None), CPU, torch.bfloat16).checks())
    assert [check for check in found if not check.ok] == []
    errors = {check.part: check.value for check in found if check.value is not None}
    assert 1e-4 < errors["transformer demo_t2v"] < 3e-2 and "image" not in errors


def test_in_half_precision_float32_is_the_measure():
    """Ours may be twice as far from it as the published class, and a float32 result 1e-4 as ever."""
    precise = torch.ones(4)
    for ours, theirs, ok in ((1.5, 1.25, True), (1.625, 1.25, False), (1.0, 1.25, True)):
        found = checks.within_rounding("a", "b", (precise * ours).half(), (precise * theirs).half(), precise)
        assert (found.ok, found.bound) == (ok, 0.5)
    assert checks.within_rounding("a", "b", precise * 1.00005, precise, precise).ok
    assert not checks.within_rounding("a", "b", precise * 1.0002, precise, precise).ok


@pytest.mark.gpu
def test_the_demo_passes_on_a_gpu(capsys):
    assert main(["--device", "cuda"]) == 0
    assert "FAIL" not in capsys.readouterr().out


def test_a_part_that_is_absent_fails_with_the_command_that_gets_it(copy, capsys):
    shutil.rmtree(copy / "text_encoder" / "byt5-small")
    status, result, table = verified(copy, capsys, "--version", "demo_t2v")
    assert status == 1 and not result["ok"]
    path = copy / "text_encoder" / "byt5-small"
    assert failures(result) == {
        "glyph: can be read": f"{copy} has no glyph encoder (text_encoder/byt5-small); get it: "
        f"hf download google/byt5-small --local-dir {path}",
        "transformer demo_t2v: can be read": "not run: it needs what glyph would have given",
    }
    assert "FAIL" in table


def test_weights_that_are_no_numbers_or_of_another_dtype_or_shape_are_named(copy, capsys):
    vae = copy / "vae" / "diffusion_pytorch_model.safetensors"
    edit_weights(vae, "decoder.conv_in.conv.bias", lambda x: x.fill_(torch.nan))
    image = copy / "vision_encoder" / "siglip" / "image_encoder" / "model.safetensors"
    name = next(name for name in load_file(image) if name.endswith("position_embedding.weight"))
    edit_weights(image, name, lambda x: x.double())
    text = next((copy / "text_encoder" / "llm").glob("*.safetensors"))
    name = next(name for name in load_file(text) if name.endswith("layers.0.input_layernorm.weight"))
    edit_weights(text, name, lambda x: x[:-1].clone())
    status, result, _ = verified(copy, capsys, "--version", "demo_i2v")
    found = failures(result)
    assert status == 1
    assert found["vae: can be read"].endswith("vae holds NaN or Inf, in torch.float32, in: conv_in.conv.bias")
    assert "1 tensors F64" in found["image: dtypes"]
    assert "layers.0.input_layernorm.weight has shape" in found["text: can be read"]


def test_another_model_under_a_published_name_is_told_by_its_numbers(tmp_path):
    draw_checkpoint(tmp_path / "model", layout="official", versions=("480p_i2v",))
    folder = open_model(tmp_path / "model", ["text"])
    found = {}
    for part in ("text", "glyph", "image", "vae", "transformer"):
        about = published.files_of(folder, part, "480p_i2v")
        assert [check.what for check in about] == ["published config", "dtypes"][: 1 if part == "glyph" else 2]
        assert not about[0].ok and all(check.ok for check in about[1:])
        found[part] = about[0].note
    assert found["transformer"].startswith("num_layers is 3, not 54; num_attention_heads is 3, not 16; ")
    assert found["vae"].startswith("block_out_channels is ") and "scaling_factor" not in found["vae"]
    assert found["glyph"] == "d_model is 64, not 1472"
    assert "in_channels" not in found["transformer"] and "use_meanflow" not in found["transformer"]
    right = published.numbers("glyph", {"d_model": 1472, "d_kv": 64}, published.GLYPH)
    assert right.ok and right.note == "d_model 1472"


def test_a_mistake_in_our_forward_is_seen(tiny_official, capsys, monkeypatch):
    """Rows and columns of the positions swapped: the shapes agree, the numbers must not."""
    from hunyuan_staged.models import transformer as model

    right = model.rope_table
    monkeypatch.setattr(model, "rope_table", lambda x, frames, rows, columns: right(x, frames, columns, rows))
    status, result, _ = verified(tiny_official, capsys, "--version", "demo_t2v")
    assert status == 1
    branches = ("conditional", "unconditional")
    assert set(failures(result)) == {f"transformer demo_t2v: forward, {branch}, torch" for branch in branches}


@pytest.mark.parametrize(("one", "other"), [("conv1", "conv2"), ("norm1", "norm2")])
def test_a_wrong_name_of_the_vae_is_seen(tiny_official, capsys, monkeypatch, one, other):
    """The reference held our tensors, so that what our table of names mixed up was mixed up in both."""
    swapped = {one: other, other: one}

    def wrong(rule):
        last = rule.official.rpartition(".block.#.")[2].split(".")[0]
        if not rule.official.startswith("decoder.up") or last not in swapped:
            return rule
        return replace(rule, diffusers=tuple(name.replace(last, swapped[last]) for name in rule.diffusers))

    monkeypatch.setattr(components, "VAE_MAP", tuple(map(wrong, components.VAE_MAP)))
    found = vae.check_vae(open_model(tiny_official, ["vae"]), CPU)
    told = {check.part: check for check in found if check.value is not None}
    assert not told["vae decoder"].ok and told["vae decoder"].value > 1e-2
    assert told["vae encoder"].ok


def test_a_wrong_name_of_the_transformer_is_seen(tiny_official, tiny_diffusers, monkeypatch):
    def misplaced(path) -> tuple[int, list[str]]:
        folder = open_model(path, ["transformer"])
        model = components.load_transformer(folder, "demo_t2v", device=CPU, dtype=torch.bfloat16)
        return second_reading.misplaced(folder, "demo_t2v", model)

    count, wrong = misplaced(tiny_official)
    assert count > 150 and wrong == [] and misplaced(tiny_diffusers) == (count, [])

    def swapped(rule):
        ends = {"img_attn_q": "attn.to_k", "img_attn_k": "attn.to_q"}
        end = next((end for start, end in ends.items() if rule.official == f"double_blocks.#.{start}"), None)
        return replace(rule, diffusers=(f"transformer_blocks.#.{end}",)) if end else rule

    monkeypatch.setattr(components, "TRANSFORMER_MAP", tuple(map(swapped, components.TRANSFORMER_MAP)))
    expected = {f"transformer_blocks.{i}.attn.to_{x}.{y}" for i in range(3) for x in "qk" for y in ("weight", "bias")}
    assert set(misplaced(tiny_official)[1]) == expected


def test_both_tables_of_names_agree_on_every_tensor():
    """Also on those of meanflow and of more blocks than the tiny model has."""
    for rules, words in ((VAE_MAP, second_reading.VAE_WORDS), (TRANSFORMER_MAP, second_reading.TRANSFORMER_WORDS)):
        for rule in rules:
            for leaf in ("weight", "bias", "gamma"):
                name = f"{rule.official.replace('#', '3')}.{leaf}"
                if second_reading.FUSED in name:
                    own = [part[0] for part in second_reading._parts(name, 3, True)]
                else:
                    own = [second_reading.renamed(name, words)]
                assert own == [f"{target.replace('#', '3')}.{leaf}" for target in rule.diffusers]


def test_a_file_that_is_not_the_one_that_was_downloaded_is_seen(copy, capsys):
    """huggingface_hub notes the hub's hash of each file; one byte of a config is changed, and one of the weights."""
    notes = copy / "vae" / ".cache" / "huggingface" / "download"
    notes.mkdir(parents=True)
    weights, config = copy / "vae" / "diffusion_pytorch_model.safetensors", copy / "vae" / "config.json"
    etags = {weights: hashlib.sha256(weights.read_bytes()).hexdigest()}
    etags[config] = hashlib.sha1(b"blob %d\0" % config.stat().st_size + config.read_bytes()).hexdigest()
    for path, etag in etags.items():
        (notes / f"{path.name}.metadata").write_text(f"{'a' * 40}\n{etag}\n1700000000.0\n")
    check = check_hashes("vae", [copy / "vae"], copy)
    assert check == [checks.Check("vae", "hashes", True, "2 of 2 files have a known hash")]
    config.write_text(config.read_text().replace("256", "257"))
    assert check_hashes("vae", [copy / "vae"], copy)[0].note.startswith("vae/config.json: not the file that was down")
    edit_weights(weights, "decoder.conv_in.conv.bias", lambda x: x + 1)
    (failed,) = check_hashes("vae", [copy / "vae"], copy)
    assert not failed.ok
    assert failed.note == "vae/config.json and 1 more: not the file that was downloaded; fetch it again"
    (notes / "config.json.metadata").write_text("junk")
    assert known_hash(config, copy) is None and known_hash(weights, copy) == etags[weights]
    assert check_hashes("text", [copy / "text_encoder"], copy) == []


def test_the_hubs_own_cache_names_files_by_their_hash(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "a" / "vae"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    etag = hashlib.sha256(b"weights").hexdigest()
    (blobs / etag).write_bytes(b"weights")
    (snapshot / "model.safetensors").symlink_to(blobs / etag)
    root = tmp_path / "snapshots" / "a"
    assert check_hashes("vae", [snapshot], root)[0].ok
    (blobs / etag).write_bytes(b"Weights")
    assert not check_hashes("vae", [snapshot], root)[0].ok


def test_a_kernel_that_is_not_exact_is_seen(monkeypatch):
    from hunyuan_staged.attention.choose import AttentionMode

    def wrong(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)  # heads taken for tokens

    choice = AttentionMode("torch", "", lambda grid: wrong)
    monkeypatch.setattr(transformer, "choose_attention", lambda *_, **__: choice)
    assert not transformer.check_attention(CPU, torch.float32, 4, 32).ok


def test_errors_are_relative_and_nan_is_never_within_a_bound():
    ones = torch.ones(4)
    assert checks.relative_error(ones * 1.5, ones) == 0.5
    assert checks.relative_error(ones, torch.ones(5)) == float("inf")
    assert not checks.compared("a", "b", ones * torch.nan, ones, checks.FLOAT32).ok


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--version", "720p_t2v"], "--version 720p_t2v is not in MODEL; it holds demo_i2v, demo_t2v"),
        (["--device", "cuda"], "--device cuda: there is no GPU that torch can use"),
        (
            ["--report", "MODEL/vae/config.json/report"],
            "--report MODEL/vae/config.json: MODEL/vae/config.json is not a folder",
        ),
    ],
)
def test_bad_flags_are_one_line(tiny_official, capsys, flags, said):
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    words = [word.replace("MODEL", str(tiny_official)) for word in flags]
    assert main(["--model_path", str(tiny_official), *words]) == 2
    assert capsys.readouterr().err == f"error: {said.replace('MODEL', str(tiny_official))}\n"
