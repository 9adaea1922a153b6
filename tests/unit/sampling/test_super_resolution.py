"""Super resolution against the official numbers: a forward, whole runs; and mistakes that must show."""

import json

import pytest
import torch
from golden_models import CPU, distance, load
from golden_super_resolution import Golden, conditioning_of_row, golden_run, golden_transformer

from hunyuan_staged.attention.choose import choose_attention
from hunyuan_staged.memory.offloading import stream_blocks
from hunyuan_staged.models.modules import TransformerConfig, TransformerModules
from hunyuan_staged.models.transformer import Transformer
from hunyuan_staged.sampling.conditions import (
    LowResolutionCondition,
    augment,
    condition_channels,
    resize_latents,
)
from hunyuan_staged.sampling.schedule import flow_sigmas, initial_noise, super_resolution_noise, timesteps_of
from hunyuan_staged.versions import super_resolution_version
from hunyuan_staged.weights.configs import official_transformer_config
from hunyuan_staged.weights.key_maps import TRANSFORMER_MAP, to_official

BOUND = 1e-4  # relative, to the official numbers
# What the least of the mistakes below moves the loops' latents by, relative, as measured: 0.02.
MISTAKE = 100 * BOUND
LOOPS = ("720p_t2v", "720p_cfg", "1080p_i2v")


def test_the_published_transformer_has_the_official_tensors(golden_folder):
    published = json.loads((golden_folder / "sr_full_transformer_shapes.json").read_text())
    config = published["config"] | {"ideal_resolution": "720p"}
    with torch.device("meta"):
        model = TransformerModules(TransformerConfig(**official_transformer_config(config, 1472)))
    official = to_official(model.state_dict(), TRANSFORMER_MAP)
    assert {name: list(x.shape) for name, x in official.items()} == published["tensors"]
    assert len(official) == 1797


@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_forward_gives_the_official_numbers(golden_folder, task):
    tensors, _ = load(golden_folder / f"sr_dit_{task}.safetensors")
    velocity = golden_transformer(golden_folder, tensors["hidden_states"].shape[2:])
    out = velocity(tensors["hidden_states"], tensors["timestep"], conditioning_of_row(tensors), tensors["timestep_r"])
    assert distance(out, tensors["output"]) < 1e-5


def test_streamed_blocks_give_the_same_bits(golden_folder):
    tensors, _ = load(golden_folder / "sr_dit_i2v.safetensors")
    resident = golden_transformer(golden_folder, tensors["hidden_states"].shape[2:])
    attention = choose_attention("torch", CPU, torch.float32)
    blocks = stream_blocks(resident.model, CPU)
    streamed = Transformer(resident.model, attention, tensors["hidden_states"].shape[2:], blocks=blocks)
    arguments = (tensors["hidden_states"], tensors["timestep"], conditioning_of_row(tensors), tensors["timestep_r"])
    assert torch.equal(streamed(*arguments), resident(*arguments))


@pytest.mark.parametrize("name", LOOPS)
def test_a_whole_run_gives_the_official_latents(golden_folder, name):
    run = golden_run(golden_folder, name)
    version = super_resolution_version(run.kind)
    assert float(run.metadata["shift"]) == version.flow_shift
    if name != "720p_cfg":
        assert int(run.metadata["steps"]) == version.num_inference_steps
        assert float(run.metadata["guidance_scale"]) == version.guidance_scale
    tensors = run.tensors
    noises = super_resolution_noise(tensors["noise"].shape, int(run.metadata["seed"]), torch.float32)
    assert torch.equal(noises[0], tensors["noise"]) and torch.equal(noises[1], tensors["lq_noise"])
    assert torch.equal(noises[0], initial_noise(tensors["noise"].shape, int(run.metadata["seed"]), torch.float32))
    resized = resize_latents(tensors["lq_latents"], *tensors["noise"].shape[-2:])
    assert distance(resized, tensors["lq_resized"]) < BOUND
    assert distance(run.upsampled(), tensors["lq_upsampled"]) < BOUND
    condition = run.condition()
    assert distance(condition(1000.0), tensors["condition"]) < BOUND
    assert torch.equal(condition(300.0), tensors["condition_last"])
    steps = run.run()
    for ours, theirs in zip(steps, tensors["latents_steps"], strict=True):
        assert distance(ours, theirs[None]) < BOUND
    assert distance(steps[-1], tensors["latents"]) < BOUND


