"""Tensors from one rank to another. In batches, also of one: what torch sends by itself opens a connection for each pair of
GPUs the first time, and warns of it on every rank."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

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
