"""--preset: its flags, how a flag that is given stands in their place, and a run with one."""

import json
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from folders import embed
from forked import run_stage

from hunyuan_staged import presets
from hunyuan_staged.errors import InputError
from hunyuan_staged.files.tensors import load_latents
from hunyuan_staged.options import DenoiseOptions
from hunyuan_staged.pipeline.settings import apply_preset
from hunyuan_staged.versions import parse_version

BASE = parse_version("720p_t2v")


def applied(version=BASE, **flags) -> DenoiseOptions:
    options = DenoiseOptions(**flags)
    options.check()
    return apply_preset(options, version)


def test_the_steps_that_are_computed():
    assert presets.computed_steps(((0.2, 1), (0.5, 2), (1.0, 3)), 10) == [0, 1, 2, 4, 6, 9]
    assert presets.computed_steps(((0.2, 1), (1.0, 3)), 10) == [0, 1, 2, 5, 8, 9], "the last one, too"
    for name, preset in presets.PRESETS.items():
        for own in (30, 50):
            steps = round(preset.steps * own)
            found = presets.computed_steps(preset.computed, steps) if preset.computed else list(range(steps))
            gaps = [after - before for before, after in pairwise(found)]
            least = {"draft": 5, "fast": 3, "balanced": 2, "exact": 1}[name]
            assert own / len(found) >= least and max(gaps) <= 3 and found[:2] == [0, 1], name


def test_a_preset_fills_in_what_is_not_given():
    balanced = applied(preset="balanced")
    assert balanced.enable_cache and balanced.cache_type == "teacache" and balanced.num_inference_steps is None
    assert balanced.cache_steps.startswith("0,1,2,3,4,5,7,9,11,13,")
    assert applied(preset="draft").num_inference_steps == 10 and applied(preset="fast").num_inference_steps == 16
    assert applied(preset="draft", num_inference_steps=20).num_inference_steps == 20
    assert applied(preset="balanced", num_inference_steps=8).cache_steps == "0,1,3,6,7"
    assert applied(preset="balanced", cache_type="taylorcache").cache_steps == balanced.cache_steps
    assert applied(preset="balanced", cache_steps="0-9").cache_steps == "0-9"
    own = applied(preset="balanced", cache_step_interval=3)
    assert (own.enable_cache, own.cache_steps, own.cache_step_interval) == (True, None, 3)
    adapts = applied(preset="balanced", cache_type="firstblock")
    assert (adapts.enable_cache, adapts.cache_steps, adapts.cache_type) == (True, None, "firstblock")
    without = applied(preset="balanced", disable_cache=True)
    assert (without.enable_cache, without.cache_steps) == (False, None)
    for name in (None, "exact"):
        assert applied(preset=name) == DenoiseOptions(preset=name)


@pytest.mark.parametrize(
    ("flags", "version", "message"),
    [
        ({"preset": "fast"}, "480p_t2v_step_distilled", "--preset fast is for weights of many steps"),
        ({"preset": "fast", "four_steps": True}, "480p_t2v_distilled", "--preset fast is for weights of many steps"),
        ({"cache_steps": "0-3"}, "480p_t2v", "--cache_steps needs --enable_cache"),
        ({"preset": "balanced", "cache_steps": "1-3"}, "480p_t2v", "--cache_steps 1-3 lacks step 0"),
        (
            {"preset": "balanced", "cache_steps": "0,x"},
            "480p_t2v",
            "--cache_steps 'x' is neither a step nor FIRST-LAST",
        ),
        (
            {"preset": "balanced", "cache_type": "magcache", "cache_steps": "0-3"},
            "480p_t2v",
            "--cache_steps belongs to --cache_type deepcache, teacache, taylorcache, not to magcache",
        ),
        (
            {"preset": "balanced", "cache_steps": "0-3", "cache_step_interval": 3},
            "480p_t2v",
            "--cache_steps chooses the steps, and so does --cache_step_interval",
        ),
        (
            {"preset": "balanced", "disable_cache": True, "cache_steps": "0"},
            "480p_t2v",
            "--cache_steps needs --enable_cache",
        ),
    ],
)
def test_refusals(flags, version, message):
    with pytest.raises(InputError) as error:
        applied(parse_version(version), **flags)
    assert message in str(error.value)


def test_a_command_line_is_shown_for_a_version():
    assert presets.described("exact", 50) == ""
    assert presets.described("draft", 30) == "--num_inference_steps 6"
    assert presets.described("balanced", 30) == (
        "--enable_cache --cache_type teacache --cache_steps 0,1,2,3,5,7,9,11,14,17,20,23,25,27,29"
    )


def test_a_run_records_its_preset_and_equals_its_flags(tiny_official, tmp_path):
    inputs = embed(tmp_path / "inputs", tiny_official)
    args = ["--input_dir", inputs, "--video_length", 5, "--num_inference_steps", 8]
    outcomes = {
        "exact": ["--preset", "exact"],
        "plain": [],
        "balanced": ["--preset", "balanced"],
        "flags": ["--enable_cache", "--cache_type", "teacache", "--cache_steps", "0,1,3,6,7"],
    }
    found = {}
    for name, more in outcomes.items():
        status, said = run_stage(2, *args, *more, "--output_dir", tmp_path / name, said=tmp_path / "said")
        assert status == 0, said
        latents, metadata = load_latents(tmp_path / name)
        config = json.loads((tmp_path / name / "generation_config.json").read_text())
        found[name] = SimpleNamespace(latents=latents, metadata=metadata, config=config, said=said)
    assert torch.equal(found["exact"].latents, found["plain"].latents)
    assert torch.equal(found["balanced"].latents, found["flags"].latents)
    assert not torch.equal(found["balanced"].latents, found["plain"].latents)
    balanced = found["balanced"]
    assert (
        balanced.metadata["preset"] == "balanced" == balanced.config["preset"]
        and "preset" not in found["plain"].metadata
    )
    assert "preset balanced" in balanced.said and "teacache: 5 steps computed, 3 reused" in balanced.said
    made_from = [found[name].metadata["made_from_sha256"] for name in ("balanced", "flags")]
    assert made_from[0] == made_from[1], "the same run, whatever it is called"
