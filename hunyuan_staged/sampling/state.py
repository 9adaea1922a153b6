"""What a stopped stage 2 goes on from: the latents after a step, and everything that determines what becomes of them.

A Keeper watches the denoising loop from its on_step: it saves the state every few steps, stops the loop where a signal
asks for it or the latents are no numbers any more, and removes the state when the latents are written.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hunyuan_staged.errors import InputError
from hunyuan_staged.files import contract, provenance
from hunyuan_staged.files.tensors import load_state, save_state
from hunyuan_staged.parallel.world import MaxAcrossRanks, World
from hunyuan_staged.runtime.signals import Interrupted, Interrupts

FORMAT = "1"
More = Callable[[], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class RunIdentity:
    """What a run is. settings determine its result; circumstances only how its sums are rounded.

    All values are JSON. Two runs with the same settings give the same latents within tolerance, with the same
    circumstances, too, the same bits. origins: for settings that are hashes, what was hashed; for messages alone.
    """

    settings: Mapping[str, Any]
    circumstances: Mapping[str, Any]
    origins: Mapping[str, str]

    def digest(self) -> str:
        """The hash of what determines the result."""
        return provenance.digest(self.settings)

    def changes(self, now: "RunIdentity") -> list[str]:
        """The settings that are others now, each as "key: was X, now Y"."""
        return [
            f"{name}: was {self._shown(name)}, now {now._shown(name)}" for name in _unequal(self.settings, now.settings)
        ]

    def deviations(self, now: "RunIdentity") -> list[str]:
        """The circumstances that are others now, likewise."""
        was, is_now = self.circumstances, now.circumstances
        return [f"{name}: was {was.get(name)}, now {is_now.get(name)}" for name in _unequal(was, is_now)]

    def _shown(self, name: str) -> str:
        value = self.settings.get(name)
        # Hashes are told apart by their heads.
        return f"{str(value)[:12]}… ({self.origins[name]})" if name in self.origins else str(value)


def _unequal(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [name for name in dict.fromkeys((*was, *now)) if was.get(name) != now.get(name)]


class StateSaver:
    """The state of one denoising run in `folder`. Every rank has one and calls the same methods; rank 0 has the file.

    steps: of the whole schedule. every: so many steps apart are the saved states; 0 saves none, at a signal neither.
    tell and warn take a line for the log. Super resolution, to what the setting of that name says, has a file of its own.
    """

    def __init__(
        self,
        folder: str | Path,
        facts: RunIdentity,
        *,
        steps: int,
        every: int,
        world: World,
        interrupts: Interrupts,
        tell: Callable[[str], Any],
        warn: Callable[[str], Any],
    ) -> None:
        self.resolution = facts.settings.get("super_resolution")
        self.path = Path(folder) / contract.at_resolution(contract.STATE_FILE, self.resolution)
        self.facts, self.steps, self.every, self.world = facts, steps, every, world
        self.interrupts, self.tell, self.warn = interrupts, tell, warn
        self._agree = MaxAcrossRanks(world)
        self._writer: ThreadPoolExecutor | None = None
        self._writing: Future[str | None] | None = None
        self._more: More = dict
        self._host: dict[str, torch.Tensor] = {}
        self._stream: torch.cuda.Stream | None = None

    def load(self, shape: Sequence[int], *, resume: bool) -> tuple[int, torch.Tensor | None, dict[str, torch.Tensor]]:
        """(steps done, latents of this shape after them, float32, on the CPU, what else was saved with them).

        (0, None, {}) where the run begins anew.

        Without `resume` it does, and a state that is there is only mentioned. Every rank waits here for the others, so
        that one's bad input ends all before weights are loaded or anything is exchanged. Raises InputError on rank 0 for
        a state that is broken, and for one of other settings, with the difference.
        """
        step, tensors = self._read(shape) if resume and self.world.is_main else (0, {})
        self.world.barrier("inputs read")
        if not resume:
            if self.world.is_main and self.path.is_file():
                self.warn(f"{self.path} holds the state of a run that was stopped; --resume would go on from it")
            return 0, None, {}
        step = int(self.world.broadcast(torch.tensor([step]))[0])
        if not step:
            self.tell(f"no state of a stopped run in {self.path.parent}: starting from the beginning")
            return 0, None, {}
        tensors = {name: tensor.cpu() for name, tensor in self.world.broadcast_tensors(tensors, 0).items()}
        return step, tensors.pop("latents"), tensors

    def _read(self, shape: Sequence[int]) -> tuple[int, dict[str, torch.Tensor]]:
        if not self.path.exists():
            return 0, {}
        tensors, metadata = load_state(self.path.parent, self.resolution)
        latents = tensors["latents"]
        try:
            if metadata["format"] != FORMAT:
                raise ValueError(f"its format is {metadata['format']}; this version reads {FORMAT}")
            step = int(metadata["step"])
            was = RunIdentity(*(dict(json.loads(metadata[kind])) for kind in ("settings", "circumstances", "origins")))
            if was.digest() != metadata[contract.MADE_FROM]:
                raise ValueError("its settings do not have the hash that it records")
        except (KeyError, ValueError, TypeError, RecursionError) as error:
            raise InputError(f"{self.path} is no state of stage 2 ({error!r}); run without --resume") from error
        changed = was.changes(self.facts)
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
        self.tell(f"going on after step {step} of {self.steps}, from {self.path}")
        other = was.deviations(self.facts)
        if other:
            self.warn(
                f"the result will agree with an unstopped run within tolerance, not to the bit: {'; '.join(other)}"
            )
        return step, tensors

    @contextlib.contextmanager
    def watching(self, more: More = dict) -> Iterator[Callable[[int, torch.Tensor], None]]:
        """The loop's on_step while the block runs. more(): what else to save; every rank calls it where one saves.

        It raises Interrupted after the step in which a signal arrived, with the state saved, and InputError where the
        latents turn to NaN or Inf.
        """
        self._more = more
        with contextlib.ExitStack() as stack:
            if self.world.is_main:
                self._writer = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="state"))
            if self.every:
                stack.enter_context(self.interrupts.deferred(self._notice))
            yield self._after_step
            self._wait()

    def _notice(self, _: int) -> None:
        if self.world.is_main:
            self.tell("stopping at the end of this step; a second signal stops at once")

    def _after_step(self, i: int, latents: torch.Tensor) -> None:
        broken = ~torch.isfinite(latents).all()
        # On a GPU this is what was so after the step before.
        at, signum, bad = self._agree(i, self.interrupts.received, broken) or (i, 0, 0)
        if bad:
            self._wait()
            raise InputError(self.not_finite(at + 1))
        if self.world.size == 1:
            signum = self.interrupts.received
        if signum:
            self._stop(signum, i + 1, latents)
        if self.every and (i + 1) % self.every == 0 and i + 1 < self.steps:
            tensors = {"latents": latents} | self._more()
            if self.world.is_main:
                self._wait()
                self._save(i + 1, tensors)

    def not_finite(self, step: int) -> str:
        """What to say of latents that hold NaN or Inf after this step."""
        kept = f"; the state before it is kept in {self.path}" if self.path.is_file() else ""
        return (
            f"the latents hold NaN or Inf after step {step} of {self.steps}, so the run stopped there: the weights or the "
            f"embeddings are broken, or too large for {self.facts.settings.get('dtype')}{kept}"
        )

    def _stop(self, signum: int, step: int, latents: torch.Tensor) -> None:
        """Save the state, on rank 0, and leave, on every rank. A rank that left first would have torchrun end the rest."""
        self.interrupts.patience = None
        failure = None
        tensors = {"latents": latents} | self._more()
        if self.world.is_main:
            self._wait()
            self._save(step, tensors)
            failure = self._wait()
        self.world.barrier("stopped")
        if failure:
            raise Interrupted(signum, f" after step {step} of {self.steps}, whose state could not be saved: {failure}")
        raise Interrupted(
            signum, f" after step {step} of {self.steps}; the same command with --resume goes on from there"
        )

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
            "settings": json.dumps(self.facts.settings),
            "circumstances": json.dumps(self.facts.circumstances),
            "origins": json.dumps(self.facts.origins),
            contract.MADE_FROM: self.facts.digest(),
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
            self.warn(f"the state could not be saved: {failure}")
        return failure

    def remove(self) -> None:
        """Remove the state: the latents are written."""
        if self.path.is_file():
            self.path.unlink()
