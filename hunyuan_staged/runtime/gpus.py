"""Which GPUs there are, as told without torch, and without a context on any of them."""

import ctypes
import os
import subprocess
from dataclasses import dataclass

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


def gpu_facts() -> list[GpuFacts]:
    """The visible GPUs, as CUDA's driver lists them; none where there is no driver, or it does not answer."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        count, size = ctypes.c_int(), ctypes.c_size_t()
        if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
            return []

        def attribute(which: int, device: ctypes.c_int) -> int:
            value = ctypes.c_int(-1)
            driver.cuDeviceGetAttribute(ctypes.byref(value), which, device)
            return value.value

        found = []
        for index in range(count.value):
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
