"""An OpenAI-compatible endpoint, asked for one answer: time-outs, retries, and whatever comes back instead. No torch."""

import json
import os
import re
import time
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hunyuan_staged.errors import InputError, one_line

if TYPE_CHECKING:
    from urllib.error import HTTPError

LOCAL, API = "local", "api"  # what --rewrite may say besides an address
KEY_VARIABLE = "REWRITE_API_KEY"
TIMEOUT_SECONDS = 120.0  # for one whole answer: a large model that thinks first takes a minute
TRIES = 3
PAUSES = (1.0, 4.0)  # seconds before the second and the third try
LONGEST_PAUSE = 30.0  # that a server may ask for
MAX_BYTES = 2**20  # of an answer; a prompt of a thousand tokens has about 5 kB
AGAIN = (408, 425, 429, 500, 502, 503, 504)  # what may pass: too much asked, or not ready
QUOTED = 200  # characters of a server's own message

Messages = Sequence[Mapping[str, Any]]


class RewritingFailed(InputError):
    """There is no rewritten prompt; the text says why. The original one can be used."""


class _TryAgain(Exception):
    """What failed may pass. pause: seconds that the server asks for."""

    def __init__(self, text: str, pause: float = 0.0) -> None:
        super().__init__(text)
        self.pause = pause


@dataclass(frozen=True)
class Endpoint:
    """Where to ask, and which model. The key is in no repr, and so in no log and no traceback."""

    url: str
    model: str
    key: str | None = field(default=None, repr=False)

    @property
    def address(self) -> str:
        """The address of chat completions."""
        base = self.url.rstrip("/")
        return base if base.endswith("/chat/completions") else f"{base}/chat/completions"

    def without_key(self, text: object) -> str:
        """One line without the key, which servers like to quote."""
        line = one_line(text)
        return line.replace(self.key, "[key]") if self.key else line


def variables(task: str) -> tuple[str, str]:
    """The official code's environment variables of address and model: T2V_REWRITE_BASE_URL, T2V_REWRITE_MODEL_NAME."""
    return f"{task.upper()}_REWRITE_BASE_URL", f"{task.upper()}_REWRITE_MODEL_NAME"


def find_endpoint(rewrite: str, model: str | None, task: str) -> Endpoint:
    """What --rewrite, --rewrite_model and the environment say; InputError where that is not enough, or no address.

    rewrite: an address, or API, with which the environment's is taken.
    """
    url_variable, model_variable = variables(task)
    url = rewrite
    if rewrite == API:
        url = os.environ.get(url_variable, "").strip()
        if not url:
            raise InputError(f"{API} takes the address from ${url_variable}, which is not set", option="rewrite")
    check_address(url, f"${url_variable}" if rewrite == API else None)
    name = model or os.environ.get(model_variable, "").strip()
    if not name:
        raise InputError(f"is needed for {url}, or ${model_variable}", option="rewrite_model")
    key = os.environ.get(KEY_VARIABLE, "").strip() or None
    if key is not None and not re.fullmatch(r"[\x21-\x7e]+", key):
        raise InputError(f"${KEY_VARIABLE} is no key: it has blanks, line breaks or letters beyond ASCII in it")
    return Endpoint(url, name, key)


def check_address(url: str, variable: str | None = None) -> None:
    """InputError for what is no plain http address. variable: where it is from, if not from --rewrite.

    An address that holds a password is not quoted.
    """
    culprit, option = (f"{variable}: ", None) if variable else ("", "rewrite")
    try:
        parts = urllib.parse.urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise InputError(f"{culprit}{url!r} is no address ({error})", option=option) from None
    if parts.username or parts.password or "@" in parts.netloc:
        raise InputError(
            f"{culprit}the address holds a name or password; a key goes into ${KEY_VARIABLE}", option=option
        )
    plain = url.isascii() and url.isprintable() and " " not in url
    if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment or not plain:
        allowed = f"an address as http://127.0.0.1:8000/v1, {API} or {LOCAL}"
        raise InputError(f"{culprit}{url!r} is not allowed; allowed is {allowed}", option=option)


def _open(request: Any) -> Any:
    """The response to a urllib Request, without a redirect: that would be a question without contents, and a key's leak."""
    from urllib.request import HTTPRedirectHandler, build_opener

    class NoRedirect(HTTPRedirectHandler):
        def redirect_request(self, *_: Any, **__: Any) -> None:
            return None

    return build_opener(NoRedirect).open(request, timeout=TIMEOUT_SECONDS)


