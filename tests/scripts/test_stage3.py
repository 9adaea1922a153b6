"""stage3_vae_decoder.py as a user calls it: on the drawn tiny checkpoint, and on the real model's own latents."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from folders import denoised
from safetensors.torch import save_file

from hunyuan_staged.files import contract, tensors, video
from hunyuan_staged.files.config import read_config

SCRIPT = ROOT / "stage3_vae_decoder.py"
TILES = ["--tile_size", "64"]


def call(*args: object, processes: int = 1) -> subprocess.CompletedProcess:
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run([*launcher, str(SCRIPT), *map(str, args)], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def done(tmp_path_factory, tiny_official):
    """One run, in tiles, that the tests of this module compare with."""
    folder = denoised(tmp_path_factory.mktemp("stage3"), tiny_official)
    result = call("--input_dir", folder, *TILES, "--save_frames")
    assert result.returncode == 0, result.stderr
    return folder, result


def test_video_frames_config_and_report(done):
    folder, result = done
    clip, fps = video.read_video(folder / contract.VIDEO_FILE)
    assert clip.shape == (9, 96, 160, 3)
    assert fps == 24
    frames, metadata = tensors.load_frames(folder)
    assert frames.shape == (1, 3, 9, 96, 160)
    assert metadata["fps"] == "24"
    assert 0 <= frames.min() < frames.max() <= 1
    # The mp4 shows those frames: averaged over 16 px, where compression and chroma subsampling hardly matter.
    shown = torch.from_numpy(clip.copy()).permute(3, 0, 1, 2)[None] / 255
    coarse = [torch.nn.functional.avg_pool3d(x.float(), (1, 16, 16)) for x in (shown, frames)]
    assert (coarse[0] - coarse[1]).abs().mean() < 0.02 < coarse[1].std()
    config = read_config(folder)
    assert config["prompt"] == "a"
    assert config["seed"] == 42
    assert config["stage3_decode_time"] > 0
    assert config["output_video"] == str(folder / contract.VIDEO_FILE)
    said = result.stdout + result.stderr
    path = folder / contract.VIDEO_FILE
    assert result.stdout == f"{path}\n"
    assert re.search(rf"INFO +video {path}: 0\.38 s, 9 frames; \d+\.\d s in all$", result.stderr.splitlines()[-1])
    assert "8 tiles of 64 px (as asked)" in said
    assert "9 frames of 160x96 at 24 frames per second" in said
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [contract.CONFIG_FILE, contract.FRAMES_FILE, contract.LATENTS_FILE, contract.VIDEO_FILE]
    )


def test_a_video_of_other_latents_is_replaced_with_a_warning(done, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(done[0], folder)
    config = read_config(folder) | {"output_video": str(folder / contract.VIDEO_FILE)}
    (folder / contract.CONFIG_FILE).write_text(json.dumps(config))
    warned = f"{folder / contract.VIDEO_FILE} was made from other latents (another prompt, seed or settings)"
    assert warned not in call("--input_dir", folder, *TILES).stderr
    latents, metadata = tensors.load_latents(folder)
    save_file({"latents": latents + 1}, folder / contract.LATENTS_FILE, metadata=metadata)
    result = call("--input_dir", folder, *TILES)
    assert result.returncode == 0 and f"{warned}, and is replaced" in result.stderr


def copy_of(done, tmp_path: Path) -> Path:
    for name in (contract.CONFIG_FILE, contract.LATENTS_FILE):
        shutil.copy(done[0] / name, tmp_path)
    return tmp_path


def frames_of(folder: Path) -> torch.Tensor:
    return tensors.load_frames(folder)[0]


@pytest.mark.parametrize(("processes", "flags"), [(3, []), (2, ["--disable_tile_parallelism"])])
def test_processes_give_the_bits_of_one(done, tmp_path, processes, flags):
    folder = copy_of(done, tmp_path)
    result = call("--input_dir", folder, *TILES, "--save_frames", *flags, processes=processes)
    assert result.returncode == 0, result.stderr
    assert torch.equal(frames_of(folder), frames_of(done[0]))
    how = "8 tiles of 64 px (as asked)" if flags else f"8 tiles of 64 px, tiles over {processes} processes (as asked)"
    assert how in result.stdout + result.stderr


@pytest.fixture(scope="module")
def whole(tmp_path_factory, done):
    """One run as it is by default: in whole frames."""
    folder = copy_of(done, tmp_path_factory.mktemp("whole"))
    result = call("--input_dir", folder, "--save_frames")
    assert result.returncode == 0, result.stderr
    assert "whole frames (the default)" in result.stdout + result.stderr
    return folder, result


def test_whole_frames_are_the_default(done, whole):
    tiles, exact = (frames_of(folder).float() for folder in (done[0], whole[0]))
    assert exact.shape == tiles.shape
    # The same video, but for what a tile of a random decoder does not see.
    assert 0.8 < torch.corrcoef(torch.stack([exact.flatten(), tiles.flatten()]))[0, 1] < 0.9999


@pytest.mark.parametrize(("processes", "flags"), [(3, []), (2, ["--disable_tile_parallelism"])])
def test_rows_over_processes_give_the_bits_of_one(done, whole, tmp_path, processes, flags):
    folder = copy_of(done, tmp_path)
    result = call("--input_dir", folder, "--save_frames", *flags, processes=processes)
    assert result.returncode == 0, result.stderr
    assert torch.equal(frames_of(folder), frames_of(whole[0]))
    how = "whole frames (the default)" if flags else "whole frames, rows over 3 processes (the default)"
    assert how in result.stdout + result.stderr


def test_whole_frames_under_another_name_and_rate(done, tmp_path):
    folder = copy_of(done, tmp_path)
    target = tmp_path / "videos" / "whole.mp4"
    target.parent.mkdir()
    result = call("--input_dir", folder, "--disable_tiling", "--output_video", target, "--fps", "12.5")
    assert result.returncode == 0, result.stderr
    clip, fps = video.read_video(target)
    assert clip.shape == (9, 96, 160, 3)
    assert fps == 12.5
    assert not (folder / contract.VIDEO_FILE).exists()
    assert not (folder / contract.FRAMES_FILE).exists()
    assert read_config(folder)["output_video"] == str(target)
    assert "whole frames (as asked)" in result.stdout + result.stderr


def test_encoder_flags_and_what_a_video_was_made_from(done, tmp_path):
    folder, sizes = copy_of(done, tmp_path), []
    for crf in (0, 30):
        result = call("--input_dir", folder, "--crf", crf, "--encoder_preset", "ultrafast")
        assert result.returncode == 0, result.stderr
        sizes.append((folder / contract.VIDEO_FILE).stat().st_size)
    assert sizes[0] > 2 * sizes[1]
    command = [video.ffmpeg_path(), "-v", "error", "-i", folder / contract.VIDEO_FILE, "-f", "ffmetadata", "-"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert 'comment={"prompt": "a", "seed": 42}' in told.splitlines()
    result = call("--input_dir", folder, "--output_video", tmp_path / "clip.gif")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "clip.gif").read_bytes()[:6] == b"GIF89a"


def test_model_path_overrides_the_config(done, tmp_path, tiny_diffusers):
    """The config's folder is gone; the flag's has the other layout of the same weights, and gives the same bits."""
    folder = denoised(tmp_path, "/nowhere/at/all")
    result = call("--input_dir", folder, *TILES, "--save_frames", "--model_path", tiny_diffusers)
    assert result.returncode == 0, result.stderr
    assert torch.equal(frames_of(folder), frames_of(done[0]))


# The real model's latents


def write_smallest_vae(folder: Path) -> Path:
    """A model folder with nothing but a VAE decoder, of one channel where the real one has 128, for speed."""
    from diffusers.models.autoencoders.autoencoder_kl_hunyuanvideo15 import HunyuanVideo15Decoder3D

    from hunyuan_staged.weights.key_maps import VAE_MAP, to_official

    channels = [1, 1, 2, 8, 32]
    torch.manual_seed(0)
    decoder = HunyuanVideo15Decoder3D(32, 3, channels[::-1], layers_per_block=0)
    config = {
        "_class_name": "AutoencoderKLConv3D",
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 32,
        "block_out_channels": channels,
        "layers_per_block": 0,
        "ffactor_spatial": 16,
        "ffactor_temporal": 4,
        "downsample_match_channel": True,
        "upsample_match_channel": True,
        "scaling_factor": 1.03682,
        "shift_factor": None,
    }
    state = to_official({f"decoder.{name}": tensor for name, tensor in decoder.state_dict().items()}, VAE_MAP)
    (folder / "vae").mkdir(parents=True)
    (folder / "vae" / "config.json").write_text(json.dumps(config))
    save_file(
        {name: tensor.contiguous() for name, tensor in state.items()},
        folder / "vae" / "diffusion_pytorch_model.safetensors",
    )
    return folder


def test_the_real_models_latents(tmp_path, tpu_folder):
    """The TPU suite's folder as it lies there: model_id for model_path, bfloat16, no height or width."""
    folder = tmp_path / "real"
    shutil.copytree(tpu_folder, folder)
    before = json.loads((folder / contract.CONFIG_FILE).read_text())
    result = call("--input_dir", folder, "--model_path", write_smallest_vae(tmp_path / "vae"), "--strict")
    assert result.returncode == 0, result.stderr
    assert "WARNING" not in result.stderr, "what it does not record is no reason to doubt it"
    clip, fps = video.read_video(folder / contract.VIDEO_FILE)
    assert clip.shape == (49, 720, 1280, 3)
    assert fps == 24
    assert clip.std() > 1
    assert np.abs(clip[0].astype(int) - clip[-1]).mean() > 0.1
    config = read_config(folder)
    assert config["prompt"] == before["prompt"]
    assert config["model_path"] == before["model_id"]
    assert config["stage3_decode_time"] > 0
    assert "whole frames (the default)" in result.stdout + result.stderr


