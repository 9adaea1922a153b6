"""mp4: what goes in comes out, and nothing is left behind when it fails."""

import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

from hunyuan_staged.errors import InputError
from hunyuan_staged.files import video
from hunyuan_staged.files.encoding import Encoding, check_encoding, default_preset


def moving_square(frames: int = 9, height: int = 96, width: int = 160) -> np.ndarray:
    """A coloured square that moves right over a plain ground; large flat areas survive chroma subsampling."""
    clip = np.full((frames, height, width, 3), (20, 60, 160), np.uint8)
    for i in range(frames):
        clip[i, 32:64, 16 + 8 * i : 48 + 8 * i] = (220, 40, 30)
    return clip


def test_round_trip(tmp_path):
    clip = moving_square()
    path = tmp_path / "new" / "clip.mp4"
    assert video.write_video(path, clip, 24, 96, 160) == 9
    frames, fps = video.read_video(path)
    assert frames.shape == clip.shape
    assert frames.dtype == np.uint8
    assert fps == 24
    # Colours come back as they went in: the matrix that wrote them is the one that the file names.
    difference = np.abs(frames.astype(int) - clip)
    assert np.median(difference) <= 2
    assert difference.mean() < 3
    assert [p.name for p in path.parent.iterdir()] == ["clip.mp4"]


def test_a_browser_plays_it(tmp_path):
    path = tmp_path / "clip.mp4"
    video.write_video(path, moving_square(), 23.976, 96, 160)
    header = subprocess.run([video.ffmpeg_path(), "-hide_banner", "-i", path], capture_output=True, text=True).stderr
    assert "Video: h264" in header
    assert "yuv420p(tv, bt709" in header
    assert "23.98 fps" in header
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


def test_frames_are_streamed(tmp_path, monkeypatch):
    """A frame goes to the encoder before the next one is made: the iterable is never collected."""
    made, written = [], []
    contiguous = np.ascontiguousarray

    def frames():
        for number, frame in enumerate(moving_square()):
            assert len(written) == number
            made.append(number)
            yield frame

    monkeypatch.setattr(np, "ascontiguousarray", lambda frame: written.append(len(made)) or contiguous(frame))
    video.write_video(tmp_path / "clip.mp4", frames(), 24, 96, 160)
    assert written == list(range(1, 10))


def test_a_failure_of_the_source_leaves_the_old_file(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"old")

    def frames():
        yield from moving_square(3)
        raise KeyError("the decoder broke")

    with pytest.raises(KeyError, match="the decoder broke"):
        video.write_video(path, frames(), 24, 96, 160)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["clip.mp4"]


def fake_ffmpeg(folder, script: str) -> str:
    path = folder / "ffmpeg"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    "script",
    [
        "echo 'first line' >&2; echo 'No space left on device' >&2; exit 28",
        "cat > /dev/null; echo 'No space left on device' >&2; exit 28",
    ],
    ids=["at once", "after the last frame"],
)
def test_ffmpeg_failure_is_one_line(tmp_path, monkeypatch, script):
    target = tmp_path / "out"
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", fake_ffmpeg(tmp_path, script))
    with pytest.raises(InputError, match=r"ffmpeg could not write .*clip\.mp4 \(status 28\): No space left on device$"):
        video.write_video(target / "clip.mp4", moving_square(), 24, 96, 160)
    assert list(target.iterdir()) == []


def test_missing_ffmpeg(monkeypatch):
    def absent():
        raise RuntimeError("No ffmpeg exe could be found.")

    monkeypatch.setattr("imageio_ffmpeg.get_ffmpeg_exe", absent)
    with pytest.raises(InputError, match=r"No ffmpeg exe could be found.*pip install imageio-ffmpeg"):
        video.ffmpeg_path()


def test_reading_what_is_no_video(tmp_path):
    with pytest.raises(InputError, match=r"none\.mp4 does not exist"):
        video.read_video(tmp_path / "none.mp4")
    (tmp_path / "text.mp4").write_text("hello")
    with pytest.raises(InputError, match=r"text\.mp4 is no video"):
        video.read_video(tmp_path / "text.mp4")


# Encoders


def test_lossless_is_lossless_where_the_colours_are(tmp_path):
    """Grey frames: nothing is lost by halving the colours' sides."""
    grey = np.repeat(np.random.default_rng(0).integers(16, 235, (5, 96, 160, 1), np.uint8), 3, axis=-1)
    sizes = {}
    for crf in (0, 17, 40):
        path = tmp_path / f"{crf}.mp4"
        video.write_video(path, grey, 24, 96, 160, Encoding(preset="ultrafast", crf=crf))
        sizes[crf] = path.stat().st_size
        worst = np.abs(video.read_video(path)[0].astype(int) - grey).max()
        assert worst <= 1 if crf == 0 else worst > 1, (crf, worst)
    assert sizes[0] > sizes[17] > sizes[40]


def test_a_gif_plays_at_the_same_rate(tmp_path):
    path, clip = tmp_path / "clip.gif", moving_square()
    assert video.write_video(path, clip, 20, 96, 160) == 9
    assert path.read_bytes()[:6] == b"GIF89a"
    frames, fps = video.read_video(path)
    assert frames.shape == clip.shape
    assert fps == 20
    assert np.abs(frames.astype(int) - clip).mean() < 3


