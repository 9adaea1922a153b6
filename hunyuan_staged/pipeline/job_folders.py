"""The folder of each of many jobs: where a stage reads and writes, whether it is its turn, why a job failed."""

import json
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from hunyuan_staged.errors import InputError
from hunyuan_staged.files import contract
from hunyuan_staged.files.atomic import replacing
from hunyuan_staged.jobs.reading import Job, at, read_line
from hunyuan_staged.run_options import PART_FILES

# What decides which weights are loaded: jobs that agree in it follow each other.
MODEL_OPTIONS = (
    *PART_FILES,
    *("model_path", "transformer", "transformer_version", "resolution", "dtype", "weights_dtype", "fp8_matmul", "lora"),
    *("cfg_distilled", "step_distilled", "sparse_attn", "super_resolution"),
)
MAX_RECORD_BYTES = 2**20


def ordered(jobs: Sequence[Job], options: Any, stage: int) -> list[Job]:
    """The jobs in the order in which they are made: those of one model together, those that failed before last.

    A job that ends the whole run holds no other up for ever.
    """
    models = [_model_of(job) for job in jobs]
    failed = [failure_of(written_to(placed(options, job, stage), stage)) is not None for job in jobs]
    order = sorted(range(len(jobs)), key=lambda index: (failed[index], models.index(models[index])))
    return [jobs[index] for index in order]


def _model_of(job: Job) -> str:
    known = {name: job.values.get(name) for name in MODEL_OPTIONS}
    return json.dumps([known, bool(job.values.get("image_path"))])


# -- where --


def placed(options: Any, job: Job, stage: int) -> Any:
    """A stage's options with a job's folders: one of the job's name in --output_dir, or --input_dir.

    A job without a prompt of its own may take the embeddings that lie in --input_dir itself: many videos of one prompt.
    """
    if stage == 1:
        return _alone(options, output_dir=str(Path(options.output_dir) / job.name))
    source = Path(options.input_dir)
    own = source / job.name
    if stage == 3:
        return _alone(options, input_dir=str(own))
    shared = "prompt" not in job.values and (source / contract.EMBEDDINGS_FILE).is_file()
    target = Path(options.output_dir) / job.name if options.output_dir else own
    return _alone(options, input_dir=str(source if shared else own), output_dir=str(target))


def placed_in(options: Any, folder: Path, stage: int) -> Any:
    """A stage's options with one folder to read and write."""
    if stage == 1:
        return _alone(options, output_dir=str(folder))
    return _alone(options, input_dir=str(folder))


def _alone(options: Any, **folders: str) -> Any:
    """Options of one job: nothing in them asks for many."""
    many = {"jobs": None, "seeds": None, "watch": None, "prompts": ()}
    has = {field.name for field in fields(options)}
    return replace(options, **{name: value for name, value in many.items() if name in has}, **folders)


def written_to(options: Any, stage: int) -> Path:
    """The folder that a stage writes into, by the options of one job."""
    return Path(options.output_dir if stage == 1 else getattr(options, "output_dir", None) or options.input_dir)


# -- whose turn --


def ready(stage: int, folder: Path, options: Any) -> int | None:
    """When the input of a folder was written (ns), where it is there and the output is not; else None.

    A job that has failed in this stage, or in one before, waits until its failure is removed.
    """
    option = {2: "super_resolution", 3: "latents"}.get(stage)
    larger = contract.resolution_asked(getattr(options, option)) if option else None
    output, inputs = contract.at_resolution(contract.STAGE_OUTPUT[stage], larger), contract.STAGE_INPUTS[stage]
    if larger:
        inputs = (*inputs, contract.at_resolution(contract.LATENTS_FILE, larger if stage == 3 else None))
    failure = failure_of(folder)
    if (folder / output).exists() or (failure and failure[0] <= stage):
        return None
    try:
        return max((folder / name).stat().st_mtime_ns for name in inputs)
    except FileNotFoundError:
        return None


def read_job(folder: Path) -> Job:
    """What is asked for in a folder; where it does not say, what the command line asks for. InputError: it is bad."""
    path = folder / contract.JOB_FILE
    if not path.is_file():
        return Job(folder.name, str(folder), {})
    if path.stat().st_size > MAX_RECORD_BYTES:
        raise InputError(f"{path} has more than {MAX_RECORD_BYTES} bytes")
    try:
        return replace(read_line(str(path), path.read_bytes()), name=folder.name)
    except InputError as error:
        raise InputError(at(str(path), error)) from error


# -- failures --


def failure_of(folder: Path) -> tuple[int, str] | None:
    """(stage, why) of the job in a folder where it failed; None where it did not, and where what says so is broken."""
    try:
        found = json.loads((folder / contract.FAILURE_FILE).read_text(encoding="utf-8"))
        return int(found["stage"]), str(found["error"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def check_earlier(options: Any, stage: int) -> None:
    """InputError where a stage before this one has failed on the job."""
    source = written_to(options, stage) if stage == 1 else Path(options.input_dir)
    failure = failure_of(source)
    if failure and failure[0] < stage:
        raise InputError(f"stage {failure[0]} failed: {failure[1]}")


def record(folder: Path, stage: int, text: str, *, done: bool = False) -> None:
    """Say in a job's folder why it failed, or remove what no longer holds. done: later stages have new input."""
    failure = failure_of(folder)
    if not text:
        if failure and (failure[0] == stage or (done and failure[0] >= stage)):
            (folder / contract.FAILURE_FILE).unlink(missing_ok=True)
    elif folder.is_dir() and not (failure and failure[0] < stage):
        write_json(folder / contract.FAILURE_FILE, json.dumps({"stage": stage, "error": text}, ensure_ascii=False))


def write_json(path: Path, text: str) -> None:
    """Write a line of JSON; nothing where it is there already."""
    line = f"{text}\n".encode()
    if path.is_file() and path.read_bytes() == line:
        return
    with replacing(path) as temporary:
        temporary.write_bytes(line)
