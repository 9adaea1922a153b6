"""Super resolution through the scripts, on the drawn tiny checkpoint: 160x96 → 320x192."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformer_writer as writer
from conftest import ROOT
from folders import embed
from forked import Moment, run_ranks, run_stage
from PIL import Image
from safetensors.torch import load_file

from hunyuan_staged.attention.choose import choose_attention
from hunyuan_staged.encoders.image import pixels_of, resize_and_center_crop
from hunyuan_staged.files import contract, provenance
from hunyuan_staged.files.config import read_config
from hunyuan_staged.files.sniffing import READ
from hunyuan_staged.files.tensors import load_embeddings, load_latents, load_state, save_embeddings, save_latents
from hunyuan_staged.files.video import read_video, write_video
from hunyuan_staged.models.embeddings import Conditioning
from hunyuan_staged.models.transformer import Transformer
from hunyuan_staged.pipeline.low_resolution import load_upsampler
from hunyuan_staged.sampling.conditions import LowResolutionCondition, condition_channels, upsample_latents
from hunyuan_staged.sampling.loop import Sampling, denoise
from hunyuan_staged.sampling.schedule import flow_sigmas
from hunyuan_staged.weights.components import load_transformer, load_vae_encoder
from hunyuan_staged.weights.folder import open_model
from hunyuan_staged.weights.upsampler import open_upsampler

STEP = "hunyuan_staged.sampling.loop.euler_step"
LARGER = contract.at_resolution(contract.LATENTS_FILE, "demo_hd")
STATE = contract.at_resolution(contract.STATE_FILE, "demo_hd")


def with_latents(folder: Path, seed: int = 5) -> Path:
    """A folder with a base run's latents of 5 frames."""
    base = torch.randn(1, 32, 2, 6, 10, generator=torch.Generator().manual_seed(seed))
    hashed = provenance.sha256(folder / contract.EMBEDDINGS_FILE)
    save_latents(folder, base, {"num_frames": "5", contract.EMBEDDINGS_HASH: hashed})
    return folder


def with_image(folder: Path, model: Path) -> Path:
    """A folder of image to video, with the image's latents at both sizes."""
    embed(folder, model, image=True)
    tensors, metadata = load_embeddings(folder)
    large = torch.randn(1, 32, 1, 12, 20, generator=torch.Generator().manual_seed(6))
    save_embeddings(folder, tensors | {contract.large_image_latents("demo_hd"): large}, metadata)
    return with_latents(folder)


def enlarge(folder: Path, *more: object, moment: Moment | None = None) -> tuple[int, str]:
    args = ["--input_dir", folder, "--super_resolution", "demo_hd", *more]
    return run_stage(2, *args, said=folder.parent / "said", moment=moment)


def latents(folder: Path) -> torch.Tensor:
    return load_latents(folder, "demo_hd")[0]


@pytest.fixture(scope="module")
def done(tmp_path_factory, tiny_super_resolution) -> Path:
    """One run that the tests of this module compare with."""
    folder = with_latents(embed(tmp_path_factory.mktemp("larger") / "out", tiny_super_resolution))
    status, said = enlarge(folder)
    assert status == 0, said
    return folder


@pytest.fixture
def again(done, tmp_path) -> Path:
    """The same folder before that run."""
    folder = shutil.copytree(done, tmp_path / "out")
    (folder / LARGER).unlink()
    return folder


def test_larger_latents_lie_beside_those_of_the_base(done):
    made, metadata = load_latents(done, "demo_hd")
    assert made.shape == (1, 32, 2, 12, 20) and torch.isfinite(made).all() and made.std() > 0.1
    expected = {"height": "192", "width": "320", "num_frames": "5", "num_inference_steps": "6", "flow_shift": "2.0"}
    expected |= {"guidance_scale": "1.0", "seed": "42", contract.ENLARGED_FROM: contract.LATENTS_FILE}
    expected |= {contract.LATENTS_HASH: provenance.sha256(done / contract.LATENTS_FILE)}
    expected |= {contract.EMBEDDINGS_HASH: provenance.sha256(done / contract.EMBEDDINGS_FILE)}
    assert expected.items() <= metadata.items()
    assert torch.equal(load_latents(done)[0], load_latents(with_latents(done))[0]), "those of the base stay"
    assert {path.name for path in done.iterdir()} == {
        contract.EMBEDDINGS_FILE,
        contract.LATENTS_FILE,
        LARGER,
        contract.CONFIG_FILE,
    }


