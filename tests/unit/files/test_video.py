"""mp4: what goes in comes out, and nothing is left behind when it fails."""

import subprocess

import numpy as np
import pytest

from hunyuan_staged.errors import InputError
from hunyuan_staged.files import video


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
