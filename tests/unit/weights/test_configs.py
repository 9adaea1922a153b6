"""Official configs as diffusers' arguments, and those that are refused by name."""

import re

import pytest

from hunyuan_staged.errors import InputError
from hunyuan_staged.weights import configs


def official_config() -> dict:
    return {
        "in_channels": 32,
        "out_channels": 32,
        "hidden_size": 128,
        "heads_num": 4,
        "mm_double_blocks_depth": 3,
        "mlp_width_ratio": 4.0,
        "patch_size": [1, 2, 2],
        "rope_dim_list": [8, 12, 12],
        "rope_theta": 256,
        "text_states_dim": 48,
        "vision_states_dim": 40,
        "use_meanflow": False,
        "ideal_resolution": "720p",
        "ideal_task": "i2v",
    }


def test_an_official_config_becomes_diffusers_arguments():
    assert configs.official_transformer_config(official_config(), 1472) == {
        "in_channels": 65,
        "out_channels": 32,
        "num_attention_heads": 4,
        "attention_head_dim": 32,
        "num_layers": 3,
        "mlp_ratio": 4.0,
        "patch_size_t": 1,
        "patch_size": 2,
        "rope_axes_dim": (8, 12, 12),
        "rope_theta": 256,
        "text_embed_dim": 48,
        "text_embed_2_dim": 1472,
        "image_embed_dim": 40,
        "use_meanflow": False,
        "target_size": 960,
        "task_type": "i2v",
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"mm_single_blocks_depth": 20},
            "c.json: mm_single_blocks_depth is 20; this suite runs mm_single_blocks_depth = 0 only",
        ),
        ({"guidance_embed": True}, "c.json: guidance_embed is True; this suite runs guidance_embed = False only"),
        (
            {"concat_condition": False},
            "c.json: in_channels 32 with concat_condition False is an input of 32 channels; this suite runs 65 and 98 only",
        ),
        ({"ideal_resolution": "8k"}, "c.json: ideal_resolution is '8k'; known: demo, 360p, 480p, 720p, 1080p, demo_hd"),
    ],
)
def test_a_transformer_that_this_suite_does_not_run_is_refused_by_name(change, message):
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        configs.official_transformer_config(official_config() | change, 1472, "c.json")


@pytest.mark.parametrize("key", ["hidden_size", "heads_num", "ideal_resolution", "patch_size"])
def test_a_key_that_a_config_lacks_is_named(key):
    config = official_config()
    del config[key]
    with pytest.raises(InputError, match=f"^c.json lacks: {key}$"):
        configs.official_transformer_config(config, 1472, "c.json")


def test_keys_that_a_config_lacks_have_the_official_classs_defaults():
    """Whose rope_dim_list is that of heads of 128."""
    config = official_config() | {"hidden_size": 512}
    for key in ("use_meanflow", "rope_theta", "rope_dim_list", "ideal_task"):
        del config[key]
    arguments = configs.official_transformer_config(config, 1472)
    assert {name: arguments[name] for name in ("use_meanflow", "rope_theta", "rope_axes_dim", "task_type")} == {
        "use_meanflow": False,
        "rope_theta": 256,
        "rope_axes_dim": (16, 56, 56),
        "task_type": None,
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tile_size": [6, 8, 8], "win_size": [[3, 3, 3]], "ssta_topk": 64, "ssta_lambda": 0.7}, None),
        ({"win_size": [3, 3, 3]}, None),
        ({"tile_size": [4, 8, 8]}, "c.json: attn_param's 'tile_size' is [4, 8, 8]; allowed is [6, 8, 8]"),
        ({"ssta_topk": 32}, "c.json: attn_param's 'ssta_topk' is 32; allowed is 64"),
        (
            {"threshold": 0.1},
            "c.json: attn_param's 'threshold' is 0.1; allowed is tile_size, win_size, ssta_topk, ssta_lambda",
        ),
        (7, "c.json: attn_param is 7; allowed is an object, or null"),
    ],
)
def test_a_sparse_attention_other_than_ours_is_refused(given, message):
    config = official_config() | {"attn_param": given}
    if message is None:
        assert configs.official_transformer_config(config, 1472) == configs.official_transformer_config(
            official_config(), 1472
        )
        return
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        configs.official_transformer_config(config, 1472, "c.json")


def test_a_vae_with_a_shift_is_refused():
    with pytest.raises(InputError, match=r"^c.json: shift_factor is 0.5; this suite runs none$"):
        configs.official_vae_config({"shift_factor": 0.5}, "c.json")
