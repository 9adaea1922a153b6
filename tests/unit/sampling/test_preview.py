"""Colours from latents."""

import json

import numpy as np
import pytest
import torch

from hunyuan_staged.errors import InputError
from hunyuan_staged.sampling import preview


def drawn(channels: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents [1, C, 3, 5, 6] and factors [C + 1, 3] whose colours stay inside [-1, 1]."""
    draw = torch.Generator().manual_seed(0)
    return torch.randn(1, channels, 3, 5, 6, generator=draw), torch.randn(channels + 1, 3, generator=draw) * 0.05


def colors_of(latents: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    return torch.einsum("cthw,cr->thwr", latents[0], factors[:-1]) + factors[-1]


def test_the_estimate_undoes_the_noise():
    clean, noise = torch.randn(2, 1, 4, 2, 3, 3)
    sigma = 0.3
    assert torch.allclose(
        preview.clean_estimate((1 - sigma) * clean + sigma * noise, noise - clean, sigma), clean, atol=1e-6
    )


def test_a_frame_for_each_latent_frame_in_its_colours():
    latents = torch.zeros(1, 2, 2, 3, 4)
    latents[:, 0, 1] = 1
    frames = preview.preview_frames(latents, [[0.5, 0, 0], [9, 9, 9], [0, 0.25, -1]])
    assert frames.shape == (2, 3 * preview.SCALE, 4 * preview.SCALE, 3) and frames.dtype == np.uint8
    assert (frames[0] == [128, 159, 0]).all()
    assert (frames[1] == [191, 159, 0]).all()


def test_factors_are_found_again():
    latents, factors = drawn()
    colors = colors_of(latents, factors)
    later = colors[1:].repeat_interleave(4, dim=0)  # four frames of each latent frame but the first
    large = torch.cat([colors[:1], later]).repeat_interleave(16, dim=1).repeat_interleave(16, dim=2)
    frames = large.add(1).mul(127.5).round().byte().numpy()
    found, explained = preview.fit_factors(latents, frames)
    assert torch.allclose(torch.tensor(found), factors, atol=3e-3)  # 8 bits
    assert explained > 0.999


def test_factors_of_a_vae_lie_in_its_folder(tmp_path):
    assert preview.load_factors(tmp_path) is preview.PUBLISHED
    _, factors = drawn()
    preview.save_factors(tmp_path / preview.FACTORS_FILE, factors.tolist())
    assert torch.allclose(torch.tensor(preview.load_factors(tmp_path)), factors, atol=1e-5)
    assert np.shape(preview.PUBLISHED) == (33, 3)


@pytest.mark.parametrize("content", ["{", "[1, 2]", "[[1, 2]]", '[["a", 1, 2]]', "[[1, 2, NaN]]", "[[1,2,3],[1]]"])
def test_a_broken_table_is_refused_by_name(tmp_path, content):
    path = tmp_path / preview.FACTORS_FILE
    path.write_text(content)
    with pytest.raises(InputError, match=str(path)):
        preview.load_factors(tmp_path)


def test_factors_of_another_vae_are_refused():
    with pytest.raises(InputError, match=r"preview factors are \[33, 3\]; 4 latent channels need one more row"):
        preview.preview_frames(drawn()[0], preview.PUBLISHED)


def test_json_holds_plain_rows(tmp_path):
    preview.save_factors(tmp_path / "f.json", [[0.123456789, 0, 1]])
    assert json.loads((tmp_path / "f.json").read_text()) == [[0.12346, 0, 1]]
