"""What a safetensors file says of its tensors; none is read."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from hunyuan_staged.errors import InputError


@dataclass(frozen=True)
class Header:
    """shapes and dtypes (as the file calls them: BF16, F8_E4M3, …) by a tensor's name; metadata: text by name."""

    path: Path
    shapes: Mapping[str, list[int]]
    dtypes: Mapping[str, str]
    metadata: Mapping[str, str]


def read_header(path: Path) -> Header:
    """The header of a file; InputError where it is no whole safetensors file."""
    shapes, dtypes = {}, {}
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (no iterator)
                entry = file.get_slice(name)
                shapes[name], dtypes[name] = list(entry.get_shape()), str(entry.get_dtype())
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a whole safetensors file ({error})") from error
    return Header(path, shapes, dtypes, metadata)
