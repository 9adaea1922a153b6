"""A drawn checkpoint of full size is what the published configs describe; a tiny one is read by the loaders."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hunyuan_staged.bench import checkpoint
from hunyuan_staged.demo import tiny
from hunyuan_staged.demo.checkpoint_writer import any_version
from hunyuan_staged.errors import InputError
from hunyuan_staged.weights import components, encoder_configs
from hunyuan_staged.weights.folder import ModelFolder
from hunyuan_staged.weights.part_tensors import part_content
from hunyuan_staged.weights.published import PublishedModel, published_language_config

CPU = torch.device("cpu")


def asked(folder: Path, **changes: object) -> argparse.Namespace:
    return argparse.Namespace(
        **{"folder": folder, "dtype": "bfloat16", "parts": checkpoint.PARTS, "version": "demo_t2v", "size": "tiny"}
        | changes
    )


def test_the_full_size_is_the_published_one(tmp_path):
    parts = checkpoint.parts_of(checkpoint.PARTS, "full", any_version("720p_t2v"), "720p_t2v")
    sizes = {part.folder: sum(tensor.numel() for tensor in part.tensors.values()) for part in parts}
    assert sizes == {
        "transformer/720p_t2v": 8_326_608_160,
        "text_encoder/llm": 7_070_619_136,
        "text_encoder/Glyph-SDXL-v2": 217_669_248,
        "vae": 1_260_634_115,
    }
    for part in parts:
        (tmp_path / part.folder).mkdir(parents=True)
        part.finish(tmp_path / part.folder)
    model = ModelFolder(tmp_path, "official")
    published = PublishedModel(tmp_path, "official", offered=("720p_t2v",), missing="")
    own, theirs = components.transformer_config(model, "720p_t2v"), published.transformer_config("720p_t2v")
    assert {name: theirs[name] for name in own} == own
    language = encoder_configs.language_config(*part_content(model, "text"))[0]
    expected = published_language_config()
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_key_value_heads", "vocab_size"):
        assert getattr(language, name) == getattr(expected, name)
    glyphs = encoder_configs.glyph_config(*part_content(model, "glyph"))
    assert (glyphs.d_model, glyphs.d_kv, glyphs.d_ff, glyphs.num_layers, glyphs.num_heads) == (1472, 64, 3584, 12, 6)


def test_what_is_drawn(tmp_path, monkeypatch):
    """In shards, each tensor of its own, around 1 where it scales a norm; and the same from one seed."""
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 8_000_000)
    result = checkpoint.draw_checkpoint(asked(tmp_path / "a", parts=("transformer", "vae")))
    assert result["dtype"] == "bfloat16" and result["parts"] == ["transformer", "vae"]
    folder = tmp_path / "a" / "transformer" / "demo_t2v"
    index = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) == 3
    tensors = {
        name: tensor for file in sorted(set(index.values())) for name, tensor in load_file(folder / file).items()
    }
    assert set(tensors) == set(index)
    assert all(tensor.dtype == torch.bfloat16 and tensor.isfinite().all() for tensor in tensors.values())
    assert tensors["byt5_in.layernorm.weight"].float().mean() == pytest.approx(1, abs=0.05)
    weight = tensors["byt5_in.fc2.weight"].float()
    assert weight.std() == pytest.approx(0.7 / weight.shape[1] ** 0.5, rel=0.02)
    assert not torch.equal(tensors["double_blocks.0.img_mlp.fc1.weight"], tensors["double_blocks.1.img_mlp.fc1.weight"])
    model = components.load_transformer(
        ModelFolder(tmp_path / "a", "official"), "demo_t2v", device=CPU, dtype=torch.bfloat16
    )
    assert torch.equal(model.transformer_blocks[1].ff.net[0].proj.weight, tensors["double_blocks.1.img_mlp.fc1.weight"])
    checkpoint.draw_checkpoint(asked(tmp_path / "b", parts=("transformer", "vae")))
    for file in folder.iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.relative_to(tmp_path / "a")).read_bytes()


def test_a_language_model_of_more_embeddings_than_tokens():
    sizes = replace(tiny.TINY, embeddings=640)
    assert tiny.qwen_config(sizes, tiny.train_tokenizer(sizes.vocab))["vocab_size"] == 640


def test_a_folder_with_something_in_it_is_refused(tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(InputError, match=f"^{tmp_path} exists already; remove it or name another folder$"):
        checkpoint.draw_checkpoint(asked(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_disk_that_is_too_small_is_refused(tmp_path):
    with pytest.raises(InputError, match=rf"^{tmp_path} has [0-9.]+ GB free; 1000000000\.0 GB are needed$"):
        checkpoint.require_space(tmp_path / "a" / "b", 10**18)
    assert not any(tmp_path.iterdir())


def test_versions_that_have_no_text_to_video_are_refused(tmp_path):
    with pytest.raises(
        InputError, match="--version 1080p_sr_distilled is of super resolution; allowed are those of t2v"
    ):
        checkpoint.draw_checkpoint(asked(tmp_path / "a", version="1080p_sr_distilled"))
