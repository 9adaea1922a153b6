"""The demo's super resolution: large drawings, and the training's forward against stage 2's own."""

import json
import random

import pytest
import torch
import torch.nn.functional as F

from hunyuan_staged.attention.choose import choose_attention
from hunyuan_staged.demo import CHECKPOINT, checkpoint_writer, scenes, super_resolution, tiny, train
from hunyuan_staged.models.embeddings import Conditioning
from hunyuan_staged.models.transformer import Transformer
from hunyuan_staged.sampling import conditions, loop
from hunyuan_staged.sampling.schedule import flow_sigmas

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", ["single", "pair", "card"])
def test_a_large_clip_shows_the_same_scene(kind):
    scene = scenes.draw_scene(random.Random(3), kind)
    small, large = (scenes.render([scene], scale=scale) for scale in (1, 2))
    assert large.shape[3:] == (2 * scenes.HEIGHT, 2 * scenes.WIDTH)
    shrunk = F.avg_pool3d(large, (1, 2, 2))
    assert (shrunk - small).abs().mean() < 0.01
    # Its edges are as sharp: what lies between two colours is one pixel wide there, too.
    assert super_resolution.psnr(super_resolution.bicubic(small), large) < 46


def test_a_batch_in_training_is_enlarged_as_stage_2_enlarges_each_clip():
    """Two clips, the second with its first frame given: the upsampler, the noise, the condition, all steps."""
    enlarger = super_resolution.build(CPU)
    grid = (2, 4, 4)
    enlarger = super_resolution.Enlarger(enlarger.upsampler, enlarger.transformer, grid).eval().requires_grad_(False)
    tiny.draw_weights(enlarger.transformer, "transformer")
    draw = torch.Generator().manual_seed(0)
    low, high, *noise = (torch.randn(2, 32, *size, generator=draw) for size in ((2, 2, 2), grid, grid, grid))
    texts = {
        name: torch.randn(2, count, width, generator=draw)
        for name, count, width in (("language", 6, 128), ("glyphs", 4, 64), ("images", 3, 64))
    }
    lengths = {"language": (4, 6), "glyph": (0, 3)}
    for name, counts in lengths.items():
        words = texts["language" if name == "language" else "glyphs"]
        texts[f"{name}_mask"] = torch.arange(words.shape[1]) < torch.tensor(counts)[:, None]
    given = torch.tensor([False, True])
    image = train.image_condition(high, given)
    made, _ = enlarger(low, texts, (noise[0], noise[1]), image, given)

    attention = choose_attention("torch", CPU, torch.float32, head_width=32)
    forward = Transformer(enlarger.transformer, attention, grid)
    for row in range(2):
        one = slice(row, row + 1)
        upsampled = conditions.upsample_latents(enlarger.upsampler, low[one], 4, 4, torch.float32)
        channels = conditions.condition_channels(noise[0][one], high[one, :, :1] if given[row] else None)
        condition = conditions.LowResolutionCondition(channels, conditions.augment(upsampled, noise[1][one]))
        branch = Conditioning(
            texts["language"][one, : lengths["language"][row]],
            texts["glyphs"][one, : lengths["glyph"][row]],
            texts["images"][one] if given[row] else torch.zeros(1, 0, 0),
        )
        sigmas = flow_sigmas(6, 2.0)
        wanted = loop.denoise(forward, noise[0][one], condition, [branch], sigmas, loop.Sampling(use_meanflow=True))
        assert (made[one] - wanted).norm() / wanted.norm() < 1e-5


def test_windows_are_cut_where_they_begin_and_count_where_the_picture_was_not_cut():
    side, ratio = super_resolution.CROP, 16
    picture = torch.arange(12 * 20.0).view(1, 1, 1, 12, 20).expand(2, -1, -1, -1, -1)
    top, left = torch.tensor([0, 6]), torch.tensor([3, 14])
    for x in (picture, picture.byte()):
        windows = super_resolution.cut(x, top, left, side)
        assert torch.equal(windows[0], x[0, :, :, :side, 3 : 3 + side])
        assert torch.equal(windows[1], x[1, :, :, 6:, 14:])
    weights = super_resolution.inner(top, left, (12, 20))
    assert weights.shape == (2, 1, 1, side * ratio, side * ratio)
    first = weights[0, 0, 0]
    assert first[0, ratio] == 1 and first[-ratio, ratio] == 0 and first[0, ratio - 1] == 0 and first[0, -1] == 0
    assert weights[1, 0, 0, -1, -1] == 1 and weights[1, 0, 0, ratio - 1, -1] == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--video_length", "6"], "--video_length 6 is not 4n + 1 from 1 to 33"),
        (["--windows", "0"], "--windows 0 is not a positive number"),
    ],
)
def test_what_cannot_be_judged_is_refused_in_one_line(capsys, flags, message):
    assert super_resolution.main(["--model_path", str(CHECKPOINT), "--judge", *flags]) == 2
    assert message in capsys.readouterr().err


def test_judging_measures_the_checkpoints_own_parts_and_trains_nothing(tmp_path, capsys):
    parts = super_resolution.build(CPU)
    version = super_resolution.super_resolution_version(super_resolution.RESOLUTION)
    _, config = tiny.build_enlarger(super_resolution.SIZES, version)
    checkpoint_writer.save_super_resolution(
        tmp_path, version, (parts.transformer, parts.upsampler, config), torch.bfloat16
    )
    for name in ("text_encoder", "vision_encoder", "vae", "transformer/demo_t2v"):
        (tmp_path / name).symlink_to(CHECKPOINT / name)
    before = sorted(tmp_path.rglob("*"))
    flags = ["--judge", "--clips", "1", "--video_length", "1", "--sheet", str(tmp_path / "sheet.png")]
    assert super_resolution.main(["--model_path", str(tmp_path), *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line).get("phase") for line in lines] == ["measure", None]
    found = json.loads(lines[-1])
    assert (found["clips"], found["frames"], len(found["gains"])) == (1, 1, 1)
    assert found["all"] == found["shapes"], "the first that is held out"
    assert found["all"]["super_resolution"] < found["all"]["bicubic"] < found["all"]["decoded_large"]
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "sheet.png"])


def test_a_sheet_has_three_pictures_in_a_row(tmp_path):
    from PIL import Image

    pictures = [torch.full((3, 4, 8), value) for value in (-1.0, 0.0, 1.0, 1.0, -1.0, 0.0)]
    super_resolution.write_sheet(tmp_path / "sheet.png", pictures)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (3 * 8 + 2 * 6, 2 * 4 + 6)
        assert [sheet.getpixel(place) for place in ((0, 0), (14, 0), (28, 0), (14, 10))] == [
            (value,) * 3 for value in (0, 128, 255, 0)
        ]
