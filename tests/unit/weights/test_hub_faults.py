"""A hub that is none, or is broken: whatever it answers, and if it never does, the end is one line, and soon."""

import socketserver
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from hunyuan_staged.errors import InputError, one_line
from hunyuan_staged.weights import hub
from hunyuan_staged.weights.folder import open_model


def answer(body: str, status: str = "200 OK", header: str = "Content-Type: application/json") -> bytes:
    return f"HTTP/1.1 {status}\r\n{header}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode()


class Answering(socketserver.BaseRequestHandler):
    """Gives one answer to everything; None: never any. Then it waits until the client leaves."""

    given: bytes | None = None
    stays = False

    def handle(self) -> None:
        self.request.recv(65536)
        if self.given:
            self.request.sendall(self.given)
        if self.given is None or self.stays:
            self.request.recv(1)


@pytest.fixture
def serve(monkeypatch, tmp_path) -> Iterator[Callable[..., None]]:
    """Have the client ask a server on the loopback with this answer, or another address."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "ANSWER_SECONDS", 0.3)
    running = []

    def start(given: bytes | None = None, *, stays: bool = False, address: str | None = None) -> None:
        handler = type("Handler", (Answering,), {"given": given, "stays": stays})
        server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}).start()
        running.append(server)
        monkeypatch.setattr(constants, "ENDPOINT", address or f"http://127.0.0.1:{server.server_address[1]}")

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
    refusal()
    assert get_session().event_hooks["request"].count(hub._limit) == 1
    request = get_session().build_request("GET", "http://a/", timeout=7.0)
    hub._limit(request)
    assert request.extensions["timeout"] == {"connect": 7.0, "read": 7.0, "write": 7.0, "pool": 7.0}
