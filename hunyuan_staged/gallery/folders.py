"""The jobs below a folder: what each is, how far it is, and what there is to see of it."""

import json
import math
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hunyuan_staged.errors import InputError, printable
from hunyuan_staged.files import contract
from hunyuan_staged.files.config import LARGER_KEY, read_config
from hunyuan_staged.files.encoding import SUFFIXES
from hunyuan_staged.files.provenance import sha256
from hunyuan_staged.files.tensors import opened
from hunyuan_staged.gallery.finishing import decode_command, denoise_command, enlarge_command, job_line
from hunyuan_staged.geometry import BUCKET_BASE
from hunyuan_staged.options import DecodeOptions
from hunyuan_staged.pipeline.decode_jobs import choose_latents
from hunyuan_staged.pipeline.job_folders import failure_of, read_job
from hunyuan_staged.versions import SUPER_RESOLUTION

# How far a job is, in the order of the page's filter.
FINISHED, DECODE, STOPPED, ENCODED, RUNNING, FAILED, BROKEN = (
    *("finished", "to decode", "stopped", "to denoise"),
    *("running", "failed", "broken"),
)
STATUSES = (FINISHED, DECODE, STOPPED, ENCODED, RUNNING, FAILED, BROKEN)
# The files of super resolution, the largest first, and those of the base run.
SIZES = (*sorted(SUPER_RESOLUTION, key=BUCKET_BASE.__getitem__, reverse=True), None)
VIDEO_FILES = tuple(contract.at_resolution(contract.VIDEO_FILE, size) for size in SIZES)
STATE_FILES = tuple(contract.at_resolution(contract.STATE_FILE, size) for size in SIZES)
# What a card shows of a config, in this order, and as what.
SETTINGS = {
    "num_inference_steps": "steps",
    "video_length": "frames",
    "guidance_scale": "guidance",
    "flow_shift": "shift",
    "transformer_version": "version",
    "attn_mode": "attention",
    "weights_dtype": "weights",
    "cache": "cache",
    "lora": "lora",
    "negative_prompt": "negative prompt",
    "image_path": "image",
}
SECONDS = ("stage2_elapsed_time", "stage3_decode_time")


@dataclass
class Job:
    """One folder. video, preview, picture: files inside the gallery's folder; commands: what finishes it, one after the
    other; line: the job in a job file; note: what is wrong with it."""

    folder: Path
    name: str
    status: str = BROKEN
    prompt: str = ""
    seed: int | None = None
    settings: dict[str, str] = field(default_factory=dict)
    seconds: float | None = None
    changed: float = 0.0
    video: Path | None = None
    preview: Path | None = None
    picture: Path | None = None
    commands: list[str] = field(default_factory=list)
    line: str | None = None
    note: str = ""


def find(root: Path) -> list[Path]:
    """The folders of jobs at or below a folder, by path. InputError where it is none, or holds no job."""
    if not root.is_dir():
        raise InputError(f"{root} is not a folder" if root.exists() else f"{root} does not exist")
    found = []
    for place, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if {contract.CONFIG_FILE, contract.FAILURE_FILE, *STATE_FILES} & set(names):
            found.append(Path(place))
    if not found:
        raise InputError(f"{root} holds no job: no folder in it has {contract.CONFIG_FILE}")
    return found


def read(folder: Path, root: Path) -> Job:
    """A job's folder as a card; what cannot be read is said in its note."""
    job = Job(folder.absolute(), folder.relative_to(root).as_posix())
    if job.name == ".":
        job.name = folder.absolute().name
    try:
        job.preview = inside(folder / contract.PREVIEW_VIDEO, root)
        job.picture = inside(folder / contract.PREVIEW_PICTURE, root)
        config = read_config(folder) if (folder / contract.CONFIG_FILE).exists() else {}
        _describe(job, config)
        resolution = _resolution(folder)
        job.video = _video(folder, resolution, config, root)
        job.changed = max(path.lstat().st_mtime for path in folder.iterdir())
        if resolution:
            job.settings["super resolution"] = resolution
        _judge(job, config, resolution)
    except (InputError, OSError) as error:
        job.status, job.note, job.commands, job.line = BROKEN, printable(str(error)), [], None
    return job


def inside(path: Path, root: Path) -> Path | None:
    """The path of a file that is there, and lies below the gallery's folder, links followed; else None.

    A folder may be someone else's: a link in it must not put another file into the page.
    """
    return path if path.is_file() and path.resolve().is_relative_to(root.resolve()) else None


def _describe(job: Job, config: Mapping[str, Any]) -> None:
    """What the config says: prompt, seed, settings, seconds."""
    job.prompt, job.seed = config.get("prompt") or "", config.get("seed")
    if config.get("width") and config.get("height"):
        job.settings["size"] = f"{config['width']}x{config['height']}"
    for key, name in SETTINGS.items():
        value = config.get(key)
        if value not in (None, ""):
            job.settings[name] = f"{value:g}" if isinstance(value, float) else str(value)
    times = [float(config[key]) for key in SECONDS if config.get(key) is not None]
    job.seconds = sum(times) if times and math.isfinite(sum(times)) else None


def _resolution(folder: Path) -> str | None:
    """Of the latents that stage 3 decodes, where super resolution has made those; else None."""
    return choose_latents(DecodeOptions(input_dir=str(folder))) if contract.latents_present(folder) else None


