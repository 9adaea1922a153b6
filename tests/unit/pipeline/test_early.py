"""What a stage of a whole run loads before its turn."""

import functools
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from folders import denoised, embed
from PIL import Image

import stage2_transformer
import stage3_vae_decoder
import utils
from hunyuan_staged.errors import InputError
from hunyuan_staged.files import contract
from hunyuan_staged.memory import available
from hunyuan_staged.memory.budget import GIB, RESERVE, FreeMemory
from hunyuan_staged.models.embeddings import Conditioning
from hunyuan_staged.options import DecodeOptions, DenoiseOptions, EncodeOptions
from hunyuan_staged.parallel.layout import LoneShare, plan_layout
from hunyuan_staged.parallel.world import World
from hunyuan_staged.parsing import options_of_run, parse
from hunyuan_staged.pipeline import common, early
from hunyuan_staged.pipeline.denoisers import Denoisers
from hunyuan_staged.pipeline.denoising import DenoiseSetup
from hunyuan_staged.pipeline.early import CONTEXT, Need
from hunyuan_staged.pipeline.rehearsal import one_block, rehearse_denoising
from hunyuan_staged.runtime.environment import RUN_FLAGS, TURN_PIPE, Early, run_flags, told_flags

CPU = torch.device("cpu")
SMALL = ["--video_length=9", "--num_inference_steps=2"]


def never() -> bool:
    return False


def run(stage: int, flags: list[str], kept: Early, folder: Path, monkeypatch) -> list[dict]:
    """Run a stage in its turn, with what it has loaded before it; its events."""
    read, write = os.pipe()
    os.write(write, b"\0")
    os.close(write)
    monkeypatch.setenv(TURN_PIPE, str(read))
    script, cls, body = {
        2: (stage2_transformer, DenoiseOptions, stage2_transformer.stage2),
        3: (stage3_vae_decoder, DecodeOptions, stage3_vae_decoder.stage3),
    }[stage]
    log = folder / "log.jsonl"
    log.unlink(missing_ok=True)
    options = parse(cls, script.build_parser(), [*flags, f"--log_json={log}"])
    assert utils.run_jobs(stage, options, body, script.group_size, lambda options, is_due: kept) == 0
    return [json.loads(line) for line in log.read_text().splitlines()]


def loadings(events: list[dict]) -> set[str]:
    return {one["what"] for one in events if one["event"] == "progress" and one["what"].startswith("loading")}


def flags_of(folder: Path, model: Path, *more: str, image: Path | None = None) -> list[list[str]]:
    """Those of a whole run's stages: 1, 2, and 3."""
    place = f"--input_dir={folder}"
    pictured = [f"--image_path={image}"] if image else []
    named = f"--model_path={model}"
    return [[named, f"--output_dir={folder}", *pictured], [named, place, *SMALL, *more], [named, place]]


@pytest.mark.parametrize("more", [[], ["--weights_dtype=fp8"], ["--guidance_scale=1", "--num_inference_steps=3"]])
def test_stage_2_takes_what_it_has_loaded_early_and_makes_the_same(tiny_official, tmp_path, monkeypatch, more):
    folder = embed(tmp_path / "run", tiny_official)
    flags = flags_of(folder, tiny_official, *more)
    plain = run(2, flags[1], Early(), folder, monkeypatch)
    latents = (folder / contract.LATENTS_FILE).read_bytes()
    loaded = early.load_early(options_of_run(flags), 1, never, CPU)
    assert re.fullmatch("loaded early: [0-9]+ MiB, rehearsed", loaded.told)
    events = run(2, flags[1], loaded, folder, monkeypatch)
    assert (folder / contract.LATENTS_FILE).read_bytes() == latents
    assert (loadings(plain), loadings(events)) == ({"loading transformer"}, set())
    assert events[0]["early"] == loaded.told and "early" not in plain[0]
    said = [[one["text"] for one in found if one["event"] == "info"] for found in (plain, events)]
    assert [line for line in said[0] if "loading" not in line] == said[1], "but for the progress of loading"


def test_image_to_video_is_known_by_stage_1s_flags(tiny_official, tmp_path, monkeypatch):
    """Of the weights' two versions the one for images; and at the image's own shape."""
    Image.new("RGB", (100, 160)).save(tmp_path / "high.png")
    flags = flags_of(embed(tmp_path / "run", tiny_official, image=True), tiny_official, image=tmp_path / "high.png")
    plans = early.plan_processes(options_of_run(flags), World(0, 1, CPU), FreeMemory(None, 2**40))
    assert (plans[1][0].setup.settings.version.name, plans[1][0].setup.shape[-2:]) == ("demo_i2v", (10, 6))
    loaded = early.load_early(options_of_run(flags), 1, never, CPU)
    assert loadings(run(2, flags[1], loaded, tmp_path / "run", monkeypatch)) == set()


