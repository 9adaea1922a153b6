"""Two runs compared: numbers known beforehand, seams that were drawn, files, and refusals that change nothing."""

import json
import math
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

from hunyuan_staged.compare import clips, command, measures, perceptual, runs
from hunyuan_staged.decoding import tiling
from hunyuan_staged.errors import InputError
from hunyuan_staged.files import contract, tensors, video

FRAMES, HEIGHT, WIDTH = 3, 96, 160
TILES = ["--tile_size", "64"]


def texture(frames: int = FRAMES, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """float32 [T, H, W, 3] in [0.3, 0.7]: noise, smoothed so that it is a picture rather than sand."""
    noise = torch.rand(frames, 3, height // 4, width // 4, generator=torch.Generator().manual_seed(3))
    smooth = torch.nn.functional.interpolate(noise, (height, width), mode="bicubic", align_corners=False)
    return (0.3 + 0.4 * smooth.clamp(0, 1)).permute(0, 2, 3, 1).contiguous().numpy()


def run_folder(
    folder: Path, frames: np.ndarray | None = None, latents: torch.Tensor | None = None, *, mp4: bool = False
) -> Path:
    """A folder with what a run left: the frames [T, H, W, 3] exact or as an mp4, the latents."""
    folder.mkdir(exist_ok=True)
    if frames is not None and mp4:
        pixels = (frames * 255 + 0.5).astype(np.uint8)
        video.write_video(folder / contract.VIDEO_FILE, pixels, 24, *frames.shape[1:3])
    elif frames is not None:
        tensors.save_frames(folder, torch.from_numpy(frames).permute(3, 0, 1, 2)[None], {"fps": "12"})
    if latents is not None:
        tensors.save_latents(folder, latents, {})
    return folder


def compared(capsys, *args: object) -> dict:
    """The JSON of a comparison that must succeed."""
    assert command.main([str(arg) for arg in args]) == 0
    said = capsys.readouterr().out.splitlines()
    return json.loads(said[-1], parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()} | {
        str(path.relative_to(folder)): b"" for path in folder.rglob("*") if path.is_dir()
    }


# Numbers


def test_latent_error_of_a_known_perturbation():
    a = torch.ones(1, 4, 3, 2, 2)
    b = a.clone()
    b[:, :, 1] += 0.3
    overall, frames = measures.latent_errors(a, b)
    assert frames == pytest.approx([0, 0.3, 0], abs=1e-6)
    assert overall == pytest.approx(0.3 / math.sqrt(3), rel=1e-6)
    assert measures.latent_errors(a.bfloat16(), a.bfloat16()) == (0.0, [0.0, 0.0, 0.0])


def test_latent_error_of_nothing():
    zero, one = torch.zeros(1, 1, 1, 2, 2), torch.ones(1, 1, 1, 2, 2)
    assert measures.latent_errors(zero, zero) == (0.0, [0.0])
    assert measures.latent_errors(zero, one) == (math.inf, [math.inf])


@pytest.mark.parametrize("offset", [0.1, 0.01])
def test_psnr_of_a_constant_offset(offset):
    frame = texture()[0]
    assert measures.psnr(frame, frame + np.float32(offset)) == pytest.approx(-20 * math.log10(offset), abs=1e-3)


def test_equal_frames():
    frame = texture()[0]
    assert measures.psnr(frame, frame.copy()) == math.inf
    assert measures.ssim(frame, frame.copy()) == 1


def test_ssim_of_two_flat_frames_is_its_formula():
    """Without variance only the luminance term is left: (2 a b + C1) / (a² + b² + C1), C1 = 0.01²."""
    a, b = 0.5, 0.6
    flat = [np.full((32, 32, 3), level, np.float32) for level in (a, b)]
    assert measures.ssim(*flat) == pytest.approx((2 * a * b + 1e-4) / (a * a + b * b + 1e-4), abs=1e-4)


def test_ssim_in_float32_is_that_in_float64():
    a = texture()[0]
    b = np.clip(a + np.random.default_rng(0).normal(0, 0.02, a.shape), 0, 1).astype(np.float32)
    assert measures.ssim(a, b) == pytest.approx(measures.ssim(a.astype(np.float64), b.astype(np.float64)), abs=1e-5)


def test_the_mean_leaves_equal_frames_out():
    found = runs.summary([math.inf, 40.0, 30.0])
    assert found == {"mean": 35.0, "worst": 30.0, "worst_frame": 2, "per_frame": [math.inf, 40.0, 30.0]}
    assert runs.summary([math.inf])["mean"] == math.inf


# Tile borders and seams


def plan(height: int = HEIGHT, width: int = WIDTH, size: int = 64, overlap: float = 0.25) -> tiling.TilePlan:
    return tiling.tile_plan(height // 16, width // 16, tile_size=size, tile_overlap=overlap, spatial_ratio=16)


def test_borders_are_where_tiles_start_and_where_blends_end():
    cut = plan()  # tiles of 4 latents, one every 3, blended over 16 px
    assert cut.borders_px(cut.columns) == [48, 64, 96, 112, 144]  # the last tile's blend ends where the frame does
    assert cut.borders_px(cut.rows) == [48, 64]
    without = plan(overlap=0)
    assert without.borders_px(without.columns) == [64, 128]
    whole = plan(size=256)
    assert whole.borders_px(whole.columns) == whole.borders_px(whole.rows) == []


def seams(frames: np.ndarray, cut: tiling.TilePlan) -> dict | None:
    found = measures.Seams(cut)
    for frame in frames:
        found.add(frame)
    return found.result()


def test_a_drawn_seam_raises_the_ratio():
    cut = plan(256, 512)
    clean = texture(2, 256, 512)
    before = seams(clean, cut)
    assert 0.7 < before["ratio"] < 1.3
    stepped = clean.copy()
    stepped[:, :, 192:] += 0.1
    after = seams(stepped, cut)
    assert after["worst_at"] == "x=192"
    assert after["worst"] > 2 * before["worst"]
    assert after["ratio"] > before["ratio"] * 1.1
    everywhere = clean.copy()
    for border in cut.borders_px(cut.rows):
        everywhere[:, border:] += 0.02 * (-1) ** (border // 16)
    assert seams(everywhere, cut)["worst_at"].startswith("y=")


def test_a_step_on_another_line_of_the_grid_lowers_the_ratio():
    cut = plan(256, 512)
    stepped = texture(2, 256, 512)
    before = seams(stepped, cut)
    assert 176 not in cut.borders_px(cut.columns)
    stepped[:, :, 176:] += 0.2
    assert seams(stepped, cut)["ratio"] < before["ratio"]


def test_seams_in_numbers():
    """A step of s in a flat picture: the floor is half a level, and each of the two px has a second difference of s."""
    cut = plan(overlap=0)
    flat = np.full((2, HEIGHT, WIDTH, 3), 0.5, np.float32)
    assert seams(flat, cut) == {"ratio": 1.0, "worst": 1.0, "worst_at": "y=64"}
    flat[:, :, 64:] += np.float32(0.1)
    # three borders, y=64, x=64 and x=128, of which one has the step
    worst = (0.1 + measures.INVISIBLE) / measures.INVISIBLE
    found = seams(flat, cut)
    assert found["worst"] == pytest.approx(worst, rel=1e-4)
    assert found["ratio"] == pytest.approx((worst + 2) / 3, rel=1e-4)


def test_a_slope_is_no_seam():
    ramp = np.broadcast_to(np.linspace(0, 1, WIDTH, dtype=np.float32)[None, None, :, None], (1, HEIGHT, WIDTH, 3))
    assert seams(ramp, plan())["ratio"] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(("size", "overlap"), [(256, 0.25), (16, 0)], ids=["one tile", "every line a border"])
def test_no_seams_where_there_is_nothing_to_tell_apart(size, overlap):
    assert seams(texture(), plan(size=size, overlap=overlap)) is None


# Whole comparisons


def test_exact_frames_and_latents(tmp_path, capsys):
    clip = texture()
    other = clip.copy()
    other[1] += np.float32(0.01)
    other[2] += np.float32(0.1)
    latents = torch.full((1, 32, 1, 6, 10), 2.0)
    a = run_folder(tmp_path / "a", clip, latents)
    b = run_folder(tmp_path / "b", other, latents * 1.5)
    out = tmp_path / "out"
    result = compared(capsys, a, b, "--output_dir", out, *TILES)
    assert result["compare"] == [str(a), str(b)]
    latent = result["latents"]
    assert latent == {
        "shape": [1, 32, 1, 6, 10],
        "relative_error": 0.5,
        "worst": 0.5,
        "worst_frame": 0,
        "per_frame": [0.5],
    }
    frames = result["frames"]
    assert (frames["file"], frames["num_frames"], frames["height"], frames["width"]) == (
        contract.FRAMES_FILE,
        FRAMES,
        HEIGHT,
        WIDTH,
    )
    assert frames["equal_frames"] == 1
    assert frames["psnr"]["per_frame"][0] == "inf"
    assert frames["psnr"]["per_frame"][1:] == pytest.approx([40, 20], abs=0.01)
    assert frames["psnr"]["mean"] == pytest.approx(30, abs=0.01)
    assert frames["psnr"]["worst_frame"] == frames["ssim"]["worst_frame"] == 2
    assert frames["ssim"]["per_frame"][0] == 1
    assert 0.9 < frames["ssim"]["worst"] < 1
    assert frames["seams"]["a"]["ratio"] == pytest.approx(frames["seams"]["b"]["ratio"], rel=0.01)
    assert result["written"] == [str(out / name) for name in (runs.SIDE_BY_SIDE_FILE, runs.PLOT_FILE)]
    assert sorted(path.name for path in out.iterdir()) == [runs.PLOT_FILE, runs.SIDE_BY_SIDE_FILE]
    assert (out / runs.PLOT_FILE).read_bytes().startswith(b"\x89PNG")


def test_the_video_shows_a_b_and_the_amplified_difference(tmp_path, capsys):
    clip = texture()
    a = run_folder(tmp_path / "a", clip)
    b = run_folder(tmp_path / "b", clip + np.float32(0.05))
    compared(capsys, a, b, "--output_dir", tmp_path / "out", "--amplify", "4", "--no_plot")
    shown, fps = video.read_video(tmp_path / "out" / runs.SIDE_BY_SIDE_FILE)
    assert shown.shape == (FRAMES, HEIGHT, 3 * WIDTH, 3)
    assert fps == 12
    left, middle, right = (shown[:, :, i * WIDTH : (i + 1) * WIDTH].mean() / 255 for i in range(3))
    assert left == pytest.approx(clip.mean(), abs=0.01)
    assert middle == pytest.approx(clip.mean() + 0.05, abs=0.01)
    assert right == pytest.approx(0.05 * 4, abs=0.01)


def test_equal_videos(tmp_path, capsys):
    clip = texture()
    a, b = (run_folder(tmp_path / name, clip, mp4=True) for name in "ab")
    before = listing(tmp_path)
    assert command.main([str(a), str(b), "--no_video", "--no_plot"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "PSNR        mean inf dB, worst inf dB in frame 0" in said
    assert "SSIM        mean 1.0000, worst 1.0000 in frame 0" in said
    assert f"frames      output_video.mp4: {FRAMES} frames of 160x96, 3 of them equal" in said
    assert "seams of A  no tile border that could be told from other lines" in said
    result = json.loads(said[-1])
    assert result["latents"] is None
    assert result["frames"]["psnr"]["mean"] == "inf"
    assert result["frames"]["seams"] == {"a": None, "b": None}
    assert result["written"] == []
    assert listing(tmp_path) == before


def test_latents_alone_need_no_library(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    latents = torch.ones(1, 32, 2, 6, 10)
    a, b = run_folder(tmp_path / "a", texture(), latents), run_folder(tmp_path / "b", None, latents)
    result = compared(capsys, a, b, "--output_dir", tmp_path / "out")
    assert result["latents"]["relative_error"] == 0
    assert result["frames"] is None
    assert result["notes"] == [f"{contract.FRAMES_FILE} is only in {a}: not compared"]
    assert not (tmp_path / "out").exists()


def test_frames_are_never_whole_in_memory(tmp_path):
    """One frame of each at a time: the second pair is not read before the first was measured."""
    clip = texture()
    a = clips.open_clip(run_folder(tmp_path / "a", clip), contract.FRAMES_FILE)
    taken = []

    def frames():
        for number, frame in enumerate(clip):
            taken.append(number)
            yield frame

    counted = clips.Clip(a.path, FRAMES, HEIGHT, WIDTH, 24, frames)
    for number, (first, second) in enumerate(clips._pairs(a, counted, lambda pairs, **_: pairs, "reading")):
        assert taken == list(range(number + 1))
        assert np.array_equal(first, second)


def test_flicker_of_steady_and_of_unsteady_frames():
    still, ramp, unsteady = measures.Flicker(), measures.Flicker(), measures.Flicker()
    ground = np.full((4, 4, 3), 0.5, dtype=np.float32)
    for number in range(5):
        still.add(ground)
        ramp.add(ground + np.float32(0.01 * number))
        unsteady.add(ground + np.float32(0.1 * (number % 2)))
    assert still.result() == 0
    assert ramp.result() == pytest.approx(0, abs=1e-6)
    assert unsteady.result() == pytest.approx(0.2)
    assert measures.Flicker().result() is None


class HalfTheDistance(torch.nn.Module):
    """In LPIPS's place: of pictures [1, 3, H, W] in [-1, 1] the mean absolute difference, which is twice that in [0, 1]."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        assert options == {"net": "alex", "version": "0.1", "verbose": False}

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        assert a.shape == b.shape == (1, 3, HEIGHT, WIDTH)
        assert a.min() < 0 < a.max()
        return (a - b).abs().mean().view(1, 1, 1, 1)


@pytest.mark.parametrize("weights", [True, False])
def test_lpips_where_its_weights_are_at_hand(tmp_path, capsys, monkeypatch, weights):
    package = types.ModuleType("lpips")
    package.LPIPS = HalfTheDistance  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lpips", package)
    monkeypatch.setattr(perceptual, "find_spec", lambda name: name in perceptual.PACKAGES)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    if weights:
        (tmp_path / "hub" / "checkpoints" / "alexnet-owt-7be5be79.pth").touch()
    clip = texture()
    other = clip.copy()
    other[1] += np.float32(0.01)
    other[2] += np.float32(0.1)
    a, b = run_folder(tmp_path / "a", clip), run_folder(tmp_path / "b", other)
    assert command.main([str(a), str(b), "--output_dir", str(tmp_path / "out"), *TILES, "--no_video", "--no_plot"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)["frames"]["lpips"]
    if weights:
        assert found["per_frame"] == pytest.approx([0, 0.02, 0.2], rel=1e-3)
        assert (found["worst_frame"], found["mean"]) == (2, pytest.approx(0.0733, rel=1e-2))
        assert "LPIPS       mean 0.0733, worst 0.2000 in frame 2" in lines
    else:
        assert found is None
        assert not any("LPIPS" in line for line in lines)


def test_without_its_package_there_is_no_lpips(monkeypatch):
    monkeypatch.setattr(perceptual, "find_spec", lambda name: None)
    assert perceptual.open_lpips() is None


def test_json_goes_to_a_file(tmp_path, capsys):
    clip = texture()
    a, b = run_folder(tmp_path / "a", clip), run_folder(tmp_path / "b", clip * np.float32(0.9))
    target = tmp_path / "new" / "result.json"
    assert command.main([str(a), str(b), "--no_video", "--no_plot", "--json", str(target)]) == 0
    said = capsys.readouterr()
    result = json.loads(target.read_text())
    assert result["frames"]["flicker"]["b"] == pytest.approx(0.9 * result["frames"]["flicker"]["a"], rel=1e-4)
    assert f"wrote {target}" in said.err
    assert "flicker     " in said.out
    assert "{" not in said.out
    assert command.main([str(a), str(b), "--json", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: --json {tmp_path} is a folder\n"


# Refusals


def refused(capsys, *args: object) -> str:
    assert command.main([str(arg) for arg in args]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    return line


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["a", "none"], "error: none is not a folder of a run"),
        (["a", "a/../a"], "error: A and B are the same folder, a; give two runs"),
        (["a"], "error: the following arguments are required: B (see python -m hunyuan_staged.compare --help)"),
        (["a", "b", "--tile_size", "100"], "error: --tile_size 100 is not a positive multiple of 16 px"),
        (["a", "b", "--tile_overlap", "0.7"], "error: --tile_overlap 0.7 is outside 0 to 0.5"),
        (["a", "b", "--amplify", "0"], "error: --amplify 0 is not a positive number"),
        (["a", "b", "--amplify", "nan"], "error: --amplify nan is not a positive number"),
        (
            ["a", "b", "--output_dir", "a/output_video.mp4/x"],
            "error: --output_dir a/output_video.mp4/x: a/output_video.mp4 is not a folder",
        ),
        (["a", "b", "--output_dir", "taken"], "error: --output_dir taken: quality.png in it is a folder"),
        (
            ["a", "empty"],
            "error: the two have none of stage2_latents.safetensors, stage3_frames.safetensors, output_video.mp4 "
            "in common: a has output_video.mp4, stage2_latents.safetensors; empty has none",
        ),
        (["a", "b"], "error: stage2_latents.safetensors differs in shape: [1, 32, 2, 6, 10] in a, [1, 32, 1, 6, 10] in b"),
        (["a", "nan"], "error: nan/stage2_latents.safetensors: latents holds NaN or Inf"),
        (
            ["a", "short"],
            "error: output_video.mp4 differs in shape: 3 frames of 160x96 px in a, 2 frames of 160x96 px in short",
        ),
        (
            ["a", "broken"],
            "error: broken/output_video.mp4 is no video that ffmpeg can read as mov, matroska, avi, mpegts, flv, ogg, gif",
        ),
        (["odd", "odd2"], "error: odd/stage3_frames.safetensors has 3 frames of 40x32 px; allowed are multiples of 16 px"),
    ],
)  # fmt: skip
def test_refusals_are_one_line_and_change_nothing(tmp_path, capsys, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    clip, latents = texture(), torch.ones(1, 32, 2, 6, 10)
    run_folder(Path("a"), clip, latents, mp4=True)
    run_folder(Path("b"), None, latents[:, :, :1])
    run_folder(Path("empty"))
    run_folder(Path("nan"), None, latents * math.nan)
    run_folder(Path("short"), clip[:2], mp4=True)
    (run_folder(Path("broken")) / contract.VIDEO_FILE).write_text("hello")
    (Path("taken") / runs.PLOT_FILE).mkdir(parents=True)
    for name in ("odd", "odd2"):
        run_folder(Path(name), clip[:, :32, :40])
    before = listing(tmp_path)
    assert refused(capsys, *args) == message
    assert listing(tmp_path) == before


def test_a_refusal_while_measuring_comes_after_the_bar_and_changes_nothing(tmp_path, capsys):
    bright = texture()
    bright[1] += 1
    a, b = run_folder(tmp_path / "a", texture()), run_folder(tmp_path / "b", bright)
    before = listing(tmp_path)
    assert command.main([str(a), str(b), "--output_dir", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == f"error: {b / contract.FRAMES_FILE}: frame 1 is not in [0, 1]"
    assert listing(tmp_path) == before


def test_a_missing_library_is_one_line_with_the_command(tmp_path, capsys, monkeypatch):
    a, b = (run_folder(tmp_path / name, texture()) for name in "ab")
    monkeypatch.setitem(sys.modules, "skimage.metrics", None)
    line = refused(capsys, a, b, "--output_dir", tmp_path / "out")
    assert line.startswith("error: comparing frames needs a library that is not here (")
    assert line.endswith("; pip install scikit-image matplotlib")
    assert not (tmp_path / "out").exists()


def test_matplotlib_is_needed_for_the_plot_alone(tmp_path, capsys, monkeypatch):
    a, b = (run_folder(tmp_path / name, texture()) for name in "ab")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "matplotlib" in refused(capsys, a, b, "--output_dir", tmp_path / "out")
    assert compared(capsys, a, b, "--no_plot", "--no_video")["frames"]["equal_frames"] == FRAMES


def test_frames_read_one_by_one_are_those_read_at_once(tmp_path):
    folder = run_folder(tmp_path / "a", texture())
    whole, _ = tensors.load_frames(folder)
    size, metadata, frames = tensors.open_frames(folder)
    assert size == (FRAMES, HEIGHT, WIDTH)
    assert metadata["fps"] == "12"
    assert torch.equal(torch.stack(list(frames), dim=1)[None], whole)
    with pytest.raises(
        InputError, match=r"stage3_frames\.safetensors does not exist; run stage3_vae_decoder\.py --save_frames first"
    ):
        tensors.open_frames(tmp_path)


def test_the_command_says_help_without_loading_torch():
    script = (
        "import sys; from hunyuan_staged.compare import command; command.build_parser().format_help(); "
        "print('torch' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "False"
