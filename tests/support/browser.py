"""A headless Chromium, driven by the DevTools protocol over a pipe: no server, no library, no port."""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
END = 60.0  # seconds that a page may take for anything


def browser_path() -> str | None:
    """The browser of this machine; None where there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One browser with one page, for as long as the block runs. profile: a folder for it alone."""

    def __init__(self, profile: Path) -> None:
        self.profile, self.number = profile, 0

    def __enter__(self) -> "Browser":
        path = browser_path()
        assert path
        theirs_in, self._write = os.pipe()
        self._read, theirs_out = os.pipe()
        words = [path, "--headless", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--mute-audio"]
        words += ["--autoplay-policy=no-user-gesture-required", f"--user-data-dir={self.profile}", "about:blank"]
        # The browser reads from 3 and writes to 4.
        script = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'
        self.process = subprocess.Popen(
            ["bash", "-c", script, "bash", *words], pass_fds=(theirs_in, theirs_out), stderr=subprocess.DEVNULL
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._left = b""
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._call("Page.enable")
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(END)
        os.close(self._write)
        os.close(self._read)

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if hasattr(self, "session"):
            message["sessionId"] = self.session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self.number:
                assert "error" not in answer, answer["error"]
                return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._left:
            data = os.read(self._read, 2**16)
            assert data, "the browser has ended"
            self._left += data
        text, _, self._left = self._left.partition(b"\0")
        return json.loads(text)

    def open(self, page: Path) -> None:
        """Show a file, and wait until it is loaded."""
        self._call("Page.navigate", url=page.absolute().as_uri())
        self.wait(f"document.readyState === 'complete' && location.href === {json.dumps(page.absolute().as_uri())}")

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page; a promise's result."""
        result = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, expression: str) -> None:
        """Until an expression is true."""
        deadline = time.monotonic() + END
        while not self.run(expression):
            assert time.monotonic() < deadline, f"never: {expression}"
            time.sleep(0.05)
