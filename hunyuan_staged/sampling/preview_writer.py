"""A look at a video while it is denoised: preview.mp4 and preview.png, which no step waits for."""

import contextlib
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from hunyuan_staged.errors import InputError, Stopped
from hunyuan_staged.files import contract
from hunyuan_staged.files.atomic import replacing
from hunyuan_staged.files.encoding import Encoding
from hunyuan_staged.files.video import write_video
from hunyuan_staged.parallel.threads import device_threads
from hunyuan_staged.runtime.progress import SILENT, Reporter
from hunyuan_staged.runtime.signals import Interrupted
from hunyuan_staged.sampling import preview
from hunyuan_staged.sampling.callbacks import AfterStep

ENCODING = Encoding(preset="veryfast", crf=23)  # a quarter of the video's pixels, soon replaced


def remove(folder: Path) -> None:
    """Remove the previews of an earlier run."""
    for name in (contract.PREVIEW_VIDEO, contract.PREVIEW_PICTURE):
        if (folder / name).is_file():
            (folder / name).unlink()


class PreviewWriter(contextlib.AbstractContextManager["PreviewWriter"]):
    """Writes previews into `folder` after every so many steps, and after the last one, also of a run that is stopped.

    For one process of a run. The device computes the colours, a thread does the rest; where that is still at the last
    preview, the next one is left out. What cannot be written is told once and ends nothing.

    Args:
        weights: of the map, [C + 1, 3] on the device; see preview.as_weights.
        fps: latent frames a second.
        every: 0 writes the last preview alone.
    """

    def __init__(
        self, folder: Path, weights: torch.Tensor, *, fps: float, every: int, report: Reporter = SILENT
    ) -> None:
        self.folder, self.weights, self.fps, self.every, self.report = folder, weights, fps, every, report
        self._latest: AfterStep | None = None  # that no preview shows yet
        self._writing: Future[str | None] | None = None
        self._host: torch.Tensor | None = None
        self._told = False

    def __enter__(self) -> "PreviewWriter":
        self._thread = device_threads(1, "preview", self.weights.device)
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        with self._thread:
            if error is None or isinstance(error, Interrupted | Stopped):
                self._end()
                if self._latest is not None:
                    self._begin(self._latest)
                    self._end()
        self._latest = None

    def __call__(self, step: AfterStep) -> None:
        self._latest = step
        if self.every and (step.index + 1) % self.every == 0 and (self._writing is None or self._writing.done()):
            self._end()
            self._begin(step)

    def _begin(self, step: AfterStep) -> None:
        colors, event = preview.colors(step.clean(), self.weights), None
        if colors.is_cuda:
            if self._host is None:
                self._host = torch.empty(colors.shape, pin_memory=True)
            self._host.copy_(colors, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            colors = self._host
        self._writing, self._latest = self._thread.submit(self._write, colors, event), None

    def _end(self) -> None:
        """Wait for the preview under way, if any, and tell why it could not be written."""
        writing, self._writing = self._writing, None
        failure = writing.result() if writing else None
        if failure and not self._told:
            self._told = True
            self.report.warn(f"the preview could not be written: {failure}")

    def _write(self, colors: torch.Tensor, event: Any) -> str | None:
        """Write a preview; why it could not be written, or None."""
        if event is not None:
            event.synchronize()
        frames = preview.frames_of(colors)
        count, height, width, _ = frames.shape
        try:
            write_video(self.folder / contract.PREVIEW_VIDEO, frames, self.fps, height, width, ENCODING)
            with replacing(self.folder / contract.PREVIEW_PICTURE) as path:
                Image.fromarray(frames[count // 2]).save(path, "PNG")
        except InputError as error:
            return str(error)
        return None
