"""A part of a model beside the transformer, in a folder or one file: what it says of itself, and its tensors."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hunyuan_staged.runtime.progress import quiet
from hunyuan_staged.weights import derived_configs
from hunyuan_staged.weights.boundary import read_json
from hunyuan_staged.weights.configs import diffusers_vae_config, official_vae_config
from hunyuan_staged.weights.folder import ModelFolder
from hunyuan_staged.weights.hub import PARTS
from hunyuan_staged.weights.key_maps import VAE_MAP, Named, diffusers_names, diffusers_tensors, refuse_names
from hunyuan_staged.weights.loading import Progress, read_tensors, weight_files
from hunyuan_staged.weights.stream import Place, nowhere

CONFIG = "config.json"
VAE_PREFIXES = ("first_stage_model.", "vae.")
_DERIVED = {
    "text": derived_configs.text_config,
    "glyph": derived_configs.glyph_config,
    "image": derived_configs.image_config,
}


def part_content(folder: ModelFolder, part: str) -> tuple[Mapping[str, Any], Path]:
    """(what the config.json of an encoder says, where that is from); of one file it follows from the shapes."""
    file, place = folder.files.get(part), folder.folders(part)[0] / CONFIG
    if file is None:
        folder.require(part)
        return read_json(place), place
    known = read_json(place) if place.is_file() else {}
    return _DERIVED[part](file.shapes, known, file.path), file.path


def part_tensors(
    folder: ModelFolder,
    part: str,
    device: torch.device,
    wanted: Callable[[str], bool] = lambda _: True,
    stays_on_host: Callable[[str], bool] = lambda _: False,
    progress: Progress = quiet,
    what: str | None = None,
    place: Place = nowhere,
) -> Iterator[Named]:
    """The tensors of a part by its own names; wanted, stays_on_host and place as in loading.read_tensors. what: is loaded,
    for the progress, where it is not the whole part."""
    file = folder.files.get(part)
    named = partial(progress, desc=f"loading {what or PARTS[part].title}")
    if file is not None:
        return file.tensors(device, wanted, stays_on_host, named)
    files = weight_files(folder.require(part)[0])
    return read_tensors(files, wanted, device, stays_on_host, progress=partial(named, unit="shard"), place=place)


# -- the VAE's file --


def _vae_plain(name: str) -> str:
    for prefix in VAE_PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _in_diffusers_names(name: str) -> bool:
    return _vae_plain(name).startswith(("decoder.up_blocks.", "encoder.down_blocks."))


def vae_file_config(folder: ModelFolder) -> dict[str, Any]:
    """diffusers' arguments of a VAE in one file."""
    file, place = folder.files["vae"], folder.folders("vae")[0] / CONFIG
    known: dict[str, Any] = {}
    if place.is_file():
        known = (official_vae_config if folder.official else diffusers_vae_config)(read_json(place), place)
    shapes = {}
    diffusers = any(map(_in_diffusers_names, file.shapes))
    unknown = []
    for name, shape in file.shapes.items():
        found = diffusers_names(_vae_plain(name), VAE_MAP)
        if diffusers:
            shapes[_vae_plain(name)] = shape
        elif found:
            shapes[found[1][0]] = shape
        else:
            unknown.append(name)
    refuse_names(f"{file.path} holds tensors that no VAE of this suite has", unknown)
    return diffusers_vae_config(derived_configs.vae_config(shapes, known, file.path), file.path)


def vae_file_names(tensors: Iterable[Named]) -> Iterator[Named]:
    """A VAE file's tensors under diffusers' names."""
    for name, tensor in tensors:
        plain = _vae_plain(name)
        yield from diffusers_tensors(plain, tensor, VAE_MAP) or [(plain, tensor)]
