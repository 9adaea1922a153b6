"""A guided loop of the golden model with a cache, which can be stopped: shared by tests on one process and on several."""

import json

import torch
from golden_models import CPU, build, golden_branches, load

from hunyuan_staged.attention.choose import choose_attention
from hunyuan_staged.models.transformer import Transformer
from hunyuan_staged.parallel.layout import Layout
from hunyuan_staged.parallel.world import World
from hunyuan_staged.sampling.cache import Cache
from hunyuan_staged.sampling.cache_settings import CacheSettings
from hunyuan_staged.sampling.conditions import condition_channels
from hunyuan_staged.sampling.guidance import Guidance
from hunyuan_staged.sampling.guidance_plan import GuidancePlan
from hunyuan_staged.sampling.loop import Sampling, denoise
from hunyuan_staged.sampling.schedule import flow_sigmas

STEPS = 8
TEACACHE = CacheSettings("teacache", STEPS, 2, 7, 3)  # computes 0 1 2 5 7
PLANS = {"gated": GuidancePlan(STEPS, 0.0, 0.5, 1), "every second": GuidancePlan(STEPS, 0.0, 1.0, 2, {3, 4, 6})}


def run_loop(folder, plan: GuidancePlan, layout: Layout | None = None, world: World | None = None, **resumed):
    """The latents of guided steps of the golden model with a cache, and the state after step 3."""
    tensors, _ = load(folder / "loop_cfg6_shift5.safetensors")
    device = world.device if world else CPU
    noise = tensors["noise"].to(device)
    config = json.loads(load(folder / "dit_t2v.safetensors")[1]["config"])
    attention = choose_attention("torch", device, torch.float32)
    forward = Transformer(build(folder, config, "dit_shapes").to(device), attention, noise.shape[2:], layout)
    cache, guidance, states = Cache(TEACACHE, layout or Layout(), forward.total), Guidance(plan), {}
    done, state = resumed.get("done", 0), resumed.get("state", {})
    cache.restore(state, done, device, 2)
    guidance.restore(state, done, noise)

    def on_step(index, latents, clean):
        more = cache.tensors(world or World(0, 1, CPU)) | guidance.tensors(index + 1)
        if index == 3:
            states.update({name: x.clone() for name, x in ({"latents": latents} | more).items()})

    latents = denoise(
        forward,
        state.get("latents", noise).to(device),
        condition_channels(noise, None),
        golden_branches(tensors, device),
        flow_sigmas(STEPS, 5.0),
        Sampling(6.0, layout=layout, cache=cache, start=done, guidance=guidance),
        on_step=on_step,
    )
    return latents, states
