"""What super resolution is prepared from, on one process and several, and what it refuses."""

import json
import shutil

import pytest
import torch
from golden_models import CPU

from hunyuan_staged.errors import InputError
from hunyuan_staged.pipeline import low_resolution
from hunyuan_staged.pipeline.low_resolution import load_upsampler
from hunyuan_staged.versions import super_resolution_version
from hunyuan_staged.weights.upsampler import open_upsampler


def test_image_latents_of_the_base_cannot_serve():
    version, shape = super_resolution_version("720p"), (1, 32, 3, 45, 80)
    base = torch.zeros(1, 32, 1, 30, 53)
    assert low_resolution.image_latents_at(version, {}, shape) is None
    again = "run stage 1 again with --super_resolution 720p"
    with pytest.raises(InputError, match=f"hold an image and no image_latents_720p, which .* needs; {again}"):
        low_resolution.image_latents_at(version, {"image_latents": base}, shape)
    with pytest.raises(InputError, match=rf"image_latents_720p is \[1, 32, 1, 30, 53\]; the latents .*: {again}"):
        low_resolution.image_latents_at(version, {"image_latents": base, "image_latents_720p": base}, shape)
    large = torch.zeros(1, 32, 1, 45, 80)
    assert (
        low_resolution.image_latents_at(version, {"image_latents": base, "image_latents_720p": large}, shape) is large
    )


def test_a_transformer_of_a_base_version_is_refused():
    version = super_resolution_version("720p")
    config = {"in_channels": 98, "out_channels": 32, "use_meanflow": True}
    low_resolution.check_config(version, config)
    with pytest.raises(InputError, match="720p_sr_distilled: in_channels is 65; super resolution has 98"):
        low_resolution.check_config(version, config | {"in_channels": 65})
    with pytest.raises(InputError, match="use_meanflow is False; super resolution has True"):
        low_resolution.check_config(version, config | {"use_meanflow": False})


def test_sizes_of_latents():
    version = super_resolution_version("1080p")
    assert low_resolution.enlarged_shape(version, (1, 32, 31, 45, 80)) == (1, 32, 31, 67, 119)


def test_an_upsampler_whose_weights_are_not_what_its_config_says_is_refused(tiny_super_resolution, tmp_path):
    folder = tmp_path / "u"
    shutil.copytree(tiny_super_resolution / "upsampler" / "demo_hd_sr_distilled", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_blocks": 2}))
    with pytest.raises(InputError, match=r"lacks tensors of the model: blocks\.1\.block\.0\.conv\.weight"):
        load_upsampler(open_upsampler(folder), CPU)
    (folder / "config.json").write_text(json.dumps(config | {"num_blocks": -1}))
    with pytest.raises(InputError, match=r"config\.json: num_blocks is -1; allowed is a whole number above 0"):
        load_upsampler(open_upsampler(folder), CPU)
