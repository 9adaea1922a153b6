"""Where each part of a model lies on disk, in either published layout, and which versions there are.

The official layout is that of tencent/HunyuanVideo-1.5 on the hub, one transformer version per folder; the diffusers
layout that of hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-*.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hunyuan_staged.errors import InputError
from hunyuan_staged.geometry import BUCKET_BASE
from hunyuan_staged.runtime.progress import quiet
from hunyuan_staged.versions import (
    DEFAULT_RESOLUTION,
    TransformerVersion,
    make_version,
    parse_version,
    super_resolution_named,
)
from hunyuan_staged.weights.boundary import read_json
from hunyuan_staged.weights.fingerprint import hash_of_files, model_files
from hunyuan_staged.weights.hub import (
    DIFFUSERS_FETCH,
    PARTS,
    PUBLISHED_RESOLUTIONS,
    PUBLISHED_SUPER_RESOLUTION,
    download,
    model_fetch,
    official_fetch,
    snapshot,
)
from hunyuan_staged.weights.key_maps import refuse_names
from hunyuan_staged.weights.loading import Progress, weight_files
from hunyuan_staged.weights.schema import DIFFUSERS_TRANSFORMER, GUIDER, SCHEDULER, Schema, check

if TYPE_CHECKING:
    from hunyuan_staged.weights.part_files import PartFile

# The task of diffusers' pipelines.
PIPELINES = {"HunyuanVideo15Pipeline": "t2v", "HunyuanVideo15ImageToVideoPipeline": "i2v"}


def is_version(name: str) -> bool:
    """Whether a folder's name is that of a transformer version, which 720p_sr_distilled and the like are not."""
    try:
        parse_version(name)
    except InputError:
        return False
    return True


