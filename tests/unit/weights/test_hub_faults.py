"""A hub that is none, or is broken: whatever it answers, and if it never does, the end is one line, and soon."""

import contextlib
import itertools
import json
import socketserver
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import pytest

from hunyuan_staged.errors import InputError, one_line
from hunyuan_staged.weights import hub
from hunyuan_staged.weights.folder import open_model


def answer(body: str, status: str = "200 OK", header: str = "Content-Type: application/json") -> bytes:
    return f"HTTP/1.1 {status}\r\n{header}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode()


class Answering(socketserver.BaseRequestHandler):
    """Gives one answer to everything; None: never any. Then it waits until the client leaves.

    before: what the first requests are answered with. letters: these follow one by one, twenty a second, for ever
    where there are none.
    """

    given: bytes | None = None
    stays = False
    before: list[bytes]
    letters: bytes | None = None

    def handle(self) -> None:
        self.request.recv(65536)
        if self.before:
            self.request.sendall(self.before.pop(0))
            return
        if self.given:
            self.request.sendall(self.given)
        if self.letters is not None:
            self.dribble()
        elif self.given is None or self.stays:
            self.request.recv(1)

    def dribble(self) -> None:
        with contextlib.suppress(OSError):  # the client has left
            for letter in self.letters or itertools.repeat(ord("x")):
                time.sleep(0.05)
                self.request.sendall(bytes([letter]))


@pytest.fixture
def serve(monkeypatch, tmp_path) -> Iterator[Callable[..., None]]:
    """Have the client ask a server on the loopback with this answer, or another address."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "ANSWER_SECONDS", 0.3)
    running = []

    def start(
        given: bytes | None = None,
        *,
        stays: bool = False,
        address: str | None = None,
        before: Sequence[bytes] = (),
        letters: bytes | None = None,
    ) -> None:
        about = {"given": given, "stays": stays, "before": list(before), "letters": letters}
        handler = type("Handler", (Answering,), about)
        server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}).start()
        running.append(server)
        endpoint = address or f"http://127.0.0.1:{server.server_address[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        files = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def refusal() -> str:
    with pytest.raises(InputError) as refused:
        open_model("owner/model", ("vae",))
    said = one_line(refused.value)
    assert said.startswith("owner/model is no folder here, and the hub did not give it (")
    assert said.endswith('--include "transformer/720p_t2v/*" "vae/*" "scheduler/*" --local-dir DIR')
    return said


@pytest.mark.parametrize(
    "given",
    [
        b"",
        b"\xff\xfe\0junk\r\n\r\n",
        *map(answer, ("", "{", "[]", "null", "3", "{}", "<html></html>")),
        answer('{"id": "a/b", "sha": "%s", "siblings": [3]}' % ("a" * 40)),
        answer('{"id": "a/b", "sha": "../../x", "siblings": [{"rfilename": "../../x"}]}'),
        answer("x", "500 Oops"),
        answer("x", "404 Not Found"),
        answer("", "302 Found", "Location: /"),
    ],
)
def test_a_hub_that_answers_anything(serve, given):
    serve(given)
    refusal()


@pytest.mark.parametrize("address", ["nonsense", "ftp://nowhere/", "http://", "http://a\0b"])
def test_a_hub_whose_address_is_none(serve, address):
    serve(address=address)
    refusal()


@pytest.mark.parametrize("given", [None, b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{"])
def test_a_hub_that_never_answers_or_stops_midway_is_left(serve, given):
    """The client waited for ever."""
    serve(given, stays=True)
    started = time.monotonic()
    assert "timed out" in refusal()
    assert time.monotonic() - started < 60


def test_a_hub_that_answers_in_time_is_asked_once(serve):
    """Each request of the client has a limit, also where it sets none, and keeps one that it sets."""
    from huggingface_hub import get_session

    serve(answer("{}"))
    refusal()
    send = get_session().send
    refusal()
    assert get_session().send == send
    request = get_session().build_request("GET", "http://a/", timeout=7.0)
    hub._send(lambda request: None, request)
    assert request.extensions["timeout"] == {"connect": 7.0, "read": 7.0, "write": 7.0, "pool": 7.0}


HEADER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
REVISION = "a" * 40
NAME, CONTENT = "vae/config.json", b"[" + b"1," * 14 + b"1]"
ABOUT = answer(json.dumps({"id": "a/b", "sha": REVISION, "siblings": [{"rfilename": NAME}]}))
LIST = answer(json.dumps([{"type": "file", "path": NAME, "size": len(CONTENT), "oid": "b" * 40}]))


@pytest.mark.parametrize("given", [b"HTTP/1.1 200 OK\r\nX: ", HEADER + b"Content-Length: 1000000000\r\n\r\n["])
def test_a_hub_whose_answer_never_ends_is_left(serve, monkeypatch, given):
    """A byte now and then kept each time-out from running out. The header is dribbled, or the list of files."""
    monkeypatch.setattr(hub, "WHOLE_ANSWER_SECONDS", 1)
    serve(given, letters=b"")
    assert "its answer did not end within 1 s" in refusal()


def test_a_hub_whose_word_on_a_file_never_ends_is_left(serve, monkeypatch):
    monkeypatch.setattr(hub, "WHOLE_ANSWER_SECONDS", 1)
    serve(HEADER + b"X: ", letters=b"", before=[ABOUT, LIST])
    refusal()


def test_contents_may_take_their_time(serve, monkeypatch, tmp_path):
    """What comes of a file counts as progress: no limit but the one on silence."""
    monkeypatch.setattr(hub, "WHOLE_ANSWER_SECONDS", 1)
    about = f"ETag: {'b' * 40}\r\nX-Repo-Commit: {REVISION}\r\nConnection: close\r\n".encode()
    head = HEADER + about + b"Content-Length: %d\r\n\r\n" % len(CONTENT)
    serve(head + CONTENT[:1], letters=CONTENT[1:], before=[ABOUT, LIST, head])
    folder = hub.snapshot("owner/model", ["*.json"])
    assert (folder / NAME).read_bytes() == CONTENT
