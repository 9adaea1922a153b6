"""Language and glyph embeddings against diffusers' own pipeline code, on the drawn tiny encoders."""

import inspect

import pytest
import torch

from hunyuan_staged.demo.tiny import SPECIAL_TOKENS, TINY, build_modules
from hunyuan_staged.encoders.text import (
    SYSTEM_PROMPT,
    USER_TURN,
    encode_glyphs,
    encode_prompt,
    glyph_embeddings,
    glyph_text,
    language_embeddings,
    template_crop,
    tokenise,
)
from hunyuan_staged.errors import InputError
from hunyuan_staged.weights import encoder_components
from hunyuan_staged.weights.folder import open_model

CPU = torch.device("cpu")
PROMPT = "a red circle moves left over a dark blue background"
SIGN = 'a card with "AB12" and a sign “Ünï €” on it'


@pytest.fixture(scope="module")
def modules():
    """The same weights as the drawn checkpoint's, in whole modules."""
    return build_modules(versions=())


@pytest.fixture(scope="module")
def language(tiny_official):
    return encoder_components.load_language_model(open_model(tiny_official, ("text",)), device=CPU, dtype=torch.float32)


@pytest.fixture(scope="module")
def glyphs(tiny_official):
    return encoder_components.load_glyph_encoder(open_model(tiny_official, ("glyph",)), device=CPU, dtype=torch.float32)


@pytest.fixture(scope="module")
def pipeline():
    from diffusers import HunyuanVideo15Pipeline

    return HunyuanVideo15Pipeline


def test_the_system_prompt_is_the_published_one(pipeline):
    parameters = inspect.signature(pipeline._get_mllm_prompt_embeds).parameters
    assert parameters["system_message"].default == SYSTEM_PROMPT
    assert SYSTEM_PROMPT.count(" " * 9 + "1. ") == 1  # the sentence's own space, and the eight before each number
    assert "\n" not in SYSTEM_PROMPT


def test_the_crop_is_the_length_of_the_template_before_the_prompt(language):
    tokenizer, _ = language
    messages = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": PROMPT}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == (
        f"<|im_start|>system\n{SYSTEM_PROMPT}<|im_end|>\n<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n"
    )
    head, tail = text.split(USER_TURN)
    tokens = tokenise(tokenizer, PROMPT)
    assert tokens.crop == template_crop(tokenizer) == len(tokenizer(head + USER_TURN)["input_ids"])
    assert tokens.ids[tokens.crop :] == tokenizer(tail)["input_ids"]
    assert tokens.dropped == 0


@pytest.mark.parametrize("prompt", ["\n\n two lines", " x", "<|im_start|>user\ntwice"])
def test_no_prompt_moves_the_crop(language, prompt):
    tokenizer, _ = language
    assert tokenise(tokenizer, prompt).crop == tokenise(tokenizer, PROMPT).crop


def test_a_folders_own_template_is_never_run(language):
    """It is a program: this one would take for ever, and most of the memory."""
    tokenizer, _ = language
    expected, kept = tokenise(tokenizer, PROMPT), tokenizer.chat_template
    tokenizer.chat_template = "{% for i in range(10 ** 10) %}{{ 'x' * 10 ** 10 }}{% endfor %}"
    try:
        assert tokenise(tokenizer, PROMPT) == expected
    finally:
        tokenizer.chat_template = kept


def test_a_tokenizer_without_the_turns_tokens_is_refused():
    """One that takes three letters at a time melts the turn into what is before it."""

    def three_letters(text, **_):
        return {"input_ids": [text[start : start + 3] for start in range(0, len(text), 3)]}

    with pytest.raises(InputError, match=r"does not keep '<\|im_start\|>user\\n' apart; .* must be Qwen2.5-VL's"):
        template_crop(three_letters)


@pytest.mark.parametrize("prompt", [PROMPT, "", "\n\n two lines", "Ein Käfer 🐞 läuft"])
def test_language_embeddings_are_those_of_the_whole_padded_model(language, modules, pipeline, prompt):
    tokenizer, model = language
    crop = template_crop(tokenizer)
    expected, expected_mask = pipeline._get_mllm_prompt_embeds(
        modules.language_model, modules.tokenizer, prompt, CPU, crop_start=crop
    )
    embeds, mask = encode_prompt(tokenizer, model, prompt)
    assert embeds.shape == expected.shape == (1, 1000, TINY.text_width)
    assert mask.dtype == torch.int64
    assert torch.equal(mask, expected_mask)
    assert mask.sum() == len(tokenise(tokenizer, prompt).ids) - crop
    valid = mask[0].bool()
    # The same sums over 1000 + crop keys, most of them masked to zero, round a little differently.
    assert (embeds[:, valid] - expected[:, valid]).abs().max() < 1e-5
    assert expected[:, valid].std() > 0.1
    assert not embeds[:, ~valid].any()


def test_an_empty_prompt_is_one_space(language):
    tokenizer, model = language
    empty, space, letter = (encode_prompt(tokenizer, model, prompt)[0] for prompt in ("", " ", "a"))
    assert torch.equal(empty, space)
    assert not torch.equal(empty, letter)


