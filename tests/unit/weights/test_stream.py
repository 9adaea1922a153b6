"""Reading tensors by many threads: the same bytes as safetensors gives, whatever the pieces."""

import json
import threading
from collections.abc import Collection
from contextlib import ExitStack
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hunyuan_staged.weights import entries as file_entries
from hunyuan_staged.weights import loading, stream
from hunyuan_staged.weights.entries import Entry, pieces
from hunyuan_staged.weights.stream import FileReader

CPU = torch.device("cpu")


def sample(path) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    content = {
        "a.large": torch.randn(50, 60, generator=draw),
        "b.half": torch.randn(7, 3, generator=draw).to(torch.bfloat16),
        "c.bytes": torch.randint(255, (13,), dtype=torch.uint8, generator=draw),
        "d.eighth": torch.randn(9, generator=draw).to(torch.float8_e4m3fn),
        "e.empty": torch.zeros(0, 4),
        "f.number": torch.tensor(7, dtype=torch.int64),
        "g.flags": torch.tensor([True, False, True]),
    }
    save_file(content, path, metadata={"format": "pt"})
    return content


def entries(path: Path) -> dict[str, Entry]:
    with safe_open(path, "pt") as header, path.open("rb") as file:
        return file_entries.entries(header, file.fileno())


def tensors(path: Path, names: Collection[str], device: torch.device, **options: Any) -> list[tuple[str, torch.Tensor]]:
    """Those tensors of one file."""
    held = entries(path)
    return read_entries(path, [held[name] for name in names], device, **options)


def read_entries(
    path: Path, wanted: list[Entry], device: torch.device, **options: Any
) -> list[tuple[str, torch.Tensor]]:
    with path.open("rb") as file:
        sources = [(file.fileno(), wanted)]
        with FileReader(sources, device, **options) as reader:
            return list(reader.tensors(0))


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def check(read: dict[str, torch.Tensor], content: dict[str, torch.Tensor]) -> None:
    assert read.keys() == content.keys()
    for name, tensor in content.items():
        assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape), name
        assert bits(read[name]) == bits(tensor), name
        assert read[name].untyped_storage().nbytes() == tensor.nbytes, name


@pytest.mark.parametrize("piece", [1, 64, 1000, 2**20])
@pytest.mark.parametrize("workers", [1, 5])
def test_whatever_the_pieces_all_bytes_arrive(tmp_path, piece, workers):
    content = sample(tmp_path / "x.safetensors")
    check(dict(tensors(tmp_path / "x.safetensors", list(content), CPU, workers=workers, piece=piece)), content)


