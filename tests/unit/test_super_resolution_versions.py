"""Versions of super resolution and all their sizes."""

import json

import pytest

from hunyuan_staged.errors import InputError
from hunyuan_staged.geometry import enlarged_size
from hunyuan_staged.versions import SUPER_RESOLUTION, super_resolution_chain, super_resolution_version


@pytest.mark.parametrize(("resolution", "count"), [("720p", 121), ("1080p", 181)])
def test_all_sizes_are_the_official_ones(golden_folder, resolution, count):
    version = super_resolution_version(resolution)
    pairs = json.loads((golden_folder / "sr_sizes_height_width.json").read_text())[version.name]
    assert len(pairs) == count
    assert [list(enlarged_size(version.base, resolution, *pair[:2])) for pair in pairs] == [pair[2:] for pair in pairs]


def test_a_size_of_another_resolution_is_refused():
    with pytest.raises(InputError, match="848x480 is no size of 720p, from which super resolution to 1080p starts"):
        enlarged_size("720p", "1080p", 480, 848)


def test_versions_and_chains():
    settings = {
        name: (v.base, v.num_inference_steps, v.flow_shift, v.guidance_scale, v.use_meanflow)
        for name, v in SUPER_RESOLUTION.items()
    }
    assert settings["720p"] == ("480p", 6, 2.0, 1.0, True)
    assert settings["1080p"] == ("720p", 8, 2.0, 1.0, True)
    assert [v.resolution for v in super_resolution_chain("480p", "1080p")] == ["720p", "1080p"]
    assert [v.resolution for v in super_resolution_chain("720p", "1080p")] == ["1080p"]
    with pytest.raises(InputError, match="to '4k' does not exist; allowed: 720p, 1080p, demo_hd"):
        super_resolution_chain("720p", "4k")
    with pytest.raises(InputError, match="to 720p does not start from 720p; allowed: 1080p"):
        super_resolution_chain("720p", "720p")
    with pytest.raises(InputError, match="to 720p does not start from 360p; allowed: none"):
        super_resolution_chain("360p", "720p")
