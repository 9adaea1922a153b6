"""Where the blocks' weights live, and when they travel: on the host, two blocks at a time on the device.

The host's copy is one for all ranks of a machine.
"""

import os
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hunyuan_staged.checkpoints import NO_PLACES, Places
from hunyuan_staged.float8 import STORED
from hunyuan_staged.parallel import World
from hunyuan_staged.plan import SLOTS, BlockWeights

ALIGNMENT = 256  # bytes; every weight starts where a kernel may load whole vectors


def _tensors(block: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*block.named_parameters(), *block.named_buffers()]


@dataclass(frozen=True)
class Cut:
    """Where the tensors of a block lie in a piece of memory: name, shape, dtype and first byte of each; the size of all."""

    pieces: tuple[tuple[str, tuple[int, ...], torch.dtype, int], ...]
    size: int

    def views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """The tensors in memory of `size` bytes, uint8."""
        views = []
        for _, shape, dtype, start in self.pieces:
            length = torch.Size(shape).numel() * dtype.itemsize
            views.append(flat[start : start + length].view(dtype).view(shape))
        return views


def cut_of(block: nn.Module, dtype: torch.dtype | None = None) -> Cut:
    """How a block is laid out with its weights in `dtype` (those in float8 stay so); None: as they are."""
    pieces, start = [], 0
    for name, tensor in _tensors(block):
        own = tensor.dtype if dtype is None or tensor.dtype == STORED else dtype
        pieces.append((name, tuple(tensor.shape), own, start))
        start += -(-tensor.numel() * own.itemsize // ALIGNMENT) * ALIGNMENT
    return Cut(tuple(pieces), start)


def weights_of(model: nn.Module, blocks: Sequence[nn.Module] | nn.ModuleList, dtype: torch.dtype) -> BlockWeights:
    """The bytes of a model (which may be on the meta device) with its weights in `dtype`, its blocks apart."""
    everything = sum(tensor.numel() for _, tensor in _tensors(model))
    inside = sum(tensor.numel() for block in blocks for _, tensor in _tensors(block))
    return BlockWeights(len(blocks), cut_of(blocks[0], dtype).size, (everything - inside) * dtype.itemsize)


def widened_bytes(block: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of a block in `dtype` where it is stored in float8, which it takes besides while it is computed; else 0."""
    tensors = list(block.parameters())
    stored = any(tensor.dtype == STORED for tensor in tensors)
    return sum(tensor.numel() for tensor in tensors) * dtype.itemsize if stored else 0


def spread(offloaded: int, count: int) -> list[int]:
    """Which of `count` blocks are offloaded: evenly spread, so that each has the others' time to arrive in."""
    return [index * count // offloaded for index in range(offloaded)]


def _machine() -> str:
    """What the processes have in common that can open each other's files: the machine, and its container."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"  # noqa: PTH115 (it points at no path)


def shared_memory(size: int, world: World) -> tuple[torch.Tensor, bool]:
    """(`size` bytes that all ranks of this machine share, whether this rank is the one to fill them).

    It has no name in any file system, so that nothing of it is left behind however a run ends, and no limit but the
    machine's memory (/dev/shm in a container often has 64 MB). Every rank of the run must call it, for the same size.
    """
    machines = world.exchange("machines", _machine())
    leader = machines.index(machines[world.rank])
    place, handle = "", -1
    if leader == world.rank:
        handle = os.memfd_create("hunyuan_staged")
        os.ftruncate(handle, size)
        place = f"/proc/{os.getpid()}/fd/{handle}"
    places = world.exchange("host memory", place)
    memory = torch.from_file(places[leader], shared=True, size=size, dtype=torch.uint8)
    world.barrier("host memory mapped")
    if handle >= 0:
        os.close(handle)
    return memory, leader == world.rank


def _pin(memory: torch.Tensor) -> None:
    """Lock memory for copies that run beside the GPU's work; torch's own pinned memory comes in powers of two."""
    status = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
    if status:
        raise RuntimeError(f"{memory.nbytes} bytes of host memory cannot be pinned: CUDA error {status}")


def _unpin(address: int) -> None:
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaHostUnregister(address)


class HostBlocks:
    """The host's copy of some of a model's equal blocks, one for all ranks of a machine, pinned where there is a GPU.

    blocks: all of them, on any device, also meta. which: those that are offloaded. dtype: of their weights, None as they
    are. leader: whether this rank is to fill it, by places(); ready() then tells the others. Raises RuntimeError where
    the memory cannot be pinned.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module] | nn.ModuleList,
        which: Sequence[int],
        device: torch.device,
        world: World,
        dtype: torch.dtype | None = None,
    ) -> None:
        cuts = {cut_of(blocks[index], dtype) for index in which}
        assert len(cuts) == 1, "blocks of different shapes cannot share their slots"
        (self.cut,) = cuts
        self.which, self.world = list(which), world
        self.memory, self.leader = shared_memory(len(self.which) * self.cut.size, world)
        self.flat = dict(zip(self.which, self.memory.split(self.cut.size), strict=True))
        if device.type == "cuda":
            _pin(self.memory)
            release = weakref.finalize(self, _unpin, self.memory.data_ptr())
            release.atexit = False  # the process takes it along

    def views(self, index: int) -> list[torch.Tensor]:
        """A block's tensors in this memory, parameters before buffers."""
        return self.cut.views(self.flat[index])

    def places(self, blocks: str) -> Places:
        """Where the loader is to put each tensor of the offloaded blocks; `blocks`: the name of their list in the model."""
        tensors = {
            f"{blocks}.{index}.{name}": view
            for index in self.which
            for (name, *_), view in zip(self.cut.pieces, self.views(index), strict=True)
        }
        return Places(tensors, self.leader)

    def ready(self) -> None:
        """Wait until every machine's leader has filled its copy."""
        self.world.barrier("host memory filled")


class StreamedBlocks:
    """Blocks, to be iterated over in slices; the weights of some are on the host, and on the device just while current.

    The copy of the next offloaded block runs beside the computation before it, SLOTS blocks ahead at most, and goes on
    from the last to the first: the weights must not change while this is in use. Between uses the blocks' parameters
    point at the host's copy.
    """

    def __init__(self, blocks: Sequence[nn.Module] | nn.ModuleList, home: HostBlocks, device: torch.device) -> None:
        self.blocks, self.home, self.device = list(blocks), home, device
        self.order = {index: position for position, index in enumerate(home.which)}
        cuda = device.type == "cuda"
        self.copy_stream = torch.cuda.Stream(device) if cuda else None
        self.slots = [
            torch.empty(home.cut.size, dtype=torch.uint8, device=device) for _ in range(min(SLOTS, len(home.which)))
        ]
        self.views = [home.cut.views(slot) for slot in self.slots]
        self.arrived = [torch.cuda.Event() for _ in self.slots] if cuda else []
        self.computed = [torch.cuda.Event() for _ in self.slots] if cuda else []
        if self.copy_stream:
            self.copy_stream.wait_stream(torch.cuda.current_stream(device))
            for slot in self.slots:
                slot.record_stream(self.copy_stream)
        self._free = deque(range(len(self.slots)))
        self._ahead: deque[tuple[int, int]] = deque()  # (position, slot) of what is on its way or there, in order
        for index in home.which:
            self._point(index, home.views(index))

    def _point(self, index: int, views: Sequence[torch.Tensor]) -> None:
        for (_, tensor), view in zip(_tensors(self.blocks[index]), views, strict=True):
            tensor.data = view

    def _fetch(self, position: int) -> None:
        """Start copying an offloaded block into a free slot, as soon as that slot's last block has been computed."""
        slot = self._free.popleft()
        with torch.cuda.stream(self.copy_stream) if self.copy_stream else nullcontext():
            if self.copy_stream:
                self.copy_stream.wait_event(self.computed[slot])
            self.slots[slot].copy_(self.home.flat[self.home.which[position]], non_blocking=True)
            if self.copy_stream:
                self.arrived[slot].record(self.copy_stream)
        self._ahead.append((position, slot))

    def bring(self, index: int) -> int:
        """Have an offloaded block's weights on the device; the slot that they are in, to be released after use."""
        position = self.order[index]
        while self._ahead and self._ahead[0][0] != position:
            self._free.append(self._ahead.popleft()[1])  # the last iteration was left early
        while self._free:
            last = self._ahead[-1][0] if self._ahead else position - 1
            self._fetch((last + 1) % len(self.order))
        _, slot = self._ahead.popleft()
        if self.arrived:
            torch.cuda.current_stream(self.device).wait_event(self.arrived[slot])
        self._point(index, self.views[slot])
        return slot

    def release(self, index: int, slot: int) -> None:
        """Send a block's weights back to the host, as it were, and begin to bring what comes SLOTS blocks later."""
        self._point(index, self.home.views(index))
        if self.computed:
            self.computed[slot].record(torch.cuda.current_stream(self.device))
        self._free.append(slot)
        last = self._ahead[-1][0] if self._ahead else self.order[index]
        self._fetch((last + 1) % len(self.order))

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, part: slice) -> Iterator[nn.Module]:
        """Iterates over some neighbouring blocks."""
        for index in range(*part.indices(len(self.blocks))):
            block = self.blocks[index]
            if index not in self.order:
                yield block
                continue
            slot = self.bring(index)
            try:
                yield block
            finally:
                self.release(index, slot)

    def hook(self) -> None:
        """Let each offloaded block fetch its own weights when it is called, for a model whose forward is not ours."""
        slots: dict[int, int] = {}
        for index in self.order:

            def before(module: nn.Module, args: tuple, index: int = index) -> None:
                slots[index] = self.bring(index)

            def after(module: nn.Module, args: tuple, output: object, index: int = index) -> None:
                self.release(index, slots.pop(index))

            self.blocks[index].register_forward_pre_hook(before)
            self.blocks[index].register_forward_hook(after)


