"""The encoders from either layout, and what is refused of them."""

import pickle
from pathlib import Path

import pytest
import torch
from checkpoints import CPU, F32, copied, edit, same
from safetensors.torch import load_file, save_file

from hunyuan_staged.errors import InputError
from hunyuan_staged.weights import encoder_components
from hunyuan_staged.weights.folder import open_model


def whole_language_model(official: Path) -> torch.nn.Module:
    """The uncut language model with its last norm, by transformers' own means."""
    from transformers import Qwen2_5_VLConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

    folder = official / "text_encoder" / "llm"
    weights = {}
    for path in folder.glob("*.safetensors"):
        weights |= load_file(path)
    model = Qwen2_5_VLTextModel(Qwen2_5_VLConfig.from_pretrained(folder).get_text_config())
    model.load_state_dict({k.removeprefix("model."): v for k, v in weights.items() if k.startswith("model.")})
    return model.eval()


def tokens(vocab: int) -> torch.Tensor:
    return torch.randint(vocab, (1, 12), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_the_cut_language_model_ends_where_the_official_one_reads(either_layout, tiny_official):
    tokenizer, model = encoder_components.load_language_model(either_layout, **F32)
    ids = tokens(len(tokenizer))
    whole = whole_language_model(tiny_official)
    expected = whole(input_ids=ids, output_hidden_states=True).hidden_states
    assert len(model.layers) == len(whole.layers) - 2
    assert len(expected) == len(whole.layers) + 1
    assert torch.equal(model(ids).last_hidden_state, expected[-3])
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_language_model_is_of_the_dtype_asked_for(either_layout):
    _, model = encoder_components.load_language_model(either_layout, device=CPU, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.rotary_emb.inv_freq.dtype == torch.float32, "the angles of late tokens need all their bits"


@pytest.mark.parametrize(
    "names",
    [
        {"model.": "model.language_model.", "visual.": "model.visual."},
        {"model.": "language_model.model.", "lm_head.": "language_model.lm_head."},
        {"model.": "language_model."},
        {"model.": ""},
    ],
)
@torch.no_grad()
def test_the_language_model_is_read_under_every_name_it_was_published(tiny_official, tmp_path, names):
    expected = encoder_components.load_language_model(open_model(tiny_official, ()), **F32)[1]
    model = copied(tiny_official, tmp_path, "text_encoder/llm")
    weights = {}
    for path in (model / "text_encoder" / "llm").glob("*model*"):
        weights |= load_file(path) if path.suffix == ".safetensors" else {}
        path.unlink()
    renamed = {}
    for name, tensor in weights.items():
        old = next((prefix for prefix in names if name.startswith(prefix)), "")
        renamed[names.get(old, "") + name.removeprefix(old)] = tensor
    save_file(renamed, model / "text_encoder" / "llm" / "model.safetensors")
    loaded = encoder_components.load_language_model(open_model(model, ()), **F32)[1]
    assert same(loaded.state_dict(), expected.state_dict())


def test_a_language_model_with_a_tensor_too_many_is_refused(tiny_official, tmp_path):
    model = copied(tiny_official, tmp_path, "text_encoder/llm")
    path = model / "text_encoder" / "llm" / "model-00001-of-00002.safetensors"
    save_file(load_file(path) | {"model.layers.0.extra.weight": torch.zeros(2)}, path)
    with pytest.raises(InputError, match=r"holds tensors that the model does not have: layers.0.extra.weight$"):
        encoder_components.load_language_model(open_model(model, ()), **F32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, r"config.json: model_type is 'llama'; allowed are qwen2_5_vl and qwen2_5_vl_text$"),
        ({"num_hidden_layers": 2}, r"config.json: num_hidden_layers is 2; allowed is a whole number from 3 to 256$"),
    ],
)
def test_another_text_encoder_is_refused(tiny_diffusers, tmp_path, change, message):
    model = copied(tiny_diffusers, tmp_path, "text_encoder", "tokenizer", "transformer")
    edit(model / "text_encoder" / "config.json", layer_types=None, **change)
    with pytest.raises(InputError, match=message):
        encoder_components.load_language_model(open_model(model, ()), **F32)


def test_a_folder_without_a_tokenizer_is_named(tiny_official, tmp_path):
    """transformers makes an empty tokenizer of a folder that has none, and every prompt would be the same."""
    model = copied(tiny_official, tmp_path, "text_encoder/llm", "text_encoder/byt5-small", "text_encoder/Glyph-SDXL-v2")
    for path in (model / "text_encoder").glob("*/tokenizer*"):
        path.unlink()
    with pytest.raises(InputError, match=r"text_encoder/llm holds no tokenizer: tokenizer.json or vocab.json$"):
        encoder_components.load_language_model(open_model(model, ()), **F32)
    with pytest.raises(InputError, match=r"text_encoder/byt5-small holds no tokenizer: tokenizer_config.json$"):
        encoder_components.load_glyph_encoder(open_model(model, ()), **F32)


def test_a_tokenizer_that_cannot_be_read_is_named(tiny_official, tmp_path):
    model = copied(tiny_official, tmp_path, "text_encoder/llm")
    (model / "text_encoder" / "llm" / "tokenizer.json").write_text('{"model": 7}')
    with pytest.raises(InputError, match=r"text_encoder/llm holds no tokenizer that transformers can read \(.+\)$"):
        encoder_components.load_language_model(open_model(model, ()), **F32)


