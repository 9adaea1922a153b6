"""The drawn checkpoint: both layouts, the published names, the same bytes for a seed, whole or not at all."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from hunyuan_staged.demo import checkpoint_writer, tiny
from hunyuan_staged.errors import InputError
from hunyuan_staged.weights import components, encoder_components
from hunyuan_staged.weights.folder import open_model

CPU = torch.device("cpu")
SMALL = tiny.Sizes(transformer_heads=1, transformer_layers=1, vocab=300)


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_official_layout_has_the_published_files(tiny_official):
    assert list(digests(tiny_official)) == sorted(
        [
            "scheduler/scheduler_config.json",
            "text_encoder/Glyph-SDXL-v2/assets/color_idx.json",
            "text_encoder/Glyph-SDXL-v2/assets/multilingual_10-lang_idx.json",
            "text_encoder/Glyph-SDXL-v2/checkpoints/byt5_model.pt",
            "text_encoder/byt5-small/config.json",
            "text_encoder/byt5-small/special_tokens_map.json",
            "text_encoder/byt5-small/tokenizer_config.json",
            "text_encoder/llm/config.json",
            "text_encoder/llm/model-00001-of-00002.safetensors",
            "text_encoder/llm/model-00002-of-00002.safetensors",
            "text_encoder/llm/model.safetensors.index.json",
            "text_encoder/llm/tokenizer.json",
            "text_encoder/llm/tokenizer_config.json",
            "transformer/demo_i2v/config.json",
            "transformer/demo_i2v/diffusion_pytorch_model.safetensors",
            "transformer/demo_t2v/config.json",
            "transformer/demo_t2v/diffusion_pytorch_model.safetensors",
            "vae/config.json",
            "vae/diffusion_pytorch_model.safetensors",
            "vision_encoder/siglip/feature_extractor/preprocessor_config.json",
            "vision_encoder/siglip/image_encoder/config.json",
            "vision_encoder/siglip/image_encoder/model.safetensors",
        ],
        key=lambda name: Path(name).parts,
    )


def test_official_tensors_and_configs_have_the_published_names(tiny_official, golden_folder):
    """The golden state dicts have as many blocks and layers as the drawn ones, so the names are the same set."""
    golden = golden_folder
    for path, shapes in (("transformer/demo_t2v", "dit_shapes"), ("vae", "vae_shapes")):
        drawn = tensors_of(tiny_official / path / "diffusion_pytorch_model.safetensors")
        expected = json.loads((golden / f"{shapes}.json").read_text())
        assert set(drawn) == set(expected)
        assert all(len(expected[name]) == drawn[name].ndim for name in expected)
    for path, example in (("transformer/demo_t2v", "dit_t2v"), ("vae", "vae_5x7")):
        with safe_open(golden / f"{example}.safetensors", "pt") as file:
            official = json.loads(file.metadata()["config"])
        config = json.loads((tiny_official / path / "config.json").read_text())
        assert config.keys() - {"_class_name"} == official.keys()
        assert {name for name in official if type(official[name]) is not type(config[name])} == set()


def test_qwen_has_its_old_key_names_and_what_stage_1_must_not_read(tiny_official):
    folder = tiny_official / "text_encoder" / "llm"
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    names = set()
    for file in set(index.values()):
        shard = set(tensors_of(folder / file))
        assert shard == {name for name, home in index.items() if home == file}
        names |= shard
    assert {"model.embed_tokens.weight", "model.layers.3.mlp.up_proj.weight", "model.norm.weight"} <= names
    assert {"lm_head.weight", "visual.patch_embed.proj.weight"} <= names
    assert {name.split(".")[0] for name in names} == {"model", "visual", "lm_head"}


def test_glyph_weights_carry_the_published_prefix(tiny_official):
    path = tiny_official / "text_encoder" / "Glyph-SDXL-v2" / "checkpoints" / "byt5_model.pt"
    content = torch.load(path, weights_only=True)
    assert list(content) == ["state_dict"]
    assert all(name.startswith("module.text_tower.encoder.") for name in content["state_dict"])
    assert content["state_dict"]["module.text_tower.encoder.embed_tokens.weight"].shape == (392, tiny.TINY.glyph_width)


def test_both_layouts_hold_the_drawn_weights_bit_for_bit(tiny_official, tiny_diffusers):
    modules = tiny.build_modules(versions=("demo_t2v",))
    loaders = {
        "transformer": lambda model: components.load_transformer(model, "demo_t2v", device=CPU, dtype=torch.float32),
        "decoder": lambda model: components.load_vae_decoder(model, device=CPU, dtype=torch.float32)[0],
        "encoder": lambda model: components.load_vae_encoder(model, device=CPU, dtype=torch.float32)[0],
        "image": lambda model: encoder_components.load_image_encoder(model, device=CPU, dtype=torch.float32)[1],
        "language": lambda model: encoder_components.load_language_model(model, device=CPU, dtype=torch.float32)[1],
    }
    built = {
        "transformer": modules.transformers["demo_t2v"],
        "decoder": modules.vae.decoder,
        "encoder": modules.vae.encoder,
        "image": modules.image_encoder,
        "language": modules.language_model,
    }
    folders = [open_model(folder, ()) for folder in (tiny_official, tiny_diffusers)]
    assert [folder.layout for folder in folders] == list(tiny.LAYOUTS)
    for part, load in loaders.items():
        expected = dict(built[part].named_parameters())
        for folder in folders:
            loaded = dict(load(folder).named_parameters())
            if part == "language":  # two layers and the norm are not loaded
                assert set(expected) - set(loaded) == {
                    name for name in expected if name.startswith(("layers.2.", "layers.3.")) or name == "norm.weight"
                }
            else:
                assert set(loaded) == set(expected)
            assert all(torch.equal(loaded[name], expected[name]) for name in loaded)


def test_glyph_encoders_of_both_layouts_give_the_same_bits(tiny_official, tiny_diffusers):
    outputs = []
    for folder in (tiny_official, tiny_diffusers):
        tokenizer, model = encoder_components.load_glyph_encoder(
            open_model(folder, ("glyph",)), device=CPU, dtype=torch.float32
        )
        ids = tokenizer('<color-1><en-font-1>Text "AB". ', return_tensors="pt")["input_ids"]
        assert ids[0, :2].tolist() == [385, 389]
        outputs.append(model(input_ids=ids).last_hidden_state)
    assert torch.equal(*outputs)


def test_diffusers_opens_its_layout_as_a_pipeline(tiny_diffusers):
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(tiny_diffusers)
    assert type(pipeline).__name__ == "HunyuanVideo15Pipeline"
    assert pipeline.scheduler.config.shift == 5.0
    assert pipeline.guider.guidance_scale == 6.0
    assert pipeline.transformer.config.target_size == 128
    assert pipeline.tokenizer("<|im_start|>")["input_ids"] == [513]


def test_a_seed_decides_every_byte(tmp_path):
    first, again, other = (
        tiny.draw_checkpoint(tmp_path / name, seed=seed, sizes=SMALL, versions=("demo_t2v",))
        for name, seed in (("first", 3), ("again", 3), ("other", 4))
    )
    assert digests(first) == digests(again)
    changed = {name for name, digest in digests(first).items() if digests(other)[name] != digest}
    assert changed == {name for name in digests(first) if name.endswith((".safetensors", ".pt"))}


def test_drawing_leaves_the_global_random_state_alone():
    torch.manual_seed(7)
    expected = torch.randn(3)
    torch.manual_seed(7)
    tiny.build_modules(SMALL, versions=())
    assert torch.equal(torch.randn(3), expected)


def test_versions_sizes_and_dtype_are_honoured(tmp_path):
    names = ("demo_i2v_step_distilled", "480p_t2v_distilled")
    folder = tiny.draw_checkpoint(tmp_path / "model", sizes=SMALL, versions=names, dtype=torch.bfloat16)
    assert sorted(path.name for path in (folder / "transformer").iterdir()) == sorted(names)
    meanflow, plain = (
        tensors_of(folder / "transformer" / name / "diffusion_pytorch_model.safetensors") for name in names
    )
    assert {name for name in meanflow if name not in plain} == {
        f"time_r_in.mlp.{layer}.{leaf}" for layer in (0, 2) for leaf in ("weight", "bias")
    }
    assert meanflow["img_in.proj.weight"].shape == (32, 65, 1, 1, 1)
    assert {tensor.dtype for tensor in meanflow.values()} == {torch.bfloat16}
    config = json.loads((folder / "transformer" / names[0] / "config.json").read_text())
    assert (config["ideal_resolution"], config["ideal_task"], config["use_meanflow"]) == ("demo", "i2v", True)


def test_values_stay_sane_through_the_vae():
    vae = tiny.build_modules(SMALL, versions=()).vae
    with torch.no_grad():
        frames = vae.decoder(torch.randn(1, 32, 2, 3, 4, generator=torch.Generator().manual_seed(0)))
    assert frames.shape == (1, 3, 5, 48, 64)
    assert 0.1 < frames.std() < 3


def test_half_a_checkpoint_is_never_left_behind(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint_writer, "save_official_vae", fail)
    with pytest.raises(OSError, match="disk full"):
        tiny.draw_checkpoint(tmp_path / "model", sizes=SMALL, versions=("demo_t2v",))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_something_in_it_is_not_touched(tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(InputError, match=f"{tmp_path} exists already; remove it or name another folder"):
        tiny.draw_checkpoint(tmp_path, sizes=SMALL, versions=("demo_t2v",))
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]


def test_an_unknown_layout_is_refused(tmp_path):
    with pytest.raises(InputError, match="layout 'comfy' is unknown; known: official, diffusers"):
        tiny.draw_checkpoint(tmp_path / "model", layout="comfy")