WIDE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def odd_file(path: Path) -> dict[str, torch.Tensor]:
    """A file whose numbers do not lie where numbers of their size should, in the order of these names."""
    draw = torch.Generator().manual_seed(1)
    content = {
        "bytes": torch.randint(255, (13,), dtype=torch.uint8, generator=draw),
        "single": torch.randn(30, 7, generator=draw),
        "half": torch.randn(5, generator=draw).to(torch.float16),
        "double": torch.randn(9, dtype=torch.float64, generator=draw),
        "brain": torch.randn(40, generator=draw).to(torch.bfloat16),
        "last": torch.randn(3, generator=draw),
    }
    kinds = {"bytes": "U8", "single": "F32", "half": "F16", "double": "F64", "brain": "BF16", "last": "F32"}
    header: dict[str, Any] = {}
    place = 0
    for name, tensor in content.items():
        offsets = [place, place := place + tensor.nbytes]
        header[name] = {"dtype": kinds[name], "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(map(bits, content.values())))
    return content


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("piece", [1, 24, 1000, 2**20])
@pytest.mark.parametrize("dtype", WIDE)
def test_tensors_are_read_to_their_place_and_converted_on_the_way(tmp_path, dtype, piece, device):
    content = odd_file(tmp_path / "x.safetensors")
    places = {name: torch.zeros(x.shape, dtype=dtype, device=device) for name, x in content.items() if name != "half"}
    places["last"] = torch.zeros(4, dtype=dtype, device=device)
    where = torch.device(device)
    read = dict(tensors(tmp_path / "x.safetensors", list(content), where, place=places.get, workers=3, piece=piece))
    for name in ("single", "double", "brain"):
        assert read[name] is places[name]
        assert bits(read[name]) == bits(content[name].to(dtype)), name
    for name in ("half", "last", "bytes"):  # that have no place, one of another shape, and numbers of another kind
        assert read[name].dtype == content[name].dtype and bits(read[name]) == bits(content[name]), name
        assert name not in places or not places[name].any()


@pytest.mark.parametrize(("workers", "buffers"), [(1, 1), (4, 1), (2, 3), (4, 8)])
def test_files_come_one_after_the_other_with_any_number_of_buffers(tmp_path, workers, buffers):
    """Also with fewer of them than threads, and than pieces."""
    files = [tmp_path / f"{number}.safetensors" for number in range(3)]
    content = [sample(files[0]), odd_file(files[1]), sample(files[2])]
    options = {"workers": workers, "buffers": buffers, "piece": 64}
    with ExitStack() as exits:
        opened = [exits.enter_context(path.open("rb")).fileno() for path in files]
        sources = [(file, list(entries(path).values())) for file, path in zip(opened, files, strict=True)]
        sources.insert(1, (opened[0], []))  # of which nothing is wanted
        reader = exits.enter_context(FileReader(sources, CPU, **options))
        for number, expected in ((0, content[0]), (1, {}), (2, content[1]), (3, content[2])):
            check(dict(reader.tensors(number)), expected)


def test_no_more_is_sent_than_a_little_ahead(tmp_path, monkeypatch):
    """What nobody asks for takes memory on the device: a slow consumer of a third of the weights must not get all."""
    save_file({f"{number:02}": torch.ones(100) for number in range(50)}, tmp_path / "x.safetensors")
    monkeypatch.setattr(stream, "AHEAD_BYTES", 5 * 400)
    held, most = entries(tmp_path / "x.safetensors"), 0
    with (tmp_path / "x.safetensors").open("rb") as file:
        sources = [(file.fileno(), list(held.values()))]
        with FileReader(sources, CPU, workers=2, piece=400, buffers=4) as reader:
            for _ in reader.tensors(0):
                while reader._workers.arrived.empty() and len(reader._sent) < 5 and reader._workers.numbers.qsize():
                    pass  # the threads have all the time they want
                reader._send_arrived()
                most = max(most, len(reader._memory))
    assert most == 5


def test_no_more_is_sent_while_a_slow_piece_is_waited_for(tmp_path, monkeypatch):
    """One thread reads the first piece last of all that there are buffers for."""
    save_file({f"{number:02}": torch.ones(100) for number in range(50)}, tmp_path / "x.safetensors")
    monkeypatch.setattr(stream, "AHEAD_BYTES", 5 * 400)
    held, read, others = entries(tmp_path / "x.safetensors"), stream._read, threading.Semaphore(0)
    first = min(entry.start for entry in held.values())

    def slowly(file: int, buffer: memoryview, start: int) -> None:
        if start == first:
            for _ in range(19):
                others.acquire()
        read(file, buffer, start)
        others.release()

    monkeypatch.setattr(stream, "_read", slowly)
    with (tmp_path / "x.safetensors").open("rb") as file:
        sources = [(file.fileno(), list(held.values()))]
        with FileReader(sources, CPU, workers=4, piece=400, buffers=20) as reader:
            tensors = reader.tensors(0)
            assert next(tensors)[0] == "00"
            assert len(reader._sent) <= 5
            assert [name for name, _ in tensors] == [f"{number:02}" for number in range(1, 50)]


def test_a_reader_that_is_left_early_leaves_no_thread(tmp_path):
    content = sample(tmp_path / "x.safetensors")
    held, before = entries(tmp_path / "x.safetensors"), threading.active_count()
    with (tmp_path / "x.safetensors").open("rb") as file:
        sources = [(file.fileno(), list(held.values()))]
        with FileReader(sources, CPU, workers=3, piece=8, buffers=3) as reader:
            name, first = next(reader.tensors(0))
            assert threading.active_count() == before + 3
    assert bits(first) == bits(content[name])
    assert threading.active_count() == before


def test_loader_threads_take_their_ranks_gpu_first(tmp_path, monkeypatch):
    """A new thread's is GPU 0: every rank opened a context there, some 500 MB each, beside the memory that was planned."""
    content, taken, read = sample(tmp_path / "x.safetensors"), {}, stream._Buffer.fill

    def set_device(device) -> None:
        taken.setdefault(threading.get_ident(), device)

    def checked(self, *args) -> torch.Tensor:
        assert threading.get_ident() in taken, "it reads before it has a GPU"
        return read(self, *args)

    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    monkeypatch.setattr(stream._Buffer, "fill", checked)
    pool = stream.device_threads
    monkeypatch.setattr(stream, "device_threads", lambda count, name, _: pool(count, name, torch.device("cuda", 3)))
    check(dict(tensors(tmp_path / "x.safetensors", list(content), CPU, workers=2, piece=64)), content)
    assert set(taken.values()) == {torch.device("cuda", 3)} and threading.get_ident() not in taken


@pytest.mark.gpu
@pytest.mark.parametrize("piece", [1000, 2**24])
def test_on_a_gpu_too(tmp_path, piece):
    content = sample(tmp_path / "x.safetensors")
    content["h.many"] = torch.randn(3000, 2000)
    save_file(content, tmp_path / "x.safetensors")
    read = dict(tensors(tmp_path / "x.safetensors", list(content), torch.device("cuda"), piece=piece))
    assert {tensor.device.type for tensor in read.values()} == {"cuda"}
    check(read, content)


def test_only_what_is_asked_for_is_read(tmp_path, monkeypatch):
    """Pieces do not span what nobody wants."""
    path = tmp_path / "x.safetensors"
    content = sample(path)
    spans = []

    def counted(file, buffer, start):
        spans.append((start, start + len(buffer)))
        return read(file, buffer, start)

    read = stream._read
    monkeypatch.setattr(stream, "_read", counted)
    names = ["a.large", "c.bytes", "f.number"]
    check(dict(tensors(path, names, CPU)), {name: content[name] for name in names})
    held = entries(path)
    assert sum(end - start for start, end in spans) == sum(held[name].end - held[name].start for name in names)


def test_the_header_is_read_as_safetensors_reads_it(tmp_path):
    path = tmp_path / "x.safetensors"
    content = sample(path)
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == entries(path).keys()
        assert file.metadata() == {"format": "pt"}
    assert {name: (entry.dtype, entry.shape) for name, entry in entries(path).items()} == {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in content.items()
    }


def test_tensors_lie_where_the_header_says(tmp_path):
    """Their places follow from their order and sizes; safetensors refuses a file with a gap."""
    for path, write in ((tmp_path / "x.safetensors", sample), (tmp_path / "odd.safetensors", odd_file)):
        write(path)
        length = int.from_bytes(path.read_bytes()[:8], "little")
        header = json.loads(path.read_bytes()[8 : 8 + length])
        header.pop("__metadata__", None)
        places = {name: [8 + length + offset for offset in entry["data_offsets"]] for name, entry in header.items()}
        assert {name: [entry.start, entry.end] for name, entry in entries(path).items()} == places
    header["last"]["data_offsets"] = [offset + 8 for offset in header["last"]["data_offsets"]]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(2**12))
    with pytest.raises(SafetensorError):
        entries(path)


