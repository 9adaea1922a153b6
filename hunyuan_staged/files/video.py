"""Frames → mp4 or gif, streamed through ffmpeg; and back, for comparisons."""

import contextlib
import os
import queue
import subprocess
import tempfile
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import IO

import numpy as np

from hunyuan_staged.errors import InputError
from hunyuan_staged.files import atomic
from hunyuan_staged.files.encoding import DEFAULT_ENCODING, ENCODERS, GIF, Encoding

# How ffmpeg may read a video of the user's: from this file alone, which some formats would have it leave.
READ_FORMATS = ("mov", "matroska", "avi", "mpegts", "flv", "ogg", "gif")
READ_OPTIONS = ["-protocol_whitelist", "file", "-format_whitelist", ",".join(READ_FORMATS)]
TRIAL_SECONDS = 60  # for a frame; a GPU's first takes a few
FRAMES_AHEAD = 128  # that wait for the encoder at most: of 720p 0.33 GiB


def ffmpeg_path() -> str:
    """The ffmpeg to run: imageio-ffmpeg's, or the one that IMAGEIO_FFMPEG_EXE names. InputError if there is none."""
    try:
        import imageio_ffmpeg

        return imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError) as error:
        raise InputError(
            f"no ffmpeg to write the video with ({error}); pip install imageio-ffmpeg, or set IMAGEIO_FFMPEG_EXE"
        ) from error


def begin_trial(encoder: str) -> None:
    """Have a thread find out what require_encoder says."""
    with contextlib.suppress(InputError):  # it says so
        _trial(ffmpeg_path(), encoder, os.getpid())


def require_encoder(encoder: str) -> None:
    """InputError with ffmpeg's reason where it cannot encode so on this machine: tried on one frame, once."""
    try:
        _trial(ffmpeg_path(), encoder, os.getpid()).result()
    except InputError:
        _trial.cache_clear()  # by the next job it may be there
        raise


