"""Where the blocks' weights live, and when they travel: on the host, two blocks at a time on the device."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import torch
from torch import nn

SLOTS = 2  # one block computes while the next one's weights arrive
ALIGNMENT = 256  # bytes; every weight starts where a kernel may load whole vectors


class StreamedBlocks:
    """Iterates over blocks whose weights rest on the host, and are on the device just while a block is the current one.

    All blocks must hold tensors of the same shapes and dtypes. Host copies are pinned where the device is a GPU, so the
    copy of block i + 1 runs beside the computation of block i. The blocks' own parameters are emptied of device memory:
    between uses they point at the host copy.
    """

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device) -> None:
        self.blocks, self.device = list(blocks), device
        cuda = device.type == "cuda"
        self.copy_stream = torch.cuda.Stream(device) if cuda else None
        tensors = [[*block.parameters(), *block.buffers()] for block in self.blocks]
        shapes = {tuple((tuple(t.shape), t.dtype) for t in own) for own in tensors}
        assert len(shapes) == 1, "blocks of different shapes cannot share their slots"
        self.tensors = tensors
        self.host = []
        for own in tensors:
            flat = torch.empty(self._bytes(own), dtype=torch.uint8, pin_memory=cuda)
            for tensor, view in zip(own, self._views(flat, own), strict=True):
                view.copy_(tensor)
                tensor.data = view
            self.host.append(flat)
        self.slots = [torch.empty_like(self.host[0], device=device, pin_memory=False) for _ in range(SLOTS)]
        self.views = [self._views(slot, tensors[0]) for slot in self.slots]
        self.arrived = [torch.cuda.Event() for _ in range(SLOTS)] if cuda else []
        self.computed = [torch.cuda.Event() for _ in range(SLOTS)] if cuda else []
        self.holds: list[int | None] = [None] * SLOTS  # which block each slot has, or is getting

    @staticmethod
    def _padded(tensor: torch.Tensor) -> int:
        return -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT

    def _bytes(self, tensors: Sequence[torch.Tensor]) -> int:
        return sum(self._padded(tensor) for tensor in tensors)

    def _views(self, flat: torch.Tensor, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        views, start = [], 0
        for tensor in tensors:
            size = tensor.numel() * tensor.element_size()
            views.append(flat[start : start + size].view(tensor.dtype).view(tensor.shape))
            start += self._padded(tensor)
        return views

    def _fetch(self, index: int) -> None:
        """Start copying a block into its slot, as soon as the slot's last block has been computed; once is enough."""
        slot = index % SLOTS
        if self.holds[slot] == index:
            return
        self.holds[slot] = index
        with torch.cuda.stream(self.copy_stream) if self.copy_stream else nullcontext():
            if self.copy_stream:
                self.copy_stream.wait_event(self.computed[slot])
            self.slots[slot].copy_(self.host[index], non_blocking=True)
            if self.copy_stream:
                self.arrived[slot].record(self.copy_stream)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, part: slice) -> Iterator[nn.Module]:
        """Iterates over some neighbouring blocks; the one behind them is on its way at the end, too."""
        first, last, _ = part.indices(len(self.blocks))
        self._fetch(first)
        for index in range(first, last):
            block, slot = self.blocks[index], index % SLOTS
            if index + 1 < len(self.blocks):
                self._fetch(index + 1)
            if self.arrived:
                torch.cuda.current_stream(self.device).wait_event(self.arrived[slot])
            for tensor, view in zip(self.tensors[index], self.views[slot], strict=True):
                tensor.data = view
            yield block
            for tensor, view in zip(
                self.tensors[index], self._views(self.host[index], self.tensors[index]), strict=True
            ):
                tensor.data = view
            if self.computed:
                self.computed[slot].record(torch.cuda.current_stream(self.device))


def stream_blocks(model: nn.Module, device: torch.device) -> StreamedBlocks:
    """Move all of a transformer but its blocks to the device; the blocks stay on the host and are streamed from there."""
    for name, child in model.named_children():
        if name != "transformer_blocks":
            child.to(device)
    return StreamedBlocks(list(model.get_submodule("transformer_blocks").children()), device)
