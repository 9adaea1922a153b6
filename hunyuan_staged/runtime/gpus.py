"""How many GPUs there are, as a launcher without torch can tell."""

import os
import subprocess


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
