"""Tensors of safetensors files, read by several threads at once and sent straight into device memory.

One thread copies 4 GB/s out of a memory map to a GPU; PCIe takes 50. Here threads read pieces of the files into pinned
buffers, which is all they do, and whoever asks for the tensors sends each piece on as it comes: no more than the buffers
is ever in host memory, and the reading threads hardly need the interpreter.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Self

import torch

from hunyuan_staged.parallel.threads import device_threads
from hunyuan_staged.weights.entries import Entry, pieces

# 16.6 GB out of the page cache, 16 cores, H200: 0.63 s, and 0.71 the first time, when buffers are pinned; with 16 workers,
# two buffers each and pieces of 8 MiB 0.65 to 0.82 and 0.82 to 0.93.
WORKERS = 12  # at most
PIECE_BYTES = 2**24
BUFFERS = 1  # a worker: it is sent in a tenth of the time that reading takes
AHEAD_BYTES = 2**28  # that are sent at most before they are asked for
LANES = 2  # streams that copy in turns: a piece's conversion does not hold up the next piece's way to the device
WIDE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # that are converted into each other


@dataclass(frozen=True)
class Piece:
    """Neighbouring bytes of an open file, and the tensors that have some of them."""

    file: int
    start: int
    end: int
    inside: list[Entry]


def _read(file: int, buffer: memoryview, start: int) -> None:
    """Fill a buffer from a place in a file."""
    while buffer:
        count = os.preadv(file, [buffer], start)
        if not count:
            raise OSError("it ends before its tensors do")
        buffer, start = buffer[count:], start + count


def _with_index(device: torch.device) -> torch.device:
    """The device, a GPU by number; without one it is this thread's current one, which a new thread does not share."""
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device())


class _Buffer:
    """Host memory for one piece at a time, made by the thread that first needs it."""

    def __init__(self, size: int, *, pinned: bool) -> None:
        self.size, self.pinned = size, pinned
        self.sent: torch.cuda.Event | None = None  # until when what it held last is needed

    def fill(self, piece: Piece) -> torch.Tensor:
        """The piece's bytes."""
        if not hasattr(self, "memory"):
            self.memory = torch.empty(self.size, dtype=torch.uint8, pin_memory=self.pinned)
            self.view = self.memory.numpy().data
        if self.sent is not None:
            self.sent.synchronize()
        length = piece.end - piece.start
        _read(piece.file, self.view[:length], piece.start)
        return self.memory[:length]


Arrived = tuple[int, _Buffer, torch.Tensor | BaseException]


class _Workers:
    """Threads that read pieces, the first ones first, into whatever buffer is free."""

    def __init__(self, todo: Sequence[Piece], count: int, buffers: int, device: torch.device) -> None:
        self.todo, self.count, self.device = todo, min(count, len(todo)), device
        self.numbers: SimpleQueue[int] = SimpleQueue()
        for number in range(len(todo)):
            self.numbers.put(number)
        largest = max((piece.end - piece.start for piece in todo), default=0)
        self.free: SimpleQueue[_Buffer | None] = SimpleQueue()
        for _ in range(min(buffers, len(todo))):
            self.free.put(_Buffer(largest, pinned=device.type == "cuda"))
        self.arrived: SimpleQueue[Arrived] = SimpleQueue()
        self.pool = device_threads(max(1, self.count), "reading", device)

    def start(self) -> None:
        for _ in range(self.count):
            self.pool.submit(self._work)

    def _work(self) -> None:
        # The buffer first: else all of them could hold later pieces than the one that is waited for.
        while (buffer := self.free.get()) is not None:
            try:
                number = self.numbers.get_nowait()
            except Empty:
                return
            try:
                held: torch.Tensor | BaseException = buffer.fill(self.todo[number])
            except BaseException as error:
                held = error  # who asks for the piece gets it
            self.arrived.put((number, buffer, held))

    def stop(self) -> None:
        """Read no more; returns when no thread is left."""
        with suppress(Empty):
            while True:
                self.numbers.get_nowait()
        for _ in range(self.count):
            self.free.put(None)
        self.pool.shutdown()


