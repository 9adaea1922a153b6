"""A drawn file is of the format that was asked for, with weights of the usual size, and stage 2's step is timed with it."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file

from hunyuan_staged.bench import command, single_file
from hunyuan_staged.demo import tiny
from hunyuan_staged.errors import InputError
from hunyuan_staged.versions import parse_version
from hunyuan_staged.weights import components
from hunyuan_staged.weights.single_file import open_transformer

CPU = torch.device("cpu")


def drawn(path, form):
    args = command.build_parser().parse_args(
        ["file", str(path), "--format", form, "--size", "tiny", "--version", "demo_t2v"]
    )
    result = args.run(args)
    assert result["format"] == form and result["file"] == str(path)
    return open_transformer(path, lambda meanflow: parse_version("demo_t2v"))


def loaded(opened) -> dict[str, torch.Tensor]:
    return components.load_transformer(opened, "demo_t2v", device=CPU, dtype=torch.float32).state_dict()


def usual(weight: torch.Tensor) -> bool:
    return float(weight.std() * weight.shape[1] ** 0.5) == pytest.approx(0.7, rel=0.03) and abs(weight.mean()) < 2e-3


@pytest.mark.parametrize("form", single_file.SAFETENSORS)
def test_safetensors(tmp_path, form):
    opened = drawn(tmp_path / "any.safetensors", form)
    tensors = load_file(opened.path)
    assert ("double_blocks.0.img_attn_qkv.weight" in tensors) == (form in ("fused", "fp8_tensor"))
    scale = tensors.get("double_blocks.0.img_mlp.fc1.weight_scale")
    rows = len(tensors["double_blocks.0.img_mlp.fc1.weight"])
    assert (None if scale is None else list(scale.shape)) == {"fp8": [rows, 1], "fp8_tensor": []}.get(form)
    state = loaded(opened)
    assert all(usual(state[f"transformer_blocks.0.{name}.weight"]) for name in ("attn.to_q", "ff.net.2"))


@pytest.mark.parametrize("form", single_file.GGUF)
def test_gguf(tmp_path, monkeypatch, form):
    """A mixed one is not of the same types in all blocks."""
    monkeypatch.setattr(tiny, "TINY", tiny.Sizes(transformer_heads=8, transformer_layers=4))
    opened = drawn(tmp_path / "any.gguf", form)
    kinds = [
        [opened.header.dtypes[f"double_blocks.{block}.{name}.weight"] for name in ("img_mlp.fc2", "img_mlp.fc1")]
        for block in range(4)
    ]
    usually, more = single_file.MIXED.get(form, (form, form))
    assert kinds == [[usually, usually], [usually, usually], [more, usually], [more, usually]]
    state = loaded(opened)
    assert all(usual(state[f"transformer_blocks.3.{name}.weight"]) for name in ("attn.to_q", "ff.net.2"))


def test_what_cannot_be_drawn(tmp_path):
    with pytest.raises(
        InputError, match=r"double_blocks.0.img_mod.linear.weight \[576, 96\]: rows are no whole blocks"
    ):
        drawn(tmp_path / "any.gguf", "Q4_K")
    (tmp_path / "any").touch()
    with pytest.raises(InputError, match=f"^{tmp_path}/any exists already; remove it or name another file$"):
        drawn(tmp_path / "any", "fp8")
    assert [path.name for path in tmp_path.iterdir()] == ["any"]


def test_a_step_with_it_is_timed(tmp_path, monkeypatch, capsys):
    path = drawn(tmp_path / "any.safetensors", "fp8").path
    words = ["--resolution", "480p", "--video_length", "1", "--steps", "1", "--warmup", "0"]
    words += ["--offload_blocks", "1"]
    monkeypatch.setattr(sys, "argv", ["bench", "stage2", "--transformer", str(path), *words])
    assert command.main() == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["transformer"].startswith("any.safetensors: taken for a transformer 480p_t2v of 3 blocks, ")
    assert result["layers"] == 3 and result["offloaded"] == 1 and result["weights_dtype"] == "the file's"
    assert result["load_seconds"] >= 0 and result["step_seconds"] > 0
    monkeypatch.setattr(sys, "argv", ["bench", "stage2", "--transformer", str(path), "--layers", "2"])
    assert command.main() == 2
    assert capsys.readouterr().err == "error: --transformer takes neither --super_resolution nor --layers\n"
