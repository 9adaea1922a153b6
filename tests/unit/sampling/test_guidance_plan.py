"""Guidance at some steps: which branches run, what the others go on with, going on after a stop."""

import pytest
import torch
from guided_loop import PLANS, run_loop

from hunyuan_staged.errors import InputError
from hunyuan_staged.sampling.conditions import condition_channels
from hunyuan_staged.sampling.guidance import DIFFERENCE, Guidance
from hunyuan_staged.sampling.guidance_plan import GuidancePlan, parse_interval, resolve
from hunyuan_staged.sampling.loop import Sampling, denoise
from hunyuan_staged.sampling.schedule import flow_sigmas


def test_the_steps_that_run_both_branches():
    """Shares of 8 steps: step / 8 in [START, STOP)."""
    assert GuidancePlan(8, 0.0, 0.5).guided == (0, 1, 2, 3)
    assert GuidancePlan(8, 0.25, 0.75).guided == (2, 3, 4, 5)
    assert GuidancePlan(8, 0.0, 1.0, 3).guided == (0, 3, 6)
    assert GuidancePlan(8, 0.25, 0.75, 2).guided == (2, 4)
    assert GuidancePlan(8, 0.0, 1.0, 2, {2, 3, 6}).guided == (0, 4, 7), "steps of a cache do not count"
    plan = GuidancePlan(8, 0.25, 0.5, 1)
    assert [plan.branches(step) for step in range(8)] == [(1,), (1,), (0, 1), (0, 1), (1,), (1,), (1,), (1,)]
    assert [step for step in range(8) if plan.reuses(step)] == [4, 5, 6, 7], (
        "before the first there is nothing to reuse"
    )
    assert [done for done in range(9) if plan.keeps(done)] == [4, 5, 6, 7]
    assert not any(GuidancePlan(8, 0.25, 0.5).reuses(step) for step in range(8))
    assert plan.forwards == 10
    assert plan.describe() == "both branches at 2 of 8 steps, the last difference at others"


@pytest.mark.parametrize("text", ["0.5", "0,2", "0.5,0.5", "0.6,0.4", "-0.1,1", "a,b", "0,nan", "0,0.5,1", ""])
def test_no_interval(text):
    with pytest.raises(InputError) as error:
        parse_interval(text)
    assert str(error.value) == f"--guidance_interval {text!r} is not START,STOP with 0 <= START < STOP <= 1"


def test_flags_of_a_run():
    assert resolve(None, None, steps=8, guidance_scale=6.0) is None
    assert resolve("0,1", None, steps=8, guidance_scale=6.0) is None, "every step runs both: the plain loop"
    assert resolve(None, 1, steps=8, guidance_scale=6.0) is None
    assert resolve("0,0.5", 0, steps=8, guidance_scale=6.0) == GuidancePlan(8, 0.0, 0.5)
    for given, message in (
        (("0,0.5", None, 1.0), "--guidance_interval needs guidance, and this run has none: --guidance_scale is 1"),
        ((None, 2, 1.0), "--guidance_reuse needs guidance"),
        ((None, -1, 6.0), "--guidance_reuse -1 is neither 0 (no reuse) nor a number of steps"),
        (("0.97,0.99", None, 6.0), "--guidance_interval 0.97,0.99 holds none of 8 steps"),
    ):
        with pytest.raises(InputError) as error:
            resolve(given[0], given[1], steps=8, guidance_scale=given[2])
        assert message in str(error.value)


def flat_loop(plan: GuidancePlan, scale: float = 3.0) -> list[float]:
    """The guided velocity of each step, where the branches give 10 + step and 20 + 2 * step."""
    noise, found, calls = torch.zeros(1, 32, 1, 2, 2), [], []

    def velocity(hidden_states, timestep, conditioning, timestep_r):
        step = round(4 * (1 - timestep.item() / 1000))
        calls.append((step, conditioning))
        value = 10 + step if conditioning == "unconditional" else 20 + 2 * step
        return torch.full_like(hidden_states[:, :32], value)

    before = [0.0]

    def on_step(index, latents, clean):
        now = latents.mean().item()
        found.append((now - before[0]) * -4)
        before[0] = now

    channels = condition_channels(noise, None)
    sampling = Sampling(scale, guidance=Guidance(plan))
    denoise(velocity, noise, channels, ["unconditional", "conditional"], flow_sigmas(4, 1.0), sampling, on_step=on_step)
    assert [step for step, name in calls if name == "unconditional"] == list(plan.guided)
    return found


def test_steps_without_the_unconditional_branch():
    """With it u + 3 (c - u) = c + 2 (c - u); without: c alone, or c + 2 x the last difference."""
    assert flat_loop(GuidancePlan(4)) == pytest.approx([40, 44, 48, 52])
    assert flat_loop(GuidancePlan(4, 0.0, 0.5)) == pytest.approx([40, 44, 24, 26])
    assert flat_loop(GuidancePlan(4, 0.0, 0.5, 1)) == pytest.approx([40, 44, 24 + 22, 26 + 22])
    assert flat_loop(GuidancePlan(4, 0.5, 1.0, 1)) == pytest.approx([20, 22, 48, 52])
    assert flat_loop(GuidancePlan(4, 0.0, 1.0, 2)) == pytest.approx([40, 22 + 20, 48, 26 + 24])


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_a_stopped_loop_goes_on_to_the_same_bits(golden_folder, plan):
    latents, state = run_loop(golden_folder, plan)
    assert DIFFERENCE in state
    assert torch.equal(run_loop(golden_folder, plan, done=4, state=state)[0], latents)
    del state[DIFFERENCE]
    with pytest.raises(InputError, match="the saved state lacks the guidance of this run"):
        run_loop(golden_folder, plan, done=4, state=state)