def _video(folder: Path, resolution: str | None, config: Mapping[str, Any], root: Path) -> Path | None:
    """The job's video: that of its latents, of none the largest, else the one that the config names, if that lies below
    the root."""
    named = config.get("output_video")
    own = contract.at_resolution(contract.VIDEO_FILE, resolution)
    latents = folder / contract.at_resolution(contract.LATENTS_FILE, resolution)
    candidates = [folder / name for name in ([own] if latents.is_file() else VIDEO_FILES)]
    if named and Path(named).suffix in SUFFIXES:
        candidates.append(Path(named))
    return next(filter(None, (inside(path, root) for path in candidates)), None)


def _judge(job: Job, config: Mapping[str, Any], resolution: str | None) -> None:
    """How far the job is, and what finishes it."""
    folder = job.folder
    latents = folder / contract.at_resolution(contract.LATENTS_FILE, resolution)
    state = next(filter(Path.is_file, (folder / name for name in STATE_FILES)), None)
    failure = failure_of(folder)
    asked = read_job(folder).values
    given: Mapping[str, Any] = {name: value for name, value in asked.items() if name != "prompt"}
    job.prompt = job.prompt or str(asked.get("prompt", ""))
    job.seed = asked.get("seed") if job.seed is None else job.seed
    if state:
        given = {**given, **_read_state(job, state)}
        job.status = STOPPED
        if state.name == contract.STATE_FILE:
            job.video = None  # of an earlier run: a state goes once its latents are there
    elif job.video and not _replaced(latents, job.video, config):
        job.status = FINISHED
    elif latents.is_file():
        job.status = DECODE
        if job.video:
            own = contract.at_resolution(contract.VIDEO_FILE, resolution)
            replaced = job.video.name not in VIDEO_FILES or job.video.name == own
            job.note = f"{job.video.name} is of other latents{': it will be replaced' * replaced}"
            job.video = None
    elif (folder / contract.EMBEDDINGS_FILE).is_file():
        job.status = ENCODED
        job.note = "stage 2 has left nothing here: flags of its command line are not known"
    elif failure:
        job.status = FAILED
    else:
        raise InputError(f"{contract.CONFIG_FILE} is alone: neither embeddings nor latents nor a video are with it")
    larger = _still_to_come(job, config, given, resolution)
    if owner := _owner(folder):
        job.status, job.note = RUNNING, f"{owner} is at it"
    elif job.status in (STOPPED, ENCODED):
        resume = job.status == STOPPED
        job.commands = [denoise_command(folder, given, resume=resume)]
        job.commands += [enlarge_command(folder, given, larger, resume=resume)] if larger else []
        job.commands.append(decode_command(folder, given))
        job.line = None if larger else job_line(folder, given)
    elif job.status == DECODE:
        job.commands = [enlarge_command(folder, given, larger, resume=True)] if larger else []
        job.commands.append(decode_command(folder, given))
    if failure and job.status != RUNNING:
        job.status, job.note = FAILED, printable(f"stage {failure[0]} failed: {failure[1]}")


def _still_to_come(job: Job, config: Mapping[str, Any], given: Mapping[str, Any], resolution: str | None) -> str | None:
    """The super resolution that stage 1 was told of, where it is to follow on the base run's latents; noted, too.

    resolution: of the latents that stage 3 would decode.
    """
    larger = config.get(LARGER_KEY)
    if larger not in SUPER_RESOLUTION or given.get("super_resolution") or job.status not in (STOPPED, ENCODED, DECODE):
        return None
    if job.status == DECODE and SIZES.index(resolution) <= SIZES.index(larger):
        return None
    job.note = f"{job.note}; super resolution to {larger} follows".removeprefix("; ")
    return str(larger)


def _replaced(latents: Path, video: Path, config: Mapping[str, Any]) -> bool:
    """Whether a video is of other latents than those that are there now."""
    recorded = config.get(contract.LATENTS_HASH)
    if recorded is None or not latents.is_file():
        return False
    # Only where the times let one think so: reading all latents of a large folder takes a while.
    return latents.stat().st_mtime > video.stat().st_mtime and sha256(latents) != recorded


def _read_state(job: Job, path: Path) -> Mapping[str, Any]:
    """The options that a stopped run records; notes its step, and what is not known yet of its settings."""
    with opened(path) as file:
        metadata = dict(file.metadata() or {})
    try:
        settings, given = json.loads(metadata["settings"]), json.loads(metadata.get("options", "null"))
        steps = int(settings["num_inference_steps"])
        job.note = f"stopped after step {int(metadata['step'])} of {steps}"
        job.seed = int(settings["seed"])
        job.settings["size"] = f"{int(settings['width'])}x{int(settings['height'])}"
        numbers = {
            SETTINGS[key]: value for key, value in settings.items() if key in SETTINGS and type(value) in (int, float)
        }
        known = job.settings | {name: f"{value:g}" for name, value in numbers.items()}
        job.settings = {name: known[name] for name in ("size", *SETTINGS.values()) if name in known}
    except (KeyError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise InputError(f"{path} is no state of stage 2 ({error!r})") from error
    if given is None:
        job.note += "; it does not record its flags: give those of the first call"
    return given if isinstance(given, dict) else {}


def _owner(folder: Path) -> str | None:
    """The process that is at a folder, as its lock says; None where there is none, or it has died."""
    try:
        words = (folder / contract.LOCK_FILE).read_text(encoding="utf-8", errors="replace")[:300].split()
        number, host = int(words[1]), words[3]
        if host == socket.gethostname():
            os.kill(number, 0)
    except PermissionError:  # it is another user's
        pass
    except (OSError, IndexError, ValueError, OverflowError):
        return None
    return f"process {number} on {printable(host)}"
