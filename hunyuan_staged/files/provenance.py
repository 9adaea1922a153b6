"""Hashes of files and settings; files that do not belong together."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hunyuan_staged.errors import printable
from hunyuan_staged.files.contract import (
    CONFIG_FILE,
    EMBEDDINGS_FILE,
    EMBEDDINGS_HASH,
    ENLARGED_FROM,
    LATENTS_FILE,
    LATENTS_HASH,
    at_resolution,
)


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def git_sha1(path: str | Path) -> str:
    """What git calls a file of these contents, in hexadecimal: hubs give it for small files."""
    path = Path(path)
    found = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as file:
        while piece := file.read(2**22):
            found.update(piece)
    return found.hexdigest()


def digest(facts: Mapping[str, Any]) -> str:
    """The SHA-256 of a JSON object, in hexadecimal; the order of its keys does not count."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


# What embeddings and config say of the same thing, under the names that each gives it.
SAID_TWICE = {"version": "transformer_version"} | {
    name: name for name in ("prompt", "negative_prompt", "rewritten_prompt")
}


def embeddings_mismatch(
    folder: str | Path, config: Mapping[str, Any], metadata: Mapping[str, str], embeddings_hash: str
) -> str | None:
    """Why the embeddings in a folder are not those that its config describes; None where they are, or nothing tells.

    metadata and embeddings_hash are the embeddings' own. The TPU suite records no hash.
    """
    embeddings, described = Path(folder) / EMBEDDINGS_FILE, Path(folder) / CONFIG_FILE
    recorded = config.get(EMBEDDINGS_HASH)
    if recorded == embeddings_hash:
        return None
    if recorded is not None:
        return (
            f"{embeddings} (sha256 {embeddings_hash[:12]}…) does not belong to {described}, "
            f"which was written with sha256 {printable(recorded[:12])}…"
        )
    for theirs, ours in SAID_TWICE.items():
        # Version and prompts may be absent on either side.
        if config.get(ours) is not None and metadata.get(theirs, printable(config[ours])) != printable(config[ours]):
            return (
                f"{embeddings} ({theirs} {metadata[theirs][:60]!a}) does not belong to {described} "
                f"({ours} {config[ours][:60]!a})"
            )
    return None


def latents_mismatch(
    folder: str | Path, config: Mapping[str, Any], metadata: Mapping[str, str], resolution: str | None = None
) -> str | None:
    """Why the latents in a folder do not belong to what they were made from; None where they do, or nothing tells.

    metadata is the latents' own; resolution: of super resolution. Where stage 2 wrote to another folder than stage 1, the
    config tells of the embeddings.
    """
    latents, embeddings = Path(folder) / at_resolution(LATENTS_FILE, resolution), Path(folder) / EMBEDDINGS_FILE
    recorded = metadata.get(EMBEDDINGS_HASH)
    present, source = config.get(EMBEDDINGS_HASH), Path(folder) / CONFIG_FILE
    if recorded is not None and embeddings.is_file():
        present, source = sha256(embeddings), embeddings
    if recorded is not None and present is not None and present != recorded:
        return _replaced(latents, "embeddings", recorded, source, present)
    return source_mismatch(folder, metadata, resolution)


def source_mismatch(folder: str | Path, metadata: Mapping[str, str], resolution: str | None) -> str | None:
    """Why latents are not of the smaller ones in the folder, from which they were made; None where they are, or nothing
    tells."""
    latents = Path(folder) / at_resolution(LATENTS_FILE, resolution)
    smaller, recorded = metadata.get(ENLARGED_FROM), metadata.get(LATENTS_HASH)
    if smaller is None or recorded is None:
        return None
    # A name alone: what a file says must not lead out of the folder.
    source = Path(folder) / Path(smaller).name
    present = sha256(source) if source.is_file() else recorded
    return None if present == recorded else _replaced(latents, "latents", recorded, source, present)


def _replaced(latents: Path, what: str, recorded: str, source: Path, present: str) -> str:
    return (
        f"{latents} was made from {what} with sha256 {recorded[:12]}…, "
        f"which {source} has since replaced (sha256 {printable(present[:12])}…)"
    )
