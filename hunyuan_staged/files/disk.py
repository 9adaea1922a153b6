"""Room on the disk."""

import shutil
from pathlib import Path


def free_space(path: Path) -> tuple[Path, int]:
    """(the folder that is there, free bytes) where a path lies or is to lie."""
    place = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    return place, shutil.disk_usage(place).free