def test_what_turns_out_not_to_be_wanted_is_let_go(tiny_official, tmp_path, monkeypatch):
    """Stage 1 was told of an image, and the folder holds text alone."""
    Image.new("RGB", (160, 96)).save(tmp_path / "image.png")
    folder = embed(tmp_path / "run", tiny_official)
    flags = flags_of(folder, tiny_official, image=tmp_path / "image.png")
    plain = run(2, flags[1], Early(), folder, monkeypatch)
    latents = (folder / contract.LATENTS_FILE).read_bytes()
    loaded = early.load_early(options_of_run(flags), 1, never, CPU)
    assert loadings(run(2, flags[1], loaded, folder, monkeypatch)) == loadings(plain) == {"loading transformer"}
    assert (folder / contract.LATENTS_FILE).read_bytes() == latents


def test_another_schedule_than_was_known_is_computed_anew(tiny_official, tmp_path, monkeypatch):
    folder = embed(tmp_path / "run", tiny_official)
    flags = flags_of(folder, tiny_official)
    loaded = early.load_early(options_of_run(flags), 1, never, CPU)
    others = [*flags[1], "--num_inference_steps=3"]
    run(2, others, loaded, folder, monkeypatch)
    latents = (folder / contract.LATENTS_FILE).read_bytes()
    run(2, others, Early(), folder, monkeypatch)
    assert (folder / contract.LATENTS_FILE).read_bytes() == latents


def test_stage_3_takes_the_decoder_that_it_has_loaded_early(tiny_official, tmp_path, monkeypatch):
    folder = denoised(embed(tmp_path / "run", tiny_official), tiny_official)
    flags = flags_of(folder, tiny_official)
    frames = folder / "stage3_frames.safetensors"
    plain = run(3, [*flags[2], "--save_frames"], Early(), folder, monkeypatch)
    before = frames.read_bytes()
    loaded = early.load_early(options_of_run(flags), 2, never, CPU)
    assert re.fullmatch("loaded early: [0-9]+ MiB, rehearsed", loaded.told)
    events = run(3, [*flags[2], "--save_frames"], loaded, folder, monkeypatch)
    assert (loadings(plain), loadings(events)) == ({"loading VAE decoder"}, set())
    assert frames.read_bytes() == before


def test_what_cannot_be_rehearsed_is_loaded_all_the_same(tiny_official, tmp_path, monkeypatch):
    """The first step meets the failure again."""

    def fail(*_):
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(early, "rehearse_denoising", fail)
    found = early.load_early(options_of_run(flags_of(tmp_path, tiny_official)), 1, never, CPU)
    assert isinstance(found.kept, Denoisers)
    assert found.told.endswith(" MiB, not rehearsed: ZeroDivisionError: ours")
    turn = iter([False, True])
    found = early.load_early(options_of_run(flags_of(tmp_path, tiny_official)), 1, lambda: next(turn), CPU)
    assert isinstance(found.kept, Denoisers) and found.told.endswith(" MiB, not rehearsed: the turn came first")


def test_kernels_are_tried_after_the_one_plan(tiny_official, tmp_path, monkeypatch):
    """Was: all stages were planned a second time for that. The plan goes by a card that is assumed, and tries none."""
    plans, setups, tried = [], [], []
    whole, rehearse, choose = early.forecast.plan_processes, early.rehearse_denoising, common.choose_attention

    def plan(*args, **kwargs):
        plans.append(whole(*args, **kwargs))
        assert tried == []
        return plans[-1]

    monkeypatch.setattr(early.forecast, "plan_processes", plan)
    monkeypatch.setattr(
        early, "rehearse_denoising", lambda setup, model: (setups.append(setup), rehearse(setup, model))
    )
    monkeypatch.setattr(
        common, "choose_attention", lambda *args, **more: tried.append(args[0]) or choose(*args, **more)
    )
    monkeypatch.setattr(available, "free_memory", lambda _: FreeMemory(48 * GIB, 64 * GIB))
    schedule = "--attn_schedule=torch:1"
    loaded = early.load_early(options_of_run(flags_of(tmp_path, tiny_official, schedule)), 1, never, CPU)
    assert re.fullmatch("loaded early: [0-9]+ MiB, rehearsed", loaded.told)
    (planned,), (setup,) = [found[1][0].setup for found in plans], setups
    assert planned.attention.reason.startswith("the fastest exact kernel of such a card")
    assert (setup.attention.name, setup.attention.reason) == ("torch", "no GPU: torch's scaled_dot_product_attention")
    assert (tried, setup.by_step.names, setup.skeleton) == (["flash", "torch"], ("torch",), planned.skeleton)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_a_step_has_nothing_left_to_compile_after_a_rehearsal(tiny_official, tmp_path, monkeypatch, processes):
    """Neither for another length of the text nor, where images are among it, for theirs; with several ranks, as well."""
    graphs = []

    def backend(graph, _, **__):
        graphs.append(graph)
        return graph

    Image.new("RGB", (160, 96)).save(tmp_path / "image.png")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    monkeypatch.setattr(DenoiseSetup, "compiled", True)
    options = options_of_run(flags_of(tmp_path, tiny_official, image=tmp_path / "image.png"))
    world = World(0, processes, CPU)
    setup = early.plan_processes(options, world, FreeMemory(None, 2**40))[1][0].setup
    torch._dynamo.reset()
    try:
        rehearse_denoising(setup, one_block(setup))
        assert len(graphs) == 3, "before, behind and after attention"
        denoiser = setup.load_resident()
        forward = denoiser.forward(
            setup.attention, setup.shape[2:], LoneShare(*plan_layout(processes, 2)), compile=True
        )
        config = denoiser.model.config
        inputs = torch.zeros(1, config.in_channels, *setup.shape[2:])
        widths = (config.text_embed_dim, config.text_embed_2_dim, config.image_embed_dim)
        for lengths in ((7, 0, 4), (31, 5, 4), (300, 0, 0), (2, 0, 0)):
            sizes = zip(lengths, widths, strict=True)
            conditioning = Conditioning(*(torch.randn(1, count, width) for count, width in sizes))
            forward(inputs, torch.tensor([1000.0]), conditioning)
        assert len(graphs) == 3
    finally:
        torch._dynamo.reset()


