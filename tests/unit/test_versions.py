"""Versions, defaults and size buckets."""

import json

import pytest

from hunyuan_staged import geometry, versions
from hunyuan_staged.errors import InputError


def test_sizes_are_the_official_ones(golden_folder):
    golden = json.loads((golden_folder / "sizes_height_width.json").read_text())
    for name, size in golden.items():
        resolution, ratio = name.split()
        assert list(geometry.size_for_ratio(resolution, ratio)) == size, name
    assert len(golden) == 36


@pytest.mark.parametrize(
    ("width", "height", "size"),
    [(120, 145, (704, 576)), (330, 253, (544, 720)), (1280, 720, (480, 848)), (720, 1280, (848, 480))],
)
def test_ratios_of_buckets_have_five_digits_as_in_the_official_code(width, height, size):
    """Two images that unrounded ratios would give another bucket, and two that they would not."""
    assert geometry.nearest_size("480p", height / width) == size


@pytest.mark.parametrize(
    ("resolution", "ratio", "size"),
    [
        ("720p", "16:9", (720, 1280)),
        ("480p", "16:9", (480, 848)),
        ("demo", "16:9", (96, 160)),
        ("demo", "1:1", (128, 128)),
    ],
)
def test_sizes(resolution, ratio, size):
    assert geometry.size_for_ratio(resolution, ratio) == size


@pytest.mark.parametrize("ratio", ["16x9", "16:9:4", "0:1", "-16:9", "a:b", "", "inf:1", "nan:1"])
def test_a_bad_ratio_is_named(ratio):
    with pytest.raises(InputError, match="is not width:height with two positive numbers"):
        geometry.size_for_ratio("720p", ratio)


@pytest.mark.parametrize(
    ("name", "guidance", "shift", "steps"),
    [
        ("480p_t2v", 6, 5, 50),
        ("480p_i2v", 6, 5, 50),
        ("720p_t2v", 6, 9, 50),
        ("720p_i2v", 6, 7, 50),
        ("480p_t2v_distilled", 1, 5, 50),
        ("480p_i2v_distilled", 1, 5, 50),
        ("720p_t2v_distilled", 1, 9, 50),
        ("720p_t2v_distilled_sparse", 1, 9, 50),
        ("720p_i2v_distilled_sparse", 1, 7, 50),
        ("480p_i2v_step_distilled", 1, 7, 12),
    ],
)
def test_guidance_shift_and_steps_follow_the_version(name, guidance, shift, steps):
    version = versions.parse_version(name)
    assert version.name == name
    assert (version.guidance_scale, version.flow_shift, version.num_inference_steps) == (guidance, shift, steps)
    assert version.use_meanflow == ("step" in name)
    assert version.video_length == 121


def test_sparse_implies_distilled():
    assert versions.make_version("720p", "t2v", sparse=True).name == "720p_t2v_distilled_sparse"


@pytest.mark.parametrize("name", ["720p", "720p_v2v", "720p_t2v_step", "720p_t2v_step_distilled_sparse", "720p_t2v_x"])
def test_an_unknown_version_is_refused_by_name(name):
    with pytest.raises(InputError, match=f"transformer version '{name}' is not of the form"):
        versions.parse_version(name)


def test_exclusive_choices_are_refused():
    with pytest.raises(InputError, match="step-distilled weights exclude"):
        versions.make_version("480p", "i2v", step_distilled=True, sparse=True)
    with pytest.raises(InputError, match="resolution '999p' is unknown; known: demo, 360p, 480p, 720p, 1080p"):
        versions.make_version("999p", "i2v")


@pytest.mark.parametrize("frames", [1, 5, 33, 49, 121])
def test_video_lengths(frames):
    assert geometry.check_video_length(frames) == frames


@pytest.mark.parametrize(("frames", "nearest"), [(120, "117 and 121"), (0, "1 and 5"), (-3, "1 and 5"), (2, "1 and 5")])
def test_a_bad_video_length_names_the_nearest(frames, nearest):
    with pytest.raises(InputError, match=rf"--video_length {frames} is not 4n\+1; the nearest are {nearest}"):
        geometry.check_video_length(frames)


def test_latent_shape_of_720p():
    assert geometry.latent_shape(121, 720, 1280, 32) == (1, 32, 31, 45, 80)


def test_settings_that_a_version_was_not_made_for_are_named():
    base, distilled = versions.parse_version("720p_t2v"), versions.parse_version("480p_t2v_distilled")
    step = versions.parse_version("480p_i2v_step_distilled")
    assert base.warnings(6.0, 50) == [] and distilled.warnings(1.0, 50) == [] and step.warnings(1.0, 8) == []
    assert base.warnings(1.0, 50) == ["720p_t2v needs guidance: --guidance_scale 6 is right, not 1"]
    assert distilled.warnings(6.0, 50) == [
        "480p_t2v_distilled has guidance distilled into it: --guidance_scale 1 is right, not 6"
    ]
    assert step.warnings(1.0, 50) == ["480p_i2v_step_distilled was made for 8 or 12 steps, not 50"]
