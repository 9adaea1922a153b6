"""Whether files have the hash that the hub gave with them, where the downloader kept it."""

import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hunyuan_staged.errors import InputError
from hunyuan_staged.files import provenance
from hunyuan_staged.verify.checks import Check
from hunyuan_staged.weights.hub import NOTES

# A noted ETag is the SHA-256 of a large file, and git's SHA-1 of a small one. In the hub's own cache the ETag is the name
# of the file that a link leads to.
MAX_NOTE_BYTES = 4096
READERS = 4  # files at once: one core hashes less than a disk gives
_HASH = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")


def known_hash(path: Path, root: Path) -> str | None:
    """The hash that the hub gave with a file below the model folder `root`; None where nobody noted it."""
    if path.is_symlink() and path.resolve().parent.name == "blobs":
        noted = path.resolve().name
        return noted if _HASH.fullmatch(noted) else None
    for folder in path.parents:
        note = folder / NOTES / f"{path.relative_to(folder)}.metadata"
        if note.is_file() and note.stat().st_size <= MAX_NOTE_BYTES:
            lines = note.read_text(encoding="utf-8", errors="replace").splitlines()
            noted = lines[1].strip('" ') if len(lines) > 1 else ""
            return noted if _HASH.fullmatch(noted) else None
        if folder == root:
            break
    return None


def _differs(known: tuple[Path, str]) -> bool:
    path, expected = known
    try:
        return (provenance.sha256(path) if len(expected) == 64 else provenance.git_sha1(path)) != expected
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from error


def check_hashes(part: str, folders: Iterable[Path], root: Path) -> list[Check]:
    """The check of all files of a part whose hash is known; none where it is of no file."""
    files = sorted({path for folder in folders for path in folder.rglob("*") if path.is_file()})
    files = [path for path in files if not any(name.startswith(".") for name in path.relative_to(root).parts)]
    known = [(path, noted) for path in files if (noted := known_hash(path, root))]
    if not known:
        return []
    with ThreadPoolExecutor(READERS) as readers:
        wrong = [path for (path, _), differs in zip(known, readers.map(_differs, known), strict=True) if differs]
    note = f"{len(known)} of {len(files)} files have a known hash"
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        note = f"{wrong[0].relative_to(root).as_posix()}{more}: not the file that was downloaded; fetch it again"
    return [Check(part, "hashes", not wrong, note)]
