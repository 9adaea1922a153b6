"""The two hubs: which files a repository holds, with sizes and hashes, and one file of it onto the disk.

Hugging Face goes through its own client; of ModelScope two plain requests are all that is needed.
"""

import fnmatch
import json
import os
import shutil
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

from hunyuan_staged.errors import InputError, one_line
from hunyuan_staged.files import provenance
from hunyuan_staged.weights.hub import HF, MODELSCOPE, Source

TIMEOUT_SECONDS = 10.0
TRIES = 3
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
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return AccessRefused(
            f"{repo} wants its licence to be accepted: do so at {endpoint}/{repo}, then `hf auth login` ({status})"
        )
    if status == 404:
        return InputError(f"{endpoint} has no repository {repo}, or not all of its files (404)")
    if isinstance(error, OSError) and error.errno is not None:
        return InputError(f"{repo} cannot be written: {error.strerror}")
    return _unreachable(HF, endpoint, error)


def list_hf(source: Source, endpoint: str) -> list[RemoteFile]:
    """The source's files; AccessRefused where this user may not read them."""
    from huggingface_hub import HfApi

    api = HfApi(endpoint)
    try:
        info = api.model_info(source.repo, files_metadata=True, timeout=TIMEOUT_SECONDS)
        if info.gated:
            api.auth_check(source.repo)
    except _client_errors() as error:
        raise _hf_failure(endpoint, source.repo, error) from error
    files = {file.rfilename: file for file in info.siblings or ()}
    found = []
    for name in wanted(source, files):
        file = files[name]
        sha256 = file.lfs.sha256 if file.lfs else None
        found.append(RemoteFile(source, name, file.size or 0, str(info.sha), sha256, None if sha256 else file.blob_id))
    return found


def fetch_hf(file: RemoteFile, folder: Path, endpoint: str) -> None:
    """One file into the model folder, by the hub's client: what is there of it is gone on with."""
    from huggingface_hub import hf_hub_download

    try:
        hf_hub_download(
            file.source.repo,
            file.name,
            revision=file.revision,
            local_dir=folder / file.source.into,
            endpoint=endpoint,
            etag_timeout=TIMEOUT_SECONDS,
        )
    except _client_errors() as error:
        raise _hf_failure(endpoint, f"{file.source.repo}: {file.name}", error) from error


# -- ModelScope --


def _ask(url: str, start: int = 0) -> Any:
    headers = {"User-Agent": "hunyuan-staged"} | ({"Range": f"bytes={start}-"} if start else {})
    return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_SECONDS)


def _modelscope_failure(endpoint: str, repo: str, error: Exception) -> InputError:
    if isinstance(error, urllib.error.HTTPError):
        return InputError(f"{endpoint} refuses {repo} ({error.code} {error.reason})")
    return _unreachable(MODELSCOPE, endpoint, error)


def list_modelscope(source: Source, endpoint: str) -> list[RemoteFile]:
    """The source's files, from ModelScope's listing of the repository."""
    url = f"{endpoint}/api/v1/models/{source.repo}/repo/files?Revision=master&Recursive=true"
    try:
        with _ask(url) as answer:
            content = json.loads(answer.read())
        files = {file["Path"]: file for file in content["Data"]["Files"] if file["Type"] != "tree"}
        return [
            RemoteFile(source, name, int(files[name]["Size"]), "master", files[name].get("Sha256") or None)
            for name in wanted(source, files)
        ]
    except (OSError, HTTPException) as error:
        raise _modelscope_failure(endpoint, source.repo, error) from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{endpoint} answers for {source.repo} in a form that is not ModelScope's") from error


def fetch_modelscope(file: RemoteFile, folder: Path, endpoint: str) -> None:
    """One file into the model folder; what an interrupted run left of it, in a hidden file beside it, is gone on with."""
    query = urllib.parse.urlencode({"Revision": file.revision, "FilePath": file.name})
    target = file.target(folder)
    part = partial_file(target)
    for attempt in range(TRIES):
        start = part.stat().st_size if part.exists() else 0
        try:
            if start < file.size:
                with (
                    _ask(f"{endpoint}/api/v1/models/{file.source.repo}/repo?{query}", start) as answer,
                    # A server that knows no ranges sends all of it.
                    part.open("ab" if answer.status == 206 else "wb") as output,
                ):
                    shutil.copyfileobj(answer, output, 2**20)
        except (urllib.error.URLError, TimeoutError, ConnectionError, HTTPException) as error:
            if attempt == TRIES - 1 or isinstance(error, urllib.error.HTTPError):
                raise _modelscope_failure(endpoint, file.source.repo, error) from error
            continue
        except OSError as error:
            raise InputError(f"{target} cannot be written: {error.strerror}") from error
        if part.stat().st_size >= file.size:
            part.replace(target)
            return
    raise InputError(f"{endpoint} breaks off in {file.name} again and again; run the same command again")


def partial_file(target: Path) -> Path:
    """Where the beginning of a ModelScope file waits for the rest."""
    return target.with_name(f".{target.name}.incomplete")


LIST = {HF: list_hf, MODELSCOPE: list_modelscope}
FETCH = {HF: fetch_hf, MODELSCOPE: fetch_modelscope}
