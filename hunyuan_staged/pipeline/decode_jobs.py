"""What stage 3 is to do: which latents of a folder, and where their video goes."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hunyuan_staged.files import contract, provenance, tensors
from hunyuan_staged.files.config import read_config
from hunyuan_staged.options import DecodeOptions
from hunyuan_staged.pipeline.common import Lock
from hunyuan_staged.run_options import DEFAULT_FPS, MAX_FPS
from hunyuan_staged.runtime.progress import SILENT, Reporter


def video_path(options: DecodeOptions, resolution: str | None) -> Path:
    """The mp4 to write; resolution: of super resolution, None of the base run."""
    name = contract.at_resolution(contract.VIDEO_FILE, resolution)
    return Path(options.output_video or Path(options.input_dir) / name)


def locks(options: DecodeOptions) -> list[Lock]:
    """What a run must lock before it reads; InputError where there are no latents."""
    folder = Path(options.input_dir)
    if options.latents or not contract.latents_present(folder):
        contract.require_file(
            folder / contract.at_resolution(contract.LATENTS_FILE, contract.resolution_asked(options.latents))
        )
    found: list[Lock] = [(folder / contract.LOCK_FILE, (*contract.STAGE_FILES[3], *contract.larger_files(3)))]
    if options.output_video:
        video = Path(options.output_video)
        own = found[0][1]
        if video.name not in own:
            found.append((video.with_name(f".{video.name}{contract.LOCK_FILE}"), (video.name,)))
        elif video.parent.resolve() != folder.resolve():
            # Another run may be at it, for which it is the video of its own folder.
            found.append((video.with_name(contract.LOCK_FILE), own))
    return found


def choose_latents(options: DecodeOptions, report: Reporter = SILENT) -> str | None:
    """The resolution of the latents to decode, None: those of the base run.

    Those asked for, else the largest that were made from what is in the folder now; a larger file of a former run is said
    to be passed over.
    """
    if options.latents:
        return contract.resolution_asked(options.latents)
    folder = Path(options.input_dir)
    for resolution in contract.latents_present(folder):
        former = _former(folder, resolution)
        if former is None or not (folder / contract.LATENTS_FILE).is_file():
            return resolution
        report.warn(f"{former}; passed over, --latents {resolution} decodes it")
    return None


def _former(folder: Path, resolution: str) -> str | None:
    """Why latents, or those that they were made from, are of a former run; None where they are not."""
    metadata = tensors.latents_metadata(folder, resolution)
    smaller = contract.resolution_of_latents(metadata.get(contract.ENLARGED_FROM, ""))
    mismatch = provenance.source_mismatch(folder, metadata, resolution)
    if mismatch or smaller in (None, resolution) or smaller not in contract.latents_present(folder):
        return mismatch
    return _former(folder, smaller)


@dataclass(frozen=True)
class DecodeJob:
    """What a folder holds for stage 3: latents [1, C, t, h, w], their hash, the config; mismatch: why they do not belong
    to what they were made from, else None; fps: of the video to make; resolution: of super resolution, else None."""

    latents: torch.Tensor
    latents_hash: str
    config: dict[str, Any]
    mismatch: str | None
    fps: float = DEFAULT_FPS
    resolution: str | None = None


def read(options: DecodeOptions, report: Reporter = SILENT) -> DecodeJob:
    """Read the latents and the config of the folder; InputError where they are absent or broken."""
    folder, resolution = Path(options.input_dir), choose_latents(options, report)
    path = folder / contract.at_resolution(contract.LATENTS_FILE, resolution)
    contract.require_file(path)
    latents, metadata = tensors.load_latents(folder, resolution)
    config = read_config(folder)
    mismatch = provenance.latents_mismatch(folder, config, metadata, resolution)
    fps = options.fps or _recorded_fps(metadata)
    return DecodeJob(latents, provenance.sha256(path), config, mismatch, fps, resolution)


def _recorded_fps(metadata: Mapping[str, str]) -> float:
    """The frames per second of the video that latents were made from; the default where there was none."""
    try:
        fps = float(metadata.get("fps", DEFAULT_FPS))
    except ValueError:
        return DEFAULT_FPS
    return fps if 1 <= fps <= MAX_FPS else DEFAULT_FPS


def replaced(options: DecodeOptions, job: DecodeJob) -> str | None:
    """Which video of other latents, so of another prompt or seed, this run replaces; None where there is none."""
    video, former = video_path(options, job.resolution), job.config.get(contract.LATENTS_HASH)
    recorded = job.config.get("output_video")
    if former is None or former == job.latents_hash or recorded != str(video) or not video.is_file():
        return None
    return f"{video} was made from other latents (another prompt, seed or settings), and is replaced"
