"""Whose turn a folder is, for a stage that watches."""

from pathlib import Path

import pytest

from hunyuan_staged.files import contract
from hunyuan_staged.options import DecodeOptions, DenoiseOptions
from hunyuan_staged.pipeline.job_folders import ready

LARGER = contract.at_resolution(contract.LATENTS_FILE, "720p")
LARGER_VIDEO = contract.at_resolution(contract.VIDEO_FILE, "720p")
ENCODED = (contract.EMBEDDINGS_FILE, contract.CONFIG_FILE)


@pytest.mark.parametrize(
    ("stage", "options", "files", "is_ready"),
    [
        (2, {}, ENCODED, True),
        (2, {}, (contract.EMBEDDINGS_FILE,), False),
        (2, {}, (*ENCODED, contract.LATENTS_FILE), False),
        (2, {"super_resolution": "720p"}, ENCODED, False),
        (2, {"super_resolution": "720p"}, (*ENCODED, contract.LATENTS_FILE), True),
        (2, {"super_resolution": "720p"}, (*ENCODED, contract.LATENTS_FILE, LARGER), False),
        (3, {}, (contract.CONFIG_FILE, contract.LATENTS_FILE), True),
        (3, {}, (contract.CONFIG_FILE, contract.LATENTS_FILE, contract.VIDEO_FILE), False),
        (3, {"latents": "base"}, (contract.CONFIG_FILE, contract.LATENTS_FILE), True),
        (3, {"latents": "720p"}, (contract.CONFIG_FILE, contract.LATENTS_FILE), False),
        (3, {"latents": "720p"}, (contract.CONFIG_FILE, contract.LATENTS_FILE, LARGER, contract.VIDEO_FILE), True),
        (3, {"latents": "720p"}, (contract.CONFIG_FILE, contract.LATENTS_FILE, LARGER, LARGER_VIDEO), False),
    ],
)
def test_a_folder_is_ready_once_its_input_is_there_and_its_output_is_not(
    tmp_path: Path, stage: int, options: dict, files: tuple[str, ...], is_ready: bool
) -> None:
    """Super resolution took a folder before the base run had made its latents, and the job had failed."""
    for name in files:
        (tmp_path / name).touch()
    found = ready(stage, tmp_path, {2: DenoiseOptions, 3: DecodeOptions}[stage](**options))
    assert (found is not None) == is_ready
