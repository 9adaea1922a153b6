"""One file over HTTP, gone on with where the last run stopped: whatever stops it, at most one piece is lost.

The hub's own client begins a file anew after each interruption, and the largest one has 33 GB.
"""

import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any

from hunyuan_staged.errors import DENIED, InputError

TIMEOUT_SECONDS = 10.0  # without a byte
TRIES = 3  # in a row that bring less than PROGRESS_BYTES
PROGRESS_BYTES = 2**20
PIECE_BYTES = 2**20
PAUSE_SECONDS = 1.0
AGAIN = (408, 429, 500, 502, 503, 504)


class _Redirect(urllib.request.HTTPRedirectHandler):
    """Follows redirects, to other hosts without the key: those of a hub's storage are signed, and refuse it."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        new = super().redirect_request(req, fp, code, msg, headers, newurl)
        if new is not None and urllib.parse.urlsplit(newurl).netloc != urllib.parse.urlsplit(req.full_url).netloc:
            new.headers.pop("Authorization", None)
        return new


def ask(url: str, headers: Mapping[str, str] | None = None, start: int = 0) -> Any:
    """The open response to a request for a URL, from byte `start` on."""
    asked = {"User-Agent": "hunyuan-staged", **(headers or {})} | ({"Range": f"bytes={start}-"} if start else {})
    opener = urllib.request.build_opener(_Redirect)
    return opener.open(urllib.request.Request(url, headers=asked), timeout=TIMEOUT_SECONDS)


def partial_file(target: Path) -> Path:
    """Where the beginning of a file waits for the rest."""
    return target.with_name(f".{target.name}.incomplete")


def transfer(url: str, headers: Mapping[str, str], target: Path, size: int, name: str) -> None:
    """A file of `size` bytes to its place, with a bar on a terminal.

    OSError or HTTPException where the server is not reached or breaks off TRIES times in a row, HTTPError where it refuses;
    InputError where the file cannot be written.
    """
    part = partial_file(target)
    if part.exists() and part.stat().st_size > size:
        part.unlink()  # of another file
    tries = 0
    while True:
        start = part.stat().st_size if part.exists() else 0
        error: Exception | None = None
        try:
            if start < size or not part.exists():
                _append(url, headers, part, start, size, name)
        except (OSError, HTTPException) as caught:
            if isinstance(caught, OSError) and caught.errno in DENIED:
                raise InputError(f"{target} cannot be written: {caught.strerror}") from caught
            if isinstance(caught, urllib.error.HTTPError) and caught.code not in AGAIN:
                raise
            error = caught
        found = part.stat().st_size if part.exists() else 0
        if found >= size:
            part.replace(target)
            return
        tries = 0 if found - start >= PROGRESS_BYTES else tries + 1
        if tries == TRIES:
            raise error or HTTPException(f"it breaks off at {found} of {size} bytes of {name}")
        time.sleep(PAUSE_SECONDS)


def _append(url: str, headers: Mapping[str, str], part: Path, start: int, size: int, name: str) -> None:
    """What the server sends of a file from byte `start` on, to the end of its beginning."""
    from tqdm import tqdm

    with ask(url, headers, start) as answer:
        going_on = answer.status == 206  # a server that knows no ranges sends all of it
        about: dict[str, Any] = {"total": size, "initial": start if going_on else 0, "desc": Path(name).name}
        with (
            part.open("ab" if going_on else "wb", buffering=0) as output,
            # Without a terminal there is no bar.
            tqdm(unit="B", unit_scale=True, dynamic_ncols=True, disable=None, **about) as bar,
        ):
            while piece := answer.read(PIECE_BYTES):
                output.write(piece)
                bar.update(len(piece))
