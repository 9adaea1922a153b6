"""The formats of one-file weights: which are read, and which are recognised and refused by name."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hunyuan_staged.errors import InputError
from hunyuan_staged.files.sniffing import READ, is_gguf
from hunyuan_staged.weights.quantization import gguf_file, scaled_fp8
from hunyuan_staged.weights.quantization.header import Header, read_header

PLAIN = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
GGUF = "GGUF"


def _has_leaf(pattern: str) -> Callable[[Header], bool]:
    compiled = re.compile(rf"(?:^|\.)(?:{pattern})(?:\.|$)")
    return lambda header: any(compiled.search(name) for name in header.shapes)


def _nvfp4(header: Header) -> bool:
    """Two values a byte, with a float8 scale for every 16 of them."""
    return any(
        name.endswith(".weight_scale_2") or (name.endswith(".weight_scale") and dtype in scaled_fp8.TYPES)
        for name, dtype in header.dtypes.items()
    )


@dataclass(frozen=True)
class Format:
    """A format by its name, and how its files are known. remedy: what to do with a file that is refused."""

    name: str
    matches: Callable[[Header], bool]
    remedy: str | None = None


FORMATS: Sequence[Format] = (
    Format("a LoKr adapter", _has_leaf("lokr_w1|lokr_w1_a|lokr_w2|lokr_w2_a"), "only LoRA adapters can be added"),
    Format("a LoHa adapter", _has_leaf("hada_w1_a|hada_w2_a"), "only LoRA adapters can be added"),
    Format("a LoRA adapter", _has_leaf("lora_A|lora_B|lora_down|lora_up"), "give it as --lora"),
    Format("NVFP4", _nvfp4, f"read is {READ}"),
    Format("float8 in blocks", _has_leaf("weight_scale_inv"), f"read is {READ}"),
    Format("float8", scaled_fp8.is_scaled),
    Format("plain", lambda header: set(header.dtypes.values()) <= PLAIN.keys()),
)


def recognise(flag: str, path: Path, *, gguf: bool = True) -> tuple[Header, Format]:
    """The header of a file, and the format it is in; InputError for a format that is not read, by its name.

    gguf: whether GGUF is read.
    """
    if is_gguf(flag, path, gguf=gguf):
        return gguf_file.read_header(flag, path), Format(GGUF, lambda _: True)
    header = read_header(path)
    if not header.shapes:
        raise InputError(f"{flag} {path} holds no tensors")
    found = next((one for one in FORMATS if one.matches(header)), None)
    if found is None:
        dtypes = ", ".join(sorted(set(header.dtypes.values()) - PLAIN.keys()))
        raise InputError(f"{flag} {path} holds tensors in {dtypes}; read is {READ}")
    if found.remedy:
        raise InputError(f"{flag} {path} is {found.name}; {found.remedy}")
    return header, found