@pytest.mark.parametrize(("resolution", "seen"), [("720p", 3), ("1080p", 4)])
def test_the_first_steps_alone_see_the_low_resolution_latents(resolution, seen):
    """3 of 6, and 4 of 8, as in the official schedules; the image's channels stay."""
    version = super_resolution_version(resolution)
    image = condition_channels(torch.zeros(1, 32, 2, 3, 4), torch.full((1, 32, 1, 3, 4), 2.0))
    condition = LowResolutionCondition(image, torch.full((1, 32, 2, 3, 4), 3.0))
    timesteps = timesteps_of(flow_sigmas(version.num_inference_steps, version.flow_shift))[:-1].tolist()
    channels = [condition(timestep) for timestep in timesteps]
    assert [bool(x[:, 33:].any()) for x in channels] == [i < seen for i in range(version.num_inference_steps)]
    assert all(torch.equal(x[:, :33], image) and x.shape == (1, 66, 2, 3, 4) for x in channels)
    assert channels[0][:, 33:65].eq(3).all() and channels[0][:, 65].eq(1).all()
    assert condition(700.0)[:, 33:].any() and not condition(699.99).to(torch.float64)[:, 33:].any()


def test_the_condition_has_the_dtype_of_the_image_channels():
    image = condition_channels(torch.zeros(1, 32, 1, 2, 2, dtype=torch.bfloat16), None)
    condition = LowResolutionCondition(image, torch.ones(1, 32, 1, 2, 2))
    assert condition(1000.0).dtype == condition(0.0).dtype == torch.bfloat16


# -- mistakes: each must move the latents far beyond the bound --


def always_seen(run: Golden):
    condition = run.condition()
    return {"condition": lambda _: condition(1000.0)}


def mask_kept(run: Golden):
    """Below timestep 700 the latents go, and their mask stays."""
    condition = run.condition()
    mask = condition(1000.0)[:, 65:]
    return {"condition": lambda timestep: torch.cat([condition(timestep)[:, :65], mask], dim=1)}


def mask_before_its_latents(run: Golden):
    condition = run.condition()
    return {"condition": lambda timestep: condition(timestep)[:, [*range(33), 65, *range(33, 65)]]}


def image_and_latents_swapped(run: Golden):
    condition = run.condition()
    return {"condition": lambda timestep: condition(timestep)[:, [*range(33, 66), *range(33)]]}


def image_mask_among_the_latents(run: Golden):
    """As another engine does: the image's mask in the first channel of the low-resolution latents, its own all zeros."""
    condition = run.condition()

    def channels(timestep: float) -> torch.Tensor:
        x = condition(timestep).clone()
        x[:, 33], x[:, 32] = x[:, 32].clone(), 0
        return x

    return {"condition": channels}


def no_shift(run: Golden):
    return {"shift": 1.0}


def shift_of_the_base(run: Golden):
    return {"shift": 5.0}


def strength_swapped(run: Golden):
    noise = run.tensors["lq_noise"]
    return {"condition": LowResolutionCondition(run.condition().image, 0.7 * run.upsampled() + 0.3 * noise)}


def no_noise(run: Golden):
    return {"condition": LowResolutionCondition(run.condition().image, run.upsampled())}


def the_first_draw_again(run: Golden):
    latents = augment(run.upsampled(), run.tensors["noise"])
    return {"condition": LowResolutionCondition(run.condition().image, latents)}


def not_upsampled(run: Golden):
    latents = augment(run.tensors["lq_resized"], run.tensors["lq_noise"])
    return {"condition": LowResolutionCondition(run.condition().image, latents)}


def no_meanflow(run: Golden):
    return {"meanflow": False}


def meanflow_of_its_own_timestep(run: Golden):
    def velocity(transformer, hidden_states, timestep, conditioning, timestep_r):
        return transformer(hidden_states, timestep, conditioning, timestep)

    return {"velocity": velocity}


MISTAKES = (
    always_seen,
    mask_kept,
    mask_before_its_latents,
    image_and_latents_swapped,
    image_mask_among_the_latents,
    no_shift,
    shift_of_the_base,
    strength_swapped,
    no_noise,
    the_first_draw_again,
    not_upsampled,
    no_meanflow,
    meanflow_of_its_own_timestep,
)


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("name", ["720p_t2v", "1080p_i2v"])
def test_a_mistake_is_far_beyond_the_bound(golden_folder, name, mistake):
    run = golden_run(golden_folder, name)
    assert distance(run.run(**mistake(run))[-1], run.tensors["latents"]) > MISTAKE
