"""The two hubs: which files a repository holds, with sizes and hashes, and one file of it onto the disk.

Of Hugging Face the listing goes through its own client; of ModelScope a plain request is all that is needed. The files
themselves come by transfer.py, which goes on where an earlier run stopped.
"""

import fnmatch
import json
import os
import time
import urllib.error
import urllib.parse
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any

from hunyuan_staged.download import transfer
from hunyuan_staged.errors import InputError, one_line
from hunyuan_staged.files import provenance
from hunyuan_staged.files.atomic import replacing
from hunyuan_staged.weights.hub import HF, MODELSCOPE, NOTES, Source, within

LISTING_SECONDS = 60  # for the whole list of a repository's files
ENDPOINTS = {HF: "https://huggingface.co", MODELSCOPE: "https://modelscope.cn"}
ENDPOINT_VARIABLES = {HF: "HF_ENDPOINT", MODELSCOPE: "MODELSCOPE_ENDPOINT"}
MIRROR_HINT = {HF: "--endpoint URL names a mirror", MODELSCOPE: "--modelscope_endpoint URL names another address"}


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository at one revision. sha256 and git_sha1 (of a small file) where the hub gives them."""

    source: Source
    name: str
    size: int
    revision: str
    sha256: str | None = None
    git_sha1: str | None = None

    def target(self, folder: Path) -> Path:
        """Where it lies in a model folder."""
        return folder / self.source.into / self.name

    def left(self, folder: Path) -> int:
        """The bytes of it that an interrupted run has left."""
        part = transfer.partial_file(self.target(folder))
        return min(self.size, part.stat().st_size) if part.is_file() else 0

    def note(self, folder: Path) -> None:
        """Keep the hub's hash, as huggingface_hub's client does, so that verify and that client know it later."""
        expected = self.sha256 or self.git_sha1
        if expected is not None:
            path = folder / self.source.into / NOTES / f"{self.name}.metadata"
            with replacing(path) as temporary:
                temporary.write_text(f"{self.revision}\n{expected}\n{time.time()}\n", encoding="utf-8")

    def fault(self, path: Path) -> str | None:
        """What is wrong with a copy of it on disk; None where size and hash are the hub's."""
        size = path.stat().st_size
        if size != self.size:
            return f"it has {size} bytes, and the hub says {self.size}"
        expected = self.sha256 or self.git_sha1
        if expected is None:
            return None
        given = provenance.sha256(path) if self.sha256 else provenance.git_sha1(path)
        return None if given == expected else f"its hash is {given[:12]}…, and the hub says {expected[:12]}…"


class AccessRefused(InputError):
    """A repository that wants a licence to be accepted, or an account."""


def endpoint_of(hub: str, given: str | None) -> str:
    """The address of a hub: as given, else by its environment variable, else its own."""
    address = (given or os.environ.get(ENDPOINT_VARIABLES[hub]) or ENDPOINTS[hub]).rstrip("/")
    if urllib.parse.urlsplit(address).scheme not in ("http", "https"):
        raise InputError(f"{address} is no address of the form https://…", option="endpoint")
    return address


def wanted(source: Source, names: Iterable[str]) -> list[str]:
    """Those of a repository's files that its source names; none that would lie outside the folder."""
    return [
        name
        for name in names
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in source.patterns)
        and not name.startswith("/")
        and ".." not in name.split("/")
    ]


def _unreachable(hub: str, endpoint: str, error: Exception) -> InputError:
    reason = one_line(error)[:160] or type(error).__name__
    return InputError(f"{endpoint} gives no answer ({reason}); {MIRROR_HINT[hub]}")


# -- Hugging Face --


def _client_errors() -> tuple[type[Exception], ...]:
    from huggingface_hub.errors import HfHubHTTPError

    # The client's own HTTP library, whichever its version uses, and the OSErrors that it raises besides.
    return (HfHubHTTPError.__mro__[1], OSError)


