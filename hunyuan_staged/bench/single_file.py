"""`bench file FILE`: a transformer of full size with random weights as one file, in a format that people have."""

import argparse
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hunyuan_staged.bench.checkpoint import SIZES, Writer, parts_of, require_space, safetensors_header
from hunyuan_staged.errors import InputError
from hunyuan_staged.files.sniffing import GGUF_MAGIC

if TYPE_CHECKING:
    import torch

# bf16 and fused: q, k and v apart as LightX2V has them, and in one as ComfyUI does; float8 with a scale a row as LightX2V
# has it, and one a tensor as ComfyUI does. GGUF with ComfyUI's names.
SAFETENSORS = ("bf16", "fused", "fp8", "fp8_tensor")
MIXED = {"Q4_K_M": ("Q4_K", "Q6_K"), "Q4_K_S": ("Q4_K", "Q5_K")}  # most matrices, those that get more bits
GGUF = ("Q8_0", "Q6_K", "Q5_K", "Q4_K", *MIXED)
_ALIGNMENT = 32  # of tensors in a GGUF file, where it says nothing else


@dataclass(frozen=True)
class Entry:
    """Tensors that are drawn together: (dtype as the file calls it, shape, bytes) by name; draw: gives them in order."""

    held: Mapping[str, tuple[str, list[int], int]]
    draw: Callable[[], list["torch.Tensor"]]

    @property
    def size(self) -> int:
        return sum(size for _, _, size in self.held.values())


def add_parser(stages: Any) -> None:
    draw = stages.add_parser("file", help="draw a transformer of full size as one file, to time its loading and steps")
    draw.add_argument("file", help="where to; must not be there yet")
    draw.add_argument("--format", choices=(*SAFETENSORS, *GGUF), required=True, help="what the file is in")
    draw.add_argument("--version", default="720p_t2v", help="of the transformer (default: %(default)s)")
    draw.add_argument("--size", choices=SIZES, default="full", help="tiny: to try it out (default: %(default)s)")
    draw.set_defaults(run=draw_file)


def draw_file(args: argparse.Namespace) -> dict[str, Any]:
    """Write the file; InputError where there is one, or the disk too small, before anything is."""
    import torch
    from tqdm import tqdm

    from hunyuan_staged.demo import checkpoint_writer
    from hunyuan_staged.files.atomic import replacing

    started, path = time.perf_counter(), Path(args.file)
    if path.exists():
        raise InputError(f"{path} exists already; remove it or name another file")
    (part,) = parts_of(("transformer",), args.size, checkpoint_writer.any_version(args.version), args.version)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    writer = Writer(device, torch.bfloat16, torch.Generator(device).manual_seed(0), lambda _: None)
    entries = list(_entries(writer, part.tensors, args.format))
    size = sum(entry.size for entry in entries)
    require_space(path, size)
    with (
        tqdm(total=size, unit="B", unit_scale=True, desc="drawing weights", dynamic_ncols=True) as bar,
        replacing(path) as work,
        work.open("wb", buffering=0) as file,
    ):
        writer.done = bar.update
        held = {name: one for entry in entries for name, one in entry.held.items()}
        file.write(_gguf_header(held) if args.format in GGUF else safetensors_header(held))
        for entry in entries:
            for tensor in entry.draw():
                writer.append(file, tensor)
                file.write(bytes(-tensor.nbytes % (_ALIGNMENT if args.format in GGUF else 1)))
    return {
        "bench": "file",
        "file": str(path.absolute()),
        "format": args.format,
        "tensors": len(held),
        "gigabytes": round(path.stat().st_size / 1e9, 2),
        "seconds": round(time.perf_counter() - started, 1),
    }


def _entries(writer: Writer, official: Mapping[str, "torch.Tensor"], form: str) -> Iterator[Entry]:
    """What the file holds. official: the transformer's tensors on the meta device, q, k and v apart."""
    from hunyuan_staged.weights.key_maps import FUSED_RULES, TRANSFORMER_MAP, to_diffusers, to_official

    if form not in ("bf16", "fp8"):
        official = to_official(to_diffusers(official, TRANSFORMER_MAP), (*FUSED_RULES, *TRANSFORMER_MAP))
    layers = 1 + max(int(name.split(".")[1]) for name in official if name.startswith("double_blocks."))
    for name, tensor in official.items():
        matrix = name.startswith("double_blocks.") and tensor.ndim == 2
        if matrix and form in GGUF:
            yield _gguf(writer, name, tensor.shape, _kind(name, form, layers))
        elif matrix and form.startswith("fp8"):
            yield _float8(writer, name, tensor.shape, by_row=form == "fp8")
        else:
            yield _plain(writer, name, tensor.shape)


