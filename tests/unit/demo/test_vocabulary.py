"""What the demo does not know of a prompt."""

import random

import pytest
from conftest import ROOT

from hunyuan_staged.demo import scenes
from hunyuan_staged.demo.vocabulary import unknown


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("a cat walks over a black background", "cat, walks"),
        ("一只猫", "一只猫"),
        (" ", "an empty prompt"),
        ('a white card with the text "HELLO" on a black background', '"HELLO" on a card'),
        ("a yellow sign that says “hi”, dark blue background", '"hi" on a card'),
        ("b c d e f g h i j k", "b, c, d, e, f, g, h, i and 2 more"),
        ('A yellow sign that says "7", dark blue background.', None),
    ],
)
def test_what_is_unknown(prompt, said):
    assert unknown(prompt) == said


@pytest.mark.parametrize("wording", [scenes.FIRST, scenes.MORE, scenes.UNSEEN])
def test_all_that_training_says_is_known(wording):
    draw = random.Random(0)
    prompts = [scenes.describe(scenes.draw_scene(draw), draw, wording) for _ in range(300)]
    assert [prompt for prompt in prompts if unknown(prompt)] == []


def test_the_demo_prompts_of_the_guide_are_known():
    """docs/prompts.md, below "Writing for the demo"; what stands above it is for the real model."""
    real, demo = (ROOT / "docs" / "prompts.md").read_text(encoding="utf-8").split("## Writing for the demo")
    sentences = demo.split("```")[1].split("\n")[1:-1]
    assert len(sentences) == 3 and [unknown(sentence) for sentence in sentences] == [None] * 3
    assert unknown(real.split("```")[1]) is not None
