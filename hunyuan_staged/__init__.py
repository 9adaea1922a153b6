"""The engine of the staged HunyuanVideo-1.5 suite: everything but flags, logs and reports."""

from collections.abc import Iterable
from typing import Any


class InputError(ValueError):
    """Something a user gave cannot be used. One line: the culprit, what was given, what is allowed."""


def quiet(iterable: Iterable[Any], **_: Any) -> Iterable[Any]:
    """The progress wrapper that shows nothing; takes tqdm's keywords and ignores them."""
    return iterable