class _Lane:
    """A stream of copies to the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._staging: torch.Tensor | None = None

    def current(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self.stream) if self.stream else nullcontext()

    def staged(self, held: torch.Tensor, size: int) -> torch.Tensor:
        """A piece on the device, in memory for so many bytes; on a CPU it is there already."""
        if self.stream is None:
            return held
        if self._staging is None:
            self._staging = torch.empty(size, dtype=torch.uint8, device=self.device)
        return self._staging[: len(held)].copy_(held, non_blocking=True)


Place = Callable[[str], torch.Tensor | None]


def nowhere(name: str) -> torch.Tensor | None:
    """The place of tensors that may lie anywhere."""
    return None


class FileReader:
    """Reads tensors of some files ahead of whoever asks for them. A context manager; within it ask for each file's, once,
    in the order of the files.

    Args:
        sources: the descriptor of an open file, and what is wanted of it.
        place: memory of a tensor's shape on the device that it is to lie in, by its name, where there is such; in another
            floating-point dtype, it is converted on its way. The others get memory of their own.
        workers: threads, by default as many as there are cores, and at most WORKERS.
        piece: bytes that one of them reads at a time.
        buffers: of a piece each, by default BUFFERS a worker.
    """

    def __init__(
        self,
        sources: Sequence[tuple[int, Sequence[Entry]]],
        device: torch.device,
        place: Place = nowhere,
        *,
        workers: int | None = None,
        piece: int | None = None,
        buffers: int | None = None,
    ) -> None:
        self.sources, self.device, self.place = sources, _with_index(device), place
        self.count = workers or min(WORKERS, len(os.sched_getaffinity(0)))
        self.buffers = buffers or BUFFERS * self.count
        self.piece = max(8, (piece or PIECE_BYTES) // 8 * 8)
        self.ahead = max(1, AHEAD_BYTES // self.piece)

    def __enter__(self) -> Self:
        self._pieces: list[Piece] = []
        self._files: list[range] = []
        self._memory: dict[tuple[int, str], torch.Tensor] = {}  # by file and name, of what is under way
        self._sent: dict[int, torch.cuda.Event | BaseException | None] = {}  # by a piece's number
        self._waiting: dict[int, tuple[_Buffer, torch.Tensor | BaseException]] = {}  # read, by number, to be sent
        for file, wanted in self.sources:
            first = len(self._pieces)
            self._pieces += [Piece(file, *piece) for piece in pieces(wanted, self.piece)]
            self._files.append(range(first, len(self._pieces)))
        self._lanes = [_Lane(self.device) for _ in range(LANES)] if self._pieces else []
        self._wait_for_memory()
        self._workers = _Workers(self._pieces, self.count, self.buffers, self.device)
        self._workers.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._workers.stop()
        for lane in self._lanes:
            if lane.stream:
                lane.stream.synchronize()  # what was sent and not asked for; its memory is let go

    def tensors(self, source: int) -> Iterator[tuple[str, torch.Tensor]]:
        """A file's tensors on the device, in the order in which they lie.

        Raises OSError where it ends before they do.
        """
        for number in self._files[source]:
            while number not in self._sent:
                if number not in self._waiting:
                    self._keep(*self._workers.arrived.get())
                self._send_waiting(number)
            sent = self._sent.pop(number)
            if isinstance(sent, BaseException):
                raise sent
            if sent is not None:
                torch.cuda.current_stream(self.device).wait_event(sent)
            piece = self._pieces[number]
            for entry in piece.inside:
                if entry.end <= piece.end:
                    self._send_arrived()
                    yield entry.name, self._memory.pop((piece.file, entry.name))

    def _send_arrived(self) -> None:
        """Send what has been read meanwhile, so that the way to the device is never idle; but no more than `ahead`: what
        nobody has asked for takes the device's memory."""
        with suppress(Empty):
            while len(self._waiting) + len(self._sent) < self.ahead:
                self._keep(*self._workers.arrived.get_nowait())
        self._send_waiting()

    def _keep(self, number: int, buffer: _Buffer, held: torch.Tensor | BaseException) -> None:
        self._waiting[number] = buffer, held

    def _send_waiting(self, first: int | None = None) -> None:
        """Send what waits, up to `ahead`; the piece of that number in any case. The others keep their buffers."""
        for number in sorted(self._waiting, key=lambda number: (number != first, number)):
            if number == first or len(self._sent) < self.ahead:
                self._send(number, *self._waiting.pop(number))

    def _send(self, number: int, buffer: _Buffer, held: torch.Tensor | BaseException) -> None:
        """Have a piece copied to where it belongs."""
        if isinstance(held, BaseException):
            self._sent[number] = held
            return
        piece = self._pieces[number]
        memory, new = [], False
        for entry in piece.inside:
            key = piece.file, entry.name
            if key not in self._memory:
                place = self.place(entry.name)
                if place is None or place.shape != entry.shape or not _convertible(entry.dtype, place.dtype):
                    place, new = torch.empty(entry.shape, dtype=entry.dtype, device=self.device), True
                self._memory[key] = place
            memory.append(self._memory[key])
        if new:
            self._wait_for_memory()
        lane = self._lanes[number % LANES]
        with lane.current():
            if any(own.dtype != entry.dtype for entry, own in zip(piece.inside, memory, strict=True)):
                held = lane.staged(held, self.piece)
            for entry, own in zip(piece.inside, memory, strict=True):
                _copy(held, piece, entry, own)
            buffer.sent = self._sent[number] = (
                lane.stream.record_event(torch.cuda.Event(blocking=True)) if lane.stream else None
            )
        self._workers.free.put(buffer)

    def _wait_for_memory(self) -> None:
        """Nothing is written before what now is done on the device: new memory may have been another tensor's till then."""
        if self.device.type == "cuda" and self._lanes:
            free = torch.cuda.current_stream(self.device).record_event()
            for lane in self._lanes:
                assert lane.stream
                lane.stream.wait_event(free)


def _convertible(given: torch.dtype, wanted: torch.dtype) -> bool:
    return given == wanted or (given in WIDE and wanted in WIDE)


def _copy(held: torch.Tensor, piece: Piece, entry: Entry, memory: torch.Tensor) -> None:
    """Copy what a piece has of a tensor to where that is to lie."""
    first, last = max(piece.start, entry.start), min(piece.end, entry.end)
    part = held[first - piece.start : last - piece.start]
    if memory.dtype == entry.dtype:
        flat, size = memory.view(-1).view(torch.uint8), 1
    else:
        flat, size, part = memory.view(-1), entry.dtype.itemsize, part.view(entry.dtype)
    flat[(first - entry.start) // size : (last - entry.start) // size].copy_(part, non_blocking=True)