@pytest.mark.parametrize("image", [False, True])
def test_a_run_is_the_parts_that_the_golden_numbers_hold(done, tmp_path, tiny_super_resolution, image):
    """With another seed than the default: the noise of both draws, upsampler, condition, shift, meanflow, put together."""
    folder = with_image(tmp_path / "out", tiny_super_resolution) if image else shutil.copytree(done, tmp_path / "out")
    status, said = enlarge(folder, "--seed", 7)
    assert status == 0, said
    model, device, name = (
        open_model(tiny_super_resolution, ("transformer",)),
        torch.device("cpu"),
        "demo_hd_sr_distilled",
    )
    upsampler = load_upsampler(open_upsampler(tiny_super_resolution / "upsampler" / name), device)
    generator = torch.Generator().manual_seed(7)
    noise, second = (torch.randn(1, 32, 2, 12, 20, generator=generator) for _ in range(2))
    embeddings, _ = load_embeddings(folder)
    first = embeddings[contract.large_image_latents("demo_hd")] if image else None
    larger = upsample_latents(upsampler, load_latents(folder)[0], 12, 20, torch.float32)
    condition = LowResolutionCondition(condition_channels(noise, first), 0.3 * larger + 0.7 * second)
    transformer = load_transformer(model, name, device=device, dtype=torch.float32)
    prompt = Conditioning.from_embeddings(embeddings, device=device, dtype=torch.float32)
    velocity = Transformer(transformer, choose_attention("torch", device, torch.float32), (2, 12, 20))
    expected = denoise(velocity, noise, condition, [prompt], flow_sigmas(6, 2.0), Sampling(1.0, use_meanflow=True))
    assert (latents(folder) - expected).norm() / expected.norm() < 1e-5


def test_runs_repeat_and_offloading_keeps_the_bits(done, again):
    status, said = enlarge(again, "--enable_offloading")
    assert status == 0, said
    assert torch.equal(latents(again), latents(done))


@pytest.mark.parametrize("more", [["--seed", 43], ["--guidance_scale", 3], ["--weights_dtype", "fp8"]])
def test_settings_shape_the_result(done, again, more):
    status, said = enlarge(again, *more)
    assert status == 0, said
    assert (latents(again) - latents(done)).norm() / latents(done).norm() > 1e-3
    if more[0] == "--guidance_scale":
        assert "demo_hd_sr_distilled has guidance distilled into it: 1 is right, not 3" in said


@pytest.mark.parametrize("guidance", [1, 3])
@pytest.mark.parametrize("size", [2, 3])
def test_processes_give_what_one_gives(done, again, tmp_path, size, guidance):
    args = ["--input_dir", again, "--super_resolution", "demo_hd", "--guidance_scale", guidance]
    for rank in run_ranks(2, size, *args, said=tmp_path / "said"):
        assert rank.status() == 0, rank.said()
    several, one = latents(again), latents(done)
    if guidance != 1:
        assert enlarge(again, "--guidance_scale", guidance)[0] == 0
        one = latents(again)
    assert (several - one).norm() / one.norm() < 1e-5


