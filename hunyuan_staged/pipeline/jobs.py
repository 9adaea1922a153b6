"""What stage 2 is to do: a job is a folder that stage 1 wrote."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hunyuan_staged.files import contract, provenance, tensors
from hunyuan_staged.files.config import LARGER_KEY, read_config
from hunyuan_staged.options import DenoiseOptions
from hunyuan_staged.pipeline.common import Lock

INPUT_LATENTS = contract.at_resolution(contract.LATENTS_FILE, contract.INPUT)


def output_dir(options: DenoiseOptions) -> Path:
    """Where the latents go."""
    return Path(options.output_dir or options.input_dir)


def locks(options: DenoiseOptions) -> list[Lock]:
    """What a run must lock before it reads; InputError where stage 1 has not been run."""
    contract.require_file(Path(options.input_dir) / contract.CONFIG_FILE)
    larger = (*contract.larger_files(2), INPUT_LATENTS) if options.super_resolution else ()
    return [(output_dir(options) / contract.LOCK_FILE, (*contract.STAGE_FILES[2], *larger))]


def what_follows(options: DenoiseOptions, config: Mapping[str, Any]) -> tuple[int, list[str]]:
    """The stage that follows on this one with its flags: stage 3, or the super resolution that stage 1 was told of."""
    larger = config.get(LARGER_KEY)
    if not larger or options.super_resolution:
        return 3, [f"--input_dir={output_dir(options)}"]
    folders = [f"--{name}={getattr(options, name)}" for name in ("input_dir", "output_dir") if getattr(options, name)]
    return 2, [*folders, f"--super_resolution={larger}"]


@dataclass(frozen=True)
class DenoiseJob:
    """What a folder holds for stage 2: embeddings, their hash, the config; mismatch: why embeddings and config do not
    belong together, else None."""

    embeddings: dict[str, torch.Tensor]
    embeddings_hash: str
    config: dict[str, Any]
    mismatch: str | None


def read(options: DenoiseOptions) -> DenoiseJob:
    """Read what stage 1 wrote; InputError where it is absent or broken."""
    folder = Path(options.input_dir)
    config = read_config(folder)
    embeddings, metadata = tensors.load_embeddings(folder)
    hashed = provenance.sha256(folder / contract.EMBEDDINGS_FILE)
    return DenoiseJob(embeddings, hashed, config, provenance.embeddings_mismatch(folder, config, metadata, hashed))
