"""Colours from latents, the factors of a VAE, and what writes previews beside the loop."""

import json
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hunyuan_staged.errors import InputError
from hunyuan_staged.files import contract
from hunyuan_staged.files.video import read_video
from hunyuan_staged.runtime.progress import Reporter
from hunyuan_staged.runtime.signals import Interrupted
from hunyuan_staged.sampling import preview, preview_factors, preview_writer, schedule
from hunyuan_staged.sampling.callbacks import AfterStep, active
from hunyuan_staged.sampling.preview_factors import FittedFactors

CPU = torch.device("cpu")


def drawn(channels: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents [1, C, 3, 5, 6] and factors [C + 1, 3] whose colours stay inside [-1, 1]."""
    draw = torch.Generator().manual_seed(0)
    return torch.randn(1, channels, 3, 5, 6, generator=draw), torch.randn(channels + 1, 3, generator=draw) * 0.05


def decoded(latents: torch.Tensor, factors: torch.Tensor) -> np.ndarray:
    """Frames that a linear VAE would decode latents to."""
    colors = torch.einsum("cthw,cr->thwr", latents[0], factors[:-1]) + factors[-1]
    later = colors[1:].repeat_interleave(4, dim=0)  # four frames of each latent frame but the first
    large = torch.cat([colors[:1], later]).repeat_interleave(16, dim=1).repeat_interleave(16, dim=2)
    return large.add(1).mul(127.5).round().byte().numpy()


def test_the_estimate_undoes_the_noise():
    clean, noise = torch.randn(2, 1, 4, 2, 3, 3)
    sigma = 0.3
    noisy = (1 - sigma) * clean + sigma * noise
    assert torch.allclose(schedule.clean_estimate(noisy, noise - clean, sigma), clean, atol=1e-6)


def test_a_frame_for_each_latent_frame_in_its_colours():
    latents = torch.zeros(1, 2, 2, 3, 4)
    latents[:, 0, 1] = 1
    latents[:, 1, 0, 0, 0] = torch.nan
    weights = preview.as_weights([[0.5, 0, 0], [9, 9, 9], [0, 0.25, -1]], 2, CPU)
    frames = preview.frames_of(preview.colors(latents, weights))
    assert frames.shape == (2, 3 * preview.SCALE, 4 * preview.SCALE, 3) and frames.dtype == np.uint8
    assert (frames[0, 2 * preview.SCALE :] == [128, 159, 0]).all() and (frames[0, 0, 0] == 128).all()
    assert (frames[1] == [191, 159, 0]).all()


def test_factors_are_found_again_from_several_clips():
    latents, factors = drawn()
    clips = [preview.moments(x, decoded(x, factors)) for x in (latents, latents.flip(2), -latents)]
    found, explained = preview.fit_factors(clips)
    assert torch.allclose(torch.tensor(found), factors, atol=3e-3)  # 8 bits
    assert 0.999 < explained < 1


def test_the_share_is_that_of_frames_left_out():
    """Of noise nothing can be foretold, however well as many factors as there are numbers fit it."""
    latents, _ = drawn(16)
    noise = np.random.default_rng(0).integers(0, 256, (9, 5, 6, 3), dtype=np.uint8)
    assert preview.fit_factors([preview.moments(latents, noise)])[1] < 0.1


def test_neighbours_count_where_a_latent_alone_tells_too_little():
    """A VAE whose colours come from the latent to the left, at the edge from the one there."""
    draw = torch.Generator().manual_seed(1)
    latents, factors = torch.randn(1, 2, 9, 8, 8, generator=draw), drawn(2)[1]
    shifted = torch.cat([latents[..., :1], latents[..., :-1]], dim=-1)
    found, explained = preview.fit_factors([preview.moments(latents, decoded(shifted, factors))])
    assert len(found) == 19 and explained > 0.99
    by_left = torch.tensor(found)[:-1].unflatten(0, (9, 2))
    assert torch.allclose(by_left[3], factors[:2], atol=3e-3)
    assert by_left[[0, 1, 2, 4, 5, 6, 7, 8]].abs().max() < 3e-3
    colors = preview.colors(latents, preview.as_weights(found, 2, CPU))
    expected = preview.colors(shifted, preview.as_weights(factors.tolist(), 2, CPU))
    assert torch.allclose(colors, expected, atol=0.02)


def test_a_single_frame_is_fitted_too():
    latents, factors = drawn(2)
    found, explained = preview.fit_factors([preview.moments(latents[:, :, :1], decoded(latents[:, :, :1], factors))])
    assert torch.allclose(torch.tensor(found), factors, atol=3e-3) and explained > 0.999


def test_frames_that_are_not_those_of_the_latents_are_refused():
    latents, factors = drawn()
    with pytest.raises(ValueError, match="8 frames do not belong to 3 latent frames"):
        preview.moments(latents, decoded(latents, factors)[:8])


def test_factors_are_read_as_written(tmp_path):
    _, factors = drawn()
    path = tmp_path / "factors.json"
    preview_factors.save(path, FittedFactors("abc", 0.91234567, factors.tolist()))
    found = preview_factors.load(path)
    assert torch.allclose(torch.tensor(found.factors), factors, atol=1e-5)
    assert (found.vae, found.explained) == ("abc", 0.9123)
    assert json.loads(path.read_text()).keys() == {"vae", "explained", "factors"}
    assert np.shape(preview_factors.PUBLISHED) == (33, 3)


@pytest.mark.parametrize(
    "factors", ["{", "[1, 2]", "[]", "[[1, 2]]", '[["a", 1, 2]]', "[[1, 2, NaN]]", "[[1,2,3],[1]]", "[[1e9,0,0]]", None]
)
def test_a_broken_table_is_refused_by_name(tmp_path, factors):
    path = tmp_path / "factors.json"
    path.write_text(f'{{"vae": "a", "explained": 1, "factors": {factors}}}' if factors else "[]")
    with pytest.raises(InputError, match=f"{path}.*remove it, or fit them anew"):
        preview_factors.load(path)


def test_factors_for_other_channels_are_refused():
    allowed = "4 latent channels need 5 rows, or 37 with their neighbours"
    with pytest.raises(InputError, match=rf"preview factors are \[33, 3\]; {allowed}"):
        preview.as_weights(preview_factors.PUBLISHED, 4, CPU)


# Beside the loop


class Told(Reporter):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def warn(self, text: str) -> None:
        self.lines.append(text)


WEIGHTS = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])  # of one channel: grey


def run(folder: Path, *, every: int, steps: int, error: BaseException | None = None, told: Reporter | None = None):
    """A loop of grey latents, brighter with each step; the brightness of the picture after each."""
    seen = []
    writer = preview_writer.PreviewWriter(folder, WEIGHTS, fps=6, every=every, report=told or Told())
    with active([writer]) as after_step:
        for index in range(steps):
            latents = torch.full((1, 1, 3, 5, 6), index / 10)
            after_step(AfterStep(index, latents, lambda latents=latents: latents))
            if writer._writing:
                writer._writing.result()  # so that none is left out
            seen.append(brightness(folder))
        if error:
            raise error
    return seen


def brightness(folder: Path) -> int | None:
    path = folder / contract.PREVIEW_PICTURE
    return int(np.asarray(Image.open(path)).mean()) if path.is_file() else None


def grey(step: int) -> int:
    """Of the preview after so many steps."""
    return round(((step - 1) / 10 + 1) * 127.5)


def test_a_preview_every_two_steps_and_one_after_the_last(tmp_path):
    assert run(tmp_path, every=2, steps=5) == [None, grey(2), grey(2), grey(4), grey(4)]
    assert brightness(tmp_path) == grey(5)
    frames, fps = read_video(tmp_path / contract.PREVIEW_VIDEO)
    assert frames.shape == (3, 40, 48, 3) and fps == 6
    assert abs(frames.mean() - grey(5)) < 2
    assert {path.name for path in tmp_path.iterdir()} == {contract.PREVIEW_VIDEO, contract.PREVIEW_PICTURE}
    preview_writer.remove(tmp_path)
    preview_writer.remove(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_is_stopped_leaves_the_preview_of_its_last_step(tmp_path):
    with pytest.raises(Interrupted):
        run(tmp_path, every=0, steps=3, error=Interrupted(signal.SIGTERM))
    assert brightness(tmp_path) == grey(3)


def test_a_run_that_fails_shows_nothing_of_its_last_step(tmp_path):
    with pytest.raises(InputError):
        run(tmp_path, every=2, steps=3, error=InputError("NaN"))
    assert brightness(tmp_path) == grey(2)


def test_a_step_does_not_wait_for_the_preview_before(tmp_path, monkeypatch):
    """While one is being written the next ones are left out; the last one is written all the same."""
    free, written, write = threading.Event(), [], preview_writer.PreviewWriter._write

    def slow(self, colors, event):
        written.append(round(colors.mean().item(), 1))
        assert free.wait(60)
        return write(self, colors, event)

    monkeypatch.setattr(preview_writer.PreviewWriter, "_write", slow)
    writer = preview_writer.PreviewWriter(tmp_path, WEIGHTS, fps=6, every=1)
    with active([writer]) as after_step:
        for index in range(4):
            latents = torch.full((1, 1, 1, 5, 6), index / 10)
            after_step(AfterStep(index, latents, lambda latents=latents: latents))
        free.set()
    assert written == [0.0, 0.3]
    assert brightness(tmp_path) == grey(4)


def test_what_cannot_be_written_is_told_once_and_the_run_goes_on(tmp_path):
    (tmp_path / contract.PREVIEW_VIDEO / "x").mkdir(parents=True)
    told = Told()
    assert run(tmp_path, every=1, steps=4, told=told) == [None] * 4
    (line,) = told.lines
    assert line.startswith("the preview could not be written: cannot write") and contract.PREVIEW_VIDEO in line