# Refusals


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--tile_size", "100"], "--tile_size 100 is not a positive multiple of 16 px"),
        (["--tile_overlap", "0.75"], "--tile_overlap 0.75 is outside 0 to 0.5"),
        (["--tile_size", "16"], "leaves no step between tiles"),
        (["--fps", "0"], "--fps 0 is outside 1 to 240"),
        (["--fps", "nan"], "--fps nan is outside 1 to 240"),
        (["--output_video", "/dev/null/a.mp4"], "--output_video /dev/null: /dev/null is not a folder"),
        (["--output_video", "clip.avi"], "--output_video clip.avi is not the name of an .mp4 file or a .gif"),
        (["--model_path", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--tiles", "3"], "unrecognized arguments: --tiles 3"),
    ],
)
def test_refusals_are_one_line_and_change_nothing(done, args, message):
    before = {path.name: path.stat().st_mtime_ns for path in done[0].iterdir()}
    result = call("--input_dir", done[0], *args)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert len([line for line in result.stderr.splitlines() if "error:" in line]) == 1
    assert before == {path.name: path.stat().st_mtime_ns for path in done[0].iterdir()}


def test_missing_latents_name_the_stage_that_writes_them(done, tmp_path):
    shutil.copy(done[0] / contract.CONFIG_FILE, tmp_path)
    result = call("--input_dir", tmp_path)
    assert result.returncode == 2
    assert "stage2_latents.safetensors does not exist; run stage2_transformer.py first" in result.stderr