def stream_blocks(
    model: nn.Module, device: torch.device, offloaded: int | None = None, *, world: World | None = None
) -> StreamedBlocks:
    """Offload so many of a loaded transformer's blocks (None: all), evenly spread, and move the rest to the device."""
    blocks = list(model.get_submodule("transformer_blocks").children())
    which = spread(len(blocks) if offloaded is None else offloaded, len(blocks))
    home = HostBlocks(blocks, which, device, world or World(0, 1, device))
    for index in which:
        for (_, tensor), view in zip(_tensors(blocks[index]), home.views(index), strict=True):
            if home.leader:
                view.copy_(tensor)
            tensor.data = view
    home.ready()
    for name, child in model.named_children():
        if name != "transformer_blocks":
            child.to(device)
    for index, block in enumerate(blocks):
        if index not in home.flat:
            block.to(device)
    return StreamedBlocks(blocks, home, device)


def load_offloaded(
    skeleton: nn.Module,
    blocks: str,
    offloaded: int,
    load: Callable[[Places], Any],
    *,
    device: torch.device,
    dtype: torch.dtype,
    world: World,
) -> tuple[Any, StreamedBlocks | None]:
    """(what `load` gave, the blocks as they are to be used; None where all are resident), loaded without a second copy.

    skeleton: a model on the meta device, which `load` fills. blocks: the name of the list of its blocks. offloaded: how
    many of them stay on the host.
    """
    if not offloaded:
        return load(NO_PLACES), None
    own: Any = skeleton.get_submodule(blocks)
    home = HostBlocks(own, spread(offloaded, len(own)), device, world, dtype)
    loaded = load(home.places(blocks))
    home.ready()
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what the loading left in pieces: memory is short here
    return loaded, StreamedBlocks(own, home, device)