def ask(endpoint: Endpoint, messages: Messages, say: Callable[[str], object] = lambda _: None) -> str:
    """The model's answer to some messages; RewritingFailed, in one line without the key, where there is none.

    What may pass (no connection, no answer in time, 429, 5xx) is tried TRIES times. say: gets a line before each retry.
    """
    reason = ""
    for attempt in range(TRIES):
        try:
            return _answer(endpoint, messages)
        except _TryAgain as error:
            reason = endpoint.without_key(error)
            if attempt < TRIES - 1:
                pause = max(PAUSES[attempt], min(error.pause, LONGEST_PAUSE))
                say(f"{endpoint.url} gives no answer ({reason}); asking again in {pause:.0f} s")
                time.sleep(pause)
    raise RewritingFailed(f"{endpoint.url} gives no answer, asked {TRIES} times ({reason})")


def _answer(endpoint: Endpoint, messages: Messages) -> str:
    # Here, since every stage imports this module for its constants.
    from http.client import HTTPException
    from urllib.error import HTTPError
    from urllib.request import Request

    # Temperature 0: the same question gets the same answer, as far as the server can.
    asked = {"model": endpoint.model, "messages": list(messages), "temperature": 0, "stream": False}
    headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "hunyuan-staged"}
    if endpoint.key:
        headers["Authorization"] = f"Bearer {endpoint.key}"
    request = Request(endpoint.address, json.dumps(asked).encode(), headers, method="POST")
    deadline = time.monotonic() + TIMEOUT_SECONDS
    try:
        with _open(request) as response:
            body = _read(response, deadline)
    except HTTPError as error:
        with error:
            raise _refused(endpoint, error, deadline) from None
    except (OSError, HTTPException) as error:
        raise _TryAgain(getattr(error, "reason", None) or str(error) or type(error).__name__) from None
    return _content(endpoint, body)


def _read(response: Any, deadline: float) -> bytes:
    """All of a response, in time and within MAX_BYTES, however slowly it drips."""
    from http.client import IncompleteRead

    body = b""
    while piece := response.read1(2**16):
        body += piece
        if len(body) > MAX_BYTES:
            raise RewritingFailed(f"the answer has more than {MAX_BYTES} bytes")
        if time.monotonic() > deadline:
            raise TimeoutError(f"it took longer than {TIMEOUT_SECONDS:g} s")
    if response.length:  # read1 says nothing of an end that came too early
        raise IncompleteRead(body, response.length)
    return body


def _refused(endpoint: Endpoint, error: "HTTPError", deadline: float) -> Exception:
    """What an answer with an error's status comes to."""
    from http.client import HTTPException

    if 300 <= error.code < 400:
        target = endpoint.without_key(error.headers.get("Location", "nowhere"))[:QUOTED]
        return RewritingFailed(f"{endpoint.url} redirects to {target} ({error.code}); give that address if it is right")
    said = str(error.reason)
    try:
        content = json.loads(_read(error, deadline))
        inner = content.get("error", content)
        said = str(inner.get("message") or said) if isinstance(inner, dict) else str(inner)
    except (OSError, ValueError, AttributeError, RecursionError, HTTPException):
        pass  # no message of the usual form: the status says enough
    said = endpoint.without_key(said)[:QUOTED]
    if error.code in AGAIN:
        pause = error.headers.get("Retry-After", "")
        return _TryAgain(f"{error.code} {said}", float(pause) if re.fullmatch(r"\d{1,6}", pause) else 0.0)
    hint = f"; the key is ${KEY_VARIABLE}" if error.code in (401, 403) else ""
    return RewritingFailed(f"{endpoint.url} refuses ({error.code} {said}){hint}")


def _content(endpoint: Endpoint, body: bytes) -> str:
    """The text in a chat completion."""
    try:
        choice = json.loads(body)["choices"][0]
        content = choice["message"]["content"]
        if isinstance(content, list):
            content = "".join(part["text"] for part in content if part["type"] == "text")
        finished = choice.get("finish_reason") != "length"
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        start = endpoint.without_key(body[:60].decode(errors="replace"))
        raise RewritingFailed(f"{endpoint.url} answers in a form that is not OpenAI's: {start!r}") from None
    if not finished:
        raise RewritingFailed(f"{endpoint.model} was cut off before the end of its answer")
    if content is not None and not isinstance(content, str):
        raise RewritingFailed(f"{endpoint.url} answers in a form that is not OpenAI's: content is no text")
    return content or ""
