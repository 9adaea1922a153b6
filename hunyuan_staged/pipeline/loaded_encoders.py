"""The encoders that are loaded, from one job to the next."""

import gc
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from hunyuan_staged.memory import estimates
from hunyuan_staged.memory.budget import BlockPlan, FreeMemory
from hunyuan_staged.pipeline.common import free_memory

if TYPE_CHECKING:
    from hunyuan_staged.pipeline.encoding import EncodeSetup

Loaded = TypeVar("Loaded")


class LoadedEncoders:
    """The encoders that are loaded. keep: from one job to the next, all of them; else one part at a time."""

    def __init__(self, *, keep: bool = False) -> None:
        self.keep = keep
        self._parts: dict[str, tuple[object, Any]] = {}
        self._free: FreeMemory | None = None  # before anything was loaded
        self._texts: dict[str, tuple[object, dict[str, torch.Tensor]]] = {}  # the last of each kind

    def plan(self, setup: "EncodeSetup") -> tuple[BlockPlan, FreeMemory]:
        """(how the language model is laid out beside what is kept, the memory there is); InputError: it does not fit."""
        if self._free is None:
            self._free = free_memory(setup.world)
        return setup.plan(self._free, beside=estimates.KEPT_ENCODERS if self.keep else 0), self._free

    def get(self, part: str, key: object, load: Callable[[], Loaded]) -> Loaded:
        """A part of a model, loaded unless it is there with the same key."""
        if part not in self._parts or self._parts[part][0] != key:
            self._drop(part)
            self._parts[part] = key, load()
        loaded: Loaded = self._parts[part][1]
        return loaded

    def release(self, part: str) -> None:
        """Have done with a part."""
        if not self.keep:
            self._drop(part)

    def _drop(self, part: str) -> None:
        if self._parts.pop(part, None) is not None:
            gc.collect()  # the hooks of offloaded layers and the layers hold each other, and with them their memory

    def text(self, kind: str, key: object, encode: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """The tensors of a text; the last of each kind are kept: many seeds of a prompt are encoded once."""
        if kind not in self._texts or self._texts[kind][0] != key:
            self._texts[kind] = key, encode()
        return self._texts[kind][1]