def test_glyph_tokens_are_named_as_the_official_code_names_them():
    fonts = {"en-Montserrat-Regular": 0, "cn-HYQiHei": 0, "en-Lato": 1}
    assert encoder_components.glyph_tokens({"white": 0, "black": 1}, fonts) == [
        "<color-0>",
        "<color-1>",
        "<en-font-0>",
        "<cn-font-0>",
        "<en-font-1>",
    ]


def test_glyph_tokens_follow_byt5s_own(either_layout):
    tokenizer, model = encoder_components.load_glyph_encoder(either_layout, **F32)
    assert tokenizer.convert_tokens_to_ids("<color-0>") == 384
    assert tokenizer("é").input_ids == [0xC3 + 3, 0xA9 + 3, 1]
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer) > 384


@torch.no_grad()
def test_the_glyph_encoder_is_the_one_in_the_file(either_layout, tiny_official):
    from transformers import T5Config, T5EncoderModel

    tokenizer, model = encoder_components.load_glyph_encoder(either_layout, **F32)
    stored = torch.load(
        tiny_official / "text_encoder" / "Glyph-SDXL-v2" / "checkpoints" / "byt5_model.pt", weights_only=True
    )["state_dict"]
    prefix = "module.text_tower.encoder."
    assert same(model.state_dict(), {name.removeprefix(prefix): tensor for name, tensor in stored.items()})
    # transformers' own whole encoder, with the same weights, gives the same numbers.
    config = T5Config.from_pretrained(tiny_official / "text_encoder" / "byt5-small", vocab_size=len(tokenizer))
    reference = T5EncoderModel(config).eval()
    reference.encoder.load_state_dict(model.state_dict())
    inputs = tokenizer('Text "Hi". ', padding="max_length", max_length=20, return_tensors="pt")
    assert torch.equal(model(**inputs).last_hidden_state, reference(**inputs).last_hidden_state)


def glyph_copy(tiny_official: Path, tmp_path: Path) -> tuple[Path, Path]:
    model = copied(tiny_official, tmp_path, "text_encoder/byt5-small", "text_encoder/Glyph-SDXL-v2")
    return model, model / "text_encoder" / "Glyph-SDXL-v2" / "checkpoints" / "byt5_model.pt"


def test_a_glyph_file_without_state_dict_is_read_as_it_is(tiny_official, tmp_path):
    expected = encoder_components.load_glyph_encoder(open_model(tiny_official, ()), **F32)[1].state_dict()
    model, path = glyph_copy(tiny_official, tmp_path)
    torch.save(dict(expected), path)
    assert same(encoder_components.load_glyph_encoder(open_model(model, ()), **F32)[1].state_dict(), expected)


class Trap:
    """A pickle that would run code."""

    def __reduce__(self):
        return (Path.touch, (Path("trapped"),))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (Trap(), r"byt5_model.pt is not a whole file of tensors \(.+\)$"),
        (b"", r"byt5_model.pt is not a whole file of tensors \(.+\)$"),
        ([1, 2], "byt5_model.pt does not hold named tensors, alone or under state_dict$"),
        ({"a": 1}, "byt5_model.pt does not hold named tensors, alone or under state_dict$"),
        (
            {"state_dict": {"module.other": torch.zeros(1)}},
            "byt5_model.pt lacks tensors of the model: embed_tokens.weight, ",
        ),
    ],
)
def test_a_glyph_file_that_is_not_one_is_refused(tiny_official, tmp_path, monkeypatch, content, message):
    model, path = glyph_copy(tiny_official, tmp_path)
    monkeypatch.chdir(tmp_path)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, Trap):
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path)
    with pytest.raises(InputError, match=message):
        encoder_components.load_glyph_encoder(open_model(model, ()), **F32)
    assert not (tmp_path / "trapped").exists()


def test_glyph_weights_for_other_tokens_are_refused(tiny_official, tmp_path):
    model, _ = glyph_copy(tiny_official, tmp_path)
    colors = model / "text_encoder" / "Glyph-SDXL-v2" / "assets" / "color_idx.json"
    rows = len(encoder_components.load_glyph_encoder(open_model(tiny_official, ()), **F32)[0])
    edit(colors, one_more=99)
    with pytest.raises(InputError) as refused:
        encoder_components.load_glyph_encoder(open_model(model, ()), **F32)
    assert f"embed_tokens.weight has shape [{rows}, 64]; its config says [{rows + 1}, 64]" in str(refused.value)


@torch.no_grad()
def test_the_image_encoder_is_the_same_in_both_layouts(tiny_official, tiny_diffusers):
    loaded = [
        encoder_components.load_image_encoder(open_model(path, ()), **F32) for path in (tiny_official, tiny_diffusers)
    ]
    (processor, model), (other_processor, other) = loaded
    assert type(model).__name__ == "SiglipVisionModel"
    assert same(model.state_dict(), other.state_dict())
    assert processor.to_dict() == other_processor.to_dict()
    assert processor.size["height"] == 28
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