def test_super_resolution_has_its_own_transformer_early(tiny_super_resolution, tmp_path, monkeypatch):
    folder = denoised(embed(tmp_path / "run", tiny_super_resolution), tiny_super_resolution)
    embed(folder, tiny_super_resolution)
    first, base, third = flags_of(folder, tiny_super_resolution)
    larger = [word for word in base if word not in SMALL] + ["--super_resolution=demo_hd"]
    flags = [[*first, "--super_resolution=demo_hd"], base, larger, third]
    name = contract.at_resolution(contract.LATENTS_FILE, "demo_hd")
    plain = run(2, larger, Early(), folder, monkeypatch)
    latents = (folder / name).read_bytes()
    (folder / name).unlink()
    loaded = early.load_early(options_of_run(flags), 2, never, CPU)
    events = run(2, larger, loaded, folder, monkeypatch)
    assert (loadings(plain), loadings(events)) == ({"loading transformer"}, set())
    assert (folder / name).read_bytes() == latents


@pytest.mark.parametrize(
    ("more", "is_due", "told"),
    [
        ([["--jobs=x.jsonl"], [], []], never, "many videos"),
        ([[], ["--seeds=1-4"], ["--seeds=1-4"]], never, "many videos"),
        ([["--rewrite=local"], [], []], never, "the prompt is rewritten here, which takes as long and more memory"),
        ([[], ["--super_resolution=demo_hd", "--input_video=x.mp4"], []], never, "a video is the input"),
        ([[], [], []], lambda: True, "the turn came first"),
        (
            [["--cfg_distilled"], [], []],
            never,
            "not loaded early: InputError: PLACE has no transformer demo_t2v_distilled; it holds demo_i2v, demo_t2v",
        ),
    ],
)
def test_where_nothing_is_known_nothing_is_loaded(tiny_official, tmp_path, more, is_due, told):
    flags = [[*own, *others] for own, others in zip(flags_of(tmp_path, tiny_official), more, strict=True)]
    found = early.load_early(options_of_run(flags), 1, is_due, CPU)
    assert (found.kept, found.told.replace(str(tiny_official), "PLACE")) == (None, told)


def test_weights_that_cannot_be_read_are_left_to_the_turn(tiny_official, tmp_path):
    shutil.copytree(tiny_official, tmp_path / "model")
    weights = tmp_path / "model" / "transformer" / "demo_t2v" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    found = early.load_early(options_of_run(flags_of(tmp_path, tmp_path / "model")), 1, never, CPU)
    assert found.kept is None
    assert found.told.startswith(f"not loaded early: InputError: {weights} is not a whole safetensors file (")


def test_each_stage_has_room_to_work_beside_the_weights_of_those_that_follow():
    needs = [Need(16, 15), Need(13, 10), Need(17, 11), Need(12, 1)]
    around = RESERVE + 3 * CONTEXT
    assert early.peak(needs, 1) - around == 16 + 10 + 11 + 1  # while stage 1 works
    assert early.peak(needs, 3) - around == 16 + 10 + 11 + 1
    small = [Need(2, 1), Need(13, 10), Need(12, 1)]
    assert early.peak(small, 1) - (RESERVE + 2 * CONTEXT) == 13 + 1, "its own turn asks for most"
    assert early.peak([Need(2, 1), Need(3, 2), Need(40, 1)], 2) - (RESERVE + 2 * CONTEXT) == 40


