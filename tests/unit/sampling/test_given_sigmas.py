"""--sigmas: what is taken, and what is refused."""

import pytest

from hunyuan_staged.errors import InputError
from hunyuan_staged.options import DenoiseOptions
from hunyuan_staged.sampling.given_sigmas import parse_sigmas


@pytest.mark.parametrize(
    ("text", "numbers"), [("1", (1.0,)), ("1,0.94,.5", (1.0, 0.94, 0.5)), ("1.0, 9e-1 ,1e-3", (1.0, 0.9, 0.001))]
)
def test_from_1_down(text, numbers):
    assert parse_sigmas(text) == numbers


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "--sigmas : '' is not a number above 0 and up to 1"),
        ("1,,0.5", "--sigmas 1,,0.5: '' is not a number above 0 and up to 1"),
        ("1,half", "'half' is not a number above 0 and up to 1"),
        ("1,nan", "'nan' is not a number"),
        ("1,0_1", "'0_1' is not a number"),
        ("1,0.5,0", "'0' is not a number above 0 and up to 1"),
        ("2,1", "'2' is not a number above 0 and up to 1"),
        ("1,-0.5", "'-0.5' is not a number"),
        ("0.9,0.5", "--sigmas 0.9,0.5 begins at 0.9, not at 1"),
        ("1,0.5,0.5", "--sigmas 1,0.5,0.5: 0.5 is not below 0.5"),
        ("1,0.5,0.7", "0.7 is not below 0.5"),
    ],
)
def test_anything_else_is_refused(text, message):
    with pytest.raises(InputError) as refused:
        parse_sigmas(text)
    assert message in str(refused.value)


def test_too_many_are_refused():
    with pytest.raises(InputError, match=r"^--sigmas has 1001 numbers; at most 1000 are allowed$"):
        parse_sigmas(",".join(str(1 - n / 2000) for n in range(1001)))


@pytest.mark.parametrize("other", [{"num_inference_steps": 2}, {"flow_shift": 5.0}, {"four_steps": True}])
def test_a_second_schedule_is_refused(other):
    with pytest.raises(InputError, match=f"^--sigmas and --{next(iter(other))} both set the schedule; give one"):
        DenoiseOptions(sigmas="1,0.5", **other).check()