def _hf_failure(endpoint: str, repo: str, error: Exception) -> InputError:
    status = getattr(getattr(error, "response", None), "status_code", getattr(error, "code", None))
    if status in (401, 403):
        page = f"{endpoint}/{repo.partition(':')[0]}"
        return AccessRefused(
            f"{repo} wants its licence to be accepted: do so at {page}, then `hf auth login` ({status})"
        )
    if status == 404:
        return InputError(f"{endpoint} has no repository {repo}, or not all of its files (404)")
    return _unreachable(HF, endpoint, error)


def list_hf(source: Source, endpoint: str) -> list[RemoteFile]:
    """The source's files; AccessRefused where this user may not read them."""
    from huggingface_hub import HfApi

    api = HfApi(endpoint)
    about: dict[str, Any] = {"files_metadata": True, "timeout": transfer.TIMEOUT_SECONDS}
    try:
        info = within(LISTING_SECONDS, partial(api.model_info, source.repo, **about))
        if info.gated:
            within(LISTING_SECONDS, partial(api.auth_check, source.repo))
    except _client_errors() as error:
        raise _hf_failure(endpoint, source.repo, error) from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{endpoint} answers for {source.repo} in a form that is not Hugging Face's") from error
    files = {file.rfilename: file for file in info.siblings or ()}
    found = []
    for name in wanted(source, files):
        file = files[name]
        sha256 = file.lfs.sha256 if file.lfs else None
        found.append(RemoteFile(source, name, file.size or 0, str(info.sha), sha256, None if sha256 else file.blob_id))
    return found


def fetch_hf(file: RemoteFile, folder: Path, endpoint: str) -> None:
    """One file into the model folder; AccessRefused where this user may not read it."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    url = hf_hub_url(file.source.repo, file.name, revision=file.revision, endpoint=endpoint)
    # Of its headers the key alone.
    headers = {name: value for name, value in build_hf_headers().items() if name.lower() == "authorization"}
    headers = {name.capitalize(): value for name, value in headers.items()}
    try:
        transfer.transfer(url, headers, file.target(folder), file.size, file.name)
    except (OSError, HTTPException) as error:
        raise _hf_failure(endpoint, f"{file.source.repo}: {file.name}", error) from error


# -- ModelScope --


def _modelscope_failure(endpoint: str, repo: str, error: Exception) -> InputError:
    if isinstance(error, urllib.error.HTTPError):
        return InputError(f"{endpoint} refuses {repo} ({error.code} {error.reason})")
    return _unreachable(MODELSCOPE, endpoint, error)


def list_modelscope(source: Source, endpoint: str) -> list[RemoteFile]:
    """The source's files, from ModelScope's listing of the repository."""
    url = f"{endpoint}/api/v1/models/{source.repo}/repo/files?Revision=master&Recursive=true"
    try:
        content = json.loads(within(LISTING_SECONDS, partial(_read, url)))
        files = {file["Path"]: file for file in content["Data"]["Files"] if file["Type"] != "tree"}
        return [
            RemoteFile(source, name, int(files[name]["Size"]), "master", files[name].get("Sha256") or None)
            for name in wanted(source, files)
        ]
    except (OSError, HTTPException) as error:
        raise _modelscope_failure(endpoint, source.repo, error) from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{endpoint} answers for {source.repo} in a form that is not ModelScope's") from error


def _read(url: str) -> bytes:
    with transfer.ask(url) as answer:
        return bytes(answer.read())


def fetch_modelscope(file: RemoteFile, folder: Path, endpoint: str) -> None:
    """One file into the model folder."""
    query = urllib.parse.urlencode({"Revision": file.revision, "FilePath": file.name})
    url = f"{endpoint}/api/v1/models/{file.source.repo}/repo?{query}"
    try:
        transfer.transfer(url, {}, file.target(folder), file.size, file.name)
    except (OSError, HTTPException) as error:
        raise _modelscope_failure(endpoint, file.source.repo, error) from error


LIST = {HF: list_hf, MODELSCOPE: list_modelscope}
FETCH = {HF: fetch_hf, MODELSCOPE: fetch_modelscope}
