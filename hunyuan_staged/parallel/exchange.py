"""Tensors from one rank to another. In batches, also of one: what torch sends by itself opens a connection for each pair of
GPUs the first time, and warns of it on every rank."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from hunyuan_staged.parallel.world import World

Transfers = Sequence[tuple[torch.Tensor, int]]  # (contiguous tensor, the other rank)


def begin_exchange(outgoing: Transfers, incoming: Transfers) -> list[Any]:
    """Begin to send and receive all of these; each of what it gives is to be waited for, and the tensors to be kept."""
    operations = [dist.P2POp(dist.isend, tensor, peer) for tensor, peer in outgoing]
    operations += [dist.P2POp(dist.irecv, tensor, peer) for tensor, peer in incoming]
    return dist.batch_isend_irecv(operations) if operations else []


def exchange(outgoing: Transfers, incoming: Transfers) -> None:
    """Send and receive all of these in one batch. On a GPU only its stream waits for them."""
    for work in begin_exchange(outgoing, incoming):
        work.wait()


def description(tensors: Mapping[str, torch.Tensor], device: torch.device) -> torch.Tensor:
    """Name, shape and dtype of each, as JSON in bytes on a device."""
    head = [(name, list(x.shape), str(x.dtype).removeprefix("torch.")) for name, x in tensors.items()]
    return torch.tensor(list(json.dumps(head).encode()), dtype=torch.uint8, device=device)


def gather_tensors(world: World, tensors: Mapping[str, torch.Tensor], source: int) -> dict[str, torch.Tensor]:
    """One rank's named tensors on rank 0, in host memory; nothing on the others, whose tensors are not looked at.

    Every rank calls it. They come one after the other, so that no device holds more than one of them besides its own.
    """
    device = world.device
    if source == 0:
        return {name: tensor.cpu() for name, tensor in tensors.items()} if world.rank == 0 else {}
    if world.rank == source:
        text = description(tensors, device)
        exchange([(torch.tensor([len(text)], device=device), 0)], [])
        exchange([(text, 0)], [])
        for tensor in tensors.values():
            exchange([(tensor.to(device).contiguous().view(-1).view(torch.uint8), 0)], [])
    if world.rank != 0:
        return {}
    length = torch.zeros(1, dtype=torch.int64, device=device)
    exchange([], [(length, source)])
    text = torch.empty(int(length), dtype=torch.uint8, device=device)
    exchange([], [(text, source)])
    found = {}
    for name, shape, dtype in json.loads(bytes(text.tolist())):
        tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
        exchange([], [(tensor.view(-1).view(torch.uint8), source)])
        found[name] = tensor.cpu()
    return found
