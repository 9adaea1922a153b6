"""Both hubs' HTTP interface on the loopback, over drawn files, with faults to order."""

import hashlib
import json
import random
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

REVISION = "a" * 40
Files = dict[str, dict[str, bytes]]  # repository → name → contents


def drawn(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


class HubServer(ThreadingHTTPServer):
    """gated: repositories that answer 401. cut: how often a file breaks off at its half. wrong: files sent with a
    byte changed. ranges: the Range headers that were asked for, by file. silent: no request is answered. endless:
    each is answered by spaces without an end. elsewhere: files that another server has. page: what every request is
    answered with. keys: (path, Authorization) of each request.
    """

    daemon_threads = True

    def __init__(self, files: Files) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = files
        self.gated: set[str] = set()
        self.wrong: set[str] = set()
        self.cut: Counter[str] = Counter()
        self.ranges: dict[str, list[str]] = {}
        self.sent: Counter[str] = Counter()
        self.silent = threading.Event()
        self.endless = threading.Event()
        self.elsewhere: dict[str, str] = {}
        self.page: bytes | None = None
        self.keys: list[tuple[str, str | None]] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if self.server.silent.is_set():
            threading.Event().wait(5)
            return
        if self.server.endless.is_set():
            self.send_response(200)
            self.end_headers()
            with suppress(OSError):  # the client has left
                while self.server.endless.is_set():
                    self.wfile.write(b" ")
                    threading.Event().wait(0.05)
            return
        self.server.keys.append((self.path, self.headers.get("Authorization")))
        if self.server.page is not None:
            self.answer(200, self.server.page, Content_Type="text/html")
            return
        url = urlsplit(self.path)
        path, query = unquote(url.path).strip("/"), parse_qs(url.query)
        if path.startswith("api/v1/models/"):
            repo = "/".join(path.split("/")[3:5])
            if path.endswith("/files"):
                self.listing_of_modelscope(repo)
            else:
                self.contents(repo, query["FilePath"][0])
        elif path.startswith("api/models/"):
            self.listing_of_hf("/".join(path.split("/")[2:4]), path.endswith("auth-check"))
        else:
            owner, name, _, _, file = path.split("/", 4)
            self.contents(f"{owner}/{name}", file)

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def listing_of_hf(self, repo: str, access: bool) -> None:
        if repo not in self.server.files:
            return self.answer(404, X_Error_Code="RepoNotFound")
        if access:
            return self.answer(
                *(
                    (
                        401,
                        b"",
                    )
                    if repo in self.server.gated
                    else (200, b"{}")
                )
            )
        siblings = []
        for name, contents in self.server.files[repo].items():
            git = hashlib.sha1(f"blob {len(contents)}\0".encode() + contents).hexdigest()
            one = {"rfilename": name, "size": len(contents), "blobId": git}
            if not name.endswith(".json"):
                sha = hashlib.sha256(contents).hexdigest()
                one["lfs"] = {"sha256": sha, "size": len(contents), "pointerSize": 134}
            siblings.append(one)
        gated = "auto" if repo in self.server.gated else False
        about = {"id": repo, "sha": REVISION, "gated": gated, "siblings": siblings}
        return self.answer(200, json.dumps(about).encode(), Content_Type="application/json")

    def listing_of_modelscope(self, repo: str) -> None:
        files = [{"Path": "assets", "Type": "tree", "Size": 0}] + [
            {"Path": name, "Type": "blob", "Size": len(x), "Sha256": hashlib.sha256(x).hexdigest()}
            for name, x in self.server.files.get(repo, {}).items()
        ]
        self.answer(200, json.dumps({"Code": 200, "Data": {"Files": files}}).encode())

    def contents(self, repo: str, name: str) -> None:
        if name in self.server.elsewhere:
            return self.answer(302, Location=f"{self.server.elsewhere[name]}{self.path}")
        contents = self.server.files[repo][name]
        about = {"ETag": f'"{hashlib.sha256(contents).hexdigest()}"', "X_Repo_Commit": REVISION}
        if self.command == "HEAD":
            self.send_response(200)
            for key, value in {**about, "Content-Length": str(len(contents))}.items():
                self.send_header(key.replace("_", "-"), value)
            return self.end_headers()
        if name in self.server.wrong:
            contents = contents[:-1] + bytes([contents[-1] ^ 1])
        start = 0
        if "Range" in self.headers:
            self.server.ranges.setdefault(name, []).append(self.headers["Range"])
            start = int(self.headers["Range"].removeprefix("bytes=").partition("-")[0])
            about["Content_Range"] = f"bytes {start}-{len(contents) - 1}/{len(contents)}"
        body = contents[start:]
        self.server.sent[name] += 1
        if self.server.cut[name] > 0:
            self.server.cut[name] -= 1
            self.send_response(206 if start else 200)
            for key, value in {**about, "Content-Length": str(len(body))}.items():
                self.send_header(key.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
            return None
        return self.answer(206 if start else 200, body, **about)


@contextmanager
def serving(files: Files) -> Iterator[HubServer]:
    server = HubServer(files)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
