"""The table, the JSON, and the file for a bug report."""

import json
import math
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from typing import Any

import torch

from hunyuan_staged.attention.choose import PACKAGES
from hunyuan_staged.memory.available import host_available
from hunyuan_staged.memory.budget import gib
from hunyuan_staged.verify.checks import Check
from hunyuan_staged.verify.run import Verification
from hunyuan_staged.weights.boundary import read_json

LIBRARIES = ("hunyuan-staged", "torch", "diffusers", "transformers", "safetensors", "numpy", "pillow", "triton")


def table(checks: Sequence[Check]) -> list[str]:
    """A line for each check: part, what, ok or FAIL, error, bound, note."""
    rows = [("part", "check", "", "error", "bound", "why, or what was found")]
    for check in checks:
        error, bound = ("" if number is None else f"{number:.1e}" for number in (check.value, check.bound))
        rows.append((check.part, check.what, "ok" if check.ok else "FAIL", error, bound, check.note))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    return ["  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[5]]) for row in rows]


def as_json(run: Verification, checks: Sequence[Check], seconds: float) -> dict[str, Any]:
    """The result for programs; a number that is not finite, which JSON has none for, is a string."""
    listed = [asdict(check) for check in checks]
    for one in listed:
        if one["value"] is not None and not math.isfinite(one["value"]):
            one["value"] = str(one["value"])
    return {
        "ok": all(check.ok for check in checks),
        "versions": [version.name for version in run.versions],
        "layout": run.folder.layout,
        "device": str(run.device),
        "dtype": str(run.dtype),
        "seconds": round(seconds, 1),
        "checks": listed,
    }


def _installed(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def machine(run: Verification) -> dict[str, str]:
    """What a bug report says of the machine; no name of a user, a host or a folder."""
    found = {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": sys.version.split()[0],
        **{name: _installed(name) for name in LIBRARIES},
        **{f"attention {mode}": package for mode, (package, _) in PACKAGES.items() if _found(package)},
        "cpu cores": str(os.cpu_count()),
        "host memory free": gib(host_available()),
    }
    if run.device.type == "cuda":
        properties = torch.cuda.get_device_properties(run.device)
        found["gpu"] = f"{properties.name}, {gib(properties.total_memory)}, {properties.major}.{properties.minor}"
        found["cuda"], found["cudnn"] = str(torch.version.cuda), str(torch.backends.cudnn.version())
    return found


def _found(package: str) -> bool:
    from hunyuan_staged.attention.packages import installed

    return installed(package)


def bug_report(run: Verification, checks: Sequence[Check], seconds: float) -> str:
    """Markdown: the table, the machine, every file of the model with its size, the configs, the JSON."""
    root = run.folder.path
    files = sorted(
        path
        for path in root.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(root).parts)
    )
    listed = [f"{path.stat().st_size:>14,}  {path.relative_to(root).as_posix()}" for path in files]
    wanted = {version.name for version in run.versions}
    configs = [
        path
        for path in files
        if path.name == "config.json" and (path.parent.parent.name != "transformer" or path.parent.name in wanted)
    ]
    parts = [
        "# hunyuan_staged.verify",
        _block(table(checks)),
        "## Machine",
        _block([f"{name}: {value}" for name, value in machine(run).items()]),
        "## Files of the model",
        _block(listed),
        "## Configs",
        *(_block([path.relative_to(root).as_posix(), json.dumps(read_json(path), indent=1)]) for path in configs),
        "## JSON",
        _block([json.dumps(as_json(run, checks, seconds))]),
    ]
    # A message may name the folder, and with it its owner.
    return "\n\n".join(parts).replace(str(root), "MODEL") + "\n"


def _block(lines: Sequence[str]) -> str:
    return "\n".join(["```", *lines, "```"])
