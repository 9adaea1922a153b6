"""Writes that are whole or not at all, and locks on folders."""

import contextlib
import errno
import fcntl
import os
import re
import socket
import stat
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from hunyuan_staged.errors import DENIED, InputError
from hunyuan_staged.files.contract import MAY_FAIL


class Locked(InputError):
    """Another run has the lock."""


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`, with its ending, that takes its place when the block ends well.

    A reader sees the old file or the new one, whole. If the block fails, nothing on disk has changed. The folder is
    made if it is absent. Raises InputError where the folder cannot be written, and where the disk is full.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
    except OSError as error:
        raise InputError(f"cannot write to {path.parent}: {error.strerror}") from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp's file is the owner's alone; a new file gets what the user's umask leaves.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.errno not in DENIED:
            raise
        raise InputError(f"cannot write {path}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(path: str | Path) -> None:
    """Remove what `replacing` left beside `path` in a process that was killed. Only for who alone may write there."""
    path = Path(path)
    pattern = re.compile(rf"\.{re.escape(path.stem)}\.[a-z0-9_]{{8}}{re.escape(path.suffix)}")
    for beside in path.parent.iterdir():
        if pattern.fullmatch(beside.name) and (beside.is_symlink() or not beside.is_dir()):
            beside.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(lock: str | Path, files: Sequence[str]) -> Iterator[list[Path]]:
    """Be the only run that writes `files` into the folder of `lock`, a path, while the block runs; gives what unlock needs.

    The folder is made if it is absent, and removed again if it is then empty; what a killed process left half-written of
    the files is removed. InputError where another run is at it, with its process id, and where the folder cannot be
    written. The kernel drops a killed process's lock, so that none is left behind; on a file system without locks there
    is none.
    """
    lock = Path(lock)
    made: list[Path] = []
    folder = lock.parent
    try:
        while not folder.exists():
            made.append(folder)
            folder = folder.parent
        lock.parent.mkdir(parents=True, exist_ok=True)
        for name in files:
            if name not in MAY_FAIL and (lock.parent / name).is_dir():
                raise InputError(f"{lock.parent / name} is a folder, in the place of a file to be written")
        handle = _lock(lock)
        try:
            for name in files:
                remove_leftovers(lock.parent / name)
        except BaseException:
            unlock(lock, ())  # before it is let go: see _lock
            os.close(handle)
            raise
    except OSError as error:
        _remove_empty(made)
        raise InputError(f"cannot write to {lock.parent}: {error.strerror}") from error
    except BaseException:
        _remove_empty(made)
        raise
    try:
        yield made
    finally:
        unlock(lock, files, made)  # before it is let go: see _lock
        os.close(handle)


def _remove_empty(folders: Sequence[Path]) -> None:
    """Remove folders, the innermost first, up to one that is not empty: the run wrote its files."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def unlock(lock: str | Path, files: Sequence[str], made: Sequence[Path] = ()) -> None:
    """Remove a lock that this process has, after what is left half-written of the files; and the folders made for it,
    the innermost first, up to one that holds something."""
    lock = Path(lock)
    # Once more, for an ffmpeg that outlived its killed parent.
    for name in files:
        remove_leftovers(lock.parent / name)
    lock.unlink(missing_ok=True)
    _remove_empty(made)


def _lock(path: Path) -> int:
    """An open file that is locked, with this process's id in it; InputError where another process has it, OSError where
    it cannot be written."""
    while True:
        # O_NOFOLLOW: the folder may be someone else's, and a link in it could lead anywhere. A FIFO must not be waited for.
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            handle = os.open(path, flags, 0o666)
        except OSError as error:
            raise InputError(f"cannot write to {path.parent}: {error.strerror} ({path.name})") from error
        try:
            _take(handle, path)
            # Its last owner may have removed it between the two calls: then it is no lock any more.
            if path.exists() and os.path.samestat(os.fstat(handle), os.lstat(path)):
                _sign(handle, path)
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _take(handle: int, path: Path) -> None:
    about = os.fstat(handle)
    if not stat.S_ISREG(about.st_mode) or about.st_nlink > 1:
        # What is written here would be in the other file, too.
        raise InputError(f"{path} is no lock of a run but something else, or a link to it; remove it")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.read(handle, 300).decode(errors="replace").strip()
        raise Locked(
            f"{path.parent} is being written by another run ({owner or 'which is just starting'}); "
            "wait for it, or give another folder"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise


def _sign(handle: int, path: Path) -> None:
    """Write into a lock whose it is. A disk that is full to the last byte has no room for it, and for nothing else."""
    try:
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
    except OSError:
        path.unlink(missing_ok=True)
        raise


def check_output_dir(flag: str, folder: str | Path) -> None:
    """InputError where a folder cannot be made or written, before the work whose result it is for."""
    place = Path(folder)
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise InputError(f"{flag} {folder}: {place} is not a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise InputError(f"{flag} {folder}: {place} cannot be written")
