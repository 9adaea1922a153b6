"""A rewriting server, as it should be and as it should not: one line, no key, no endless wait."""

import json
import socket
import threading
import traceback

import pytest
from chat_server import Reply, chatting, completion, failure

from hunyuan_staged.encoders import endpoint
from hunyuan_staged.encoders.endpoint import Endpoint, RewritingFailed, ask, find_endpoint
from hunyuan_staged.errors import InputError, one_line

KEY = "sk-secret-0123456789"
QUESTION = [{"role": "user", "content": "a cat"}]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No pauses to speak of, and nothing of this machine's environment."""
    pauses = []
    monkeypatch.setattr(endpoint.time, "sleep", pauses.append)
    for name in ("T2V_REWRITE_BASE_URL", "T2V_REWRITE_MODEL_NAME", "I2V_REWRITE_BASE_URL", "I2V_REWRITE_MODEL_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv(endpoint.KEY_VARIABLE, raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return pauses


def refused(server, key: str | None = KEY) -> str:
    """What the failure says; neither it nor the traceback holds the key."""
    with pytest.raises(RewritingFailed) as caught:
        ask(Endpoint(server.address, "m", key), QUESTION)
    assert KEY not in "".join(traceback.format_exception(caught.value))
    assert one_line(caught.value) == str(caught.value)
    return str(caught.value)


def test_the_question_is_a_chat_completion_with_the_key_in_its_header():
    with chatting(completion("A cat walks.")) as server:
        assert ask(Endpoint(server.address + "/", "the model", KEY), QUESTION) == "A cat walks."
        ((path, headers, content),) = server.asked
        assert path == "/v1/chat/completions"
        assert content == {"model": "the model", "messages": QUESTION, "temperature": 0, "stream": False}
        assert headers["Authorization"] == f"Bearer {KEY}"
        assert ask(Endpoint(server.address + "/chat/completions", "m"), QUESTION) == "A cat walks."
        assert server.asked[1][0] == "/v1/chat/completions" and "Authorization" not in server.asked[1][1]


def test_content_in_parts_is_put_together():
    with chatting(
        completion([{"type": "text", "text": "A "}, {"type": "image"}, {"type": "text", "text": "cat"}])
    ) as s:
        assert ask(Endpoint(s.address, "m"), QUESTION) == "A cat"


def test_what_may_pass_is_asked_again_with_longer_pauses(quick):
    lines = []
    with chatting(failure(503, "loading"), failure(429, "slow", Retry_After="7"), completion("A cat.")) as server:
        assert ask(Endpoint(server.address, "m"), QUESTION, lines.append) == "A cat."
        assert len(server.asked) == 3
    assert quick == [1.0, 7.0]
    assert lines[0] == f"{server.address} gives no answer (503 loading); asking again in 1 s"


def test_what_does_not_pass_ends_after_three_tries(quick):
    with chatting(failure(500, "oh", Retry_After="100000")) as server:
        assert refused(server) == f"{server.address} gives no answer, asked 3 times (500 oh)"
        assert len(server.asked) == 3
    assert quick == [30.0, 30.0], "a server may not ask for more"


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (failure(401, f"Incorrect key {KEY}"), "refuses (401 Incorrect key [key]); the key is $REWRITE_API_KEY"),
        (failure(404, "no model m"), "refuses (404 no model m)"),
        (Reply(400, b"<html>\n\x1b[31mbad"), "refuses (400 Bad Request)"),
        (Reply(400, b'{"error": "plain"}'), "refuses (400 plain)"),
        (Reply(400, b"[1]"), "refuses (400 Bad Request)"),
        (
            Reply(302, b"", {"Location": f"http://10.0.0.1/{KEY}"}),
            "redirects to http://10.0.0.1/[key] (302); give that",
        ),
        (Reply(308, b""), "redirects to nowhere (308); give that address if it is right"),
        (Reply(body=b"<html>\nHello</html>"), "answers in a form that is not OpenAI's: '<html> Hello</html>'"),
        (Reply(body=b""), "answers in a form that is not OpenAI's: ''"),
        (Reply(body=b'{"choices": []}'), "answers in a form that is not OpenAI's"),
        (Reply(body=b'{"choices": [{"message": "x"}]}'), "answers in a form that is not OpenAI's"),
        (Reply(body=b"[" * 100_000), "answers in a form that is not OpenAI's"),
        (Reply(body=b"\xff\xfe\x00"), "answers in a form that is not OpenAI's"),
        (completion({"a": 1}), "answers in a form that is not OpenAI's: content is no text"),
        (completion([1]), "answers in a form that is not OpenAI's"),
        (completion("x" * 2**20), "the answer has more than 1048576 bytes"),
        (completion("A cat w", "length"), "m was cut off before the end of its answer"),
    ],
)
def test_junk_is_one_line_and_asked_for_once(reply, said):
    with chatting(reply) as server:
        found = refused(server)
        assert len(server.asked) == 1, "no redirect is followed"
    assert said in found and len(found) < 400


