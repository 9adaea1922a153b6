"""The key maps against the official names: both ways, closed, bit for bit."""

import json
import re

import pytest
import torch
from checkpoints import golden_config, golden_vae, meta_transformer, same
from conftest import golden_weights
from safetensors.torch import load_file

from hunyuan_staged.errors import InputError
from hunyuan_staged.weights import configs
from hunyuan_staged.weights.key_maps import TRANSFORMER_MAP, VAE_MAP, to_diffusers, to_official


@pytest.mark.parametrize("name", ["dit", "dit_meanflow"])
def test_every_official_transformer_name_has_its_place(golden_folder, name):
    golden = golden_folder
    config = golden_config(golden / f"{'dit_t2v' if name == 'dit' else name}.safetensors")
    shapes = json.loads((golden / f"{name}_shapes.json").read_text())
    weights = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    arguments = configs.official_transformer_config(config, shapes["byt5_in.fc1.weight"][1])
    expected = {key: list(tensor.shape) for key, tensor in meta_transformer(arguments).state_dict().items()}
    mapped = {key: list(tensor.shape) for key, tensor in to_diffusers(weights, TRANSFORMER_MAP).items()}
    assert mapped == expected


def test_every_official_vae_name_has_its_place(golden_folder):
    shapes = json.loads((golden_folder / "vae_shapes.json").read_text())
    weights = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    expected = {key: list(tensor.shape) for key, tensor in golden_vae(golden_folder).state_dict().items()}
    assert {key: list(tensor.shape) for key, tensor in to_diffusers(weights, VAE_MAP).items()} == expected


@pytest.mark.parametrize(
    ("name", "rules"),
    [
        ("dit_shapes", TRANSFORMER_MAP),
        ("dit_meanflow_shapes", TRANSFORMER_MAP),
        ("vae_shapes", VAE_MAP),
    ],
)
def test_the_map_there_and_back_gives_the_same_bits(golden_folder, name, rules):
    weights = golden_weights(golden_folder / f"{name}.json")
    renamed = to_diffusers(weights, rules)
    assert same(to_official(renamed, rules), weights)
    assert same(to_diffusers(to_official(renamed, rules), rules), renamed)


@pytest.mark.parametrize("rules", [TRANSFORMER_MAP, VAE_MAP])
def test_no_name_stands_in_two_rules(rules):
    official = [rule.official for rule in rules]
    diffusers = [name for rule in rules for name in rule.diffusers]
    assert len(set(official)) == len(official)
    assert len(set(diffusers)) == len(diffusers)
    assert all(rule.official.count("#") == name.count("#") for rule in rules for name in rule.diffusers)


def test_fused_and_swapped_tensors_are_taken_apart_in_the_right_order():
    refiner = "txt_in.individual_token_refiner.blocks.1.self_attn_qkv.bias"
    mapped = to_diffusers(
        {refiner: torch.arange(6.0), "final_layer.adaLN_modulation.1.bias": torch.arange(4.0)}, TRANSFORMER_MAP
    )
    prefix = "context_embedder.token_refiner.refiner_blocks.1.attn."
    assert {name: tensor.tolist() for name, tensor in mapped.items()} == {
        f"{prefix}to_q.bias": [0, 1],
        f"{prefix}to_k.bias": [2, 3],
        f"{prefix}to_v.bias": [4, 5],
        "norm_out.linear.bias": [2, 3, 0, 1],  # shift, scale → scale, shift
    }


def test_leftovers_on_either_side_are_refused_by_name():
    some = {f"double_blocks.0.img_attn_{x}.weight": torch.zeros(2, 2) for x in "qwxyz"}
    with pytest.raises(InputError) as refused:
        to_diffusers(some, TRANSFORMER_MAP)
    assert str(refused.value) == (
        "tensors that the official layout does not have: double_blocks.0.img_attn_w.weight, "
        "double_blocks.0.img_attn_x.weight, double_blocks.0.img_attn_y.weight and 1 more"
    )
    with pytest.raises(InputError, match=r"^tensors that the diffusers layout does not have: img_in.proj.weight$"):
        to_official({"img_in.proj.weight": torch.zeros(2)}, TRANSFORMER_MAP)
    with pytest.raises(InputError, match=r"layout does not have: decoder.up.0.block.0.conv3.conv.weight$"):
        to_diffusers({"decoder.up.0.block.0.conv3.conv.weight": torch.zeros(2)}, VAE_MAP)


@pytest.mark.parametrize("given", ["q", "k", "qv"])
def test_parts_of_a_fused_tensor_without_the_others_are_refused(given):
    prefix = "context_embedder.token_refiner.refiner_blocks.0.attn."
    absent = ", ".join(f"{prefix}to_{x}.weight" for x in "qkv" if x not in given)
    with pytest.raises(
        InputError, match=f"^{re.escape(f'tensors missing beside those that they are fused with: {absent}')}$"
    ):
        to_official({f"{prefix}to_{x}.weight": torch.zeros(2, 2) for x in given}, TRANSFORMER_MAP)


@pytest.mark.parametrize(
    ("name", "rows", "parts"),
    [
        ("txt_in.individual_token_refiner.blocks.0.self_attn_qkv.weight", 4, 3),
        ("final_layer.adaLN_modulation.1.weight", 3, 2),
    ],
)
def test_a_fused_tensor_that_does_not_split_evenly_is_refused(name, rows, parts):
    with pytest.raises(InputError, match=rf"{name} has shape \[{rows}, 2\]; it holds {parts} equal parts"):
        to_diffusers({name: torch.zeros(rows, 2)}, TRANSFORMER_MAP)


def test_the_mapped_vae_gives_the_official_numbers(golden_folder):
    vae = golden_vae(golden_folder)
    weights = to_diffusers(golden_weights(golden_folder / "vae_shapes.json"), VAE_MAP)
    vae.load_state_dict(weights, assign=True)
    golden = load_file(golden_folder / "vae_5x7.safetensors")
    with torch.no_grad():
        decoded = vae.decoder(golden["latents"])
        # The posterior's mode is its mean, the first half of the channels.
        encoded = vae.encoder(golden["image"]).chunk(2, dim=1)[0]
    for ours, theirs in ((decoded, golden["decoded"]), (encoded, golden["encoded_mode"])):
        assert (ours - theirs).norm() / theirs.norm() < 1e-4
