"""Upsamplers and super-resolution transformers on disk, in a folder or one file."""

import json
import re

import pytest
import torch
from conftest import golden_weights
from golden_models import CPU
from safetensors.torch import save_file

from hunyuan_staged.errors import InputError
from hunyuan_staged.models.upsampler import run_upsampler
from hunyuan_staged.pipeline.low_resolution import load_upsampler
from hunyuan_staged.weights import components
from hunyuan_staged.weights.folder import open_model
from hunyuan_staged.weights.upsampler import open_upsampler, upsampler_config, upsampler_kind


def test_an_upsampler_is_found_in_a_folder_and_in_one_file(golden_folder, tmp_path):
    """The official folder has a config; ComfyUI's file, whatever its name, has none; Wan2GP's has one beside it."""
    weights = golden_weights(golden_folder / "sr_upsampler_720p_shapes.json")
    folder, file = tmp_path / "720p_sr_distilled", tmp_path / "file.safetensors"
    folder.mkdir()
    save_file(weights, folder / "diffusion_pytorch_model.safetensors")
    with pytest.raises(InputError, match=r"config\.json does not exist"):
        open_upsampler(folder)
    config = {"in_channels": 32, "out_channels": 32, "hidden_channels": 48, "num_blocks": 3, "global_residual": True}
    (folder / "config.json").write_text(json.dumps(config | {"_class_name": "Any"}))
    save_file(weights, file)
    found = open_upsampler(folder)
    assert (found.kind, found.config["global_residual"], found.origin) == ("720p", True, folder / "config.json")
    found = open_upsampler(file)
    assert (found.kind, found.config, found.origin) == ("720p", config | {"global_residual": False}, file)
    beside = open_upsampler(folder / "diffusion_pytorch_model.safetensors")
    assert beside.config["global_residual"] is True
    assert {name for name, _ in found.tensors(CPU)} == set(weights)


def test_what_is_no_upsampler_on_disk_is_refused(tmp_path):
    with pytest.raises(InputError, match="none does not exist"):
        open_upsampler(tmp_path / "none")
    (tmp_path / "text.safetensors").write_text("no tensors")
    with pytest.raises(InputError, match="is not a whole safetensors file"):
        open_upsampler(tmp_path / "text.safetensors")
    save_file({"img_in.proj.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=r"other.safetensors is no latent upsampler: it holds neither"):
        open_upsampler(tmp_path / "other.safetensors")
    save_file({"blocks.0.block.0.conv.weight": torch.zeros(8, 8, 3, 3, 3)}, tmp_path / "half.safetensors")
    with pytest.raises(InputError, match=r"half.safetensors is a 720p latent upsampler without in_conv\.conv\.weight"):
        open_upsampler(tmp_path / "half.safetensors")


def test_other_tensors_are_no_upsampler():
    assert upsampler_kind(["img_in.proj.weight"]) is None
    with pytest.raises(
        InputError, match=r"no latent upsampler: it holds neither blocks\.0\.block\.0\.conv\.weight nor"
    ):
        upsampler_config({"img_in.proj.weight": (2048, 98, 1, 1, 1)})
    with pytest.raises(InputError, match=r"a 720p latent upsampler without in_conv\.conv\.weight"):
        upsampler_config({"blocks.0.block.0.conv.weight": (8, 8, 3, 3, 3)})


def test_a_model_folder_gives_the_parts_of_super_resolution(tiny_super_resolution, tiny_diffusers, tmp_path):
    folder = open_model(tiny_super_resolution, ("transformer", "upsampler"))
    name = "demo_hd_sr_distilled"
    assert name not in folder.versions()
    config = components.transformer_config(folder, name)
    assert (config["in_channels"], config["out_channels"], config["use_meanflow"]) == (98, 32, True)
    model = components.load_transformer(folder, name, device=CPU, dtype=torch.float32)
    assert model.x_embedder.proj.weight.shape[1] == 98
    upsampler = load_upsampler(open_upsampler(folder.super_resolution_folder("upsampler", name)), CPU)
    assert not any(parameter.requires_grad for parameter in upsampler.parameters())
    assert run_upsampler(upsampler, torch.randn(1, 32, 2, 6, 10)).shape == (1, 32, 2, 6, 10)
    both = {folder.fingerprint([part], name) for part in ("transformer", "upsampler")}
    assert len(both | {folder.fingerprint(["transformer"], "demo_t2v")}) == 3
    fetch = 'hf download tencent/HunyuanVideo-1.5 --include "upsampler/720p_sr_distilled/*" --local-dir'
    with pytest.raises(InputError, match=f"has no upsampler/720p_sr_distilled; get it: {re.escape(fetch)}"):
        folder.super_resolution_folder("upsampler", "720p_sr_distilled")
    with pytest.raises(InputError, match="is in diffusers' layout, which has no super resolution"):
        components.transformer_config(open_model(tiny_diffusers, ("transformer",)), name)


def test_the_super_resolution_transformer_loads_in_float8(tiny_super_resolution):
    folder, name = open_model(tiny_super_resolution, ("transformer",)), "demo_hd_sr_distilled"
    skeleton = components.transformer_skeleton(folder, name, weights_dtype="fp8")
    model = components.load_transformer(folder, name, device=CPU, dtype=torch.float32, skeleton=skeleton)
    stored = {tensor.dtype for tensor in model.transformer_blocks.state_dict().values()}
    assert torch.float8_e4m3fn in stored
    assert model.x_embedder.proj.weight.dtype == torch.float32, "only the blocks are in float8"
