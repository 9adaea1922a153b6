"""What is to be fetched into a model folder, what is there already, and the fetching itself."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hunyuan_staged.download.remote import FETCH, LIST, AccessRefused, RemoteFile
from hunyuan_staged.errors import InputError
from hunyuan_staged.files.disk import free_space
from hunyuan_staged.runtime.progress import quiet
from hunyuan_staged.weights.hub import Source


@dataclass(frozen=True)
class Download:
    """The files of some sources for a model folder. remarks: what a user should know of them."""

    folder: Path
    files: tuple[RemoteFile, ...]
    remarks: tuple[str, ...] = ()

    @property
    def missing(self) -> list[RemoteFile]:
        """Those that are not there; whether those that are there are the hub's is checked later."""
        return [file for file in self.files if not file.target(self.folder).exists()]

    @property
    def missing_bytes(self) -> int:
        """What is to be fetched yet, without what interrupted runs have left of these files."""
        return sum(file.size - file.left(self.folder) for file in self.missing)

    def free_bytes(self) -> int:
        """Free space where the folder lies or is to lie."""
        return free_space(self.folder)[1]

    def rows(self) -> list[tuple[str, str, str]]:
        """(folder, size, repository) of each part, for people."""
        sizes: dict[tuple[str, str], int] = {}
        for file in self.files:
            place = Path(file.source.into, file.name).parent.as_posix()
            sizes[place, file.source.repo] = sizes.get((place, file.source.repo), 0) + file.size
        return [(place, size_text(size), repo) for (place, repo), size in sizes.items()]


def size_text(size: int) -> str:
    """Bytes as people read them, in powers of ten as hubs and disks count."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} bytes"


def make_download(folder: Path, sources: Iterable[Source], endpoints: Mapping[str, str]) -> Download:
    """Ask the hubs what the sources hold. InputError where one lacks a file that its source names."""
    files: list[RemoteFile] = []
    remarks: list[str] = []
    for source in sources:
        try:
            found = LIST[source.hub](source, endpoints[source.hub])
        except AccessRefused:
            if source.substitute is None:
                raise
            remarks.append(f"{source.repo} is gated: {source.substitute.repo} has the same files without")
            source = source.substitute
            found = LIST[source.hub](source, endpoints[source.hub])
        held = [pattern for pattern in source.patterns if "*" in pattern or any(file.name == pattern for file in found)]
        absent = [pattern for pattern in source.patterns if pattern not in held]
        if absent or not found:
            raise InputError(f"{source.repo} holds no {', '.join(absent or source.patterns)}")
        files += found
    return Download(folder, tuple(files), tuple(remarks))


def check_space(download: Download) -> None:
    """InputError where the disk does not hold what is missing."""
    needed, free = download.missing_bytes, download.free_bytes()
    if needed > free:
        raise InputError(f"{download.folder}: {size_text(needed)} are to be fetched, and {size_text(free)} are free")


def check_present(download: Download, progress: Callable[..., Any] = quiet) -> None:
    """InputError, with no file changed, where a file in the folder is another one than the hub's; notes their hashes."""
    present = [file for file in download.files if file.target(download.folder).exists()]
    for file in progress(present, desc="checking files that are there", unit="file"):
        path = file.target(download.folder)
        fault = file.fault(path) if path.is_file() else "it is no file"
        if fault:
            raise InputError(f"{path} is there already and is not {file.source.repo}'s ({fault}); move it away")
        file.note(download.folder)


def fetch(download: Download, endpoints: Mapping[str, str], say: Callable[[str], object]) -> Sequence[Path]:
    """Fetch what is missing and check each file's size and hash; a file that fails is removed, and InputError says so."""
    fetched = []
    for file in download.missing:
        path = file.target(download.folder)
        say(f"{path} ({size_text(file.size)}) from {file.source.repo}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot write to {path.parent}: {error.strerror}") from error
        FETCH[file.source.hub](file, download.folder, endpoints[file.source.hub])
        fault = file.fault(path)
        if fault:
            path.unlink()
            raise InputError(f"{path} arrived broken: {fault}; it is removed, run the same command again")
        file.note(download.folder)
        fetched.append(path)
    return fetched
