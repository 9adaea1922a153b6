"""Threads that touch a GPU."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch


def device_threads(count: int, name: str, device: torch.device) -> ThreadPoolExecutor:
    """A pool of threads whose current device is this one, a GPU by number.

    Left to itself a new thread's is 0, where whatever it asks of CUDA opens a context: each rank's some 500 MB.
    """
    return ThreadPoolExecutor(count, thread_name_prefix=name, initializer=partial(take_device, device))


def take_device(device: torch.device) -> None:
    """Make a GPU the current thread's; nothing for a CPU."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