def test_image_to_video_takes_the_image_at_the_larger_size(tmp_path, tiny_super_resolution):
    folder = with_image(tmp_path / "image", tiny_super_resolution)
    assert enlarge(folder)[0] == 0
    first = latents(folder)
    tensors, metadata = load_embeddings(folder)
    name = contract.large_image_latents("demo_hd")
    save_embeddings(folder, tensors | {name: tensors[name] + 1}, metadata)
    with_latents(folder)
    assert enlarge(folder)[0] == 0
    assert (latents(folder) - first).norm() / first.norm() > 1e-3
    save_embeddings(folder, {key: value for key, value in tensors.items() if key != name}, metadata)
    status, said = enlarge(folder)
    assert status == 2
    assert said.splitlines()[-1] == (
        "error: the embeddings hold an image and no image_latents_demo_hd, which super resolution needs; run stage 1 again "
        "with --super_resolution demo_hd"
    )


@pytest.mark.parametrize("step", [2, 5])
def test_a_stopped_run_goes_on_to_the_same_bits(done, again, step):
    """One stopped while it sees the enlarged latents, and one stopped after that."""
    status, said = enlarge(again, moment=Moment(STEP, step, (signal.SIGTERM,)))
    assert status == 143, said
    assert load_state(again, "demo_hd")[1]["step"] == str(step)
    assert not (again / LARGER).exists() and not (again / contract.STATE_FILE).exists()
    assert planned(enlarge(again, "--dry_run", "--resume")[1], "steps") == f"6, guidance 1, {step} done already"
    status, said = enlarge(again, "--resume")
    assert status == 0, said
    assert f"going on after step {step} of 6, from {again / STATE}" in said
    assert (again / LARGER).read_bytes() == (done / LARGER).read_bytes()
    assert not (again / STATE).exists()
    status, said = enlarge(again, "--resume")
    assert status == 0 and f"{again / LARGER} is there, made from the same: taken as it is" in said


def test_a_state_of_other_latents_is_refused(again):
    assert enlarge(again, moment=Moment(STEP, 2, (signal.SIGTERM,)))[0] == 143
    with_latents(again, seed=6)
    status, said = enlarge(again, "--resume")
    assert status == 2
    assert re.search(rf"{STATE} belongs to other settings: latents_sha256: was \w{{12}}… \({again}\), now", said), said


def test_latents_of_other_embeddings_are_told_and_with_strict_refused(again):
    tensors, metadata = load_embeddings(again)
    save_embeddings(again, tensors | {"prompt_embeds": tensors["prompt_embeds"] * 2}, metadata)
    status, said = enlarge(again, "--strict")
    assert status == 2 and f"{again / contract.LATENTS_FILE} was made from embeddings" in said
    assert said.splitlines()[-1].endswith("; --strict refuses that")
    assert not (again / LARGER).exists()


def test_single_files_give_what_the_folders_give(done, again, tmp_path, tiny_super_resolution):
    """As ComfyUI has them: q, k and v in one tensor, no configs; nothing of the model's folder is read."""
    parts = [tiny_super_resolution / part / "demo_hd_sr_distilled" for part in ("transformer", "upsampler")]
    transformer, upsampler = (load_file(part / "diffusion_pytorch_model.safetensors") for part in parts)
    files = ["--super_resolution_transformer", writer.save(tmp_path / "any.safetensors", writer.fused(transformer))]
    files += ["--super_resolution_upsampler", writer.save(tmp_path / "other.safetensors", upsampler)]
    status, said = enlarge(again, *files, "--model_path", tmp_path / "nothing")
    assert status == 0, said
    assert "any.safetensors: taken for a transformer demo_hd_sr_distilled of 3 blocks" in said
    assert torch.equal(latents(again), latents(done))


