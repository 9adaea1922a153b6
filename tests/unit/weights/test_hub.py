"""A hub id in the place of a folder: the wanted parts alone are downloaded."""

import json
import shutil
from types import SimpleNamespace

import pytest
from checkpoints import F32

from hunyuan_staged.errors import InputError
from hunyuan_staged.weights import components
from hunyuan_staged.weights.folder import open_model


@pytest.fixture
def hub(monkeypatch, tiny_official):
    """huggingface_hub with one repository, owner/model: the drawn checkpoint. Holds what was asked of it."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked = []

    def snapshot_download(repo, allow_patterns, revision, etag_timeout):
        asked.append((repo, sorted(allow_patterns), revision))
        if repo != "owner/model":
            raise LocalEntryNotFoundError("no connection\nand more")
        return str(tiny_official)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_of_a_hub_id_only_the_wanted_parts_are_downloaded(hub, tiny_official):
    model = open_model("owner/model", ("vae", "glyph"))
    wanted = [
        "*.json",
        "text_encoder/Glyph-SDXL-v2/*",
        "text_encoder/byt5-small/*",
        "text_encoder_2/*",
        "tokenizer_2/*",
    ]
    assert hub == [("owner/model", [*wanted, "vae/*"], None)]
    assert model.path == tiny_official
    components.load_vae_decoder(model, **F32)
    assert len(hub) == 1


def test_of_the_hubs_transformers_only_the_version_that_is_read_is_downloaded(hub, tiny_official):
    model = open_model("owner/model", ("transformer", "scheduler"))
    assert model.versions() == ["demo_i2v", "demo_t2v"]
    assert hub == [("owner/model", ["*.json", "scheduler/*"], None)]
    components.load_transformer(model, "demo_i2v", **F32)
    # From the same snapshot, whatever was pushed since.
    assert set(map(str, hub[1:])) == {str(("owner/model", ["transformer/demo_i2v/*"], tiny_official.name))}


def test_one_shape_costs_a_header_and_not_33_gb(hub, monkeypatch, tiny_official, tmp_path):
    """Stage 1 needs the glyph encoder's width, which no official config names."""
    import huggingface_hub

    snapshot = tmp_path / "snapshot"
    shutil.copytree(tiny_official, snapshot, ignore=shutil.ignore_patterns("*.safetensors*"))
    ours = "transformer/demo_t2v"
    index = {"weight_map": {"byt5_in.fc1.weight": "part-2.safetensors", "img_in.proj.weight": "part-1.safetensors"}}
    (snapshot / ours / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda repo, allow_patterns, **_: hub.append(allow_patterns) or snapshot
    )
    asked = []

    def headers(repo, file, revision):
        asked.append((repo, file, revision))
        return SimpleNamespace(tensors={"byt5_in.fc1.weight": SimpleNamespace(shape=[2048, 77])})

    monkeypatch.setattr(huggingface_hub, "parse_safetensors_file_metadata", headers)
    model = open_model("owner/model", ("text", "transformer"))
    assert components.transformer_config(model, "demo_t2v")["text_embed_2_dim"] == 77
    assert asked == [("owner/model", f"{ours}/part-2.safetensors", "snapshot")]
    assert [pattern for patterns in hub for pattern in patterns if pattern.startswith("transformer")] == []


def test_a_hub_that_does_not_answer_is_one_line(hub):
    with pytest.raises(InputError) as refused:
        open_model("owner/none", ("vae",))
    assert str(refused.value) == (
        "owner/none is no folder here, and the hub did not give it (no connection); to have it in a folder: hf download "
        'tencent/HunyuanVideo-1.5 --include "transformer/720p_t2v/*" "vae/*" "scheduler/*" --local-dir DIR'
    )
