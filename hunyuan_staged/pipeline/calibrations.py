"""Where a checkpoint's calibration of caches lies: beside its weights, else in the user's cache folder, else published."""

import json
import os
from pathlib import Path
from typing import Any

from hunyuan_staged.attention.kernel_cache import user_cache
from hunyuan_staged.files.atomic import replacing
from hunyuan_staged.sampling import calibration
from hunyuan_staged.sampling.calibration import Calibration
from hunyuan_staged.weights.fingerprint import CALIBRATION_FILE
from hunyuan_staged.weights.folder import ModelFolder


def beside(folder: ModelFolder, version: str) -> Path | None:
    """The file beside a version's weights; None where the transformer is one file."""
    weights = folder.transformer_folder(version)
    return weights / CALIBRATION_FILE if weights.is_dir() else None


def in_user_cache(folder: ModelFolder, version: str) -> Path:
    """The file in the user's cache folder, named by the weights themselves. Reads samples of them."""
    return user_cache() / "calibrations" / f"{folder.fingerprint(['transformer'], version)[:32]}.json"


def find(folder: ModelFolder, version: str) -> Calibration | None:
    """The calibration of a version's weights; InputError where one is there and broken."""
    own = beside(folder, version)
    found = calibration.read(own) if own else None
    return found or calibration.read(in_user_cache(folder, version)) or calibration.published(version)


def write(folder: ModelFolder, version: str, content: dict[str, Any]) -> Path:
    """Write a calibration where `find` finds it, beside the weights where that folder takes it; its path."""
    path = beside(folder, version)
    if path is None or not os.access(path.parent, os.W_OK):
        path = in_user_cache(folder, version)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path
