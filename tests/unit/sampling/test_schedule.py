"""Sigmas, timesteps and the Euler step."""

import json
import re

import torch

from hunyuan_staged.sampling.schedule import euler_step, flow_sigmas, timesteps_of


def test_sigmas_are_the_official_ones(golden_folder):
    golden = json.loads((golden_folder / "schedules.json").read_text())
    for name, sigmas in golden.items():
        shift, steps = re.fullmatch(r"shift([\d.]+)_steps(\d+)", name).groups()
        ours = flow_sigmas(int(steps), float(shift))
        assert torch.allclose(ours, torch.tensor(sigmas), rtol=0, atol=1e-6), name
    assert len(golden) >= 12


def test_ends_and_shift():
    sigmas = flow_sigmas(4, 5.0)
    assert sigmas[0] == 1 and sigmas[-1] == 0
    assert torch.allclose(sigmas, torch.tensor([1, 15 / 16, 5 / 6, 5 / 8, 0]))
    assert timesteps_of(sigmas)[1] == 937.5


def test_euler_step_follows_the_velocity():
    latents = torch.ones(1, 2)
    stepped = euler_step(latents, torch.full((1, 2), 2.0, dtype=torch.bfloat16), 1.0, 0.75)
    assert stepped.dtype == torch.float32 and torch.equal(stepped, torch.full((1, 2), 0.5))
