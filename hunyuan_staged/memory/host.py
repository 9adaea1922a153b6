"""Blocks' weights in host memory, one copy for all ranks of a machine."""

import os
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from hunyuan_staged.parallel.world import World
from hunyuan_staged.weights.loading import Destinations
from hunyuan_staged.weights.packing import PackedLayout, pack
from hunyuan_staged.weights.quantization.stored import KEPT


def block_tensors(block: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*block.named_parameters(), *block.named_buffers()]


def packed_layout(block: nn.Module, dtype: torch.dtype | None = None) -> PackedLayout:
    """How a block is laid out with its weights in `dtype` (those that are stored stay so); None: as they are."""
    return pack(
        (name, tuple(tensor.shape), tensor.dtype if dtype is None or tensor.dtype in KEPT else dtype)
        for name, tensor in block_tensors(block)
    )


def _machine() -> str:
    """What the processes have in common that can open each other's files: the machine, and its container."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"  # noqa: PTH115 (it points at no path)


def shared_memory(size: int, world: World) -> tuple[torch.Tensor, bool]:
    """(`size` bytes that all ranks of this machine share, whether this rank is the one to fill them).

    It has no name in any file system, so that nothing of it is left behind however a run ends, and no limit but the
    machine's memory (/dev/shm in a container often has 64 MB). Every rank of the run must call it, for the same size.
    """
    machines = world.all_gather_text("machines", _machine())
    leader = machines.index(machines[world.rank])
    place, handle = "", -1
    if leader == world.rank:
        handle = os.memfd_create("hunyuan_staged")
        os.ftruncate(handle, size)
        place = f"/proc/{os.getpid()}/fd/{handle}"
    places = world.all_gather_text("host memory", place)
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
    are. leader: whether this rank is to fill it, by destinations(); ready() then tells the others. Raises RuntimeError
    where the memory cannot be pinned.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module] | nn.ModuleList,
        which: Sequence[int],
        device: torch.device,
        world: World,
        dtype: torch.dtype | None = None,
    ) -> None:
        # A GGUF file may have blocks of different types; the largest one says what each of them gets.
        self.layouts = {index: packed_layout(blocks[index], dtype) for index in which}
        self.size = max(layout.size for layout in self.layouts.values())
        self.which, self.world = list(which), world
        self.memory, self.leader = shared_memory(len(self.which) * self.size, world)
        self.flat = dict(zip(self.which, self.memory.split(self.size), strict=True))
        if device.type == "cuda":
            _pin(self.memory)
            release = weakref.finalize(self, _unpin, self.memory.data_ptr())
            release.atexit = False  # the process takes it along

    def views(self, index: int) -> list[torch.Tensor]:
        """A block's tensors in this memory, parameters before buffers."""
        return self.layouts[index].views(self.flat[index])

    def destinations(self, blocks: str) -> Destinations:
        """Where the loader is to put each tensor of the offloaded blocks; `blocks`: the name of their list in the model."""
        tensors = {
            f"{blocks}.{index}.{name}": view
            for index in self.which
            for (name, *_), view in zip(self.layouts[index].pieces, self.views(index), strict=True)
        }
        return Destinations(tensors, self.leader)

    def ready(self) -> None:
        """Wait until every machine's leader has filled its copy."""
        self.world.barrier("host memory filled")
