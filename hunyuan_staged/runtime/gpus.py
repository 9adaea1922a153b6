"""Which GPUs there are, and the context of one, by their driver alone: without torch."""

import ctypes
import os
import subprocess
import sys
import threading
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

# https://docs.nvidia.com/cuda/cuda-driver-api: CUdevice_attribute, CUcomputemode
_COMPUTE_MODE, _MAJOR, _MINOR = 20, 75, 76
_SHARED_MODE = 0


@dataclass(frozen=True)
class GpuFacts:
    """A visible GPU: its number, bytes of memory, compute capability, and whether several processes may use it."""

    index: int
    total: int
    capability: tuple[int, int]
    shared: bool


def _driver() -> tuple[ctypes.CDLL, int]:
    """(CUDA's driver, how many GPUs it shows). Raises OSError where there is none, or no answer, and AttributeError where
    it lacks these functions."""
    driver, count = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        raise OSError("CUDA's driver does not answer")
    return driver, count.value


def gpu_facts() -> list[GpuFacts]:
    """The visible GPUs, as CUDA's driver lists them, none gets a context; none where there is no driver, or no answer."""
    try:
        driver, count = _driver()
        size = ctypes.c_size_t()

        def attribute(which: int, device: ctypes.c_int) -> int:
            value = ctypes.c_int(-1)
            driver.cuDeviceGetAttribute(ctypes.byref(value), which, device)
            return value.value

        found = []
        for index in range(count):
            device = ctypes.c_int()
            if driver.cuDeviceGet(ctypes.byref(device), index) or driver.cuDeviceTotalMem_v2(
                ctypes.byref(size), device
            ):
                return []
            capability = attribute(_MAJOR, device), attribute(_MINOR, device)
            shared = attribute(_COMPUTE_MODE, device) == _SHARED_MODE
            found.append(GpuFacts(index, size.value, capability, shared))
    except (OSError, AttributeError):  # no library, or one without these functions
        return []
    return found


def begin_context(local_rank: int) -> None:
    """Have a thread open the context of a rank's GPU while torch is imported, which takes longer and finds it there.

    Nothing where torch is imported already, or was built for no GPU.
    """
    if "torch" not in sys.modules and _torch_takes_gpus():
        threading.Thread(target=open_context, args=(local_rank,), name="context").start()


def _torch_takes_gpus() -> bool:
    found = find_spec("torch")
    return bool(found and found.origin and (Path(found.origin).parent / "lib" / "libtorch_cuda.so").exists())


def open_context(local_rank: int) -> bool:
    """Open the context that all of this process shares, on the GPU that a rank takes (world.lone_world), until it ends.

    Whether it is there; why it is not, torch will say.
    """
    try:
        driver, count = _driver()
        if not count:
            return False
        device, context = ctypes.c_int(), ctypes.c_void_p()
        failed = driver.cuDeviceGet(ctypes.byref(device), local_rank % count)
        return not failed and not driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
    except (OSError, AttributeError):  # no library, or one without these functions
        return False


def visible_gpus() -> int:
    """How many GPUs CUDA_VISIBLE_DEVICES, else nvidia-smi, shows."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shown is not None:
        return 0 if shown == "-1" else len([word for word in shown.split(",") if word])
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False).stdout
    except OSError:
        return 0
    return sum(line.startswith("GPU") for line in listed.splitlines())