@pytest.mark.parametrize(
    ("flag", "other", "message"),
    [
        ("transformer", "transformer/demo_t2v", "lacks time_r_in, and is no demo_hd_sr_distilled"),
        ("upsampler", "transformer/demo_t2v", "is no latent upsampler"),
        ("transformer", "upsampler/demo_hd_sr_distilled", "holds tensors that no transformer of this suite has"),
    ],
)
def test_files_of_something_else_are_refused(again, tiny_super_resolution, flag, other, message):
    file = tiny_super_resolution / other / "diffusion_pytorch_model.safetensors"
    status, said = enlarge(again, f"--super_resolution_{flag}", file)
    assert status == 2
    assert str(file) in said.splitlines()[-1] and message in said.splitlines()[-1]
    assert not (again / LARGER).exists()


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """11 frames of 200x100 at 12 frames per second: a bright column that moves."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    frames = np.zeros((11, 100, 200, 3), np.uint8)
    for number, frame in enumerate(frames):
        frame[:, 15 * number : 15 * number + 40] = 230
    write_video(path, frames, 12, 100, 200)
    return path


def test_any_video_is_enlarged(again, clip):
    """Its frames go through the VAE's encoder; the base run's latents stay, and stage 3 keeps the frame rate."""
    base = (again / contract.LATENTS_FILE).read_bytes()
    status, said = enlarge(again, "--input_video", clip)
    assert status == 0, said
    assert (
        f"{clip}: 11 frames of 200x100 at 12 frames per second; taken are 9, cropped and resized to 160x80 (demo)"
        in said
    )
    made, metadata = load_latents(again, "demo_hd")
    source = contract.at_resolution(contract.LATENTS_FILE, contract.INPUT)
    assert made.shape == (1, 32, 3, 11, 22)
    assert (metadata[contract.ENLARGED_FROM], metadata["fps"]) == (source, "12")
    assert (again / contract.LATENTS_FILE).read_bytes() == base
    # What is enlarged is the mode of the posterior of the first 9 frames, cropped, times the scaling factor.
    frames = [resize_and_center_crop(Image.fromarray(frame), 80, 160) for frame in read_video(clip)[0][:9]]
    config = read_config(again)
    encoder, vae = load_vae_encoder(
        open_model(config["model_path"], ("vae",)), device=torch.device("cpu"), dtype=torch.float32
    )
    mean = encoder(torch.stack([pixels_of(frame) for frame in frames], dim=1)[None]).chunk(2, dim=1)[0]
    expected = mean * vae["scaling_factor"]
    found = load_latents(again, contract.INPUT)[0]
    assert (found - expected).norm() / expected.norm() < 1e-5
    status, said = run_stage(3, "--input_dir", again, said=again.parent / "said")
    assert status == 0, said
    assert "9 frames of" in said and "at 12 frames per second" in said
    status, said = enlarge(again, "--input_video", clip, "--resume")
    assert status == 0, said
    assert said.count("is there, made from the same: taken as it is") == 2


def test_done_steps_of_a_video_that_is_enlarged_are_planned(again, clip, tmp_path):
    """They were planned anew. Of another video, and of one that is not encoded yet, none is done."""
    args = ["--input_video", clip]

    def steps() -> str:
        status, said = enlarge(again, *args, "--dry_run", "--resume")
        assert status == 0, said
        return planned(said, "steps")

    assert enlarge(again, *args, moment=Moment(STEP, 2, (signal.SIGTERM,)))[0] == 143
    assert steps() == "6, guidance 1, 2 done already"
    assert planned(enlarge(again, *args, "--dry_run")[1], "encoding") == "done already", "which --resume has no part in"
    assert planned(enlarge(again, *args, "--dry_run")[1], "steps") == "6, guidance 1", "without --resume it begins anew"
    assert enlarge(again, *args, "--resume")[0] == 0
    assert steps() == "6, guidance 1, 6 done already"
    args = ["--input_video", tmp_path / "other.mp4"]
    write_video(args[1], np.full((9, 100, 200, 3), 90, np.uint8), 12, 100, 200)
    assert steps() == "6, guidance 1"
    args = ["--input_video", clip]
    (again / contract.at_resolution(contract.LATENTS_FILE, contract.INPUT)).unlink()
    assert steps() == "6, guidance 1"
    assert planned(enlarge(again, *args, "--dry_run")[1], "encoding") == "4 frames at a time"


def test_a_part_of_a_video_in_another_shape(again, clip):
    status, said = enlarge(again, "--input_video", clip, "--video_length", 5, "--aspect_ratio", "1:1", "--dry_run")
    assert status == 0, said
    assert "taken are 5, cropped and resized to 128x128 (demo)" in said
    # First the plan of its encoding, then that of super resolution.
    videos = [line.split(maxsplit=1)[1] for line in said.splitlines() if line.startswith("video ")]
    assert videos == ["128x128, 5 frames", "256x256, 5 frames"]
    assert planned(said, "encoding") == "4 frames at a time"
    assert re.fullmatch(r"\d+ MiB: weights \d+ MiB, working memory \d+ MiB", planned(said, "memory"))
    assert " (an estimate: this CPU" in planned(said, "expected time")
    assert not (again / contract.at_resolution(contract.LATENTS_FILE, contract.INPUT)).exists()
    status, said = enlarge(again, "--input_video", clip, "--video_length", 13)
    assert status == 2
    assert said.splitlines()[-1] == f"error: --video_length 13: {clip} has 11 frames"


@pytest.mark.parametrize("kind", ["text", "playlist", "list of files", "cut short"])
def test_what_is_no_video_is_refused(again, tmp_path, clip, kind):
    """A playlist or a list of files would have ffmpeg read others."""
    content = {
        "text": b"no video",
        "playlist": f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{clip}\n#EXT-X-ENDLIST\n".encode(),
        "list of files": f"ffconcat version 1.0\nfile {clip}\n".encode(),
        "cut short": clip.read_bytes()[:60],
    }[kind]
    (tmp_path / "clip.mp4").write_bytes(content)
    status, said = enlarge(again, "--input_video", tmp_path / "clip.mp4")
    assert status == 2
    assert [line for line in said.splitlines() if "error" in line] == [
        f"error: {tmp_path}/clip.mp4 is no video that ffmpeg can read as mov, matroska, avi, mpegts, flv, ogg, gif"
    ]
    assert not (again / LARGER).exists()


def planned(said: str, row: str) -> str:
    return next(line.removeprefix(row).strip() for line in said.splitlines() if line.startswith(row))


def test_a_plan_needs_no_latents(again):
    status, said = enlarge(again, "--dry_run")
    assert status == 0, said
    assert planned(said, "version") == "demo_hd_sr_distilled"
    assert planned(said, "video") == "320x192, 5 frames"
    assert planned(said, "steps") == "6, guidance 1"
    (again / contract.LATENTS_FILE).unlink()
    status, said = enlarge(again, "--dry_run", "--aspect_ratio", "9:16", "--video_length", 17)
    assert status == 0, said
    assert planned(said, "video") == "192x320, 17 frames"
    assert planned(enlarge(again, "--dry_run")[1], "video") == "320x192, 33 frames"
    assert not (again / LARGER).exists()
    status, said = enlarge(again)
    assert status == 2
    assert (
        said.splitlines()[-1]
        == f"error: {again / contract.LATENTS_FILE} does not exist; run stage2_transformer.py first"
    )


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--video_length", 9], "--video_length 9: {latents} has 5 frames"),
        (["--aspect_ratio", "1:1"], "--aspect_ratio 1:1: {latents} is 160x96"),
        (["--enable_cache"], "--enable_cache is for the run whose latents --super_resolution enlarges"),
        (["--lora", ROOT], "--lora is for the run whose latents --super_resolution enlarges"),
        (["--input_video", ROOT / "none.mp4"], f"--input_video {ROOT}/none.mp4 does not exist"),
        (
            ["--super_resolution_upsampler", ROOT],
            f"--super_resolution_upsampler {ROOT} is a folder; read is one file: {READ}",
        ),
        (["--super_resolution", "720p"], "super resolution to 720p does not start from demo; allowed: demo_hd"),
    ],
)
def test_refusals_are_one_line_and_change_nothing(again, more, message):
    before = {path.name: path.stat().st_mtime_ns for path in again.iterdir()}
    status, said = enlarge(again, *more)
    assert status == 2
    assert [line for line in said.splitlines() if "error" in line] == [
        "error: " + message.format(latents=again / contract.LATENTS_FILE)
    ]
    assert before == {path.name: path.stat().st_mtime_ns for path in again.iterdir()}


def test_a_model_without_super_resolution_is_told(again, tmp_path, tiny_official):
    """By stage 2, by its plan (which took other numbers than the demo's), and by stage 1, before the base run."""
    lacks = f"{tiny_official} has no upsampler/demo_hd_sr_distilled"
    for more in ((), ("--dry_run",)):
        status, said = enlarge(again, "--model_path", tiny_official, *more)
        assert (status, said.splitlines()[-1]) == (2, f"error: {lacks}")
    args = ["--model_path", tiny_official, "--super_resolution", "demo_hd", "--output_dir", tmp_path / "new"]
    status, said = run_stage(1, *args, said=tmp_path / "said")
    assert status == 0, said
    assert f"{lacks}; stage 2 then needs --super_resolution_transformer and --super_resolution_upsampler" in said


def test_480p_becomes_1080p_in_two_runs(tmp_path, tiny_enlarging):
    """The second begins from the latents of the first, which are taken as they are where they are there already."""
    folder = embed(tmp_path / "out", tiny_enlarging, {"transformer_version": "480p_t2v"})
    save_latents(folder, torch.randn(1, 32, 1, 30, 53, generator=torch.Generator().manual_seed(5)), {})
    args = ["--input_dir", folder, "--num_inference_steps", 1, "--super_resolution"]

    def run(*more: object) -> tuple[int, str]:
        return run_stage(2, *args, *more, said=tmp_path / "said")

    status, said = run("1080p", "--dry_run")
    assert status == 0, said
    assert [line.split(maxsplit=1)[1] for line in said.splitlines() if line.startswith("video ")] == [
        "1280x720, 1 frames",
        "1904x1072, 1 frames",
    ]
    assert run("720p")[0] == 0
    middle = folder / contract.at_resolution(contract.LATENTS_FILE, "720p")
    made = middle.read_bytes()
    status, said = run("1080p", "--dry_run", "--resume")
    assert status == 0, said
    assert re.findall(r"(?m)^steps +(.*)", said) == ["1, guidance 1, 1 done already", "1, guidance 1"]
    file = tiny_enlarging / "upsampler" / "720p_sr_distilled" / "diffusion_pytorch_model.safetensors"
    status, said = run("1080p", "--super_resolution_upsampler", file)
    assert status == 2
    assert said.splitlines()[-1] == ("error: 480p to 1080p takes two runs, each with files of its own: one at a time")
    status, said = run("1080p")
    assert status == 0, said
    assert f"{middle} is there, made from the same: taken as it is" in said
    assert middle.read_bytes() == made
    latents, metadata = load_latents(folder, "1080p")
    assert latents.shape == (1, 32, 1, 67, 119) and torch.isfinite(latents).all()
    assert (metadata[contract.ENLARGED_FROM], metadata[contract.LATENTS_HASH]) == (
        middle.name,
        provenance.sha256(middle),
    )


def test_a_whole_run_enlarges_and_decodes_the_larger(tmp_path, tiny_super_resolution):
    flags = ["--model_path", tiny_super_resolution, "--output_dir", tmp_path / "out", "--video_length", 5]
    flags += ["--num_inference_steps", 1, "--gpus", 1, "--prompt", "a red circle"]
    flags += ["--super_resolution", "demo_hd"]
    command = ["bash", ROOT / "run_staged.sh", *flags]

    environment = os.environ | {"PYTHON": sys.executable}
    result = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{tmp_path}/out/output_video_demo_hd.mp4\n"
    assert "5 frames of 320x192" in result.stderr
    assert load_latents(tmp_path / "out", "demo_hd")[1]["num_inference_steps"] == "6", "the 1 is the base run's"