def test_an_answer_without_contents_is_empty():
    with chatting(completion(None)) as server:
        assert ask(Endpoint(server.address, "m"), QUESTION) == ""


def test_silence_and_an_answer_that_drips_end_in_time(monkeypatch):
    monkeypatch.setattr(endpoint, "TIMEOUT_SECONDS", 0.2)
    monkeypatch.setattr(endpoint, "TRIES", 1)
    with chatting(Reply(silent=True)) as server:
        assert refused(server) == f"{server.address} gives no answer, asked 1 times (timed out)"
    dripping = completion("A cat walks on the grass.")
    dripping.drip = 0.02
    with chatting(dripping) as server:
        assert refused(server) == f"{server.address} gives no answer, asked 1 times (it took longer than 0.2 s)"


def test_an_answer_that_breaks_off_is_asked_for_again():
    broken = completion("A cat.")
    broken.cut = True
    with chatting(broken, completion("A cat.")) as server:
        assert ask(Endpoint(server.address, "m"), QUESTION) == "A cat."
        assert len(server.asked) == 2


def test_nobody_there_is_one_line():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(
            RewritingFailed, match=r"gives no answer, asked 3 times \(\[Errno 111\] Connection refused\)$"
        ):
            ask(Endpoint(url, "m"), QUESTION)


def test_something_else_than_http_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            for _ in range(3):
                with listener.accept()[0] as connection:
                    connection.recv(4096)
                    connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(RewritingFailed, match="SSH-2"):
            ask(Endpoint(f"http://127.0.0.1:{listener.getsockname()[1]}", "m"), QUESTION)
        thread.join()


def test_flags_come_before_the_official_variables(monkeypatch):
    monkeypatch.setenv("T2V_REWRITE_BASE_URL", "http://t2v/v1")
    monkeypatch.setenv("T2V_REWRITE_MODEL_NAME", "of t2v")
    monkeypatch.setenv("I2V_REWRITE_BASE_URL", "http://i2v/v1")
    monkeypatch.setenv("I2V_REWRITE_MODEL_NAME", "of i2v")
    monkeypatch.setenv("REWRITE_API_KEY", f" {KEY}\n")
    assert find_endpoint("api", None, "t2v") == Endpoint("http://t2v/v1", "of t2v", KEY)
    assert find_endpoint("api", None, "i2v") == Endpoint("http://i2v/v1", "of i2v", KEY)
    assert find_endpoint("http://own", None, "t2v") == Endpoint("http://own", "of t2v", KEY)
    assert find_endpoint("http://own", "own", "t2v") == Endpoint("http://own", "own", KEY)
    assert KEY not in repr(find_endpoint("api", None, "t2v"))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("api", "m"), "--rewrite api takes the address from $T2V_REWRITE_BASE_URL, which is not set"),
        (("http://a", None), "--rewrite_model is needed for http://a, or $T2V_REWRITE_MODEL_NAME"),
        (
            ("locale", "m"),
            "--rewrite 'locale' is not allowed; allowed is an address as http://127.0.0.1:8000/v1, api or l",
        ),
        (("ftp://a", "m"), "--rewrite 'ftp://a' is not allowed"),
        (("http://", "m"), "--rewrite 'http://' is not allowed"),
        (("http://a?key=1", "m"), "--rewrite 'http://a?key=1' is not allowed"),
        (("http://a b", "m"), "--rewrite 'http://a b' is not allowed"),
        (("http://[::1", "m"), "--rewrite 'http://[::1' is no address (Invalid IPv6 URL)"),
        (("http://a:99999", "m"), "--rewrite 'http://a:99999' is no address (Port out of range 0-65535)"),
        (
            (f"http://me:{KEY}@a", "m"),
            "--rewrite the address holds a name or password; a key goes into $REWRITE_API_KEY",
        ),
    ],
)
def test_what_is_no_endpoint_is_refused(given, said):
    with pytest.raises(InputError) as caught:
        find_endpoint(*given, "t2v")
    assert str(caught.value).startswith(said)
    assert KEY not in str(caught.value)


def test_what_the_environment_says_is_judged_too(monkeypatch):
    monkeypatch.setenv("T2V_REWRITE_BASE_URL", "file:///etc/passwd")
    with pytest.raises(InputError, match=r"^\$T2V_REWRITE_BASE_URL: 'file:///etc/passwd' is not allowed"):
        find_endpoint("api", "m", "t2v")
    monkeypatch.setenv(endpoint.KEY_VARIABLE, "sk-one\r\nX-Other: two")
    with pytest.raises(InputError, match=r"^\$REWRITE_API_KEY is no key") as caught:
        find_endpoint("http://a", "m", "t2v")
    assert "sk-one" not in str(caught.value)


def test_the_key_is_not_in_what_is_asked():
    with chatting(completion("x")) as server:
        ask(Endpoint(server.address, "m", KEY), QUESTION)
        assert KEY not in json.dumps(server.asked[0][2])