def _plain(writer: Writer, name: str, shape: "torch.Size") -> Entry:
    return Entry({name: ("BF16", list(shape), 2 * shape.numel())}, lambda: [writer.draw(name, shape)])


def _float8(writer: Writer, name: str, shape: "torch.Size", *, by_row: bool) -> Entry:
    from hunyuan_staged.weights.quantization.stored import FLOAT8, LARGEST

    def draw() -> list["torch.Tensor"]:
        weight = writer.draw(name, shape).float()
        scale = (weight.abs().amax(1, keepdim=True) if by_row else weight.abs().max()) / LARGEST
        return [(weight / scale).clamp(-LARGEST, LARGEST).to(FLOAT8), scale]

    scales = [shape[0], 1] if by_row else []
    held = {name: ("F8_E4M3", list(shape), shape.numel()), f"{name}_scale": ("F32", scales, 4 * (scales or [1])[0])}
    return Entry(held, draw)


def _kind(name: str, form: str, layers: int) -> str:
    """The type of a matrix. A mixed one gives more bits to v (in one tensor with q and k) and to what leads out of the
    feed-forward, in the blocks where llama.cpp does (use_more_bits in llama-quant.cpp)."""
    if form not in MIXED:
        return form
    usual, more = MIXED[form]
    block, eighth = int(name.split(".")[1]), layers // 8
    chosen = block < eighth or block >= 7 * layers // 8 or (block - eighth) % 3 == 2
    return more if chosen and name.endswith(("qkv.weight", "mlp.fc2.weight")) else usual


def _gguf(writer: Writer, name: str, shape: "torch.Size", kind: str) -> Entry:
    """Random blocks whose scales make numbers of about the size that a plain weight would have."""
    import torch

    from hunyuan_staged.weights.quantization.gguf_blocks import TYPES, dequantise

    kept = TYPES[kind]
    if shape[1] % kept.values:
        raise InputError(f"{name} {list(shape)}: rows are no whole blocks of {kind}, which are of {kept.values}")

    def draw() -> list["torch.Tensor"]:
        count = shape.numel() // kept.values
        blocks = torch.empty(count, kept.size, dtype=torch.uint8, device=writer.device)
        blocks.random_(0, 256, generator=writer.generator)

        def scale(*values: float) -> "torch.Tensor":
            """A part of the numbers with these scales."""
            for at, value in zip(kept.halves, values, strict=True):
                half = torch.tensor([value], dtype=torch.float16, device=writer.device)
                blocks[:, at : at + 2] = half.view(torch.uint8)
            return dequantise(blocks[:1024], kind, torch.float32)

        units = [scale(*(float(at == one) for at in kept.halves)) for one in kept.halves]
        # Where there is a minimum, so much of it that the numbers are around zero.
        least = [-float(units[0].mean() / units[1].mean())] if len(units) > 1 else []
        size = 0.7 / shape[1] ** 0.5 / float(scale(1.0, *least).std())
        scale(size, *(size * one for one in least))
        return [blocks]

    return Entry({name: (kind, list(shape), shape.numel() // kept.values * kept.size)}, draw)


def _gguf_header(held: Mapping[str, tuple[str, list[int], int]]) -> bytes:
    """What stands before the tensors of a GGUF file; format: as in gguf_file.py."""
    from hunyuan_staged.weights.quantization import gguf_file

    types = gguf_file.ggml_constants("the file").GGMLQuantizationType

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    entries = [text("general.architecture") + struct.pack("<I", gguf_file.TEXT) + text(gguf_file.ARCHITECTURE)]
    tensors, place = [], 0
    for name, (kind, shape, size) in held.items():
        axes = shape
        if len(shape) > gguf_file.GGML_AXES:
            axes = [shape[0], prod(shape[1:])]
            values = struct.pack(f"<IQ{len(shape)}i", gguf_file.INT32, len(shape), *shape)
            entries.append(text(gguf_file.ORIGINAL_SHAPE + name) + struct.pack("<I", gguf_file.ARRAY) + values)
        tensors.append(text(name) + struct.pack(f"<I{len(axes)}QIQ", len(axes), *axes[::-1], types[kind], place))
        place += size + -size % _ALIGNMENT
    header = GGUF_MAGIC + struct.pack("<IQQ", 3, len(tensors), len(entries)) + b"".join([*entries, *tensors])
    return header + bytes(-len(header) % _ALIGNMENT)
