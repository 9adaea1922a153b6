"""The page: one HTML file, which takes nothing from elsewhere but the videos that are too large to be in it.

What files say reaches the page as JSON whose "<" are escaped, and the page's script puts it there as text, never as HTML.
"""

import base64
import hashlib
import json
import os
import re
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

from hunyuan_staged.files.atomic import replacing
from hunyuan_staged.gallery.finishing import batch
from hunyuan_staged.gallery.folders import STATUSES, Job

# A video is in the page itself up to this size, and while all of them together stay below the other; the page links what
# is larger, and shows its preview where the link leads nowhere.
EMBEDDED_BYTES, EMBEDDED_IN_ALL = 2**20, 2**26
TYPES = {".mp4": "video/mp4", ".gif": "image/gif", ".png": "image/png"}
TEMPLATE = "template.html"


class Embedder:
    """Files as data URIs, as long as there is room for them in the page."""

    def __init__(self) -> None:
        self.left = EMBEDDED_IN_ALL

    def uri(self, path: Path | None) -> str | None:
        """None where the file is too large, the page already is, or the file cannot be read."""
        try:
            if path is None or path.stat().st_size > min(EMBEDDED_BYTES, self.left):
                return None
            content = path.read_bytes()
        except OSError:
            return None  # a run that goes on has just replaced it
        self.left -= len(content)
        return f"data:{TYPES[path.suffix]};base64,{base64.b64encode(content).decode()}"


def as_data(job: Job, output: Path, embedder: Embedder) -> dict[str, Any]:
    """What the page knows of a job. sources: what plays, the best first."""
    link = quote(os.fsencode(os.path.relpath(job.video.absolute(), output.absolute().parent))) if job.video else None
    embedded = embedder.uri(job.video)
    sources = [embedded or link] if job.video else []
    if not embedded and (preview := embedder.uri(job.preview)):
        sources.append(preview)
    return {
        "name": job.name,
        "status": job.status,
        "prompt": job.prompt,
        "seed": None if job.seed is None else str(job.seed),  # a seed may have more digits than a number of JavaScript
        "settings": job.settings,
        "seconds": job.seconds,
        "changed": job.changed,
        "note": job.note,
        "still": job.video is not None and job.video.suffix == ".gif",
        "sources": sources,
        "poster": embedder.uri(job.picture),
        "link": link,
        "commands": job.commands,
        "line": job.line,
        "parent": str(job.folder.parent),
    }


def as_json(value: Any) -> str:
    """JSON that may stand in a script element: no "<" or "&" ends it or begins anything."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def render(jobs: Iterable[Job], title: str, output: Path) -> str:
    """The page's text."""
    embedder = Embedder()
    shown = list(jobs)
    data = {
        "title": title,
        "statuses": STATUSES,
        "jobs": [as_data(job, output, embedder) for job in shown],
        "batches": {str(parent): batch(parent) for parent in {job.folder.parent for job in shown if job.line}},
    }
    template = resources.files("hunyuan_staged.gallery").joinpath(TEMPLATE).read_text(encoding="utf-8")
    (script,) = re.findall(r"<script>(.*?)</script>", template, re.DOTALL)
    hashed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return template.replace("SCRIPT_HASH", hashed, 1).replace("JOBS_AS_JSON", as_json(data), 1)


def write(jobs: Iterable[Job], title: str, output: Path) -> None:
    """Write the page, whole or not at all."""
    text = render(jobs, title, output)
    with replacing(output) as temporary:
        temporary.write_text(text, encoding="utf-8")
