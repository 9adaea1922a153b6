"""Opening a model for a stage: a folder in either layout, a hub id, or single files; with files in the place of parts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
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


@dataclass(frozen=True)
class Files:
    """What stands in the place of a model folder: a transformer's file, or a folder of files for parts, each of which has
    been looked at once.

    found: those files by part. passed_over: why the others are no part of a model.
    """

    path: Path
    found: Mapping[str, Sequence[PartFile]]
    passed_over: Sequence[str] = ()

    def part(self, part: str) -> PartFile | None:
        """The file for a part; InputError where there are two."""
        files = self.found.get(part, ())
        if len(files) > 1:
            option = PARTS[part].option or "transformer"
            raise InputError(
                f"{self.path} holds two files for the {PARTS[part].title}, {files[0].path.name} and {files[1].path.name}; "
                f"name one by --{option}"
            )
        return files[0] if files else None

    def transformer(self) -> tuple[Path, PartFile | None]:
        """The transformer's file, and what has been seen of it."""
        if self.path.is_file():
            return self.path, None
        file = self.part("transformer")
        if file is None:
            raise InputError(f"{self.path} holds no transformer's file")
        return file.path, file

    def warn(self, report: Reporter) -> None:
        """Say which files are passed over."""
        for why in self.passed_over:
            report.warn(f"passed over: {why}")


def look_at(path: Path) -> Files | None:
    """The files at a path that is a transformer's file, or a folder of files for parts and none in a layout; else None."""
    found: dict[str, list[PartFile]] = {}
    passed_over = []
    try:
        if path.is_file():
            return Files(path, found)
        if (path / "model_index.json").exists() or any(path.glob("transformer/**/config.json")):
            return None
        for file in single_files(path):
            try:
                one = opened("--model_path", file)
            except InputError as error:
                passed_over.append(error.text.removeprefix("--model_path "))
                continue
            if one is not None:
                found.setdefault(one.part, []).append(one)
    except (OSError, ValueError):
        return None
    return Files(path, found, passed_over) if found else None


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
    choose = partial(version_of_file, getattr(options, "transformer_version", None), {}, report)

    def plan(others: Sequence[str]) -> ModelFolder:
        return model_for_plan(path, others, version)

    return _open(path, parts, given, choose, report, plan if options.dry_run else None)


def open_recorded(path: str, config: Mapping[str, Any], report: Reporter, *, planned: bool = False) -> ModelFolder:
    """The model of a run, for its VAE: that file which the config records, else the model's own.

    planned: nothing of it is to be loaded.
    """
    file = config.get("vae")
    given = {"vae": open_part("vae", Path(file))} if file else {}
    return _open(path, ["vae"], given, _no_version, report, partial(model_for_plan, path) if planned else None)


def _open(
    path: str,
    parts: Sequence[str],
    given: Mapping[str, PartFile],
    choose: Choose,
    report: Reporter,
    plan: Callable[[Sequence[str]], ModelFolder] | None = None,
) -> ModelFolder:
    """A model, with the files that are given in the place of parts. plan: what opens a folder or a hub id where nothing is
    to be loaded."""
    others = [part for part in parts if part not in given]
    place = expanded(path)
    files = look_at(place)
    if files:
        model: ModelFolder = open_files(files, others, choose, report)
    elif plan:
        model = plan(others)
    elif not others and not place.exists():
        model = PartsFolder(place, "official")  # nothing of it is read
    else:
        model = open_model(path, others, report.progress)
    return replace(model, files={**model.files, **given})


def expanded(path: str) -> Path:
    """A path with ~ as the user's home; InputError where there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise InputError(f"{path}: there is no such user") from error


def _no_version(path: Path, meanflow: bool) -> TransformerVersion:
    raise AssertionError("no transformer was asked for")


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


def open_files(files: Files, parts: Sequence[str], choose: Choose, report: Reporter) -> PartsFolder:
    """The model that files make up; InputError names a part that they lack, or have twice."""
    path = files.path
    files.warn(report)
    found = {part: file for part in parts if (file := files.part(part))}
    transformer = None
    if "transformer" in parts:
        own, seen = files.transformer()
        transformer = open_transformer(own, partial(choose, own), "--model_path", seen)
        report.info(transformer.describe())
    found = {part: file for part, file in found.items() if part in FILE_PARTS}
    for file in found.values():
        report.info(file.describe())
    model = PartsFolder(path, "official", files=found, transformer=transformer)
    for part in parts:
        if part in FILE_PARTS and not model.has(part):
            what = "is a transformer alone" if path.is_file() else f"has no file for the {PARTS[part].title}"
            raise InputError(f"{path} {what}; give --{PARTS[part].option} FILE")
    return model


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
