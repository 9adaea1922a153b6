"""Tensors of a safetensors file, read by several threads at once straight into device memory.

One thread copies 4 GB/s out of a memory map to a GPU; PCIe takes 50. Here each worker reads its piece of the file into
its own pinned buffer and sends it on, so that no more than WORKERS pieces are ever in host memory.
"""

import json
import os
import threading
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from hunyuan_staged.parallel.threads import device_threads

WORKERS = 16  # at most: one core reads 3 to 10 GB/s from the page cache
PIECE_BYTES = 2**24
AHEAD = 2  # pieces a worker that are handed out before the first of them is asked for

MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit

# https://github.com/huggingface/safetensors: the names of dtypes in a file's header
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: its name, dtype and shape, and its bytes from `start` to `end` in the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


def entries(path: Path) -> dict[str, Entry]:
    """What a safetensors file holds, by name. Raises OSError, or ValueError where the header is none."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError("its header is cut off")
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"its header has {length} bytes; at most {MAX_HEADER_BYTES} are allowed")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{name} is of dtype {entry['dtype']}; read are {', '.join(DTYPES)}")
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        found[name] = Entry(name, DTYPES[entry["dtype"]], tuple(entry["shape"]), start, end)
    return found


def pieces(wanted: Sequence[Entry], size: int) -> Iterator[tuple[int, int, list[Entry]]]:
    """(start, end, the tensors that have bytes between) over all wanted bytes of a file, `size` at most at a time.

    Tensors that lie side by side share a piece; one that is larger than a piece has several.
    """
    start = end = 0
    inside: list[Entry] = []
    for entry in sorted(wanted, key=lambda entry: (entry.start, entry.end)):
        if entry.start != end and inside:
            yield start, end, inside
            inside = []
        if not inside:
            start = entry.start
        end = entry.end
        inside.append(entry)
        while end - start > size:
            yield start, start + size, [entry for entry in inside if entry.start < start + size]
            start += size
            inside = [entry for entry in inside if entry.end > start or entry.start >= start]  # the latter: empty ones
    if inside:
        yield start, end, inside


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


class _Reader:
    """Reads pieces of an open file on pool threads, each with a pinned buffer and a stream of its own."""

    def __init__(self, file: int, device: torch.device, piece: int) -> None:
        self.file, self.device, self.piece = file, device, piece
        self.cuda = device.type == "cuda"
        self.own = threading.local()

    def read(
        self, start: int, end: int, parts: Sequence[tuple[Entry, torch.Tensor]], free: torch.cuda.Event | None
    ) -> None:
        """The file's bytes from start to end, into those tensors (as bytes); free: when they may be written."""
        own = self.own
        if not hasattr(own, "buffer"):
            own.buffer = torch.empty(self.piece, dtype=torch.uint8, pin_memory=self.cuda)
            own.stream = torch.cuda.Stream(self.device) if self.cuda else None
        buffer = own.buffer[: end - start]
        _read(self.file, memoryview(buffer.numpy()), start)
        with torch.cuda.stream(own.stream) if self.cuda else nullcontext():
            if free is not None:
                own.stream.wait_event(free)  # the memory may have been another tensor's, still in use
            for entry, flat in parts:
                first, last = max(start, entry.start), min(end, entry.end)
                flat[first - entry.start : last - entry.start].copy_(
                    buffer[first - start : last - start], non_blocking=True
                )
        if self.cuda:
            own.stream.synchronize()


def tensors(
    path: Path, names: Collection[str], device: torch.device, *, workers: int | None = None, piece: int = PIECE_BYTES
) -> Iterator[tuple[str, torch.Tensor]]:
    """Those tensors of a file on the device, in the order in which they lie, each in memory of its own.

    workers: threads, by default as many as there are cores, and at most WORKERS. piece: bytes that one of them reads at a
    time. Raises OSError, ValueError, or KeyError for a name that the file lacks.
    """
    device = _with_index(device)
    held = entries(path)
    wanted = [held[name] for name in names]
    workers = workers or min(WORKERS, len(os.sched_getaffinity(0)))
    with path.open("rb") as opened:
        reader = _Reader(opened.fileno(), device, piece)
        with device_threads(workers, "reading", device) as pool:
            allocated: dict[str, torch.Tensor] = {}
            under_way: deque[tuple[Future, list[Entry]]] = deque()
            coming = pieces(wanted, piece)

            def hand_out() -> None:
                for start, end, inside in coming:
                    parts = []
                    for entry in inside:
                        if entry.name not in allocated:
                            allocated[entry.name] = torch.empty(entry.shape, dtype=entry.dtype, device=device)
                        parts.append((entry, allocated[entry.name].view(-1).view(torch.uint8)))
                    free = torch.cuda.current_stream(device).record_event() if reader.cuda else None
                    done = [entry for entry in inside if entry.end <= end]
                    under_way.append((pool.submit(reader.read, start, end, parts, free), done))
                    return

            try:
                for _ in range(AHEAD * workers):
                    hand_out()
                while under_way:
                    future, done = under_way.popleft()
                    future.result()
                    hand_out()
                    for entry in done:
                        yield entry.name, allocated.pop(entry.name)
            finally:
                pool.shutdown(cancel_futures=True)