def test_a_file_that_threads_read_is_parsed_once(tmp_path, monkeypatch):
    """It was by safetensors and by a parser of our own."""
    opened: list[Path] = []

    def counted(path: Path, framework: str) -> Any:
        opened.append(path)
        return safe_open(path, framework)

    content = sample(tmp_path / "x.safetensors")
    monkeypatch.setattr(loading, "safe_open", counted)
    monkeypatch.setattr(loading, "_stays_mapped", lambda device: False)
    monkeypatch.delattr(json, "loads")
    names = {"a.large", "b.half"}
    found = dict(loading.read_tensors([tmp_path / "x.safetensors"], names.__contains__, CPU))
    check(found, {name: content[name] for name in names})
    assert opened == [tmp_path / "x.safetensors"]


def test_neighbours_share_a_piece_and_large_ones_have_several():
    a, b, c, d = (
        Entry(name, torch.uint8, (end - start,), start, end)
        for name, start, end in (("a", 8, 10), ("b", 10, 35), ("none", 35, 35), ("d", 40, 45))
    )
    assert list(pieces([d, c, b, a], 10)) == [
        (8, 18, [a, b]),
        (18, 28, [b]),
        (28, 35, [b, c]),
        (40, 45, [d]),
    ]


def test_a_file_that_was_cut_off(tmp_path):
    """It may be cut between the look at its header and the reading."""
    path = tmp_path / "x.safetensors"
    sample(path)
    held = entries(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(OSError, match="it ends before its tensors do"):
        read_entries(path, list(held.values()), CPU)
    # The file before it is not to blame.
    whole = tmp_path / "whole.safetensors"
    expected = sample(whole)
    with whole.open("rb") as first, path.open("rb") as second:
        sources = [(first.fileno(), list(held.values())), (second.fileno(), list(held.values()))]
        with FileReader(sources, CPU, piece=8) as reader:
            check(dict(reader.tensors(0)), expected)
            with pytest.raises(OSError, match="it ends before its tensors do"):
                list(reader.tensors(1))
    with pytest.raises(SafetensorError):
        entries(path)


def test_a_dtype_that_torch_cannot_hold(tmp_path):
    path = tmp_path / "x.safetensors"
    header = b'{"x":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"0")
    with pytest.raises(ValueError, match=r"x is of dtype F4; read are BOOL, .*, F64"):
        entries(path)


def test_what_is_left_of_reading_may_be_cleared_away_on_any_thread(tmp_path, monkeypatch):
    """After a refusal it now and then was on its own read-ahead thread: a page about a thread that cannot join itself."""
    save_file({"a": torch.ones(3), "b": torch.ones(3)}, tmp_path / "model.safetensors")
    reading: list[Any] = []
    goes_on, raised = threading.Event(), SimpleQueue[BaseException | None]()

    def close_it(*_: object) -> None:
        goes_on.wait(60)
        try:
            reading[0].close()
            raised.put(None)
        except BaseException as error:
            raised.put(error)

    monkeypatch.setattr(loading, "_read_ahead", close_it)
    reading.append(loading.read_tensors([tmp_path / "model.safetensors"], lambda _: True, torch.device("cpu")))
    assert next(reading[0])[0] == "a"
    goes_on.set()
    assert raised.get(timeout=60) is None
