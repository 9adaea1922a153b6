"""Opening a model for a stage: a folder in either layout, a hub id, or single files; with files in the place of parts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from hunyuan_staged import versions
from hunyuan_staged.errors import InputError
from hunyuan_staged.run_options import RunOptions
from hunyuan_staged.runtime.progress import Reporter
from hunyuan_staged.versions import TransformerVersion
from hunyuan_staged.weights.folder import ModelFolder, open_model
from hunyuan_staged.weights.hub import FILE_PARTS, PARTS
from hunyuan_staged.weights.part_files import PartFile, PartsFolder, open_part, opened
from hunyuan_staged.weights.published import model_for_plan
from hunyuan_staged.weights.single_file import guess_version, open_transformer

SUFFIXES = (".safetensors", ".gguf")
# Where ComfyUI's repositories and its own folder have the files of each part.
COMFY_FOLDERS = ("diffusion_models", "unet", "text_encoders", "clip_vision", "vae")
Choose = Callable[[Path, bool], TransformerVersion]  # a version by a transformer's file, and whether it is meanflow's


def open_for(
    options: RunOptions, path: str, parts: Sequence[str], report: Reporter, version: str | None = None
) -> ModelFolder:
    """The model at a path or of a hub id: to be loaded, or with --dry_run what a plan can go by.

    parts: keys of PARTS; those that an option names a file for are taken from there. version: of super resolution, None
    for any other. The log says what a file was taken for.
    """
    asked = {part: getattr(options, PARTS[part].option, None) for part in parts if part in FILE_PARTS}
    given = {part: open_part(part, Path(file)) for part, file in asked.items() if file}
    for file in given.values():
        report.info(file.describe())
    others = [part for part in parts if part not in given]
    place = expanded(path)
    if is_files(place):
        choose = partial(version_of_file, getattr(options, "transformer_version", None), {}, report)
        model: ModelFolder = open_files(place, others, choose, report)
    elif options.dry_run:
        model = model_for_plan(path, others, version)
    elif not others and not place.exists():
        model = PartsFolder(place, "official")  # nothing of it is read
    else:
        model = open_model(path, others, report.progress)
    return replace(model, files={**model.files, **given})


def open_recorded(path: str, config: Mapping[str, Any], report: Reporter) -> ModelFolder:
    """The model of a run, for its VAE: that file which the config records, else the model's own."""
    place, file = expanded(path), config.get("vae")
    others = [] if file else ["vae"]
    if is_files(place):
        model: ModelFolder = open_files(place, others, _no_version, report)
    else:
        model = open_model(path, others, report.progress)
    return replace(model, files={**model.files, "vae": open_part("vae", Path(file))}) if file else model


def expanded(path: str) -> Path:
    """A path with ~ as the user's home; InputError where there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise InputError(f"{path}: there is no such user") from error


def _no_version(path: Path, meanflow: bool) -> TransformerVersion:
    raise AssertionError("no transformer was asked for")


def is_files(path: Path) -> bool:
    """Whether a path is a transformer's file, or a folder of files for parts and none in a layout."""
    try:
        if path.is_file():
            return True
        if (path / "model_index.json").exists() or any(path.glob("transformer/**/config.json")):
            return False
        return any(map(_is_part, single_files(path)))
    except (OSError, ValueError):
        return False


def _is_part(file: Path) -> bool:
    try:
        return opened("--model_path", file) is not None
    except InputError:
        return False


def single_files(path: Path) -> list[Path]:
    """The files for parts in a folder, its own and those of folders as ComfyUI has them."""
    folders = [path, *(path / base / name for base in ("", "split_files") for name in COMFY_FOLDERS)]
    return [
        file
        for folder in folders
        if not (folder / "config.json").exists()
        for file in sorted(folder.glob("*"))
        if file.suffix in SUFFIXES and file.is_file()
    ]


def transformer_file(path: Path, report: Reporter) -> Path:
    """The transformer's file in a folder of single files, or the one file that the path is."""
    if path.is_file():
        return path
    found = _by_part(path, ("transformer",), report)
    if "transformer" not in found:
        raise InputError(f"{path} holds no transformer's file")
    return found["transformer"].path


def open_files(path: Path, parts: Sequence[str], choose: Choose, report: Reporter) -> PartsFolder:
    """A transformer's file, or a folder of files for parts; InputError names a part that it lacks, or has twice."""
    found = {} if path.is_file() else _by_part(path, parts, report)
    transformer = None
    if "transformer" in parts:
        if not path.is_file() and "transformer" not in found:
            raise InputError(f"{path} holds no transformer's file")
        own = path if path.is_file() else found["transformer"].path
        transformer = open_transformer(own, partial(choose, own), "--model_path")
        report.info(transformer.describe())
    files = {part: file for part, file in found.items() if part in parts and part in FILE_PARTS}
    for file in files.values():
        report.info(file.describe())
    model = PartsFolder(path, "official", files=files, transformer=transformer)
    for part in parts:
        if part in FILE_PARTS and not model.has(part):
            what = "is a transformer alone" if path.is_file() else f"has no file for the {PARTS[part].title}"
            raise InputError(f"{path} {what}; give --{PARTS[part].option} FILE")
    return model


def _by_part(path: Path, parts: Sequence[str], report: Reporter) -> dict[str, PartFile]:
    """The files of a folder by the parts that they are; those of other kinds are passed over with a warning.

    InputError where two are of one part that is asked for.
    """
    found: dict[str, PartFile] = {}
    for file in single_files(path):
        try:
            one = opened("--model_path", file)
        except InputError as error:
            report.warn(f"passed over: {error.text.removeprefix('--model_path ')}")
            continue
        if one is None or one.part not in parts:
            continue
        if one.part in found:
            option = PARTS[one.part].option or "transformer"
            raise InputError(
                f"{path} holds two files for the {PARTS[one.part].title}, {found[one.part].path.name} and {file.name}; "
                f"name one by --{option}"
            )
        found[one.part] = one
    return found


def version_of_file(
    given: str | None, config: Mapping[str, Any], report: Reporter, file: Path, meanflow: bool
) -> TransformerVersion:
    """The version of a transformer's file: as given, as stage 1 recorded for this very file, by its name, as recorded.

    A guess is said. InputError where nothing tells.
    """
    if given:
        return versions.parse_version(given)
    recorded = config.get("transformer_version")
    model = config.get("model_path")
    if recorded and model and file.resolve().is_relative_to(expanded(model).resolve()):
        return versions.parse_version(recorded)
    right = "where that is wrong, give --transformer_version"
    guessed = guess_version(file.name, meanflow=meanflow)
    if guessed:
        report.warn(f"{file.name}: its name is taken to mean {guessed.name}; {right}")
        return guessed
    if not recorded:
        raise InputError(f"neither {file.name} nor stage 1 says which version it is", option="transformer_version")
    report.warn(f"{file.name}: taken for the version that stage 1 recorded, {recorded}; {right}")
    return versions.parse_version(recorded)
