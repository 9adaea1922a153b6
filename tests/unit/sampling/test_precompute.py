"""Modulations computed beforehand: the bits of those that every step computes, without the weights that give them."""

import gc
import weakref
from pathlib import Path

import pytest
import torch
from golden_models import CPU, golden
from safetensors.torch import load_file, save_file

from hunyuan_staged.attention.choose import choose_attention
from hunyuan_staged.errors import InputError
from hunyuan_staged.memory.offloading import load_offloaded
from hunyuan_staged.models.embeddings import Conditioning
from hunyuan_staged.models.modulations import Modulations, hoist, remove_linears, table_bytes
from hunyuan_staged.models.transformer import Transformer
from hunyuan_staged.parallel.world import World
from hunyuan_staged.sampling.cache import Cache
from hunyuan_staged.sampling.cache_settings import CacheSettings
from hunyuan_staged.sampling.conditions import condition_channels
from hunyuan_staged.sampling.loop import Sampling, denoise
from hunyuan_staged.sampling.precompute import ModulationReader, step_times
from hunyuan_staged.sampling.schedule import flow_sigmas
from hunyuan_staged.weights import components, lora
from hunyuan_staged.weights.folder import open_model

VERSION = "demo_t2v"
ALONE = World(0, 1, CPU)
SIGMAS = flow_sigmas(4, 5.0)
GRID = (2, 3, 4)
F32 = {"device": CPU, "dtype": torch.float32}


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def loop(model, blocks=None, modulations=None, *, sigmas=SIGMAS, noise=None, start=0, caching=None) -> torch.Tensor:
    """The latents of two guidance branches."""
    width = model.config.text_embed_dim
    nothing = torch.zeros(1, 0, 0)
    branches = [Conditioning(draw(1, count, width, seed=count), nothing, nothing) for count in (3, 5)]
    attention = choose_attention("torch", **F32)
    forward = Transformer(model, attention, GRID, blocks=blocks, modulations=modulations)
    cache = Cache(caching, forward.layout, forward.total) if caching else None
    noise = draw(1, 32, *GRID) if noise is None else noise
    channels = condition_channels(noise, None)
    return denoise(forward, noise, channels, branches, sigmas, Sampling(6.0, cache=cache, start=start))


def hoisted(folder, *, sigmas=SIGMAS, offloaded=0, weights_dtype=None, adapt=iter):
    """(model, blocks, modulations, what reads others), loaded as stage 2 loads them."""
    skeleton = components.transformer_skeleton(folder, VERSION, weights_dtype=weights_dtype)
    reader = ModulationReader(folder, VERSION, skeleton, remove_linears(skeleton), adapt=adapt, **F32)
    table = reader.begin(sigmas)

    def read(places):
        places = reader.destinations(table, places)
        return components.load_transformer(folder, VERSION, skeleton=skeleton, destinations=places, adapt=adapt, **F32)

    model, blocks = load_offloaded(skeleton, "transformer_blocks", offloaded, read, world=ALONE, **F32)
    return model, blocks, table, reader


@pytest.fixture(scope="module")
def folder(tiny_official):
    return open_model(tiny_official, ("transformer",))


@pytest.fixture(scope="module")
def whole(folder):
    """The model with all its weights, which computes its modulations in every step."""
    return components.load_transformer(folder, VERSION, **F32)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a, b) and bool(a.any())


@pytest.mark.parametrize("offloaded", [0, 2])
def test_a_loop_gives_the_same_bits(folder, whole, offloaded):
    model, blocks, table, _ = hoisted(folder, offloaded=offloaded)
    assert not any(".linear." in name for name, _ in model.transformer_blocks.named_parameters() if "norm1" in name)
    assert same(loop(model, blocks, table), loop(whole))


def test_a_loop_gives_the_same_bits_from_the_diffusers_layout(tiny_diffusers, whole):
    model, blocks, table, _ = hoisted(open_model(tiny_diffusers, ("transformer",)))
    assert same(loop(model, blocks, table), loop(whole))


def test_the_weights_are_let_go_one_linear_map_after_the_other(folder, monkeypatch):
    alive: list[weakref.ref] = []
    most = 0
    add = Modulations.add

    def watched(self: Modulations, name: str, tensor: torch.Tensor) -> None:
        nonlocal most
        alive.append(weakref.ref(tensor))
        most = max(most, sum(ref() is not None for ref in alive))
        add(self, name, tensor)

    monkeypatch.setattr(Modulations, "add", watched)
    model, _, table, _ = hoisted(folder)
    gc.collect()
    assert len(alive) == 4 * len(model.transformer_blocks) and not any(ref() is not None for ref in alive)
    assert most <= 4, "two maps at most: the one that is there, and the next one's first half"
    assert not table.missing


def test_the_table_has_the_planned_size(folder):
    model, _, table, _ = hoisted(folder)
    config = model.config
    width = config.num_attention_heads * config.attention_head_dim
    assert table.table.nbytes == table_bytes(4, config.num_layers, width, 4)
    assert table_bytes(50, 54, 2048, 2) == 132_710_400


def test_a_run_that_goes_on_gives_the_same_bits(folder, whole):
    model, _, table, _ = hoisted(folder)
    half = draw(1, 32, *GRID, seed=9)
    assert same(loop(model, None, table, noise=half, start=2), loop(whole, noise=half, start=2))


