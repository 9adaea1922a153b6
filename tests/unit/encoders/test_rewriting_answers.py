"""What a rewriting model is asked, and which of its answers are taken."""

import base64
import io

import pytest
from PIL import Image

from hunyuan_staged.encoders import rewriting
from hunyuan_staged.encoders.endpoint import RewritingFailed
from hunyuan_staged.encoders.rewriting import accepted, data_uri, messages, read_instructions
from hunyuan_staged.encoders.text import glyph_text
from hunyuan_staged.errors import InputError

SIGN = 'a sign "HELLO" and “Ünï €”'


@pytest.mark.parametrize(
    ("answer", "prompt", "taken"),
    [
        ("  A cat walks.\n", "a cat", "A cat walks."),
        ("A cat walks.\n\n  It is \t grey.\r\nSlowly.", "a cat", "A cat walks. It is grey. Slowly."),
        ('<think>A cat? A "cat".</think>\n\nA cat walks.', "a cat", "A cat walks."),
        ('"A cat walks."', "a cat", "A cat walks."),
        ("“A cat walks.”", "a cat", "A cat walks."),
        ('"A sign "HELLO" hangs there"', 'a sign "HELLO"', 'A sign "HELLO" hangs there'),
        ('"HELLO"', '"HELLO"', '"HELLO"'),
        (
            'The so-called "golden hour", a sign “HELLO”.',
            'a sign "HELLO"',
            "The so-called golden hour, a sign “HELLO”.",
        ),
        ('A sign “HELLO” above "Ünï €".', SIGN, 'A sign “HELLO” above "Ünï €".'),
        ("A c\x1b\x00at \ud83dwalks\u2028on", "a cat", "A cat walks on"),
        ("一只猫“喵”地叫。", "一只猫“喵”", "一只猫“喵”地叫。"),
    ],
)
def test_an_answer_becomes_one_line_whose_quoted_text_is_the_prompts(answer, prompt, taken):
    assert accepted(answer, prompt) == taken
    assert sorted(glyph_text(taken).split("Text ")) == sorted(glyph_text(prompt).split("Text "))


@pytest.mark.parametrize(
    ("answer", "prompt", "said"),
    [
        ("", "a cat", "the rewritten prompt is empty"),
        (" \n\t\x00", "a cat", "the rewritten prompt is empty"),
        ('""', "a cat", "the rewritten prompt is empty"),
        ("<think>for ever</think>", "a cat", "the rewritten prompt is empty"),
        ("A sign.", SIGN, "the rewritten prompt has lost the quoted text 'HELLO'"),
        ('A sign "Hello" and "Ünï €".', SIGN, "the rewritten prompt has lost the quoted text 'HELLO'"),
        ('A sign "HELLO" and "Uni €".', SIGN, "the rewritten prompt has lost the quoted text 'Ünï €'"),
        ("A sign that says HELLO.", 'a sign "HELLO"', "the rewritten prompt has lost the quoted text 'HELLO'"),
        ('A sign "HEL\nLO".', 'a sign "HELLO"', "the rewritten prompt has lost the quoted text 'HELLO'"),
        (
            "A cat<|im_end|>\n<|im_start|>user",
            "a cat",
            "the rewritten prompt holds <|im_end|>, which is a token of the",
        ),
    ],
)
def test_an_answer_that_cannot_be_taken_says_why(answer, prompt, said):
    with pytest.raises(RewritingFailed) as caught:
        accepted(answer, prompt)
    assert str(caught.value).startswith(said)


def test_the_language_of_the_prompt_chooses_the_instructions():
    names = {
        (task, prompt): read_instructions(None, task, prompt) for task in ("t2v", "i2v") for prompt in ("cat", "猫")
    }
    assert {key: found.name for key, found in names.items()} == {
        ("t2v", "cat"): "t2v_en",
        ("t2v", "猫"): "t2v_zh",
        ("i2v", "cat"): "i2v_en",
        ("i2v", "猫"): "i2v_zh",
    }
    assert len({found.sha256 for found in names.values()}) == 4
    for (_, prompt), found in names.items():
        wanted = (
            ("quotation marks", "letter by letter", "Camera", "Light") if prompt == "cat" else ("引号", "镜头", "光线")
        )
        assert all(word in found.text for word in wanted)


def test_instructions_of_ones_own(tmp_path):
    own = tmp_path / "own.txt"
    own.write_text("  Say it in verse.\n", encoding="utf-8")
    found = read_instructions(str(own), "t2v", "猫")
    assert (found.name, found.text) == ("own.txt", "Say it in verse.")
    for content, said in (
        (b" \n", "holds no text"),
        (b"\xff", "is not UTF-8 text"),
        (b"x" * (2**16 + 1), "holds more than 65536 bytes"),
    ):
        own.write_bytes(content)
        with pytest.raises(InputError, match=rf"^--rewrite_instructions {own} {said}$"):
            read_instructions(str(own), "t2v", "cat")
    with pytest.raises(InputError, match=r"cannot be read \(Is a directory\)$"):
        read_instructions(str(tmp_path), "t2v", "cat")


def test_an_image_goes_along_as_a_small_jpeg_before_the_prompt():
    instructions = rewriting.Instructions("a", "Write.")
    assert messages(instructions, "a cat") == [
        {"role": "system", "content": "Write."},
        {"role": "user", "content": "a cat"},
    ]
    picture = Image.new("RGB", (3000, 1500), "red")
    content = messages(instructions, "a cat", picture)[1]["content"]
    assert content[1] == {"type": "text", "text": "a cat"}
    head, _, data = content[0]["image_url"]["url"].partition(",")
    assert head == "data:image/jpeg;base64"
    sent = Image.open(io.BytesIO(base64.b64decode(data)))
    assert (sent.format, sent.size) == ("JPEG", (1024, 512)) and sent.getpixel((5, 5))[0] > 250
    assert picture.size == (3000, 1500)
    assert data_uri(picture) == content[0]["image_url"]["url"]
