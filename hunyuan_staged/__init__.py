"""The engine of the staged HunyuanVideo-1.5 suite: everything but flags, logs and reports."""

import re
from collections.abc import Iterable
from typing import Any

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


class InputError(ValueError):
    """Something a user gave cannot be used. One line: the culprit, what was given, what is allowed."""


def quiet(iterable: Iterable[Any], **_: Any) -> Iterable[Any]:
    """The progress wrapper that shows nothing; takes tqdm's keywords and ignores them."""
    return iterable


def printable(text: str) -> str:
    """Text with every control character, line breaks included, replaced by its escape (\\x1b, \\n)."""
    return _CONTROL.sub(lambda match: repr(match[0])[1:-1], text)
