"""Progress without a terminal."""

import re

import pytest

from hunyuan_staged.runtime.progress import LineBar

SECONDS = r"\d+\.\d\d s a step, \d+ s left"


@pytest.mark.parametrize(
    ("total", "initial", "told"),
    [
        (3, 0, ["33% (1 of 3)", "66% (2 of 3)", "100% (3 of 3)"]),
        (50, 0, [f"{10 * tenth}% ({5 * tenth} of 50)" for tenth in range(1, 11)]),
        (50, 38, ["80% (40 of 50)", "90% (45 of 50)", "100% (50 of 50)"]),
    ],
)
def test_a_line_every_tenth_with_seconds(total, initial, told):
    lines: list[str] = []
    bar = LineBar(range(initial, total), say=lines.append, desc="denoising", unit="step", initial=initial, total=total)
    bar.set_postfix_str("1 reused", refresh=False)
    assert list(bar) == list(range(initial, total))
    assert [re.sub(f", {SECONDS}, 1 reused$", "", line) for line in lines] == [f"denoising: {part}" for part in told]
    assert lines[-1].endswith(" s a step, 0 s left, 1 reused")


def test_of_unknown_length_nothing_is_told():
    lines: list[str] = []
    assert list(LineBar(iter("abc"), say=lines.append)) == ["a", "b", "c"]
    assert lines == []
