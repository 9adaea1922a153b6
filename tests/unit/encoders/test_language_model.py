"""The whole language model writes: as transformers' own loading of the same files does, greedily, and to an end."""

import json
import shutil

import pytest
import qwen_writer
import torch
from PIL import Image

from hunyuan_staged.encoders import language_model
from hunyuan_staged.encoders.endpoint import RewritingFailed
from hunyuan_staged.encoders.rewriting import Instructions
from hunyuan_staged.errors import InputError
from hunyuan_staged.weights import whole_language_model
from hunyuan_staged.weights.folder import open_model

CPU = torch.device("cpu")
INSTRUCTIONS = Instructions("a", "Describe the video in detail.")
PROMPT = "a red circle moves left"
PICTURE = Image.linear_gradient("L").resize((160, 96)).convert("RGB")


@pytest.fixture(scope="module")
def whole(tiny_official, tmp_path_factory):
    return qwen_writer.write_whole(tiny_official, tmp_path_factory.mktemp("whole") / "model")


def load(folder, *, vision: bool, dtype: torch.dtype = torch.float32):
    opened = open_model(folder, ["text"])
    tokenizer = whole_language_model.load_language_tokenizer(opened)
    skeleton = whole_language_model.whole_skeleton(opened, tokenizer, vision=vision)
    model = whole_language_model.load_whole(opened, skeleton, device=CPU, dtype=dtype, vision=vision)
    return tokenizer, model


def written(model, inputs, count: int) -> list[int]:
    """So many tokens, by transformers' own settings for greedy decoding."""
    options = {"do_sample": False, "repetition_penalty": 1.05, "max_new_tokens": count, "eos_token_id": [10**6]}
    output = model.generate(**inputs, **options, pad_token_id=0)
    return output[0, inputs["input_ids"].shape[1] :].tolist()


def question(tokenizer, model, picture: Image.Image | None) -> dict[str, torch.Tensor]:
    inputs = language_model.image_inputs(model, picture) if picture else {}
    count = int(inputs["image_grid_thw"].prod()) // 4 if picture else 0
    ids = torch.tensor([language_model.chat_ids(tokenizer, INSTRUCTIONS, PROMPT, count)])
    types = {"mm_token_type_ids": (ids == model.config.image_token_id).int()} if picture else {}
    return inputs | types | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("picture", [None, PICTURE], ids=["text", "image"])
def test_it_writes_what_transformers_own_model_writes_up_to_the_end(whole, tmp_path, picture):
    """The drawn model never ends by itself: a token that it writes is made its end."""
    tokenizer, model = load(whole, vision=picture is not None)
    inputs = question(tokenizer, model, picture)
    with torch.no_grad():
        expected = written(qwen_writer.reference(whole), inputs, 12)
        assert written(model, inputs, 12) == expected
    with pytest.raises(RewritingFailed, match=r"^the language model did not come to an end within 12 tokens$"):
        language_model.write(tokenizer, model, INSTRUCTIONS, PROMPT, picture, 12)
    end = next(i for i in range(3, 12) if expected[i] not in expected[:i])
    folder = shutil.copytree(whole, tmp_path / "model")
    qwen_writer.swap_tokens(folder, expected[end], tokenizer.convert_tokens_to_ids("<|im_end|>"))
    _, model = load(folder, vision=picture is not None)
    answer = language_model.write(tokenizer, model, INSTRUCTIONS, PROMPT, picture)
    assert answer == tokenizer.decode(expected[:end]) and answer


def test_the_image_is_seen(whole):
    """Places for an image are as many as its merged patches, and another image gives other numbers."""
    tokenizer, model = load(whole, vision=True)
    inputs = question(tokenizer, model, PICTURE)
    places = int((inputs["input_ids"] == tokenizer.convert_tokens_to_ids("<|image_pad|>")).sum())
    assert inputs["image_grid_thw"].tolist() == [[1, 6, 12]] and places == 18
    with torch.no_grad():
        one = model(**inputs).logits[0, -1]
        other = model(**question(tokenizer, model, PICTURE.rotate(180))).logits[0, -1]
    assert (one - other).abs().max() > 1e-3


def test_the_template_is_the_tokenizers_own(whole):
    tokenizer = whole_language_model.load_language_tokenizer(open_model(whole, ["text"]))
    chat = [{"role": "system", "content": INSTRUCTIONS.text}, {"role": "user", "content": PROMPT}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert language_model.chat_ids(tokenizer, INSTRUCTIONS, PROMPT) == tokenizer(text)["input_ids"]


def test_a_model_that_cannot_write_is_refused_before_it_is_loaded(tiny_official, tiny_diffusers):
    for folder, held in ((tiny_official, "an lm_head of [8, 64], not [576, 64]"), (tiny_diffusers, "no lm_head")):
        with pytest.raises(InputError) as caught:
            load(folder, vision=False)
        origin = open_model(folder, ["text"]).folders("text")[0]
        assert str(caught.value).startswith(f"--rewrite local: {origin} holds {held}, so that it cannot write; Qwen2.5")


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("lm_head.weight", "lm_head.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("model.layers.0.mlp.up_proj.weight", "model.language_model.layers.0.mlp.up_proj.weight"),
        ("language_model.model.norm.weight", "model.language_model.norm.weight"),
        ("model.language_model.norm.weight", "model.language_model.norm.weight"),
        ("visual.merger.ln_q.weight", "model.visual.merger.ln_q.weight"),
        ("model.visual.merger.ln_q.weight", "model.visual.merger.ln_q.weight"),
    ],
)
def test_every_naming_is_understood(name, own):
    assert whole_language_model.whole_key(name, vision=True) == own
    assert whole_language_model.whole_key(name, vision=False) == (None if "visual" in name else own)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("depth", 10**6, "depth is 1000000; allowed is a whole number from 1 to 256"),
        ("num_heads", 5, "hidden_size 32 modulo 20 is 12; allowed is 0"),
        ("out_hidden_size", 32, "out_hidden_size is 32; allowed is 64"),
        ("window_size", 100, "window_size 100 modulo 28 is 16; allowed is 0"),
        ("hidden_act", "import os", "hidden_act is 'import os'; allowed is 'silu'"),
        ("patch_size", ..., "lacks: patch_size"),
        ("", None, "describes no vision tower (vision_config)"),
    ],
)
def test_a_vision_tower_that_cannot_be_is_refused(whole, tmp_path, key, value, said):
    folder = tmp_path / "model"
    (folder / qwen_writer.LLM).mkdir(parents=True)
    (folder / "transformer").symlink_to(whole / "transformer")
    for path in (whole / qwen_writer.LLM).iterdir():
        (folder / qwen_writer.LLM / path.name).symlink_to(path)
    config = json.loads((whole / qwen_writer.LLM / "config.json").read_text())
    if not key:
        del config["vision_config"]
    elif value is ...:
        del config["vision_config"][key]
    else:
        config["vision_config"][key] = value
    path = folder / qwen_writer.LLM / "config.json"
    path.unlink()
    path.write_text(json.dumps(config))
    with pytest.raises(InputError) as caught:
        load(folder, vision=True)
    assert str(path) in str(caught.value) and said in str(caught.value)
