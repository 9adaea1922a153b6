"""A short prompt → the long description that the model was trained on: what is asked for, and which answers are taken.

Who is asked is in endpoint.py (a server) and language_model.py (the text encoder's own language model).
"""

import base64
import hashlib
import io
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from hunyuan_staged.encoders.endpoint import RewritingFailed
from hunyuan_staged.encoders.text import QUOTED_TEXT, quoted_texts
from hunyuan_staged.errors import InputError

INSTRUCTIONS = Path(__file__).with_name("instructions")
MAX_INSTRUCTIONS_BYTES = 2**16
# Source of the side: the official code's default of I2V_REWRITE_MAX_IMAGE_SIZE. Larger ones are shrunk before they go out.
MAX_IMAGE_SIDE = 1024
_CHINESE = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]")
_CONTROL_TOKEN = re.compile(r"<\|[^|<>]*\|>")  # of Qwen's chat template


@dataclass(frozen=True)
class Instructions:
    """What the rewriting model is told. name: for people."""

    name: str
    text: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclass(frozen=True)
class Rewritten:
    """What is to be encoded. model: who wrote it out at length; identity: the hash of all that it was made from. Without
    them it is the prompt as it was given.
    """

    prompt: str
    model: str = ""
    identity: str = ""

    @property
    def record(self) -> dict[str, str]:
        """What config and embeddings say of it; nothing for a prompt as it was given."""
        if not self.identity:
            return {}
        return {"rewritten_prompt": self.prompt, "rewrite_model": self.model, "rewrite_sha256": self.identity}


def read_instructions(path: str | None, task: str, prompt: str) -> Instructions:
    """Those of a file, else our own for the task, in Chinese for a prompt with Chinese characters.

    InputError where the file is no UTF-8 text, is empty, or has more than MAX_INSTRUCTIONS_BYTES.
    """
    name = f"{task}_{'zh' if _CHINESE.search(prompt) else 'en'}"
    source = INSTRUCTIONS / f"{name}.txt" if path is None else Path(path)
    try:
        with source.open("rb") as file:
            content = file.read(MAX_INSTRUCTIONS_BYTES + 1)
        text = content.decode().strip()
    except OSError as error:
        raise InputError(f"{source} cannot be read ({error.strerror})", option="rewrite_instructions") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{source} is not UTF-8 text", option="rewrite_instructions") from error
    if not text or len(content) > MAX_INSTRUCTIONS_BYTES:
        held = f"more than {MAX_INSTRUCTIONS_BYTES} bytes" if text else "no text"
        raise InputError(f"{source} holds {held}", option="rewrite_instructions")
    return Instructions(name if path is None else source.name, text)


def messages(instructions: Instructions, prompt: str, image: Image.Image | None = None) -> list[Mapping[str, Any]]:
    """The question in OpenAI's form: the instructions, then the prompt, with an image as a data URI before it."""
    user: Any = prompt
    if image is not None:
        user = [{"type": "image_url", "image_url": {"url": data_uri(image)}}, {"type": "text", "text": prompt}]
    return [{"role": "system", "content": instructions.text}, {"role": "user", "content": user}]


def data_uri(image: Image.Image) -> str:
    """An image as JPEG in base64, its longer side at most MAX_IMAGE_SIDE px."""
    small = image.convert("RGB")
    small.thumbnail((MAX_IMAGE_SIDE, MAX_IMAGE_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def accepted(answer: str, prompt: str) -> str:
    """The description in a model's answer, as one line; RewritingFailed where there is none to be taken.

    What a model thought aloud is left out. Quoted text is spelt out in the video, so that of the prompt must be there
    letter by letter, and quotation marks round anything else are removed.
    """
    text = answer.rpartition("</think>")[2].strip()
    text = re.sub(r"\s*[\t\r\n\x0b\x0c\x1c-\x1e\x85\u2028\u2029]+\s*", " ", text)
    text = "".join(letter for letter in text if unicodedata.category(letter) not in ("Cc", "Cs"))
    if not text:
        raise RewritingFailed("the rewritten prompt is empty")
    if found := _CONTROL_TOKEN.search(text):
        raise RewritingFailed(f"the rewritten prompt holds {found[0]}, which is a token of the chat template")
    wanted = quoted_texts(prompt)
    if text[0] + text[-1] in ('""', "“”") and set(wanted) <= set(quoted_texts(text[1:-1])):
        text = text[1:-1].strip()
    lost = [quoted for quoted in wanted if quoted not in quoted_texts(text)]
    if lost:
        raise RewritingFailed(f"the rewritten prompt has lost the quoted text {lost[0][:60]!r}")

    def unquoted(match: re.Match[str]) -> str:
        inner = match[1] or match[2] or ""
        return match[0] if inner in wanted else inner

    text = QUOTED_TEXT.sub(unquoted, text).strip()
    if not text:
        raise RewritingFailed("the rewritten prompt is empty")
    return text
