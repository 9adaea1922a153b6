"""An OpenAI-compatible server on the loopback that answers as it is told to, and keeps what it was asked."""

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Reply:
    """One response. drip: seconds between its bytes; cut: it ends before its length; silent: there is none."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    drip: float = 0.0
    cut: bool = False
    silent: bool = False


def completion(content: Any, finish_reason: str = "stop") -> Reply:
    message = {"role": "assistant", "content": content}
    choice = {"index": 0, "message": message, "finish_reason": finish_reason}
    return Reply(body=json.dumps({"object": "chat.completion", "choices": [choice]}).encode())


def failure(status: int, message: str = "", **headers: str) -> Reply:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Reply(status, json.dumps({"error": {"message": message}}).encode(), named)


class ChatServer(ThreadingHTTPServer):
    """replies: one for each request, the last for all that follow. asked: (path, headers, JSON) of each request."""

    daemon_threads = True

    def __init__(self, replies: Sequence[Reply]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.replies = list(replies)
        self.asked: list[tuple[str, dict[str, str], Any]] = []
        self.stopped = threading.Event()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: ChatServer

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.server.asked.append((f"GET {self.path}", dict(self.headers), None))
        self.send_error(405)

    def do_POST(self) -> None:
        content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, dict(self.headers), content))
        reply = self.server.replies.pop(0) if len(self.server.replies) > 1 else self.server.replies[0]
        if reply.silent:
            self.server.stopped.wait(10)
            return
        self.send_response(reply.status)
        length = len(reply.body) + 10 * reply.cut
        for name, value in {"Content-Type": "application/json", "Content-Length": str(length), **reply.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        try:
            for start in range(0, len(reply.body), 1 if reply.drip else 2**16):
                self.wfile.write(reply.body[start : start + (1 if reply.drip else 2**16)])
                if reply.drip and self.server.stopped.wait(reply.drip):
                    return
        except OSError:
            return  # who asked has had enough


@contextmanager
def chatting(*replies: Reply) -> Iterator[ChatServer]:
    server = ChatServer(replies)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.stopped.set()
        server.shutdown()
        server.server_close()
        thread.join()
