"""Encoders and VAE as one file each: the same weights as from a folder, configs by shapes, refusals."""

from dataclasses import replace
from pathlib import Path

import part_writer as parts
import pytest
import torch
from checkpoints import CPU, F32, edit, same
from transformer_writer import save

from hunyuan_staged.errors import InputError
from hunyuan_staged.models.vae_modules import Vae, VaeConfig
from hunyuan_staged.weights import components, derived_configs, encoder_components, part_tensors
from hunyuan_staged.weights.folder import open_model
from hunyuan_staged.weights.key_maps import VAE_MAP, to_diffusers
from hunyuan_staged.weights.part_files import open_part, part_of
from hunyuan_staged.weights.published import QWEN_7B

LOADERS = {
    "text": lambda folder, **how: encoder_components.load_language_model(folder, **how)[1],
    "glyph": lambda folder, **how: encoder_components.load_glyph_encoder(folder, **how)[1],
    "image": lambda folder, **how: encoder_components.load_image_encoder(folder, **how)[1],
    "vae": lambda folder, **how: components.load_vae_decoder(folder, **how)[0],
}
WRITERS = {"text": parts.text, "glyph": parts.glyph, "image": parts.image, "vae": parts.vae}


def with_file(folder, part: str, path: Path):
    return replace(folder, files={part: open_part(part, path)})


@pytest.mark.parametrize("part", LOADERS)
def test_a_file_gives_what_the_folder_gives(tiny_official, tiny_diffusers, tmp_path, part):
    plain = open_model(tiny_official, ())
    expected = LOADERS[part](plain, **F32).state_dict()
    path = save(tmp_path / "any.safetensors", WRITERS[part](tiny_official))
    for model in (plain, open_model(tiny_diffusers, ())):
        assert same(LOADERS[part](with_file(model, part, path), **F32).state_dict(), expected)
    assert with_file(plain, part, path).fingerprint([part]) != plain.fingerprint([part])


def test_the_vae_in_either_style_and_both_halves(tiny_official, tmp_path):
    plain = open_model(tiny_official, ())
    tensors = parts.vae(tiny_official)
    styles = {
        "prefixed": {f"vae.{name}": x for name, x in tensors.items()},
        "diffusers": to_diffusers(tensors, VAE_MAP),
    }
    for name, styled in styles.items():
        model = with_file(plain, "vae", save(tmp_path / f"{name}.safetensors", styled))
        assert components.vae_config(model) == components.vae_config(plain)
        for load in (components.load_vae_decoder, components.load_vae_encoder):
            assert same(load(model, **F32)[0].state_dict(), load(plain, **F32)[0].state_dict())


def test_scaled_float8_is_q_times_its_scale(tiny_official, tmp_path):
    plain = open_model(tiny_official, ())
    stored, exact = parts.scaled(parts.text(tiny_official))
    model = with_file(plain, "text", save(tmp_path / "qwen_fp8_scaled.safetensors", stored))
    found = LOADERS["text"](model, **F32).state_dict()
    assert [name for name, x in parts.text(tiny_official).items() if not torch.equal(x, exact[name])]
    kept = {name.removeprefix("model."): x for name, x in exact.items()}
    assert not [name for name, x in found.items() if not torch.equal(x, kept[name])]
    assert model.files["text"].describe().startswith("qwen_fp8_scaled.safetensors: taken for the text encoder, ")


def shapes_of(module: torch.nn.Module, prefix: str = "") -> dict[str, list[int]]:
    return {prefix + name: list(x.shape) for name, x in module.state_dict().items()}


def test_configs_of_published_sizes_follow_from_the_shapes():
    from transformers import Qwen2_5_VLTextConfig, SiglipVisionConfig, SiglipVisionModel, T5Config, T5EncoderModel
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

    siglip = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
    siglip |= {"image_size": 384, "patch_size": 14}
    byt5 = {"vocab_size": 1510, "d_model": 1472, "d_kv": 64, "d_ff": 3584, "num_layers": 12, "num_heads": 6}
    byt5 |= {"feed_forward_proj": "gated-gelu", "relative_attention_num_buckets": 32}
    vae = VaeConfig()
    with torch.device("meta"):
        text = shapes_of(Qwen2_5_VLTextModel(Qwen2_5_VLTextConfig(**QWEN_7B)), "model.")
        image = shapes_of(SiglipVisionModel(SiglipVisionConfig(**siglip)))
        glyph = shapes_of(T5EncoderModel(T5Config(**byt5)))
        coder = shapes_of(Vae(vae))
    where = Path("any")
    derived = derived_configs.text_config(text, {}, where)
    assert {name: derived[name] for name in QWEN_7B} == QWEN_7B
    assert derived["rope_scaling"]["mrope_section"] == [16, 24, 24]
    derived = derived_configs.image_config(image, {}, where)
    assert {name: derived[name] for name in siglip} == siglip
    derived = derived_configs.glyph_config(glyph, {}, where)
    assert {name: derived[name] for name in byt5} == byt5
    derived = derived_configs.vae_config(coder, {}, where)
    assert VaeConfig(**derived | {"block_out_channels": tuple(derived["block_out_channels"])}) == vae


def test_a_config_of_other_sizes_does_not_count(tiny_official, tmp_path):
    """The folder's VAE is another one: the file's sizes stand, with the published factor."""
    path = save(tmp_path / "any.safetensors", parts.vae(tiny_official))
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_bytes((tiny_official / "vae" / "config.json").read_bytes())
    edit(tmp_path / "vae" / "config.json", latent_channels=16)
    config = components.vae_config(with_file(open_model(tmp_path, ()), "vae", path))
    assert config["latent_channels"] == 32 and config["scaling_factor"] == VaeConfig().scaling_factor
    assert list(config["block_out_channels"]) == [16, 16, 32, 32, 64]