def test_latents_of_another_model_are_refused_before_any_weight_is_read(tmp_path, tiny_official):
    folder = denoised(tmp_path, tiny_official, torch.zeros(1, 16, 3, 6, 10))
    result = call("--input_dir", folder)
    assert result.returncode == 2
    assert "latents [1, 16, 3, 6, 10] do not fit this VAE, which takes [1, 32, t, h, w]" in result.stderr
    assert not (folder / contract.VIDEO_FILE).exists()


def test_no_model_path_names_the_flag(done, tmp_path):
    folder = copy_of(done, tmp_path)
    (folder / contract.CONFIG_FILE).write_text('{"prompt": "a"}')
    result = call("--input_dir", folder)
    assert result.returncode == 2
    assert "records no model_path; give --model_path" in result.stderr


def test_help_and_refusals_load_no_torch():
    for arguments, code in ((["--help"], 0), (["--tile_size", "100"], 2)):
        program = (
            f"import sys, runpy; sys.argv = ['stage3_vae_decoder.py', *{arguments}]; sys.path.insert(0, '.')\n"
            "try: runpy.run_path('stage3_vae_decoder.py', run_name='__main__')\n"
            f"except SystemExit as e: assert e.code == {code}, e.code\n"
            "assert 'torch' not in sys.modules\n"
        )
        result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        if code == 0:
            assert "default: whole frames" in " ".join(result.stdout.split())
            assert "examples:" in result.stdout
            assert "tiles" in result.stdout
