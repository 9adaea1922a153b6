"""A part of a model beside its transformer as one safetensors file: recognised by keys, shapes and dtypes.

What its config would say follows from the shapes (derived_configs.py). A tokenizer is in no such file: the text encoder's
is taken from beside the file, else from the model folder, the glyph encoder's from the model folder.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from hunyuan_staged.errors import InputError
from hunyuan_staged.runtime.progress import quiet
from hunyuan_staged.weights.folder import ModelFolder
from hunyuan_staged.weights.hub import PARTS
from hunyuan_staged.weights.key_maps import Named
from hunyuan_staged.weights.loading import Progress
from hunyuan_staged.weights.quantization.contents import Contents, contents
from hunyuan_staged.weights.quantization.formats import GGUF, PLAIN, Format, recognise
from hunyuan_staged.weights.quantization.header import Header

# The ending of a tensor's name that tells a part, whatever stands before it; the first that fits counts.
MARKS = {
    "transformer": ("double_blocks.0.img_mlp.fc1.weight", "transformer_blocks.0.ff.net.0.proj.weight"),
    "glyph": ("block.0.layer.0.SelfAttention.q.weight",),
    "image": ("embeddings.patch_embedding.weight",),
    "vae": ("decoder.conv_in.conv.weight",),
    "text": ("layers.0.self_attn.q_proj.weight",),
    "upsampler": ("in_conv.conv.weight", "up.0.block.0.conv1.conv.weight"),
}


def part_of(names: Iterable[str]) -> str | None:
    """Which part of a model tensors of these names are; None where they are of none."""
    names = list(names)
    found = (part for part, marks in MARKS.items() if any(name.endswith(marks) for name in names))
    return next(found, None)


@dataclass(frozen=True)
class PartFile:
    """A file that was taken for a part. contents: its weights."""

    part: str
    path: Path
    header: Header
    kind: Format
    contents: Contents

    @property
    def names(self) -> Sequence[str]:
        """Of its weights, scales not counted."""
        return self.contents.names

    @property
    def shapes(self) -> dict[str, list[int]]:
        return {name: self.header.shapes[name] for name in self.names}

    def describe(self) -> str:
        """A line for the log: what the file was taken for."""
        dtypes = {self.header.dtypes[name] for name in self.names}
        stored = [PLAIN[dtype] for dtype in PLAIN if dtype in dtypes]
        stored = ["float8, made wider as it is read"] * (self.kind.name != "plain") + stored
        title = PARTS[self.part].title
        return f"{self.path.name}: taken for the {title}, {len(self.names)} weights, {' and '.join(stored)}"

    def tensors(
        self,
        device: torch.device,
        wanted: Callable[[str], bool] = lambda _: True,
        stays_on_host: Callable[[str], bool] = lambda _: False,
        progress: Progress = quiet,
    ) -> Iterator[Named]:
        """The weights by the file's names, those in float8 in float32; arguments as of loading.read_tensors."""
        for _ in progress([self.path], unit="file"):
            for name, weight in self.contents.read(wanted, device, stays_on_host):
                yield name, weight.wide()


def open_part(part: str, path: Path) -> PartFile:
    """Recognise the file that an option names; InputError for a format that is not read, and for another part."""
    flag = f"--{PARTS[part].option}"
    if not path.exists():
        raise InputError(f"{path} does not exist", option=PARTS[part].option)
    found = opened(flag, path, gguf=part == "transformer")
    if found is None or found.part != part:
        held = f"a {PARTS[found.part].title}" if found else "no part of this model by its tensors"
        raise InputError(f"{path} is {held}; allowed is a {PARTS[part].title}", option=PARTS[part].option)
    return found


def opened(flag: str, path: Path, *, gguf: bool = True) -> PartFile | None:
    """A file with the part it is taken for; None where it is of none. flag: that named it, for messages; gguf: whether it
    may be one."""
    header, kind = recognise(flag, path, gguf=gguf)
    held = contents(header)
    part = part_of(held.names)
    if part is None:
        return None
    if kind.name == GGUF and part != "transformer":
        recognise(flag, path, gguf=False)
    return PartFile(part, path, header, kind, held)


@dataclass(frozen=True)
class PartsFolder(ModelFolder):
    """Files for the parts of a model, and nothing else of it but tokenizers.

    path: the folder that they are in; where a transformer's file was named alone, that file.
    transformer: that file, opened (a single_file.TransformerFile); None where there is none.
    """

    transformer: ModelFolder | None = field(default=None, kw_only=True)

    def folders(self, part: str) -> list[Path]:
        base = self.path.parent if self.path.is_file() else self.path
        return [base / name for name in PARTS[part].official]

    def versions(self) -> list[str]:
        return self._transformer().versions()

    def _transformer(self) -> ModelFolder:
        if self.transformer is None:
            raise InputError(f"{self.path} holds no transformer's file")
        return self.transformer

    def lacks(self, version: str) -> str:
        return f"{self.path} has no transformer {version}; it holds {', '.join(self.versions())}"

    def transformer_folder(self, version: str) -> Path:
        return self._transformer().transformer_folder(version)

    def config_alone(self, version: str) -> bool:
        return False

    def flow_shift(self, version: str) -> float | None:
        """None: a file has no scheduler."""
        return None

    def super_resolution_folder(self, part: str, version: str) -> Path:
        option = f"--super_resolution_{part}"
        raise InputError(f"{self.path} is no model folder, which has {part}/{version}; give {option} FILE")
