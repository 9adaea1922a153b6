"""What weights are known by: names, sizes and samples of their files. Where they lie, and since when, does not count."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from hunyuan_staged.errors import InputError
from hunyuan_staged.weights.boundary import require_regular

# Files beside weights that are no part of a model: for previews, and what was recorded of a transformer for caches.
PREVIEW_FACTORS = "preview_factors.json"
CALIBRATION_FILE = "cache_calibration.json"
# Of each file so many pieces of so many bytes are read.
SAMPLES, SAMPLE_BYTES = 16, 2**16


def sampled_hash(path: Path) -> bytes:
    """The hash of a file's size and of SAMPLES pieces of it, evenly spread, its beginning and its end among them."""
    size = require_regular(path).stat().st_size
    found = hashlib.sha256(str(size).encode())
    try:
        with path.open("rb") as file:
            for index in range(SAMPLES):
                file.seek(max(0, size - SAMPLE_BYTES) * index // (SAMPLES - 1))
                found.update(file.read(SAMPLE_BYTES))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from error
    return found.digest()


def model_files(folder: Path) -> list[tuple[str, Path]]:
    """(name below the folder, path) of each file of a part of a model."""
    files = [(path.relative_to(folder), path) for path in sorted(folder.rglob("*")) if path.is_file()]
    return [
        (name.as_posix(), path)
        for name, path in files
        # hf download keeps its own notes in hidden folders.
        if path.name not in (PREVIEW_FACTORS, CALIBRATION_FILE) and not any(one.startswith(".") for one in name.parts)
    ]


def hash_of_files(files: Iterable[tuple[str, Path]]) -> str:
    """The hash of files, each with the name that counts."""
    total = hashlib.sha256()
    for name, path in sorted(files):
        total.update(f"{name}\0".encode())
        total.update(sampled_hash(path))
    return total.hexdigest()