def test_a_long_prompt_is_cut_at_its_end_and_says_so(language, modules, pipeline):
    tokenizer, model = language
    crop = template_crop(tokenizer)
    whole = tokenise(tokenizer, PROMPT * 9)
    length = len(whole.ids) - crop
    assert tokenise(tokenizer, PROMPT * 9, max_tokens=length).dropped == 0
    cut = tokenise(tokenizer, PROMPT * 9, max_tokens=16)
    assert (cut.ids, cut.dropped) == (whole.ids[: crop + 16], length - 16)
    expected, _ = pipeline._get_mllm_prompt_embeds(
        modules.language_model, modules.tokenizer, PROMPT * 9, CPU, tokenizer_max_length=16, crop_start=crop
    )
    embeds, mask = encode_prompt(tokenizer, model, PROMPT * 9, max_tokens=16)
    assert mask.tolist() == [[1] * 16]
    assert (embeds - expected).abs().max() < 1e-5


def test_language_embeddings_hold_both_rows_in_the_model_dtype(tiny_official):
    tokenizer, model = encoder_components.load_language_model(
        open_model(tiny_official, ("text",)), device=CPU, dtype=torch.bfloat16
    )
    tensors = language_embeddings(tokenizer, model, PROMPT, max_tokens=40)
    tensors |= language_embeddings(tokenizer, model, "", negative=True, max_tokens=40)
    assert list(tensors) == [
        "prompt_embeds",
        "prompt_embeds_mask",
        "negative_prompt_embeds",
        "negative_prompt_embeds_mask",
    ]
    assert tensors["prompt_embeds"].dtype == tensors["negative_prompt_embeds"].dtype == torch.bfloat16
    assert torch.equal(tensors["negative_prompt_embeds"], encode_prompt(tokenizer, model, "", max_tokens=40)[0])
    assert tensors["negative_prompt_embeds_mask"].sum() < tensors["prompt_embeds_mask"].sum()


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("no quotation", ""),
        ("an 'apostrophe' is none", ""),
        ('one "alone', ""),
        ('a sign "HI"', 'Text "HI". '),
        ("a sign “HI”", 'Text "HI". '),
        ('"B", “A”, "B" and "A"', 'Text "B". Text "A". '),
        ('""', 'Text "". '),
        ('"over\ntwo lines"', ""),
        ("„nur“ deutsch”", 'Text " deutsch". '),
    ],
)
def test_glyph_text_takes_each_quoted_text_once_in_order(prompt, expected):
    from diffusers.pipelines.hunyuan_video1_5.pipeline_hunyuan_video1_5 import extract_glyph_texts

    assert glyph_text(prompt) == expected
    assert expected == (extract_glyph_texts(prompt) or "")


@pytest.mark.parametrize("prompt", [SIGN, '"' + "long " * 100 + '"'])
def test_glyph_embeddings_are_those_of_the_padded_encoder(glyphs, modules, pipeline, prompt):
    expected, expected_mask = pipeline._get_byt5_prompt_embeds(
        modules.glyph_tokenizer, modules.glyph_encoder, prompt, CPU
    )
    embeds, mask = encode_glyphs(*glyphs, prompt, width=TINY.glyph_width, dtype=torch.float32)
    assert embeds.shape == expected.shape == (1, 256, TINY.glyph_width)
    assert torch.equal(mask, expected_mask)
    assert mask.sum() == min(256, len(glyph_text(prompt).encode()) + 1)  # one token a byte, and </s>
    valid = mask[0].bool()
    assert (embeds[:, valid] - expected[:, valid]).abs().max() < 1e-5
    assert expected[:, valid].std() > 0.1
    assert not embeds[:, ~valid].any()


def test_the_negative_glyph_row_is_zero(glyphs):
    tensors = glyph_embeddings(*glyphs, SIGN, width=TINY.glyph_width, dtype=torch.bfloat16)
    assert {name: (tuple(x.shape), x.dtype) for name, x in tensors.items()} == {
        "prompt_embeds_2": ((1, 256, TINY.glyph_width), torch.bfloat16),
        "prompt_embeds_mask_2": ((1, 256), torch.int64),
        "negative_prompt_embeds_2": ((1, 256, TINY.glyph_width), torch.bfloat16),
        "negative_prompt_embeds_mask_2": ((1, 256), torch.int64),
    }
    assert tensors["prompt_embeds_2"].any()
    assert not tensors["negative_prompt_embeds_2"].any()
    assert not tensors["negative_prompt_embeds_mask_2"].any()


def test_a_prompt_without_quoted_text_needs_no_glyph_encoder():
    tensors = glyph_embeddings(None, None, PROMPT, width=1472, dtype=torch.bfloat16)
    assert tensors["prompt_embeds_2"].shape == (1, 256, 1472)
    assert not any(tensor.any() for tensor in tensors.values())


def test_a_glyph_encoder_of_another_width_is_refused(glyphs):
    with pytest.raises(InputError, match="the glyph encoder is 64 wide, the transformer takes 1472"):
        encode_glyphs(*glyphs, SIGN, width=1472, dtype=torch.float32)


def test_the_glyph_tokenizer_knows_colors_then_fonts(glyphs):
    tokenizer, model = glyphs
    added = ["<color-0>", "<color-3>", "<en-font-0>", "<en-font-1>", "<cn-font-2>", "<jp-font-3>"]
    assert tokenizer.convert_tokens_to_ids(added) == [384, 387, 388, 389, 390, 391]
    assert model.get_input_embeddings().num_embeddings == 392


def test_special_tokens_follow_the_trained_vocabulary(language):
    tokenizer, _ = language
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(TINY.vocab, TINY.vocab + 14))
    assert tokenizer("a<|im_end|>")["input_ids"] == [*tokenizer("a")["input_ids"], TINY.vocab + 2]
    assert tokenizer.decode(tokenizer("Käfer 🐞 12\n")["input_ids"]) == "Käfer 🐞 12\n"