def test_modulations_of_another_schedule_are_not_taken(folder):
    model, _, table, _ = hoisted(folder)
    other = flow_sigmas(4, 7.0)
    assert table.cover(step_times(SIGMAS)) and table.cover(step_times(SIGMAS)[2:])
    assert not table.cover(step_times(other)) and not table.cover(step_times(SIGMAS, use_meanflow=True))
    with pytest.raises(AssertionError, match=r"timesteps \(954\.5\d+, None\) are none of those"):
        loop(model, None, table, sigmas=other)


def test_another_schedule_in_the_same_process(folder, whole):
    model, _, _, reader = hoisted(folder)
    other = flow_sigmas(3, 7.0)
    assert same(loop(model, None, reader.read(other), sigmas=other), loop(whole, sigmas=other))


def test_adapters_reach_the_modulations(folder, tmp_path):
    """On a modulation and on the time embedding, which every modulation follows from."""
    shapes = components.transformer_shapes(folder, VERSION)
    tensors = {}
    for module in ("transformer_blocks.1.norm1.linear", "time_embed.timestep_embedder.linear_2"):
        rows, columns = shapes[f"{module}.weight"]
        tensors[f"transformer.{module}.lora_A.weight"] = draw(2, columns)
        tensors[f"transformer.{module}.lora_B.weight"] = draw(rows, 2, seed=1) * 0.1
    save_file(tensors, tmp_path / "lora.safetensors")
    adapters = lora.load([(tmp_path / "lora.safetensors", 0.7)], shapes)
    adapted = components.load_transformer(folder, VERSION, adapt=adapters.fused, **F32)
    model, _, table, reader = hoisted(folder, adapt=adapters.fused)
    assert same(loop(model, None, table), loop(adapted))
    assert torch.equal(reader.read(SIGMAS).table, table.table)
    assert not torch.equal(hoisted(folder)[2].table, table.table)


def test_with_float8_they_stay_exact(folder, whole):
    model, _, table, _ = hoisted(folder, weights_dtype="fp8")
    assert torch.equal(table.table, hoisted(folder)[2].table)
    assert any(x.dtype == torch.float8_e4m3fn for x in model.parameters())
    exact, latents = loop(whole), loop(model, None, table)
    skeleton = components.transformer_skeleton(folder, VERSION, weights_dtype="fp8")
    quantised = loop(components.load_transformer(folder, VERSION, skeleton=skeleton, **F32))
    assert not torch.equal(latents, quantised), "where every step computes them, they are in float8, too"
    assert (latents - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("kind", ["deepcache", "taylorcache", "firstblock"])
def test_caches_take_the_modulations_of_the_blocks_that_they_run(folder, whole, kind):
    more = {"deepcache": {"edge": 1}, "firstblock": {"threshold": float("inf")}}.get(kind, {})
    settings = CacheSettings(kind, steps=4, start=1, end=4, interval=2, **more)
    model, _, table, _ = hoisted(folder)
    assert same(loop(model, None, table, caching=settings), loop(whole, caching=settings))


def test_meanflow_has_a_modulation_for_each_pair_of_timesteps(golden_folder):
    tensors, model, row = golden(golden_folder, "dit_meanflow")
    noise = draw(1, 32, *tensors["hidden_states"].shape[2:])
    sigmas = flow_sigmas(3, 7.0)
    attention = choose_attention("torch", **F32)

    def run(modulations=None) -> torch.Tensor:
        forward = Transformer(model, attention, noise.shape[2:], modulations=modulations)
        return denoise(forward, noise, condition_channels(noise, None), [row], sigmas, Sampling(use_meanflow=True))

    expected = run()
    times = step_times(sigmas, use_meanflow=True)
    assert times[0][1] == times[1][0] and times[-1][1] == 0.0
    assert same(run(hoist(model, times)), expected)


def broken(tiny: Path, target: Path, change):
    """A copy of the tiny checkpoint whose tensors were changed."""
    place = target / "transformer" / VERSION
    place.mkdir(parents=True)
    original = tiny / "transformer" / VERSION
    (place / "config.json").write_text((original / "config.json").read_text())
    tensors = load_file(original / "diffusion_pytorch_model.safetensors")
    change(tensors)
    save_file(tensors, place / "diffusion_pytorch_model.safetensors")
    return open_model(target, ("transformer",))


def test_a_file_without_a_modulation_is_refused(tiny_official, tmp_path):
    source = broken(tiny_official, tmp_path / "a", lambda tensors: tensors.pop("double_blocks.1.txt_mod.linear.bias"))
    with pytest.raises(
        InputError, match=r"lacks tensors of the model: transformer_blocks\.1\.norm1_context\.linear\.bias"
    ):
        hoisted(source)

    def cut(tensors):
        name = "double_blocks.0.img_mod.linear.weight"
        tensors[name] = tensors[name][:-1].clone()

    source = broken(tiny_official, tmp_path / "b", cut)
    with pytest.raises(
        InputError, match=r"transformer_blocks\.0\.norm1\.linear\.weight has shape \[\d+, \d+\]; its config"
    ):
        hoisted(source)
    source = broken(tiny_official, tmp_path / "c", lambda tensors: tensors.pop("time_in.mlp.2.bias"))
    with pytest.raises(InputError, match=r"lacks tensors of the model: timestep_embedder\.linear_2\.bias"):
        hoisted(source)