def test_published_weights_fit_a_card_of_48_gb_early_and_none_of_24():
    options = [EncodeOptions(model_path="x"), DenoiseOptions(model_path="x"), DecodeOptions(model_path="x")]
    for card, fits in ((48, True), (24, False)):
        free = FreeMemory(card * GIB, 64 * GIB)
        plans = early.plan_processes(options, World(0, 1, torch.device("cuda")), free)
        assert (early.peak(list(map(early.need_of, plans)), 1) <= free.device) is fits


def test_a_rehearsal_is_planned_with_the_copy_that_it_runs_on(tiny_official, tmp_path):
    """Was: 49 frames peaked half a GiB above their plan, by the copy of a block and of all that is not in blocks."""
    options = options_of_run(flags_of(tmp_path, tiny_official))
    plans = early.plan_processes(options, World(0, 1, torch.device("cuda")), FreeMemory(48 * GIB, 64 * GIB))
    for (plan,), copies in zip(plans[1:], (True, False), strict=True):
        model = one_block(replace(plan.setup, world=World(0, 1, CPU))) if copies else torch.nn.Module()
        copied = sum(tensor.nbytes for tensor in model.state_dict().values())
        found = early.need_to_rehearse([plan])
        assert found.total == found.resident and found.total >= plan.memory.total
        assert found.total - plan.memory.total == pytest.approx(copied, rel=0.01)
        assert bool(copied) is copies


@pytest.mark.parametrize("own", [1, 2])
def test_products_in_float8_are_planned_for_the_gpu_that_is_here(own):
    """Was: no card's capability was told, so that such a run had neither its transformer nor its decoder early."""
    denoise = DenoiseOptions(model_path="x", weights_dtype="fp8", fp8_matmul=True)
    options = [EncodeOptions(model_path="x"), denoise, DecodeOptions(model_path="x")]
    world, free = World(0, 1, torch.device("cuda")), FreeMemory(48 * GIB, 64 * GIB)
    plans = early.plan_processes(options, world, free, (9, 0))
    assert plans[1][0].rows["weights"].endswith("fp8; computed in float8 and torch.bfloat16")
    assert early.peak(list(map(early.need_of, plans)), own) <= free.device
    with pytest.raises(InputError, match=r"this one has 8\.9"):
        early.plan_processes(options, world, free, (8, 9))


def test_files_are_read_ahead_where_the_host_has_room(tmp_path):
    files = [tmp_path / "a", tmp_path / "b"]
    for path, size in zip(files, (2 * early.PIECE + 1, 5), strict=True):
        path.write_bytes(bytes(size))
    everything = 2 * early.PIECE + 6
    assert early.read_ahead(files, everything + RESERVE, never) == everything
    assert early.read_ahead(files, everything + RESERVE - 1, never) == 0
    asked = iter([False, True])
    assert early.read_ahead(files, GIB * 9, lambda: next(asked)) == early.PIECE, "until the turn comes"


def test_a_card_without_room_has_the_transformer_read_ahead(tiny_official, tmp_path):
    options = options_of_run(flags_of(tmp_path, tiny_official))
    weights = tiny_official / "transformer" / "demo_t2v" / "diffusion_pytorch_model.safetensors"
    size = weights.stat().st_size / 2**20
    assert early.read_early(options, 1, never, (8 * GIB, (8, 9))) == Early(None, f"read ahead: {size:.0f} MiB")
    assert early.read_early(options, 2, never, (8 * GIB, (8, 9))) == Early(None, "read ahead: 0 MiB")


def test_the_launcher_tells_a_stage_the_flags_of_all_but_texts(monkeypatch):
    flags = [["--prompt=a", "--negative_prompt=b=c", "--resolution=480p"], ["--seed=3", "--resume"], []]
    monkeypatch.setenv(RUN_FLAGS, told_flags(1, flags))
    assert run_flags() == (1, [["--resolution=480p"], ["--seed=3", "--resume"], []])
    monkeypatch.delenv(RUN_FLAGS)
    assert run_flags() is None


@pytest.mark.parametrize(
    ("count", "classes"),
    [
        (2, [EncodeOptions, DenoiseOptions]),
        (3, [EncodeOptions, DenoiseOptions, DecodeOptions]),
        (4, [EncodeOptions, DenoiseOptions, DenoiseOptions, DecodeOptions]),
    ],
)
def test_flags_are_of_stage_1_stage_2_maybe_twice_and_stage_3(count, classes):
    assert [type(options) for options in options_of_run([[]] * count)] == classes
