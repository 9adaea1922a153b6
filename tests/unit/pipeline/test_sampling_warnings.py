"""What is said of settings that weights for four steps were not made for."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hunyuan_staged.options import DenoiseOptions
from hunyuan_staged.pipeline.settings import Settings, resolve_sampling, sampling_warnings
from hunyuan_staged.versions import parse_version

LIGHTX2V = "hy1.5_t2v_480p_lightx2v_4step.safetensors"
NO_ADAPTER = "--four_steps is for weights or an adapter made for it, and {} has no adapter"
NAMED = "{}: its name speaks of 4 steps, and this run takes {}; --four_steps takes 4 steps, shift 5 and guidance 1"


def said(name: str, file: str | None = None, **flags: object) -> list[str]:
    options, version = DenoiseOptions(**flags), parse_version(name)
    steps, scale, shift = resolve_sampling(options, version, version.flow_shift)
    settings = Settings(version, 480, 848, 121, steps, scale, shift, "bf16")
    return sampling_warnings(options, settings, Path(file) if file else None)


def test_distilled_weights_in_a_file_may_be_for_four_steps():
    """As --model_path, too: it said that they had no adapter."""
    assert said("480p_t2v_distilled", LIGHTX2V, four_steps=True) == []
    assert said("480p_t2v_distilled", four_steps=True) == [NO_ADAPTER.format("480p_t2v_distilled")]
    assert said("480p_t2v", "480p_t2v.safetensors", four_steps=True) == [NO_ADAPTER.format("480p_t2v")]


@pytest.mark.parametrize(
    ("file", "speaks"),
    [
        (LIGHTX2V, True),
        ("a-4-steps.safetensors", True),
        ("a_4Step_480p.gguf", True),
        ("a_14step.safetensors", False),
        ("a_480p_t2v.safetensors", False),
    ],
)
def test_a_name_that_speaks_of_four_steps(file, speaks):
    """Fifty steps were taken without a word."""
    assert said("480p_t2v_distilled", file) == [NAMED.format(file, 50)] * speaks
    assert said("480p_t2v_distilled", file, num_inference_steps=8) == []


def test_an_adapters_name_too(tmp_path):
    adapter = tmp_path / "hunyuanvideo1.5_t2v_480p_lightx2v_4step_lora_rank_32_bf16.safetensors"
    save_file({"weight": torch.ones(1)}, adapter)
    assert said("480p_t2v", lora=(str(adapter),)) == [NAMED.format(adapter.name, 50)]
    assert said("480p_t2v", lora=(str(adapter),), four_steps=True) == []
