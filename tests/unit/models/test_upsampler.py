"""The latent upsamplers against the official numbers."""

import json

import pytest
import torch
from golden_models import distance, golden_upsampler, load

from hunyuan_staged.errors import InputError
from hunyuan_staged.models.upsampler import build_upsampler, run_upsampler
from hunyuan_staged.weights.upsampler import upsampler_config


@pytest.mark.parametrize("kind", ["720p", "1080p"])
@pytest.mark.parametrize("frames_per_chunk", [1, 3, 8])
def test_upsamplers_give_the_official_numbers_whatever_the_chunks(golden_folder, kind, frames_per_chunk):
    tensors, metadata = load(golden_folder / f"sr_upsampler_{kind}.safetensors")
    upsampler = golden_upsampler(golden_folder, kind, json.loads(metadata["config"]))
    assert distance(run_upsampler(upsampler, tensors["input"], frames_per_chunk), tensors["output"]) < 1e-5


def test_the_global_residual_adds_the_input(golden_folder):
    tensors, metadata = load(golden_folder / "sr_upsampler_720p.safetensors")
    upsampler = golden_upsampler(golden_folder, "720p", json.loads(metadata["config"]) | {"global_residual": True})
    assert distance(run_upsampler(upsampler, tensors["input"]), tensors["output_global_residual"]) < 1e-5


@pytest.mark.parametrize("kind", ["720p", "1080p"])
def test_the_published_upsamplers_have_the_official_tensors(golden_folder, kind):
    published = json.loads((golden_folder / f"sr_full_upsampler_{kind}_shapes.json").read_text())
    shapes = {name: tuple(shape) for name, shape in published["tensors"].items()}
    config = upsampler_config(shapes)
    assert config == {name: value for name, value in published["config"].items() if name in config}
    with torch.device("meta"):
        upsampler = build_upsampler(kind, config)
    assert {name: tuple(x.shape) for name, x in upsampler.state_dict().items()} == shapes
    assert sum(x.numel() for x in upsampler.parameters()) == published["parameters"]


def test_absent_entries_of_an_upsamplers_config_have_the_official_defaults():
    with torch.device("meta"):
        plain = build_upsampler("720p", {"in_channels": 32, "out_channels": 32, "hidden_channels": None})
        levels = build_upsampler("1080p", {"z_channels": 8, "out_channels": 8, "block_out_channels": [16, 24]})
    assert plain.in_conv.conv.weight.shape == (64, 32, 3, 3, 3)
    assert (len(plain.blocks), plain.global_residual) == (6, False)
    assert [len(level.block) for level in levels.up] == [3, 3]


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        ("720p", {"in_channels": 32}, "out_channels is None; allowed is a whole number above 0"),
        ("720p", {"in_channels": 32, "out_channels": 32, "num_blocks": "6"}, "num_blocks is '6'; allowed is a whole"),
        ("720p", {"in_channels": 8, "out_channels": 4, "global_residual": True}, "adds 8 channels to 4; allowed"),
        ("1080p", {"z_channels": 32, "out_channels": 32}, "block_out_channels is None; allowed is a list of widths"),
        ("1080p", {"z_channels": 32, "out_channels": 32, "block_out_channels": [48]}, "the first of n x 32"),
    ],
)
def test_an_upsamplers_config_that_makes_no_sense_is_refused(kind, config, message):
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        build_upsampler(kind, config)