def test_the_comment_survives(tmp_path):
    path, comment = tmp_path / "clip.mp4", '{"prompt": "a cat = \\"Mei\\"; 猫", "seed": 42}'
    video.write_video(path, moving_square(), 24, 96, 160, Encoding(comment=comment))
    command = [video.ffmpeg_path(), "-v", "error", "-i", path, "-f", "ffmetadata", "-"]
    written = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    unescaped = re.sub(r"\\(.)", r"\1", next(line for line in written.splitlines() if line.startswith("comment=")))
    assert unescaped == f"comment={comment}"


@pytest.mark.parametrize(
    ("cores", "gpus", "preset"),
    [
        (2, 0, "medium"),
        (2, 1, "veryfast"),
        (4, 1, "medium"),
        (16, 8, "veryfast"),
        (128, 8, "fast"),
        (4, 4, "superfast"),
    ],
)
def test_the_default_preset_keeps_up_with_decoding(cores, gpus, preset):
    assert default_preset(cores, gpus) == preset


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"encoder": "hevc"}, r"^--encoder hevc is none of libx264, h264_nvenc$"),
        ({"preset": "p4"}, r"^--encoder_preset p4 is none of libx264's: ultrafast, superfast, .*, veryslow$"),
        ({"encoder": "h264_nvenc", "preset": "fast"}, r"^--encoder_preset fast is none of h264_nvenc's: p1, .*, p7$"),
        ({"crf": 52}, r"^--crf 52 is outside 0 to 51$"),
        ({"crf": -1}, r"^--crf -1 is outside 0 to 51$"),
    ],
)
def test_encodings_that_no_encoder_takes(given, message):
    with pytest.raises(InputError, match=message):
        check_encoding(Encoding(**given))


def test_an_encoder_is_tried_before_it_is_used(tmp_path, monkeypatch):
    video.require_encoder("libx264")
    video.require_encoder(video.GIF)
    script = "case \"$*\" in *h264_nvenc*) echo 'Cannot load libcuda.so.1' >&2; echo 'more' >&2; exit 1;; esac"
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", fake_ffmpeg(tmp_path, script))
    with pytest.raises(
        InputError,
        match=r"^--encoder h264_nvenc does not work here: Cannot load libcuda\.so\.1; allowed here: libx264$",
    ):
        video.require_encoder("h264_nvenc")


def test_a_trial_that_was_begun_is_the_one_that_counts(tmp_path, monkeypatch):
    """Each job had ffmpeg tried, 0.1 s of it. One that failed is tried again."""
    log = tmp_path / "log"
    program = fake_ffmpeg(tmp_path, f"echo $$ >> {log}; echo frame")
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", program)
    video.begin_trial("libx264")
    for _ in range(2):
        video.require_encoder("libx264")
    assert len(log.read_text().splitlines()) == 1
    (tmp_path / "broken").mkdir()
    log.unlink()
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", fake_ffmpeg(tmp_path / "broken", f"echo $$ >> {log}; exit 1"))
    video.begin_trial("libx264")
    for _ in range(2):
        with pytest.raises(InputError, match="it gave no reason"):
            video.require_encoder("libx264")
    assert len(log.read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("exit 0", "cannot encode with libx264: it gave no reason; see IMAGEIO_FFMPEG_EXE"),
        ("echo 'Unknown encoder' >&2; exit 8", "cannot encode with libx264: Unknown encoder; see IMAGEIO_FFMPEG_EXE"),
        (None, "is no ffmpeg that works: Permission denied; see IMAGEIO_FFMPEG_EXE"),
    ],
)
def test_a_broken_ffmpeg_is_found_before_anything_is_decoded(tmp_path, monkeypatch, script, message):
    program = Path(fake_ffmpeg(tmp_path, script or ""))
    if script is None:
        program.chmod(0o644)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(program))
    with pytest.raises(InputError, match=re.escape(f"{program} {message}")):
        video.require_encoder("libx264")


def test_an_ffmpeg_that_writes_nothing_leaves_the_old_video(tmp_path, monkeypatch):
    """With status 0 an empty file took its place."""
    path = tmp_path / "out" / "clip.mp4"
    path.parent.mkdir()
    path.write_bytes(b"old")
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", fake_ffmpeg(tmp_path, "cat >/dev/null"))
    with pytest.raises(InputError, match=r"ffmpeg wrote nothing into .*clip\.mp4, with status 0: it gave no reason$"):
        video.write_video(path, moving_square(), 24, 96, 160)
    assert [(x.name, x.read_bytes()) for x in path.parent.iterdir()] == [("clip.mp4", b"old")]


@pytest.mark.parametrize("name", ["a.mp4", "a.gif"])
def test_a_playlist_in_the_videos_place_leads_nowhere(tmp_path, name):
    """ffmpeg followed it to other files, and would have to addresses."""
    video.write_video(tmp_path / "secret.mp4", moving_square(), 24, 96, 160)
    for text in (
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nsecret.mp4\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile secret.mp4\n",
        "<MPD/>",
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match=f"{name} is no video that ffmpeg can read"):
            video.read_video(tmp_path / name)


def test_a_videos_name_is_no_address(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    video.write_video(tmp_path / "concat:a.mp4", moving_square(), 24, 96, 160)
    assert len(video.read_video("concat:a.mp4")[0]) == len(list(moving_square()))
