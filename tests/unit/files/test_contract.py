"""The contract between stages: what is written comes back, what breaks it is refused, writes are whole or absent."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hunyuan_staged.errors import InputError
from hunyuan_staged.files import atomic, contract, provenance
from hunyuan_staged.files.config import CONFIG_KEYS, read_config, update_config
from hunyuan_staged.files.tensors import (
    load_embeddings,
    load_frames,
    load_latents,
    save_embeddings,
    save_frames,
    save_latents,
)


def embeddings(dtype: torch.dtype = torch.float32, *, image: bool = False) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    tensors = {}
    for prefix in ("", "negative_"):
        for suffix, tokens, width in (("", 5, 8), ("_2", 3, 6)):
            tensors[f"{prefix}prompt_embeds{suffix}"] = torch.randn(1, tokens, width, generator=draw).to(dtype)
            tensors[f"{prefix}prompt_embeds_mask{suffix}"] = torch.ones(1, tokens, dtype=torch.int64)
    if image:
        tensors["image_embeds"] = torch.randn(1, 4, 7, generator=draw).to(dtype)
        tensors["image_latents"] = torch.randn(1, 32, 1, 2, 3, generator=draw).to(dtype)
    return tensors


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Tensors


@pytest.mark.parametrize("image", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_embeddings_come_back_as_they_were(tmp_path, dtype, image):
    written = embeddings(dtype, image=image)
    path = save_embeddings(tmp_path, written, {"prompt": "ein Bär", "version": "720p_t2v"})
    assert path == tmp_path / "stage1_embeddings.safetensors"
    read, metadata = load_embeddings(tmp_path)
    assert read.keys() == written.keys()
    assert all(read[name].dtype == written[name].dtype and torch.equal(read[name], written[name]) for name in written)
    assert metadata["prompt"] == "ein Bär"
    assert metadata["version"] == "720p_t2v"
    assert json.loads(metadata["dtype_info"])["prompt_embeds"] == str(dtype)


def test_tensors_that_share_memory_or_are_not_contiguous_are_written_whole(tmp_path):
    latents = torch.arange(2 * 3 * 4.0).reshape(1, 4, 1, 3, 2).transpose(3, 4)
    save_latents(tmp_path, latents, {})
    assert torch.equal(load_latents(tmp_path)[0], latents)


@pytest.mark.parametrize("spelling", ["bfloat16", "torch.bfloat16"])
def test_the_sibling_suites_bfloat16_in_float32_gets_its_dtype_back(tmp_path, spelling):
    stored = {name: tensor.float() for name, tensor in embeddings(torch.bfloat16).items() if "mask" not in name}
    masks = {name: tensor for name, tensor in embeddings().items() if "mask" in name}
    recorded = dict.fromkeys(stored, spelling) | dict.fromkeys(masks, "int64")
    save_file(stored | masks, tmp_path / contract.EMBEDDINGS_FILE, metadata={"dtype_info": json.dumps(recorded)})
    read, _ = load_embeddings(tmp_path)
    assert {name: tensor.dtype for name, tensor in read.items() if "mask" not in name} == dict.fromkeys(
        stored, torch.bfloat16
    )
    assert all(torch.equal(read[name], stored[name].bfloat16()) for name in stored)
    assert read["prompt_embeds_mask"].dtype == torch.int64


@pytest.mark.parametrize(
    ("recorded", "message"),
    [
        ('{"latents": "torch.bfloat61"}', "gives latents the dtype 'torch.bfloat61'; allowed are float64, float32,"),
        ('{"latents": "torch.nn"}', "gives latents the dtype 'torch.nn'; allowed are float64, float32,"),
        ('{"latents": "torch.quint8"}', "gives latents the dtype 'torch.quint8'; allowed are float64, float32,"),
        ('["bfloat16"]', "its dtype_info is not a JSON object of dtype names"),
        ('{"latents": 16}', "its dtype_info is not a JSON object of dtype names"),
        ("bfloat16", "its dtype_info is not a JSON object of dtype names"),
    ],
)
def test_a_dtype_info_that_says_nothing_is_refused(tmp_path, recorded, message):
    path = tmp_path / contract.LATENTS_FILE
    save_file({"latents": torch.zeros(1, 32, 1, 2, 2)}, path, metadata={"dtype_info": recorded})
    with pytest.raises(InputError, match=re.escape(str(path))) as refused:
        load_latents(tmp_path)
    assert message in str(refused.value)


def test_latents_of_the_sibling_suite_get_their_size_from_their_shape(tpu_folder):
    latents, metadata = load_latents(tpu_folder)
    assert latents.shape == (1, 32, 13, 45, 80)
    assert latents.dtype == torch.bfloat16
    assert (metadata["num_frames"], metadata["height"], metadata["width"]) == ("49", "720", "1280")
    assert metadata["seed"] == "42"
    config = read_config(tpu_folder)
    assert config["model_path"] == "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-720p_t2v"
    assert config.keys() == {"prompt", "negative_prompt", "model_path"}


def test_a_recorded_size_is_kept(tmp_path):
    save_latents(tmp_path, torch.zeros(1, 32, 3, 4, 5), {"height": "60"})
    metadata = load_latents(tmp_path)[1]
    assert (metadata["height"], metadata["width"], metadata["num_frames"]) == ("60", "80", "9")


def test_frames_come_back(tmp_path):
    frames = torch.rand(1, 3, 5, 4, 6, generator=torch.Generator().manual_seed(0))
    save_frames(tmp_path, frames, {"fps": "24"})
    read, metadata = load_frames(tmp_path)
    assert torch.equal(read, frames)
    assert metadata["fps"] == "24"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_embeds": None}, "lacks prompt_embeds"),
        ({"negative_prompt_embeds_mask_2": None}, "lacks negative_prompt_embeds_mask_2"),
        ({"prompt_embeds_3": (1, 2)}, "holds unknown tensors prompt_embeds_3; known: prompt_embeds,"),
        ({"prompt_embeds": (5, 8)}, "prompt_embeds has shape [5, 8]; allowed is [1, L, W]"),
        ({"prompt_embeds": (2, 5, 8)}, "prompt_embeds has shape [2, 5, 8]; allowed is [1, L, W]"),
        ({"prompt_embeds_mask": (1, 4)}, "prompt_embeds_mask has shape [1, 4]; allowed is [1, 5]"),
        (
            {"negative_prompt_embeds_2": (1, 3, 9)},
            "negative_prompt_embeds_2 has shape [1, 3, 9]; allowed is [1, 3, 6]",
        ),
        ({"prompt_embeds": (1, 0, 8)}, "prompt_embeds has shape [1, 0, 8]; allowed is [1, L, W]"),
        ({"image_latents": (1, 16, 1, 2, 3)}, "image_latents has shape [1, 16, 1, 2, 3]; allowed is [1, 32, 1, h, w]"),
        ({"image_latents": (1, 32, 2, 2, 3)}, "image_latents has shape [1, 32, 2, 2, 3]; allowed is [1, 32, 1, h, w]"),
    ],
)
def test_embeddings_that_break_the_contract_are_neither_written_nor_read(tmp_path, change, message):
    tensors = embeddings(image=True)
    for name, shape in change.items():
        tensors.pop(name, None)
        if shape is not None:
            tensors[name] = torch.zeros(shape)
    with pytest.raises(InputError) as refused:
        save_embeddings(tmp_path, tensors, {})
    assert message in str(refused.value)
    assert str(tmp_path / contract.EMBEDDINGS_FILE) in str(refused.value)
    assert names_in(tmp_path) == []
    save_file(tensors, tmp_path / contract.EMBEDDINGS_FILE)
    with pytest.raises(InputError, match=re.escape(message)):
        load_embeddings(tmp_path)


def test_frames_of_another_rank_are_refused(tmp_path):
    with pytest.raises(InputError, match=re.escape("frames has shape [1, 4, 5, 4, 6]; allowed is [1, 3, T, H, W]")):
        save_frames(tmp_path, torch.zeros(1, 4, 5, 4, 6), {})


@pytest.mark.parametrize(
    ("load", "stage"),
    [
        (load_embeddings, "stage1_text_encoder.py"),
        (load_latents, "stage2_transformer.py"),
        (load_frames, "stage3_vae_decoder.py --save_frames"),
        (read_config, "stage1_text_encoder.py"),
    ],
)
def test_what_is_absent_names_the_stage_that_writes_it(tmp_path, load, stage):
    with pytest.raises(InputError, match=rf"{re.escape(str(tmp_path))}/\S+ does not exist; run {stage} first"):
        load(tmp_path)
    with pytest.raises(InputError, match=rf"^{re.escape(str(tmp_path))}/none does not exist; run {stage} first"):
        load(tmp_path / "none")


@pytest.mark.parametrize("damage", ["cut short", "text", "empty"])
def test_a_damaged_file_is_refused(tmp_path, damage):
    path = save_latents(tmp_path, torch.zeros(1, 32, 1, 2, 2), {})
    whole = path.read_bytes()
    path.write_bytes({"cut short": whole[:-1], "text": b"not tensors at all", "empty": b""}[damage])
    with pytest.raises(InputError, match=rf"{re.escape(str(path))} is not a whole safetensors file \(.+\)"):
        load_latents(tmp_path)


# Whole or not at all


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "video.mp4"
    target.write_text("old")

    def fail() -> None:
        with atomic.replacing(target) as temporary:
            assert temporary.parent == tmp_path
            assert temporary.suffix == ".mp4"
            assert temporary != target
            temporary.write_text("half of the new")
            assert target.read_text() == "old", "a reader sees the old file until the new one is whole"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert target.read_text() == "old"
    assert names_in(tmp_path) == ["video.mp4"]


def test_a_write_replaces_the_file_and_makes_its_folder(tmp_path):
    target = tmp_path / "new" / "folder" / "a.json"
    for text in ("one", "two"):
        with atomic.replacing(target) as temporary:
            temporary.write_text(text)
        assert target.read_text() == text
        assert names_in(target.parent) == ["a.json"]


def test_a_written_file_has_the_mode_of_any_new_file(tmp_path):
    ordinary = tmp_path / "ordinary"
    ordinary.touch()
    with atomic.replacing(tmp_path / "a.json") as temporary:
        temporary.write_text("{}")
    assert (tmp_path / "a.json").stat().st_mode == ordinary.stat().st_mode, (
        "readable by others where the umask lets them"
    )


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=rf"cannot write to {re.escape(str(tmp_path))}/file/folder: "):
        save_latents(tmp_path / "file" / "folder", torch.zeros(1, 32, 1, 2, 2), {})


# The config


def test_each_stage_adds_its_keys_and_leaves_the_others(tmp_path):
    update_config(tmp_path, {"prompt": "ein Bär", "model_path": "/m", "dtype": "bf16"})
    update_config(tmp_path, {"seed": 1, "height": 720})
    update_config(tmp_path, {"output_video": "a.mp4"})
    assert read_config(tmp_path) == {
        "prompt": "ein Bär",
        "model_path": "/m",
        "dtype": "bf16",
        "seed": 1,
        "height": 720,
        "output_video": "a.mp4",
    }
    assert "ein Bär" in (tmp_path / contract.CONFIG_FILE).read_text(encoding="utf-8")


def test_a_stage_that_runs_again_drops_its_own_keys_only(tmp_path):
    update_config(tmp_path, {"prompt": "a", "image_path": "a.png"})
    update_config(tmp_path, {"seed": 1, "height": 720})
    update_config(tmp_path, {"seed": 2})
    assert read_config(tmp_path) == {"prompt": "a", "image_path": "a.png", "seed": 2}
    update_config(tmp_path, {"prompt": "b"})
    assert read_config(tmp_path) == {"prompt": "b", "seed": 2}


def test_a_stage_cannot_write_what_another_decides(tmp_path):
    update_config(tmp_path, {"prompt": "a"})
    with pytest.raises(AssertionError, match="no one stage decides"):
        update_config(tmp_path, {"seed": 1, "prompt": "b"})
    assert read_config(tmp_path) == {"prompt": "a"}


def test_no_two_stages_decide_the_same_key():
    keys = [name for names in CONFIG_KEYS.values() for name in names]
    assert len(keys) == len(set(keys))


def test_a_config_follows_into_another_folder(tmp_path):
    update_config(tmp_path / "in", {"prompt": "a"})
    update_config(tmp_path / "out", {"seed": 3}, source=tmp_path / "in")
    assert read_config(tmp_path / "out") == {"prompt": "a", "seed": 3}
    assert read_config(tmp_path / "in") == {"prompt": "a"}


def test_a_later_stage_needs_a_config_to_add_to(tmp_path):
    with pytest.raises(InputError, match=r"run stage1_text_encoder.py first"):
        update_config(tmp_path, {"seed": 1})
    assert names_in(tmp_path) == []


def test_the_sibling_suites_keys_are_read_and_kept_under_our_names(tmp_path):
    path = tmp_path / contract.CONFIG_FILE
    path.write_text(json.dumps({"model_id": "a/b", "num_frames": 49, "seed": 7}))
    assert read_config(tmp_path) == {"model_path": "a/b", "video_length": 49, "seed": 7}
    update_config(tmp_path, {"output_video": "v.mp4"})
    assert json.loads(path.read_text()) == {
        "model_path": "a/b",
        "video_length": 49,
        "seed": 7,
        "output_video": "v.mp4",
    }


def test_our_own_key_wins_over_the_sibling_suites(tmp_path):
    (tmp_path / contract.CONFIG_FILE).write_text('{"model_id": "a/b", "model_path": "/m"}')
    assert read_config(tmp_path) == {"model_path": "/m"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", r"is not JSON \(.+\)"),
        (b"\xff\xfe", r"is not JSON \(.+\)"),
        (b"[1]", "holds a JSON list, not an object"),
        (b"null", "holds a JSON NoneType, not an object"),
    ],
)
def test_a_broken_config_is_refused_and_left_as_it_is(tmp_path, text, message):
    path = tmp_path / contract.CONFIG_FILE
    path.write_bytes(text)
    for act in (lambda: read_config(tmp_path), lambda: update_config(tmp_path, {"prompt": "a"})):
        with pytest.raises(InputError, match=f"{re.escape(str(path))} {message}"):
            act()
    assert path.read_bytes() == text


def test_sha256_is_that_of_the_bytes(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"abc" * 100000)
    assert provenance.sha256(path) == hashlib.sha256(b"abc" * 100000).hexdigest()


def test_real_folder_takes_stage_3s_keys(tpu_folder, tmp_path):
    folder = tmp_path / "real"
    folder.mkdir()
    shutil.copyfile(tpu_folder / contract.CONFIG_FILE, folder / contract.CONFIG_FILE)
    update_config(folder, {"stage3_decode_time": 1.5, "output_video": "v.mp4"})
    config = read_config(folder)
    assert config["prompt"].startswith("A girl holding a paper")
    assert config["stage3_decode_time"] == 1.5
