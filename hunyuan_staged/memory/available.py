"""Memory that is free on the device and the host."""

from pathlib import Path
from typing import Any

from hunyuan_staged.memory.budget import FreeMemory

# -- what is free --


def free_memory(device: Any) -> FreeMemory:
    """What is free on a torch device and its host; memory that torch holds without using it counts as free."""
    host = host_available()
    if device.type != "cuda":
        return FreeMemory(None, host)
    import torch

    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return FreeMemory(torch.cuda.mem_get_info(device)[0] + held, host)


def host_available(root: Path = Path("/")) -> int:
    """Bytes of host memory that this process can still get without swapping: the kernel's MemAvailable, or less where a
    cgroup (version 1 or 2) of a container sets a limit. root: where proc and sys are mounted."""
    available = _field(root / "proc/meminfo", "MemAvailable:") * 1024
    for folder, limit, usage, cache in _cgroups(root):
        try:
            allowed = int((folder / limit).read_text())
            used = int((folder / usage).read_text())
        except (OSError, ValueError):  # no such file, or "max"
            continue
        # The page cache counts as used, and is given back when needed.
        kept = sum(_field(folder / "memory.stat", f"{cache}{name}_file") for name in ("active", "inactive"))
        available = min(available, max(0, allowed - used + kept))
    return available


def _field(path: Path, name: str) -> int:
    for line in path.read_text().splitlines() if path.is_file() else ():
        words = line.split()
        if words[:1] == [name]:
            return int(words[1])
    return 0


def _cgroups(root: Path) -> list[tuple[Path, str, str, str]]:
    """(folder, file of the limit, file of the use, prefix in memory.stat) of this process's cgroups and their parents."""
    found = []
    path = root / "proc/self/cgroup"
    for line in path.read_text().splitlines() if path.is_file() else ():
        _, controllers, name = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        files = files if controllers else ("memory.max", "memory.current", "")
        # Seen from inside a container the path may be the host's, and then is not there: its own is the mount itself.
        parents = [base, *(base / part for part in _prefixes(name))]
        found += [(folder, *files) for folder in parents if folder.is_dir()]
    return found


def _prefixes(name: str) -> list[str]:
    parts = [part for part in name.split("/") if part]
    return ["/".join(parts[: i + 1]) for i in range(len(parts))]
