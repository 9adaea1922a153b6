"""What every way of decoding needs: who decodes and is told, and decoded pixels on their way out."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from hunyuan_staged.errors import InputError
from hunyuan_staged.geometry import chunk_spans
from hunyuan_staged.models.vae_decoder import Decoder
from hunyuan_staged.parallel.world import World
from hunyuan_staged.runtime.progress import quiet

FLOAT32_HINT = '; "force_upcast": true in the config.json of the VAE has it decode in float32'
BATCH_FRAMES = 8  # that leave the device together: of 720p 22 MB


@dataclass(frozen=True)
class FrameBatch:
    """Successive frames of a video in host memory: uint8 [n, H, W, 3], and where asked for, floats of it in [0, 1].

    floats have the decoder's dtype: half precision is still eight times finer than 8 bits.
    """

    frames: torch.Tensor
    floats: torch.Tensor | None = None


def check_latents(latents: torch.Tensor, config: Mapping[str, Any]) -> None:
    """InputError where latents are not [1, C, t, h, w] with this decoder's C, the config's latent_channels."""
    channels = config["latent_channels"]
    if latents.ndim != 5 or latents.shape[0] != 1 or latents.shape[1] != channels:
        raise InputError(f"latents {list(latents.shape)} do not fit this VAE, which takes [1, {channels}, t, h, w]")


@dataclass(frozen=True)
class DecodeContext:
    """Who decodes, and what else is wanted of it.

    warn: is told, in a line, where memory ran out and what was done. as_float: batches hold the frames in float, too.
    """

    world: World
    progress: Callable[..., Any] = quiet
    warn: Callable[[str], object] = str
    as_float: bool = False

    def begin(
        self,
        decoder: torch.nn.Module | None,
        latents: torch.Tensor,
        config: Mapping[str, Any],
        latent_frames_per_chunk: int,
    ) -> tuple[Decoder, torch.Tensor, list[slice]]:
        """(the decoder's forward, the latents as it takes them, the frames of each chunk) of a rank that decodes."""
        assert decoder is not None, f"rank {self.world.rank} has something to decode and no decoder"
        forward = Decoder(decoder)
        scaled = (latents.float() / config["scaling_factor"]).to(forward.device, forward.dtype)
        return (
            forward,
            scaled,
            chunk_spans(latents.shape[2], latent_frames_per_chunk, config["temporal_compression_ratio"]),
        )

    def floats_in(self, forward: Decoder) -> torch.dtype | None:
        """The dtype of the frames in float; None where they are not asked for."""
        return forward.dtype if self.as_float else None


def to_8bit(pixels: torch.Tensor) -> torch.Tensor:
    """[0, 1] → uint8, rounded to the nearest of 256 levels, a half upwards."""
    return (pixels * 255 + 0.5).to(torch.uint8)


def _to_host(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    """The tensor in host memory, and what to wait for before it is read: nothing waits for the copy here."""
    if not tensor.is_cuda:
        return tensor, None
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return host, event


class FrameBuffer:
    """A video while its parts come in, as 8-bit frames on the device, and where asked for as floats on the host.

    Where frames come whole, the device holds those alone that are on their way out.
    """

    def __init__(self, size: tuple[int, int, int], device: torch.device, floats: torch.dtype | None) -> None:
        self.size, self.device = size, device
        self._whole: dict[int, torch.Tensor] = {}  # by the first frame
        self.floats = None if floats is None else torch.empty(*size, 3, dtype=floats)
        self.left = 0  # frames that have left
        self._leaving: deque[tuple[FrameBatch, torch.cuda.Event | None]] = deque()

    def put(self, place: tuple[slice, ...], frames: torch.Tensor, floats: torch.Tensor | None) -> None:
        """A part of the video, place being its frames, rows and columns: uint8 [n, y, x, 3], and floats where kept."""
        if frames.shape[1:3] == self.size[1:]:
            self._whole[place[0].start] = frames
        else:
            self.frames[place] = frames
        if self.floats is not None:
            assert floats is not None
            self.floats[place] = floats.to(self.floats.dtype).cpu()

    @cached_property
    def frames(self) -> torch.Tensor:
        """uint8 [T, H, W, 3], for frames that come in parts."""
        return torch.empty(*self.size, 3, dtype=torch.uint8, device=self.device)

    def leave(self, now: slice) -> None:
        """These frames are complete: they start for the host, and nothing waits for them."""
        whole = self._whole.pop(now.start, None)
        for start in range(now.start, now.stop, BATCH_FRAMES):
            some = slice(start, min(start + BATCH_FRAMES, now.stop))
            frames = self.frames[some] if whole is None else whole[some.start - now.start : some.stop - now.start]
            frames, event = _to_host(frames)
            self._leaving.append((FrameBatch(frames, None if self.floats is None else self.floats[some]), event))
        self.left = now.stop

    def arrived(self) -> Iterator[FrameBatch]:
        """The batches that are under way, each once it is there."""
        while self._leaving:
            batch, event = self._leaving.popleft()
            if event is not None:
                event.synchronize()
            yield batch


class FiniteChecks:
    """Whether what was decoded is finite, read late, so that the device has work to do meanwhile."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._pending: deque[tuple[str, torch.Tensor, torch.cuda.Event | None]] = deque()

    def add(self, what: str, finite: torch.Tensor) -> None:
        """finite [] is true, or not nought, where all of `what` is."""
        self._pending.append((what, *_to_host(finite)))

    def read(self, keep: int = 0) -> None:
        """Read all but the `keep` latest. Raises FloatingPointError where one of them is not finite."""
        while len(self._pending) > keep:
            what, finite, event = self._pending.popleft()
            if event is not None:
                event.synchronize()
            if not finite:
                told = FLOAT32_HINT if self.dtype == torch.float16 else ""
                raise FloatingPointError(f"{what} decoded to NaN or Inf in {self.dtype}{told}")
