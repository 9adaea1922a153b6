"""What a stopped stage 2 goes on from: the latents after a step, and everything that determines what becomes of them.

A StateSaver finds the state of a stopped run, saves it every few steps (callbacks.py calls it), and removes it when the
latents are written.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hunyuan_staged.errors import InputError
from hunyuan_staged.files import contract, provenance
from hunyuan_staged.files.tensors import load_state, save_state
from hunyuan_staged.parallel.threads import device_threads
from hunyuan_staged.parallel.world import World
from hunyuan_staged.runtime.progress import SILENT, Reporter

FORMAT = "1"
# What a file calls the parts of a RunIdentity.
IDENTITY_KEYS = {"inputs": "settings", "environment": "circumstances", "sources": "origins", "options": "options"}


@dataclass(frozen=True)
class RunIdentity:
    """What a run is. inputs determine its result; the environment only how its sums are rounded.

    All values are JSON. Two runs with the same inputs give the same latents within tolerance, in the same environment,
    too, the same bits. sources: for inputs that are hashes, what was hashed; for messages alone. options: those that a
    command line needs to go on with the run, where they are not the defaults; for the gallery alone.
    """

    inputs: Mapping[str, Any]
    environment: Mapping[str, Any]
    sources: Mapping[str, str]
    options: Mapping[str, Any] = field(default_factory=dict)

    def digest(self) -> str:
        """The hash of what determines the result."""
        return provenance.digest(self.inputs)

    def changes(self, now: "RunIdentity") -> list[str]:
        """The inputs that are others now, each as "key: was X, now Y"."""
        return [
            f"{name}: was {self._shown(name)}, now {now._shown(name)}" for name in _unequal(self.inputs, now.inputs)
        ]

    def deviations(self, now: "RunIdentity") -> list[str]:
        """What is another environment now, likewise."""
        was, is_now = self.environment, now.environment
        return [f"{name}: was {was.get(name)}, now {is_now.get(name)}" for name in _unequal(was, is_now)]

    def _shown(self, name: str) -> str:
        value = self.inputs.get(name)
        # Hashes are told apart by their heads.
        return f"{str(value)[:12]}… ({self.sources[name]})" if name in self.sources else str(value)


def _unequal(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [name for name in dict.fromkeys((*was, *now)) if was.get(name) != now.get(name)]


@dataclass(frozen=True)
class Start:
    """Where a run starts: how many steps have been done, the latents after them (float32, on the CPU), and what else was
    saved with them. As it stands: from the beginning."""

    done: int = 0
    latents: torch.Tensor | None = None
    more: Mapping[str, torch.Tensor] = field(default_factory=dict)


class StateSaver:
    """The state of one denoising run in `folder`. Every rank has one and calls the same methods; rank 0 has the file.

    steps: of the whole schedule. every: so many steps apart are the saved states; 0 saves none, at a signal neither.
    Super resolution, to what the input of that name says, has a file of its own.
    """

    def __init__(
        self,
        folder: str | Path,
        identity: RunIdentity,
        *,
        steps: int,
        every: int,
        world: World,
        report: Reporter = SILENT,
    ) -> None:
        self.resolution = identity.inputs.get("super_resolution")
        self.path = Path(folder) / contract.at_resolution(contract.STATE_FILE, self.resolution)
        self.identity, self.steps, self.every, self.world, self.report = identity, steps, every, world, report
        self._writer: ThreadPoolExecutor | None = None
        self._writing: Future[str | None] | None = None
        self._host: dict[str, torch.Tensor] = {}
        self._stream: torch.cuda.Stream | None = None

    def load(self, shape: Sequence[int], *, resume: bool, lenient: bool = False) -> Start:
        """Where the run starts; its latents have this shape.

        Without `resume` it begins anew, and a state that is there is only mentioned. Every rank waits here for the
        others, so that one's bad input ends all before weights are loaded or anything is exchanged. Raises InputError on
        rank 0 for a state that is broken, and for one of other settings, with the difference. lenient: without `resume`,
        too, it goes on from a state; of one that is broken or of other settings it warns, and begins anew.
        """
        step, tensors = 0, dict[str, torch.Tensor]()
        if (resume or lenient) and self.world.is_main:
            try:
                step, tensors = self._read(shape)
            except InputError as error:
                if resume:
                    raise
                self.report.warn(f"starting from the beginning: {error}")
        self.world.barrier("inputs read")
        if not resume and not lenient:
            if self.world.is_main and self.path.is_file():
                self.report.warn(f"{self.path} holds the state of a run that was stopped; --resume would go on from it")
            return Start()
        step = int(self.world.broadcast(torch.tensor([step]))[0])
        if not step:
            if resume:
                self.report.info(f"no state of a stopped run in {self.path.parent}: starting from the beginning")
            return Start()
        tensors = {name: tensor.cpu() for name, tensor in self.world.broadcast_tensors(tensors, 0).items()}
        return Start(step, tensors.pop("latents"), tensors)

    def _read(self, shape: Sequence[int]) -> tuple[int, dict[str, torch.Tensor]]:
        if not self.path.exists():
            return 0, {}
        tensors, metadata = load_state(self.path.parent, self.resolution)
        latents = tensors["latents"]
        try:
            if metadata["format"] != FORMAT:
                raise ValueError(f"its format is {metadata['format']}; this version reads {FORMAT}")
            step = int(metadata["step"])
            was = RunIdentity(
                **{n: dict(json.loads(metadata[key])) for n, key in IDENTITY_KEYS.items() if key in metadata}
            )
            if was.digest() != metadata[contract.MADE_FROM]:
                raise ValueError("its settings do not have the hash that it records")
        except (KeyError, ValueError, TypeError, RecursionError) as error:
            raise InputError(f"{self.path} is no state of stage 2 ({error!r}); run without --resume") from error
        changed = was.changes(self.identity)
        if changed:
            raise InputError(
                f"{self.path} belongs to other settings: {'; '.join(changed)}. "
                "Give those again, or run without --resume to start from the beginning"
            )
        if list(latents.shape) != list(shape) or latents.dtype != torch.float32 or not 0 < step <= self.steps:
            raise InputError(
                f"{self.path}: step {step} of {self.steps} with latents {list(latents.shape)} {latents.dtype}; "
                f"allowed is 1 to {self.steps} with {list(shape)} torch.float32"
            )
        self.report.info(f"going on after step {step} of {self.steps}, from {self.path}")
        other = was.deviations(self.identity)
        if other:
            self.report.warn(
                f"the result will agree with an unstopped run within tolerance, not to the bit: {'; '.join(other)}"
            )
        return step, tensors

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Have a thread that writes, on rank 0, while the block runs, and wait for it at the end."""
        with contextlib.ExitStack() as stack:
            if self.world.is_main:
                self._writer = stack.enter_context(device_threads(1, "state", self.world.device))
            yield
            self._wait()

    def due(self, step: int) -> bool:
        """Whether the state after so many steps is to be saved."""
        return bool(self.every) and step % self.every == 0 and step < self.steps

    @property
    def is_writing(self) -> bool:
        """Whether a state is still being written, which only rank 0 knows."""
        return self._writing is not None and not self._writing.done()

    def save(self, step: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Begin to save the state after so many steps; the loop goes on meanwhile."""
        if self.world.is_main:
            self._wait()
            self._save(step, tensors)

    def save_now(self, step: int, tensors: Mapping[str, torch.Tensor]) -> str | None:
        """Save it, and have every rank wait for that; on rank 0, why it could not be saved."""
        self.save(step, tensors)
        failure = self._wait()
        self.world.barrier("stopped")
        return failure

    def not_finite(self, step: int) -> str:
        """What to say of latents that hold NaN or Inf after this step; waits for the state that is being written."""
        self._wait()
        kept = f"; the state before it is kept in {self.path}" if self.path.is_file() else ""
        return (
            f"the latents hold NaN or Inf after step {step} of {self.steps}, so the run stopped there: the weights or the "
            f"embeddings are broken, or too large for {self.identity.inputs.get('dtype')}{kept}"
        )

    def check(self, latents: torch.Tensor) -> None:
        """InputError where the finished latents hold NaN or Inf, which on a GPU the loop itself learns a step late."""
        if not torch.isfinite(latents).all():
            raise InputError(self.not_finite(self.steps))

    def _save(self, step: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Begin to write the state on a thread of its own. The loop never changes these tensors again."""
        assert self._writer is not None
        event = None
        device = tensors["latents"].device
        if device.type == "cuda":
            self._stream = self._stream or torch.cuda.Stream(device)
            self._stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(self._stream):
                tensors = {name: self._to_host(name, tensor) for name, tensor in tensors.items()}
            event = torch.cuda.Event()
            event.record(self._stream)
        self._writing = self._writer.submit(self._write, step, tensors, event)

    def _to_host(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A copy in pinned memory, which the current stream makes; the memory is kept for the next one of that name."""
        if not tensor.is_cuda:
            return tensor
        host = self._host.get(name)
        if host is None or host.shape != tensor.shape:
            host = self._host[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        assert self._stream is not None
        tensor.record_stream(self._stream)
        return host

    def _write(self, step: int, tensors: Mapping[str, torch.Tensor], event: Any) -> str | None:
        """Write the state; why it could not be written, or None. A disk that is full now need not be so at the end."""
        if event is not None:
            event.synchronize()
        if not torch.isfinite(tensors["latents"]).all():
            return None  # on a GPU the loop learns of it a step later; the last good state stays
        metadata = {
            "format": FORMAT,
            "step": str(step),
            **{key: json.dumps(getattr(self.identity, name)) for name, key in IDENTITY_KEYS.items()},
            contract.MADE_FROM: self.identity.digest(),
        }
        try:
            save_state(self.path.parent, tensors, metadata, self.resolution)
        except InputError as error:
            return str(error)
        return None

    def _wait(self) -> str | None:
        """Wait for the writing under way, if any; why it failed. A failure is told once, and the run goes on."""
        writing, self._writing = self._writing, None
        failure = writing.result() if writing else None
        if failure:
            self.report.warn(f"the state could not be saved: {failure}")
        return failure

    def remove(self) -> None:
        """Remove the state: the latents are written."""
        if self.path.is_file():
            self.path.unlink()
