"""The loop against the official one, the noise, and several processes against one."""

import json
from dataclasses import asdict
from itertools import pairwise

import pytest
import torch
from golden_models import CPU, build, distance, load, run_loop

from hunyuan_staged.attention.choose import choose_attention
from hunyuan_staged.models.embeddings import Conditioning
from hunyuan_staged.models.transformer import Transformer
from hunyuan_staged.sampling.conditions import condition_channels
from hunyuan_staged.sampling.guidance import guide
from hunyuan_staged.sampling.loop import Sampling, denoise
from hunyuan_staged.sampling.schedule import flow_sigmas, initial_noise, timesteps_of


def test_the_loop_gives_the_official_latents(golden_folder):
    tensors, _ = load(golden_folder / "loop_cfg6_shift5.safetensors")
    sigmas = flow_sigmas(6, 5.0)
    assert torch.allclose(sigmas, tensors["sigmas"], rtol=0, atol=1e-6)
    assert torch.allclose(timesteps_of(sigmas)[:-1], tensors["timesteps"], rtol=1e-6, atol=0)
    latents = run_loop(golden_folder)
    assert latents.dtype == torch.float32
    assert distance(latents, tensors["latents"]) < 1e-4


def test_the_loop_gives_the_same_bits_twice(golden_folder):
    assert torch.equal(run_loop(golden_folder), run_loop(golden_folder))


def test_noise_is_drawn_on_the_cpu_in_the_models_dtype():
    noise = initial_noise((1, 32, 2, 3, 4), 42, torch.bfloat16)
    assert noise.device == CPU and noise.dtype == torch.bfloat16
    assert torch.equal(
        noise, torch.randn(1, 32, 2, 3, 4, generator=torch.Generator().manual_seed(42), dtype=torch.bfloat16)
    )
    assert not torch.equal(noise, initial_noise((1, 32, 2, 3, 4), 43, torch.bfloat16))


def test_condition_channels_of_text_and_of_an_image():
    noise = torch.randn(1, 32, 3, 2, 2)
    assert not condition_channels(noise, None).any() and condition_channels(noise, None).shape == (1, 33, 3, 2, 2)
    image = torch.randn(1, 32, 1, 2, 2)
    channels = condition_channels(noise, image)
    assert torch.equal(channels[:, :32, :1], image) and not channels[:, :32, 1:].any()
    assert channels[:, 32, 0].eq(1).all() and not channels[:, 32, 1:].any()


def test_guidance():
    unconditional, conditional = torch.tensor([1.0]), torch.tensor([2.0])
    assert guide([unconditional, conditional], 6.0).item() == 7.0
    assert guide([conditional], 1.0).item() == 2.0


def test_meanflow_gets_the_next_timestep_and_zero_last():
    seen = []

    def velocity(hidden_states, timestep, conditioning, timestep_r):
        seen.append((timestep.item(), timestep_r.item(), hidden_states.shape[1]))
        return torch.zeros_like(hidden_states[:, :32])

    noise = torch.ones(1, 32, 1, 2, 2)
    latents = denoise(
        velocity, noise, condition_channels(noise, None), [None], flow_sigmas(2, 7.0), Sampling(use_meanflow=True)
    )
    assert seen == [(1000.0, 875.0, 65), (875.0, 0.0, 65)]
    assert torch.equal(latents, noise)


def test_steps_are_reported_with_their_latents():
    noise, steps = torch.zeros(1, 32, 1, 2, 2), []
    denoise(
        lambda x, *_: torch.ones_like(x[:, :32]),
        noise,
        condition_channels(noise, None),
        [None],
        flow_sigmas(4, 1.0),
        on_step=lambda i, latents, clean: steps.append((i, latents.mean().item(), clean().mean().item())),
    )
    # A velocity of 1 everywhere leads to latents of -1, whatever the step.
    assert steps == [(0, -0.25, -1), (1, -0.5, -1), (2, -0.75, -1), (3, -1.0, -1)]


def in_diffusers(model):
    """The same weights in diffusers' module, whose own forward pads the text."""
    from diffusers import HunyuanVideo15Transformer3DModel

    reference = HunyuanVideo15Transformer3DModel(**asdict(model.config))
    reference.load_state_dict(model.state_dict())
    return reference.eval()


def plain_loop(model, tensors, sigmas, *, image: torch.Tensor | None = None, meanflow: bool = False) -> torch.Tensor:
    """The loop written out, over diffusers' own forward with its padded text and masks; no guidance."""
    latents = tensors["noise"]
    condition, mask = torch.zeros_like(latents), torch.zeros_like(latents[:, :1])
    if image is not None:
        condition[:, :, :1], mask[:, :, :1] = image, 1.0
    for sigma, following in pairwise(sigmas):
        with torch.no_grad():
            velocity = model(
                torch.cat([latents, condition, mask], dim=1),
                sigma[None] * 1000,
                tensors["text_states"],
                tensors["text_mask"],
                timestep_r=following[None] * 1000 if meanflow else None,
                encoder_hidden_states_2=tensors["byt5_states"],
                encoder_attention_mask_2=tensors["byt5_mask"],
                image_embeds=tensors["vision_states"],
                return_dict=False,
            )[0]
        latents = latents + (following - sigma) * velocity
    return latents


@pytest.mark.parametrize(("name", "shift"), [("dit_i2v", 5.0), ("dit_meanflow", 7.0)])
def test_image_and_meanflow_loops_agree_with_a_plain_one(golden_folder, name, shift):
    """The image's latent in frame 0 with mask 1; meanflow's second timestep, 0 at the last step."""
    folder = golden_folder
    tensors, metadata = load(folder / f"{name}.safetensors")
    meanflow = "meanflow" in name
    model = build(folder, json.loads(metadata["config"]), "dit_meanflow_shapes" if meanflow else "dit_shapes")
    draw = torch.Generator().manual_seed(9)
    noise = torch.randn(1, 32, *tensors["hidden_states"].shape[2:], generator=draw)
    image = torch.randn(1, 32, 1, *noise.shape[3:], generator=draw)
    sigmas = flow_sigmas(4, shift)
    reference = plain_loop(in_diffusers(model), tensors | {"noise": noise}, sigmas, image=image, meanflow=meanflow)
    embeddings = {
        "prompt_embeds": tensors["text_states"],
        "prompt_embeds_mask": tensors["text_mask"],
        "prompt_embeds_2": tensors["byt5_states"],
        "prompt_embeds_mask_2": tensors["byt5_mask"],
        "image_embeds": tensors["vision_states"],
    }
    conditioning = Conditioning.from_embeddings(embeddings, device=CPU, dtype=torch.float32)
    velocity = Transformer(model, choose_attention("torch", CPU, torch.float32), noise.shape[2:])
    latents = denoise(
        velocity, noise, condition_channels(noise, image), [conditioning], sigmas, Sampling(use_meanflow=meanflow)
    )
    assert distance(latents, reference) < 1e-5