@cache
def _trial(program: str, encoder: str, process: int) -> Future[None]:
    """process: this one. One that is forked has none of its parent's threads."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="encoder")
    try:
        return pool.submit(_try, program, encoder)
    finally:
        pool.shutdown(wait=False)


def _try(program: str, encoder: str) -> None:
    source = ["-f", "lavfi", "-i", "color=size=256x256:rate=24", "-frames:v", "1"]
    kind = "gif" if encoder == GIF else "h264"
    command = [program, "-v", "error", *source, "-c:v", encoder, "-f", kind, "-"]
    try:
        tried = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=TRIAL_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = getattr(error, "strerror", None) or f"no answer in {TRIAL_SECONDS} s"
        raise InputError(f"{command[0]} is no ffmpeg that works: {reason}; see IMAGEIO_FFMPEG_EXE") from error
    if tried.returncode or not tried.stdout:
        # The first line is the cause, those after it are what followed from it.
        said = tried.stderr.decode(errors="replace").splitlines()
        reason = next((line.strip() for line in said if line.strip()), "it gave no reason")
        if encoder in (GIF, ENCODERS[0]):
            raise InputError(f"{command[0]} cannot encode with {encoder}: {reason}; see IMAGEIO_FFMPEG_EXE")
        raise InputError(f"{encoder} does not work here: {reason}; allowed here: {ENCODERS[0]}", option="encoder")


def _encoder_options(encoding: Encoding) -> list[str]:
    quality = ["-crf", str(encoding.crf)]
    if encoding.encoder == "h264_nvenc":
        lossless = ["-tune", "lossless"]
        quality = ["-rc", "vbr", "-cq", str(encoding.crf), "-b:v", "0"] if encoding.crf else lossless
    preset = ["-preset", encoding.preset] if encoding.preset else []
    return ["-c:v", encoding.encoder, *preset, *quality]


def _command(fps: float, height: int, width: int, target: Path, encoding: Encoding) -> list[str]:
    """Raw RGB on stdin → H.264 that a browser plays. Players assume BT.709, so convert to it and say so in the file.

    Into a gif: 256 colours that suit the whole clip, for which ffmpeg keeps its frames.
    """
    rate = Fraction(fps).limit_denominator(1001)
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(rate), "-i", "-"]
    if target.suffix == ".gif":
        palette = "split[a][b];[a]palettegen=stats_mode=diff[p];[b][p]paletteuse"
        return [ffmpeg_path(), "-y", "-v", "error", *source, "-vf", palette, str(target)]
    colors = ["-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709", "-color_range", "tv"]
    return [
        *(ffmpeg_path(), "-y", "-v", "error", *source, "-an", *_encoder_options(encoding)),
        *("-vf", "scale=out_color_matrix=bt709:out_range=tv", "-pix_fmt", "yuv420p", *colors),
        *(("-metadata", f"comment={encoding.comment}") if encoding.comment else ()),
        # The index at the front: a browser plays before it has the whole file.
        *("-movflags", "+faststart", str(target)),
    ]


def _last_line(log: IO[bytes]) -> str:
    log.seek(0)
    lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it gave no reason"


class _Pump:
    """A thread that hands frames to a pipe, so that their maker need not wait for the encoder.

    It takes up to FRAMES_AHEAD frames ahead. Once the pipe is broken the rest is dropped, and `broken` says so.
    """

    def __init__(self, pipe: IO[bytes]) -> None:
        self.broken = False
        self._pipe = pipe
        self._frames: queue.Queue[np.ndarray | None] = queue.Queue(FRAMES_AHEAD)
        self._thread = threading.Thread(target=self._run, name="frames to ffmpeg", daemon=True)
        self._thread.start()

    def put(self, frame: np.ndarray) -> None:
        self._frames.put(frame)

    def close(self) -> None:
        """Wait until all frames are handed over, and close the pipe."""
        self._frames.put(None)
        self._thread.join()
        with contextlib.suppress(BrokenPipeError):
            self._pipe.close()

    def _run(self) -> None:
        while (frame := self._frames.get()) is not None:
            if self.broken:
                continue
            try:
                self._pipe.write(frame.data)
            except BrokenPipeError:
                self.broken = True  # ffmpeg has ended; its status and its last line say why


def write_video(
    path: str | Path,
    frames: Iterable[np.ndarray],
    fps: float,
    height: int,
    width: int,
    encoding: Encoding = DEFAULT_ENCODING,
) -> int:
    """Write frames, uint8 [H, W, 3] RGB each, as H.264 yuv420p mp4 or as gif, and return how many there were.

    Frames go to the encoder one by one as the iterable yields them, while it makes the next ones. The file appears
    whole or not at all. Raises InputError with ffmpeg's own last line if it fails, or if it is missing; needs even height
    and width.
    """
    assert height % 2 == width % 2 == 0, f"yuv420p halves both sides, and {width}x{height} is odd"
    path = Path(path)
    count = 0
    # stderr goes to a file: a pipe that nobody reads would fill up and stop ffmpeg.
    with atomic.replacing(path) as target, tempfile.TemporaryFile() as log:
        try:
            process = subprocess.Popen(
                _command(fps, height, width, Path(target), encoding),
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=log,
            )
        except OSError as error:
            raise InputError(f"{ffmpeg_path()} cannot be run: {error.strerror}; see IMAGEIO_FFMPEG_EXE") from error
        assert process.stdin is not None
        pump = _Pump(process.stdin)
        try:
            for frame in frames:
                assert (frame.shape, frame.dtype) == ((height, width, 3), np.uint8), (frame.shape, frame.dtype)
                pump.put(np.ascontiguousarray(frame))
                count += 1
                if pump.broken:
                    break
            assert count, "a video needs at least one frame"
        except BaseException:
            process.kill()
            raise
        finally:
            pump.close()
            status = process.wait()
        if pump.broken or status:
            raise InputError(f"ffmpeg could not write {path} (status {status}): {_last_line(log)}")
        if not target.stat().st_size:
            raise InputError(f"ffmpeg wrote nothing into {path}, with status 0: {_last_line(log)}")
    return count


@dataclass(frozen=True)
class VideoInfo:
    """What a video file says of itself: H and W in px, frames per second."""

    height: int
    width: int
    fps: float


def open_video(path: str | Path) -> tuple[VideoInfo, Iterator[np.ndarray]]:
    """(info, frames) of a video file: uint8 [H, W, 3] RGB each, read-only, decoded as they are asked for.

    InputError if the file is absent or no video, from the call or, where only its frames are broken, from the iterator.
    """
    ffmpeg_path()
    import imageio_ffmpeg

    if not Path(path).is_file():
        raise InputError(f"video {path} does not exist")
    unreadable = f"{path} is no video that ffmpeg can read as {', '.join(READ_FORMATS)}"
    reader = imageio_ffmpeg.read_frames(str(Path(path).absolute()), input_params=READ_OPTIONS)
    try:
        meta = next(reader)
        info = VideoInfo(meta["size"][1], meta["size"][0], float(meta["fps"]))
    except (OSError, RuntimeError, KeyError, IndexError) as error:
        raise InputError(unreadable) from error

    def frames() -> Iterator[np.ndarray]:
        count = 0
        with contextlib.closing(reader):
            while True:
                try:
                    frame = next(reader, None)
                except (OSError, RuntimeError) as error:
                    raise InputError(unreadable) from error
                if frame is None:
                    break
                count += 1
                yield np.frombuffer(frame, np.uint8).reshape(info.height, info.width, 3)
        if not count:
            raise InputError(unreadable)

    return info, frames()


def read_video(path: str | Path) -> tuple[np.ndarray, float]:
    """(frames uint8 [T, H, W, 3] RGB, frames per second) of a video file; InputError as open_video."""
    info, frames = open_video(path)
    return np.stack(list(frames)), info.fps
