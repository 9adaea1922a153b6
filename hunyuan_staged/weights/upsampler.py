"""Where a latent upsampler lies on disk, and which one it is: by its tensors, whatever file or folder they are in."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from hunyuan_staged.errors import InputError
from hunyuan_staged.weights.boundary import read_json, require_regular
from hunyuan_staged.weights.fingerprint import sampled_hash
from hunyuan_staged.weights.key_maps import Named
from hunyuan_staged.weights.loading import read_tensors, weight_files

# The tensor that only this kind of upsampler has.
MARKS = {"720p": "blocks.0.block.0.conv.weight", "1080p": "up.0.block.0.conv1.conv.weight"}
CONFIG = "config.json"


def upsampler_kind(names: Iterable[str]) -> str | None:
    """Which kind, "720p" or "1080p", a checkpoint's tensors are of by their names; None where of neither."""
    known = set(names)
    return next((kind for kind, mark in MARKS.items() if mark in known), None)


def upsampler_config(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """The config of a checkpoint that comes without one, from its tensors' shapes.

    Raises InputError where the tensors are of no latent upsampler.
    """
    kind = upsampler_kind(shapes)
    if kind is None:
        raise InputError(f"no latent upsampler: it holds neither {' nor '.join(MARKS.values())}")
    try:
        if kind == "720p":
            return {
                "in_channels": shapes["in_conv.conv.weight"][1],
                "out_channels": shapes["out_conv.conv.weight"][0],
                "hidden_channels": shapes["in_conv.conv.weight"][0],
                "num_blocks": _count(shapes, "blocks"),
                "global_residual": False,  # no published one has it, and no shape shows it
            }
        levels = range(_count(shapes, "up"))
        return {
            "z_channels": shapes["conv_in.conv.weight"][1],
            "out_channels": shapes["conv_out.conv.weight"][0],
            "block_out_channels": [shapes[f"up.{level}.block.0.conv1.conv.weight"][0] for level in levels],
            "num_res_blocks": _count(shapes, "up.0.block") - 1,
        }
    except KeyError as error:
        raise InputError(f"a {kind} latent upsampler without {error.args[0]}") from error


def _count(names: Iterable[str], prefix: str) -> int:
    """How many numbered modules there are below a prefix."""
    head = f"{prefix}."
    return len({name.removeprefix(head).split(".")[0] for name in names if name.startswith(head)})


@dataclass(frozen=True)
class UpsamplerFiles:
    """A latent upsampler on disk. origin: what its config was read from, config.json or the weights themselves."""

    files: tuple[Path, ...]
    kind: str
    config: dict[str, Any]
    origin: Path

    def fingerprint(self) -> str:
        """A hash that tells these weights from others, by samples of the files."""
        return hashlib.sha256(b"".join(map(sampled_hash, self.files))).hexdigest()

    def tensors(self, device: torch.device) -> Iterator[Named]:
        """Its tensors by name, on the device."""
        return read_tensors(self.files, lambda _: True, device)


def open_upsampler(path: Path) -> UpsamplerFiles:
    """The upsampler in a folder of the official layout, or in one safetensors file, which needs no config.

    A config.json beside the weights is read where they are the only ones there. Raises InputError where there are no
    weights, where they are of no upsampler, and where a folder lacks its config.
    """
    files = weight_files(path) if path.is_dir() else [path]
    shapes = {name: shape for file in files for name, shape in _shapes(file).items()}
    kind = upsampler_kind(shapes)
    if kind is None:
        raise InputError(f"{path} is no latent upsampler: it holds neither {' nor '.join(MARKS.values())}")
    folder = path if path.is_dir() else path.parent
    config = folder / CONFIG
    if path.is_dir() or (config.exists() and list(folder.glob("*.safetensors")) == files):
        return UpsamplerFiles(tuple(files), kind, read_json(config), config)
    try:
        return UpsamplerFiles(tuple(files), kind, upsampler_config(shapes), path)
    except InputError as error:
        raise InputError(f"{path} is {error}") from error


def _shapes(path: Path) -> dict[str, list[int]]:
    """The shapes of a safetensors file's tensors, which are not read."""
    require_regular(path)
    try:
        with safe_open(path, "pt") as file:
            return {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a whole safetensors file ({error})") from error