@dataclass(frozen=True)
class ModelFolder:
    """A model on disk, in the official or the diffusers layout; components and encoder_components load its parts.

    repo: the hub id that the folder is a snapshot of. Of its transformers a version's weights are downloaded when they
    are first read: the official repository holds ten of 33 GB each. planned: its configs alone count, nothing is loaded.
    files: what stands in the place of parts, by part.
    """

    path: Path
    layout: str  # "official" or "diffusers"
    repo: str | None = None
    planned: bool = False
    files: Mapping[str, "PartFile"] = field(default_factory=dict)

    @property
    def official(self) -> bool:
        return self.layout == "official"

    def folders(self, part: str) -> list[Path]:
        """The folders of a part, which may be absent."""
        return [self.path / name for name in (PARTS[part].official if self.official else PARTS[part].diffusers)]

    def has(self, part: str) -> bool:
        return part in self.files or all(folder.is_dir() for folder in self.folders(part))

    def origin(self, part: str) -> Path:
        """Where the weights of a part are, a file or a folder; InputError as require."""
        return self.files[part].path if part in self.files else self.require(part)[0]

    @property
    def identity(self) -> tuple[Path, ...]:
        """What tells this model from others on this machine: its path, and the files that replace parts of it."""
        return self.path, *(file.path for _, file in sorted(self.files.items()))

    def require(self, part: str) -> list[Path]:
        """The folders of a part; where one is absent, InputError names it and the command that downloads it."""
        folders = self.folders(part)
        for folder in folders:
            if not folder.is_dir():
                name = folder.relative_to(self.path).as_posix()
                raise InputError(
                    f"{self.path} has no {PARTS[part].title} ({name}); get it: {self._fetch_command(part, name)}"
                )
        return folders

    def _fetch_command(self, part: str, folder: str) -> str:
        if self.official:
            return PARTS[part].official[folder].format(path=self.path)
        known = part != "transformer" and self.has("transformer")
        version = self.versions()[0] if known else f"{DEFAULT_RESOLUTION}_t2v"
        return DIFFUSERS_FETCH.format(version=version, folder=folder, path=self.path)

    # -- transformer --

    def versions(self) -> list[str]:
        """The transformer versions in the folder, by name; the super-resolution ones beside them are not counted."""
        (folder,) = self.require("transformer")
        if self.official:
            names = sorted(path.parent.name for path in folder.glob("*/config.json"))
            return [name for name in names if is_version(name)]
        return [self._diffusers_version(folder).name]

    def _diffusers_version(self, folder: Path) -> TransformerVersion:
        path = folder / "config.json"
        config = read_json(path)
        check(
            config, {name: DIFFUSERS_TRANSFORMER[name] for name in ("target_size", "task_type", "use_meanflow")}, path
        )
        refuse_names(f"{path} lacks", [name for name in ("target_size",) if name not in config])
        resolution = next(name for name, base in BUCKET_BASE.items() if base == config["target_size"])
        guider = self.path / "guider" / "guider_config.json"
        guidance = self._settings(guider, GUIDER).get("guidance_scale") if guider.exists() else None
        meanflow = bool(config.get("use_meanflow"))
        return make_version(
            resolution, self.task(config), step_distilled=meanflow, cfg_distilled=guidance == 1 and not meanflow
        )

    def task(self, config: Mapping[str, Any]) -> str:
        """The task of a diffusers folder. Its pipeline's name or an image encoder overrules the transformer's task_type:
        diffusers' conversion script writes "i2v" for every version, which is the class's default, too.
        """
        index = self.path / "model_index.json"
        name = read_json(index).get("_class_name") if index.exists() else None
        if isinstance(name, str) and name in PIPELINES:
            return PIPELINES[name]
        return "i2v" if self.has("image") else config.get("task_type") or "i2v"

    def _settings(self, path: Path, schema: Schema) -> dict[str, Any]:
        content = read_json(path)
        check(content, schema, path)
        return content

    def fingerprint(self, parts: Sequence[str], version: str | None = None) -> str:
        """A hash that tells these weights from others: names, sizes and samples of all files of the parts.

        parts: keys of PARTS; of "transformer" and "upsampler" only the version's folder counts. Where the folder lies and
        when it was written do not count. It reads about a megabyte of each file.
        """
        files = []
        for part in parts:
            if part in self.files:
                files.append((part, self.files[part].path))
            folders = [folder for folder in self.folders(part) if folder.is_dir()]
            if part == "transformer":
                assert version is not None
                self.transformer_files(version)  # a hub repository's are downloaded now
                folders = [self.transformer_folder(version)]
            elif part == "upsampler":
                assert version is not None
                folders = [self.super_resolution_folder(part, version)]
            files += [(f"{part}/{name}", path) for folder in folders for name, path in model_files(folder)]
        return hash_of_files(files)

    def resolutions(self) -> list[str]:
        """The resolutions of the versions in the folder."""
        return sorted({parse_version(name).resolution for name in self.versions()})

    def super_resolution_folder(self, part: str, version: str) -> Path:
        """transformer/ or upsampler/<version of super resolution>; InputError where it is absent names the command.

        Of a hub repository the folder is downloaded now.
        """
        name = f"{part}/{version}"
        if not self.official:
            raise InputError(f"{self.path} is in diffusers' layout, which has no super resolution ({name})")
        if self.repo:
            snapshot(self.repo, [f"{name}/*"], revision=self.path.name)
        folder = self.path / name
        if not folder.is_dir():
            known = super_resolution_named(version)
            published = known is not None and known.resolution in PUBLISHED_SUPER_RESOLUTION
            get = f"; get it: {official_fetch(name).format(path=self.path)}" if published else ""
            raise InputError(f"{self.path} has no {name}{get}")
        return folder

    def lacks(self, version: str) -> str:
        """What to say where a transformer version is absent: those that are here, and the command that gets it."""
        folder = self.path / "transformer" / version
        if folder.is_dir() and not os.access(folder, os.R_OK | os.X_OK):
            return f"{folder}: Permission denied"
        said = f"{self.path} has no transformer {version}; it holds {', '.join(self.versions()) or 'none'}"
        if parse_version(version).resolution not in PUBLISHED_RESOLUTIONS:
            return said
        if not self.official:  # such a folder holds one version
            return f"{said}; get it: python -m hunyuan_staged.download {version} --model_path DIR"
        return f"{said}; get it: {official_fetch(f'transformer/{version}').format(path=self.path)}"

    def transformer_folder(self, version: str) -> Path:
        if super_resolution_named(version):
            return self.super_resolution_folder("transformer", version)
        (folder,) = self.require("transformer")
        offered = self.versions()
        if version not in offered:
            raise InputError(self.lacks(version))
        return folder / version if self.official else folder

    def config_alone(self, version: str) -> bool:
        """Whether of a version's transformer only the config is here: its weights are a file elsewhere, or forgotten."""
        return not self.repo and not any(self.transformer_folder(version).glob("*.safetensors*"))

    def transformer_files(self, version: str) -> list[Path]:
        """A version's weights; of a hub repository they are downloaded now, if they are not in its cache."""
        folder = self.transformer_folder(version)
        if self.repo:
            snapshot(self.repo, [f"{folder.relative_to(self.path).as_posix()}/*"], revision=self.path.name)
        return weight_files(folder)

    def flow_shift(self, version: str) -> float | None:
        """The schedule's shift where the folder records it for its version (diffusers layout), else None."""
        if self.official or not self.has("scheduler"):
            return None
        assert version in self.versions()
        shift = self._settings(self.folders("scheduler")[0] / "scheduler_config.json", SCHEDULER).get("shift")
        return None if shift is None else float(shift)


def open_model(model_path: str | Path, parts: Sequence[str], progress: Progress = quiet) -> ModelFolder:
    """The model folder at a path, or of a hub id, of which only these parts are downloaded (into the hub's own cache).

    parts: keys of PARTS. The hub shows its own progress bars, so `progress` has nothing to do. Raises InputError where
    the path is neither a folder in one of the two layouts nor a hub id, and where the hub cannot be reached.
    """
    assert all(part in PARTS for part in parts), parts
    try:
        path, repo = Path(model_path).expanduser(), None
        present = path.exists()
    except RuntimeError as error:
        raise InputError(f"{model_path}: there is no such user") from error
    except OSError as error:
        raise InputError(f"{model_path}: {error.strerror}") from error
    if not present:
        repo = str(model_path)
        path = download(repo, parts)
    layout = layout_of(path)
    if layout is None:
        command = model_fetch(f"{DEFAULT_RESOLUTION}_t2v", model_path)
        raise InputError(
            f"{model_path} is no model folder: it has neither the official layout (transformer/<version>/config.json, "
            f"vae/, …) nor diffusers' (model_index.json); to get one: {command}"
        )
    return ModelFolder(path, layout, repo)


def layout_of(path: Path) -> str | None:
    """Which layout a folder has, if any. The transformers tell; without them it is judged by what else there is."""
    if (path / "transformer" / "config.json").is_file():
        return "diffusers"
    if any(path.glob("transformer/*/config.json")):
        return "official"
    if (path / "model_index.json").is_file():
        return "diffusers"
    return "official" if any((path / name).is_dir() for part in PARTS.values() for name in part.official) else None
