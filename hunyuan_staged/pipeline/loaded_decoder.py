"""The VAE's decoder that is loaded, from one job to the next."""

from collections.abc import Callable
from typing import Any

from hunyuan_staged.memory.budget import FreeMemory
from hunyuan_staged.parallel.world import World
from hunyuan_staged.pipeline.common import free_memory

Decoder = tuple[Any, dict[str, Any]]  # and the VAE's config


class LoadedDecoder:
    """One loaded decoder at a time: that of the last job serves the next one of the same model."""

    def __init__(self) -> None:
        self._loaded: Decoder | None = None
        self._key: object = None
        self._free: FreeMemory | None = None  # before anything was loaded

    def free(self, world: World) -> FreeMemory:
        """The memory that is free but for the decoder; every rank of the world calls it."""
        if self._free is None:
            self._free = free_memory(world, self._loaded is not None)
        return self._free

    def get(self, key: object, load: Callable[[], Decoder]) -> Decoder:
        """The decoder of this key."""
        if self._loaded is None or key != self._key:
            self._loaded = None
            self._loaded, self._key = load(), key
        return self._loaded
