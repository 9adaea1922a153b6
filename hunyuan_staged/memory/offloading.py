"""Where the blocks' weights live, and when they travel: on the host, two blocks at a time on the device.

The host's copy is one for all ranks of a machine.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from hunyuan_staged.memory.budget import SLOTS, BlockWeights
from hunyuan_staged.memory.host import HostBlocks, block_tensors, packed_layout
from hunyuan_staged.parallel.world import World
from hunyuan_staged.weights.loading import NO_DESTINATIONS, Destinations
from hunyuan_staged.weights.quantization.stored import wide_elements


def weights_of(model: nn.Module, blocks: Sequence[nn.Module] | nn.ModuleList, dtype: torch.dtype) -> BlockWeights:
    """The bytes of a model (which may be on the meta device) with its weights in `dtype`, its blocks apart."""
    everything = sum(tensor.numel() for _, tensor in block_tensors(model))
    inside = sum(tensor.numel() for block in blocks for _, tensor in block_tensors(block))
    largest = max(packed_layout(block, dtype).size for block in blocks)
    return BlockWeights(len(blocks), largest, (everything - inside) * dtype.itemsize)


def widened_bytes(blocks: Iterable[nn.Module], dtype: torch.dtype) -> int:
    """Bytes of a block in `dtype` where some are stored in another form, which it takes besides while it is computed; else
    0."""
    return max(map(wide_elements, blocks), default=0) * dtype.itemsize


def evenly_spaced(offloaded: int, count: int) -> list[int]:
    """Which of `count` blocks are offloaded: evenly spread, so that each has the others' time to arrive in."""
    return [index * count // offloaded for index in range(offloaded)]


class StreamedBlocks:
    """Blocks, to be iterated over in slices; the weights of some are on the host, and on the device just while current.

    The copy of the next offloaded block runs beside the computation before it, SLOTS blocks ahead at most, and goes on
    from the last to the first: the weights must not change while this is in use. Between uses the blocks' parameters
    point at the host's copy.
    """

    def __init__(
        self, blocks: Sequence[nn.Module] | nn.ModuleList, host_blocks: HostBlocks, device: torch.device
    ) -> None:
        self.blocks, self.host_blocks, self.device = list(blocks), host_blocks, device
        self.order = {index: position for position, index in enumerate(host_blocks.which)}
        cuda = device.type == "cuda"
        self.copy_stream = torch.cuda.Stream(device) if cuda else None
        self.slots = [
            torch.empty(host_blocks.size, dtype=torch.uint8, device=device)
            for _ in range(min(SLOTS, len(host_blocks.which)))
        ]
        self._views: dict[tuple[int, int], list[torch.Tensor]] = {}  # of a block in a slot
        self.arrived = [torch.cuda.Event() for _ in self.slots] if cuda else []
        self.computed = [torch.cuda.Event() for _ in self.slots] if cuda else []
        if self.copy_stream:
            self.copy_stream.wait_stream(torch.cuda.current_stream(device))
            for slot in self.slots:
                slot.record_stream(self.copy_stream)
        self._free = deque(range(len(self.slots)))
        self._ahead: deque[tuple[int, int]] = deque()  # (position, slot) of what is on its way or there, in order
        for index in host_blocks.which:
            self._point(index, host_blocks.views(index))

    def _point(self, index: int, views: Sequence[torch.Tensor]) -> None:
        for (_, tensor), view in zip(block_tensors(self.blocks[index]), views, strict=True):
            tensor.data = view

    def _fetch(self, position: int) -> None:
        """Start copying an offloaded block into a free slot, as soon as that slot's last block has been computed."""
        slot = self._free.popleft()
        with torch.cuda.stream(self.copy_stream) if self.copy_stream else nullcontext():
            if self.copy_stream:
                self.copy_stream.wait_event(self.computed[slot])
            self.slots[slot].copy_(self.host_blocks.flat[self.host_blocks.which[position]], non_blocking=True)
            if self.copy_stream:
                self.arrived[slot].record(self.copy_stream)
        self._ahead.append((position, slot))

    def acquire(self, index: int) -> int:
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
        if (index, slot) not in self._views:
            self._views[index, slot] = self.host_blocks.layouts[index].views(self.slots[slot])
        self._point(index, self._views[index, slot])
        return slot

    def release(self, index: int, slot: int) -> None:
        """Send a block's weights back to the host, as it were, and begin to fetch what comes SLOTS blocks later."""
        self._point(index, self.host_blocks.views(index))
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
            slot = self.acquire(index)
            try:
                yield block
            finally:
                self.release(index, slot)

    def hook(self) -> None:
        """Let each offloaded block fetch its own weights when it is called, for a model whose forward is not ours."""
        slots: dict[int, int] = {}
        for index in self.order:

            def before(module: nn.Module, args: tuple, index: int = index) -> None:
                slots[index] = self.acquire(index)

            def after(module: nn.Module, args: tuple, output: object, index: int = index) -> None:
                self.release(index, slots.pop(index))

            self.blocks[index].register_forward_pre_hook(before)
            self.blocks[index].register_forward_hook(after)


def stream_blocks(
    model: nn.Module, device: torch.device, offloaded: int | None = None, *, world: World | None = None
) -> StreamedBlocks:
    """Offload so many of a loaded transformer's blocks (None: all), evenly spread, and move the rest to the device."""
    blocks = list(model.get_submodule("transformer_blocks").children())
    which = evenly_spaced(len(blocks) if offloaded is None else offloaded, len(blocks))
    host_blocks = HostBlocks(blocks, which, device, world or World(0, 1, device))
    for index in which:
        for (_, tensor), view in zip(block_tensors(blocks[index]), host_blocks.views(index), strict=True):
            if host_blocks.leader:
                view.copy_(tensor)
            tensor.data = view
    host_blocks.ready()
    for name, child in model.named_children():
        if name != "transformer_blocks":
            child.to(device)
    for index, block in enumerate(blocks):
        if index not in host_blocks.flat:
            block.to(device)
    return StreamedBlocks(blocks, host_blocks, device)


def load_offloaded(
    skeleton: nn.Module,
    blocks: str,
    offloaded: int,
    load: Callable[[Destinations], Any],
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
        return load(NO_DESTINATIONS), None
    own: Any = skeleton.get_submodule(blocks)
    host_blocks = HostBlocks(own, evenly_spaced(offloaded, len(own)), device, world, dtype)
    loaded = load(host_blocks.destinations(blocks))
    host_blocks.ready()
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what the loading left in pieces: memory is short here
    return loaded, StreamedBlocks(own, host_blocks, device)