def refused(part: str, path: Path, message: str) -> None:
    with pytest.raises(InputError) as error:
        open_part(part, path)
    assert str(path) in str(error.value) and message in str(error.value) and "\n" not in str(error.value)


def test_files_of_other_parts_and_formats_are_refused(tiny_official, tmp_path):
    path = tmp_path / "any.safetensors"
    save(path, parts.glyph(tiny_official))
    refused("vae", path, "--vae ")
    refused("vae", path, "is a glyph encoder; allowed is a VAE")
    refused("text", save(path, {"a.weight": torch.ones(2)}), "is no part of this model by its tensors")
    path.write_bytes(b"GGUF\3\0\0\0")
    refused("text", path, "is a GGUF file, which is read for the transformer alone; read here is safetensors in")
    path.write_bytes(b"{}")
    refused("glyph", path, "is not a whole safetensors file")
    refused("glyph", tmp_path / "none", "does not exist")
    stored, _ = parts.scaled(parts.text(tiny_official))
    stored["model.layers.0.mlp.up_proj.scale_weight"] = torch.tensor(float("nan"))
    refused("text", save(path, stored), "scales that do not fit: model.layers.0.mlp.up_proj.scale_weight, which holds")


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("vae", lambda x: x.pop("decoder.conv_out.conv.bias"), "lacks tensors of the model: conv_out.conv.bias"),
        (
            "vae",
            lambda x: x.update({"decoder.odd.weight": torch.ones(1)}),
            "that no VAE of this suite has: decoder.odd",
        ),
        ("glyph", lambda x: x.pop("shared.weight"), "lacks the embeddings of a glyph encoder's tokens"),
        ("glyph", lambda x: x.update({"shared.weight": torch.ones(300, 64)}), "holds a tokenizer of "),
        ("text", lambda x: x.pop("model.layers.0.self_attn.k_proj.weight"), "lacks: layers.0.self_attn.k_proj.weight"),
        ("text", lambda x: x.pop("model.embed_tokens.weight"), "lacks: embed_tokens.weight"),
        (
            "text",
            lambda x: x.update({"model.embed_tokens.weight": x["model.embed_tokens.weight"][:, :30]}),
            "heads of 128 do not divide queries of 64 and keys of 32 in a width of 30",
        ),
        (
            "image",
            lambda x: x.update({"vision_model.embeddings.position_embedding.weight": torch.ones(9, 32)}),
            "9 patches of 14 px in a width of 32 are not those of siglip-so400m-patch14-384",
        ),
    ],
)
def test_what_is_missing_or_left_over_is_named(tiny_official, tmp_path, part, change, message):
    tensors = dict(WRITERS[part](tiny_official))
    change(tensors)
    model = with_file(open_model(tiny_official, ()), part, save(tmp_path / "any.safetensors", tensors))
    with pytest.raises(InputError) as error:
        LOADERS[part](model, **F32)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_tokenizer_beside_the_file_comes_first_and_its_absence_names_the_command(tiny_official, tmp_path):
    (tmp_path / "a").mkdir()
    path = save(tmp_path / "a" / "any.safetensors", parts.text(tiny_official))
    parts.copy_small(tiny_official, tmp_path / "model", "text_encoder/llm")
    model = with_file(open_model(tmp_path / "model", ()), "text", path)
    inside = tmp_path / "model" / "text_encoder" / "llm"
    assert encoder_components.language_tokenizer(model)[1] == inside
    (path.parent / "tokenizer.json").write_bytes((inside / "tokenizer.json").read_bytes())
    (path.parent / "tokenizer_config.json").write_bytes((inside / "tokenizer_config.json").read_bytes())
    assert encoder_components.language_tokenizer(model)[1] == path.parent
    (path.parent / "tokenizer.json").unlink()
    (inside / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"holds the text encoder's tokenizer; get it: hf download Qwen/Qwen2.5-VL"):
        encoder_components.language_tokenizer(model)


def test_parts_are_told_by_their_keys(tiny_official):
    for part, write in WRITERS.items():
        assert part_of(write(tiny_official)) == part
    assert part_of(["double_blocks.0.img_mlp.fc1.weight"]) == "transformer"
    assert part_of(["a.weight"]) is None


def test_a_whole_models_head_is_found_in_the_file(tiny_official, tmp_path):
    from qwen_writer import write_whole

    from hunyuan_staged.weights import whole_language_model as whole

    model_path = write_whole(tiny_official, tmp_path / "model")
    plain = open_model(model_path, ())
    path = save(tmp_path / "any.safetensors", parts.text(model_path))
    found = {}
    for name, model in (("folder", plain), ("file", with_file(plain, "text", path))):
        skeleton = whole.whole_skeleton(model, whole.load_language_tokenizer(model), vision=True)
        found[name] = whole.load_whole(model, skeleton, device=CPU, dtype=torch.float32, vision=True).state_dict()
    assert same(found["file"], found["folder"])


def test_the_vae_factor_of_a_folder_that_fits_is_kept(tiny_official, tmp_path):
    plain = open_model(tiny_official, ())
    model = with_file(plain, "vae", save(tmp_path / "any.safetensors", parts.vae(tiny_official)))
    assert part_tensors.vae_file_config(model) == components.vae_config(plain)
