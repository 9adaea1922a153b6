"""Python loads this in every process of a cluster under test: it kills some of them, each at a given moment.

KILLS names a folder. kills.json there says, for a function of a stage, in which of its calls, counted over all processes,
what is killed: {"euler_step": {"17": "actor"}}. See test_cluster.py.
"""

import fcntl
import functools
import importlib.util
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

FUNCTIONS = {"hunyuan_staged.sampling.loop": "euler_step", "hunyuan_staged.pipeline.job_folders": "check_earlier"}


def count(folder: Path, name: str) -> int:
    """Which call of a function this is, counted from 1."""
    with (folder / name).open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write("x")
        file.flush()
        return os.fstat(file.fileno()).st_size


def kill(folder: Path, victim: str) -> None:
    if victim == "driver":
        former, came = signal.getsignal(signal.SIGTERM), []
        signal.signal(signal.SIGTERM, lambda *about: (came.append(1), former(*about)))  # type: ignore[operator, misc]
        os.kill(int((folder / "driver").read_text()), signal.SIGTERM)
        while not came:  # until it is passed on: the job is under way when it comes
            time.sleep(0.01)
    else:
        os.kill({"actor": os.getppid(), "process": os.getpid()}[victim], signal.SIGKILL)


class Finder:
    """Has the functions of FUNCTIONS counted, as their modules are imported."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.left = folder, dict(FUNCTIONS)

    def find_spec(self, name: str, *_: object) -> Any:
        function = self.left.pop(name, None)
        if function is None:
            return None
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def loaded(module: Any) -> None:
            load(module)
            setattr(module, function, self.counted(getattr(module, function)))

        spec.loader.exec_module = loaded
        return spec

    def counted(self, function: Any) -> Any:
        @functools.wraps(function)
        def wrapped(*args: Any, **options: Any) -> Any:
            name = function.__name__ if function.__name__ == "euler_step" else f"{function.__name__} {args[1]}"
            kills = json.loads((self.folder / "kills.json").read_text())
            victim = kills.get(name, {}).get(str(count(self.folder, name)))
            if victim:
                kill(self.folder, victim)
            return function(*args, **options)

        return wrapped


if os.environ.get("KILLS") and os.environ.get("RANK", "0") == "0":
    sys.meta_path.insert(0, Finder(Path(os.environ["KILLS"])))  # type: ignore[arg-type]
