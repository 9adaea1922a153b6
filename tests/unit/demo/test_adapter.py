"""The demo's adapter: what it is taught, how it is trained and saved, and what the one that ships does."""

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from hunyuan_staged.attention.choose import choose_attention
from hunyuan_staged.demo import ADAPTER, CHECKPOINT, adapter, evaluate, scenes, train
from hunyuan_staged.files import video
from hunyuan_staged.models.embeddings import Conditioning
from hunyuan_staged.models.transformer import Transformer
from hunyuan_staged.weights import components, lora
from hunyuan_staged.weights.folder import open_model

CPU = torch.device("cpu")
SHORT = ["--rank", "2", "--steps", "2", "--batch", "1", "--clips", "1", "--rate", "1e-2", "--seed", "5"]


def through_mp4(scene: scenes.Scene, path: Path) -> np.ndarray:
    clip = scenes.to_8bit(scenes.render([scene])[0]).permute(1, 2, 3, 0).numpy()
    video.write_video(path, clip, 24, scenes.HEIGHT, scenes.WIDTH)
    return video.read_video(path)[0]


def test_a_bounce_is_told_from_every_motion_that_the_checkpoint_knows(tmp_path):
    draw = random.Random(2)
    for scene in (adapter.draw_scene(draw) for _ in range(4)):
        frames = through_mp4(scene, tmp_path / "clip.mp4")
        assert all(adapter.judge(frames, scene).values()), scene.key
        assert adapter.WAY[0] - 5 < adapter.dip(frames) < adapter.WAY[1]
    for motion in scenes.MOTIONS:
        thing = scenes._single(draw, "circle", "red", motion)
        clip = scenes.to_8bit(scenes.render([scenes.Scene((thing,), motion, ("black", "black"))])[0])
        assert not adapter.bounces(clip.permute(1, 2, 3, 0).numpy()), motion


def test_held_out_bounces_are_never_trained_on_and_the_world_draws_none():
    draw = random.Random(1)
    trained = {adapter.draw_scene(draw).key for _ in range(300)}
    prompts = adapter.held_out_prompts(40)
    assert not trained & {scene.key for scene, _ in prompts}
    assert all("bounces" in prompt for _, prompt in prompts)
    assert adapter.MOTION not in {scenes.draw_scene(draw, "single").motion for _ in range(200)}


def test_training_writes_what_the_learner_holds(tmp_path, capsys, monkeypatch):
    """The same seed, the same bytes; and the file, fused, is the transformer as it was trained, to bfloat16."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    lesson = adapter.Lesson(CHECKPOINT, CPU)
    pool = adapter.draw_lessons(lesson, 1, seed=5)
    plain = velocity(lesson.learner.transformer)
    added = adapter.learn(lesson, pool, rank=2, steps=2, batch=1, rate=1e-2, seed=5)
    adapter.save(tmp_path / "a.safetensors", added)
    command = ["--model_path", str(CHECKPOINT), "--out", str(tmp_path / "b.safetensors"), *SHORT]
    assert adapter.main(command) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["bytes"] == (tmp_path / "b.safetensors").stat().st_size
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()

    learned = velocity(lesson.learner.transformer)
    moved = (learned - plain).norm()
    assert moved > 1e-3 * plain.norm()
    assert (velocity(fused(tmp_path / "a.safetensors")) - learned).norm() < 0.02 * moved


@pytest.mark.gpu
def test_training_on_a_gpu(tmp_path):
    path = tmp_path / "a.safetensors"
    assert adapter.main(["--model_path", str(CHECKPOINT), "--out", str(path), *SHORT]) == 0
    folder = open_model(CHECKPOINT, ("transformer",))
    plain = velocity(components.load_transformer(folder, train.VERSION, device=CPU, dtype=torch.float32))
    assert (velocity(fused(path)) - plain).norm() > 1e-3 * plain.norm()


def fused(file: Path) -> torch.nn.Module:
    folder = open_model(CHECKPOINT, ("transformer",))
    adapters = lora.load([(file, 1.0)], components.transformer_shapes(folder, train.VERSION))
    return components.load_transformer(folder, train.VERSION, device=CPU, dtype=torch.float32, adapt=adapters.fused)


def velocity(model: torch.nn.Module) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    widths = (model.config.text_embed_dim, model.config.text_embed_2_dim)
    language, glyph = (torch.randn(1, 4, width, generator=draw) for width in widths)
    forward = Transformer(model, choose_attention("torch", CPU, torch.float32), (2, 3, 4))
    hidden = torch.randn(1, 65, 2, 3, 4, generator=draw)
    return forward(hidden, torch.tensor([700.0]), Conditioning(language, glyph, torch.zeros(1, 0, 0)))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model_path", "."], ". is no model folder: it has neither the official layout"),
        (["--model_path", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--model_path", str(CHECKPOINT), "--steps", "0"], "--steps 0 is not a positive number"),
        (["--model_path", str(CHECKPOINT), "--out", "/dev/null/x/a"], "--out /dev/null/x: /dev/null is not a folder"),
    ],
)
def test_refusals_are_one_line_and_write_nothing(flags, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert adapter.main(["--out", "a.safetensors", *flags]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and errors[0].startswith("error: ") and message in errors[0]
    assert not list(tmp_path.iterdir())


def test_another_checkpoint_is_refused(tiny_official, tmp_path, capsys):
    assert adapter.main(["--model_path", str(tiny_official), "--out", str(tmp_path / "a.safetensors")]) == 2
    message = "is not the demo checkpoint: its image encoder takes 28 pixels, the demo's 32"
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_the_one_that_ships_is_small_and_fits():
    assert ADAPTER.stat().st_size < 1_000_000
    assert {tensor.dtype for tensor in load_file(ADAPTER).values()} == {torch.bfloat16}
    with safe_open(ADAPTER, "pt") as file:
        assert all(key.startswith("transformer.") for key in file.keys())  # noqa: SIM118 (no iterator)
    adapters = lora.load(
        [(ADAPTER, 1.0)], components.transformer_shapes(open_model(CHECKPOINT, ("transformer",)), train.VERSION)
    )
    assert len(adapters.additions) == len(load_file(ADAPTER)) // 2


def test_with_the_adapter_a_shape_comes_back():
    """Two held-out prompts: without it nothing comes back, with it the centre falls by more than 15 pixels and returns."""
    pipeline = evaluate.DemoPipeline(CHECKPOINT, CPU)
    taught = adapter.with_adapter(pipeline, CHECKPOINT, ADAPTER, 1.0)
    prompts, setting = adapter.held_out_prompts(8), replace(pipeline.setting(), steps=15)  # as good as the 30
    for number in (2, 7):
        scene, prompt = prompts[number]
        clips = [one.frames(prompt, evaluate.SEED + number, setting) for one in (pipeline, taught)]
        before, after = map(adapter.dip, clips)
        assert before < 5 and after > 15, (prompt, before, after)
        assert [adapter.judge(clip, scene)["direction"] for clip in clips] == [False, True]
        assert adapter.judge(clips[1], scene)["background"]
