"""`bench checkpoint FOLDER`: a checkpoint of full size with random weights, in the official layout, to time runs on.

All that a t2v run reads. Weights are drawn on the GPU where there is one, tensor after tensor, and written as they come.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from hunyuan_staged import versions
from hunyuan_staged.errors import InputError
from hunyuan_staged.files.disk import free_space

if TYPE_CHECKING:
    import torch

    from hunyuan_staged.demo.tiny import Sizes

SHARD_BYTES = 5 * 10**9
PIECE_BYTES = 2**26  # copied to the host at once
DTYPES = {"bfloat16": "BF16", "float32": "F32"}  # as safetensors calls them
PARTS = ("transformer", "text", "glyph", "vae")
SIZES = ("full", "tiny")
SPARE_BYTES = 2**28  # configs, tokenizers, headers: far less

# google/byt5-small, whose encoder Glyph-SDXL-v2 trains further.
BYT5_SMALL = {
    "glyph_width": 1472,
    "glyph_layers": 12,
    "glyph_heads": 6,
    "glyph_head_dim": 64,
    "glyph_mlp": 3584,
}


@dataclass(frozen=True)
class Part:
    """One part of a checkpoint: its folder, its tensors (on the meta device) by name, the stem of its files."""

    folder: str
    tensors: Mapping[str, Any]
    stem: str
    finish: Callable[[Path], None]  # writes configs and tokenizers


def add_parser(stages: Any) -> None:
    draw = stages.add_parser("checkpoint", help="draw a checkpoint of full size, to time runs on")
    draw.add_argument("folder", help="where to; made here, or empty")
    draw.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16", help="default: %(default)s")
    draw.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all of them")
    draw.add_argument("--version", default="720p_t2v", help="of the transformer (default: %(default)s)")
    draw.add_argument("--size", choices=SIZES, default="full", help="tiny: to try it out (default: %(default)s)")
    draw.set_defaults(run=draw_checkpoint)


def draw_checkpoint(args: argparse.Namespace) -> dict[str, Any]:
    """Write the checkpoint; InputError where the folder is not empty, or the disk too small, before anything is."""
    import torch
    from tqdm import tqdm

    from hunyuan_staged.demo import checkpoint_writer

    started, root = time.perf_counter(), Path(args.folder)
    dtype = getattr(torch, args.dtype)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    checkpoint_writer.require_vacant(root)
    parts = parts_of(args.parts, args.size, checkpoint_writer.any_version(args.version), args.version)
    size = sum(tensor.numel() for part in parts for tensor in part.tensors.values()) * dtype.itemsize
    require_space(root, size + SPARE_BYTES)
    generator = torch.Generator(device).manual_seed(0)
    with (
        tqdm(total=size, unit="B", unit_scale=True, desc="drawing weights", dynamic_ncols=True) as bar,
        checkpoint_writer.new_folder(root) as work,
    ):
        writer = Writer(device, dtype, generator, bar.update)
        for part in parts:
            writer.write(work / part.folder, part)
        checkpoint_writer.write_scheduler(work)
    seconds = time.perf_counter() - started
    return {
        "bench": "checkpoint",
        "folder": str(root.absolute()),
        "parts": list(args.parts),
        "dtype": args.dtype,
        "gigabytes": round(size / 1e9, 2),
        "seconds": round(seconds, 1),
    }


def require_space(root: Path, size: int) -> None:
    """InputError where the disk has no room for so many bytes."""
    place, free = free_space(root)
    if free < size:
        raise InputError(f"{place} has {free / 1e9:.1f} GB free; {size / 1e9:.1f} GB are needed")


# --- what there is ---------------------------------------------------------------------------------------------------


def full_sizes() -> "Sizes":
    """The published model's sizes, as tiny.py draws from."""
    from hunyuan_staged.demo.tiny import Sizes
    from hunyuan_staged.models.modules import TransformerConfig
    from hunyuan_staged.models.vae_modules import VaeConfig
    from hunyuan_staged.weights.published import QWEN_7B

    transformer, vae = TransformerConfig(), VaeConfig()
    time_rope, row_rope, column_rope = transformer.rope_axes_dim
    return Sizes(
        embeddings=QWEN_7B["vocab_size"],
        text_width=QWEN_7B["hidden_size"],
        text_layers=QWEN_7B["num_hidden_layers"],
        text_heads=QWEN_7B["num_attention_heads"],
        text_kv_heads=QWEN_7B["num_key_value_heads"],
        text_mlp=QWEN_7B["intermediate_size"],
        image_width=transformer.image_embed_dim,
        transformer_heads=transformer.num_attention_heads,
        transformer_head_dim=transformer.attention_head_dim,
        transformer_layers=transformer.num_layers,
        transformer_rope=(time_rope, row_rope, column_rope),
        transformer_mlp_ratio=transformer.mlp_ratio,
        latent_channels=vae.latent_channels,
        vae_channels=tuple(vae.block_out_channels),
        vae_layers=vae.layers_per_block,
        **BYT5_SMALL,
    )


def parts_of(chosen: tuple[str, ...], size: str, version: Any, name: str) -> list[Part]:
    """The chosen parts, on the meta device."""
    import torch

    from hunyuan_staged.demo import checkpoint_writer as layout
    from hunyuan_staged.demo import tiny
    from hunyuan_staged.weights.key_maps import TRANSFORMER_MAP, VAE_MAP, to_official

    if not isinstance(version, versions.TransformerVersion):
        raise InputError(f"--version {name} is of super resolution; allowed are those of t2v and i2v")
    sizes = full_sizes() if size == "full" else tiny.TINY
    found = []
    if "transformer" in chosen:
        with torch.device("meta"):
            transformer = tiny.build_transformer(sizes, version)
        config = layout.official_transformer_dict(transformer.config, version)
        tensors = to_official(transformer.state_dict(), TRANSFORMER_MAP)
        found.append(Part(f"transformer/{name}", tensors, "diffusion_pytorch_model", _config_writer(config)))
    if "text" in chosen:
        found.append(_text(sizes))
    if "glyph" in chosen:
        found.append(_glyph(sizes))
    if "vae" in chosen:
        with torch.device("meta"):
            vae = tiny.build_vae(sizes)
        tensors = to_official(vae.state_dict(), VAE_MAP)
        found.append(
            Part("vae", tensors, "diffusion_pytorch_model", _config_writer(layout.official_vae_dict(vae.config)))
        )
    return found


def _config_writer(config: Mapping[str, Any]) -> Callable[[Path], None]:
    from hunyuan_staged.demo.checkpoint_writer import write_json

    return lambda folder: write_json(folder / "config.json", config)


def _text(sizes: "Sizes") -> Part:
    """All layers of the language model, also those that stage 1 leaves out; no vision tower, no lm_head."""
    import torch

    from hunyuan_staged.demo import checkpoint_writer, tiny

    tokenizer = tiny.train_tokenizer(sizes.vocab)
    config = tiny.qwen_config(sizes, tokenizer)
    with torch.device("meta"):
        model = tiny.build_language_model(config)

    def finish(folder: Path) -> None:
        checkpoint_writer.save_tokenizer(tokenizer, folder, save_jinja_files=False)
        checkpoint_writer.write_json(folder / "config.json", config)

    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    return Part("text_encoder/llm", tensors, "model", finish)


def _glyph(sizes: "Sizes") -> Part:
    import torch

    from hunyuan_staged.demo import checkpoint_writer, tiny

    with torch.device("meta"):
        model: Any = tiny.build_glyph_encoder(sizes, len(tiny.build_glyph_tokenizer(tiny.COLORS, tiny.FONTS)))

    def finish(folder: Path) -> None:
        checkpoint_writer.write_glyph_configs(folder.parent, model.config, tiny.COLORS, tiny.FONTS)

    return Part("text_encoder/Glyph-SDXL-v2", model.encoder.state_dict(), "", finish)


# --- files -----------------------------------------------------------------------------------------------------------


def safetensors_header(tensors: Mapping[str, tuple[str, list[int], int]]) -> bytes:
    """What stands before the tensors of a safetensors file: (dtype, shape, bytes) by name, in the order of the tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, (dtype, shape, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [place, place + size]}
        place += size
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)
    return len(content).to_bytes(8, "little") + content


class Writer:
    """Draws tensors and writes them, one after the other."""

    def __init__(
        self, device: "torch.device", dtype: "torch.dtype", generator: "torch.Generator", done: Callable[[int], object]
    ) -> None:
        import torch

        self.device, self.dtype, self.generator, self.done = device, dtype, generator, done
        self.buffer = torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=device.type == "cuda")

    def write(self, folder: Path, part: Part) -> None:
        """The files of a part."""
        folder.mkdir(parents=True)
        if part.stem:
            self._write_shards(folder, part)
        else:
            self._write_pickle(folder, part)
        part.finish(folder)

    def _write_shards(self, folder: Path, part: Part) -> None:
        from hunyuan_staged.demo.checkpoint_writer import shard_files, shards_of, write_index

        sizes = {name: tensor.numel() * self.dtype.itemsize for name, tensor in part.tensors.items()}
        files = shard_files(part.stem, shards_of(sizes, SHARD_BYTES))
        for file, names in files.items():
            self._write_file(folder / file, {name: part.tensors[name] for name in names})
        if len(files) > 1:
            write_index(folder, part.stem, files, sum(sizes.values()))

    def _write_file(self, path: Path, tensors: Mapping[str, Any]) -> None:
        kind = DTYPES[str(self.dtype).removeprefix("torch.")]
        held = {
            name: (kind, list(tensor.shape), tensor.numel() * self.dtype.itemsize) for name, tensor in tensors.items()
        }
        with path.open("wb", buffering=0) as file:
            file.write(safetensors_header(held))
            for name, tensor in tensors.items():
                self.append(file, self.draw(name, tensor.shape))

    def append(self, file: BinaryIO, tensor: "torch.Tensor") -> None:
        import torch

        for piece in tensor.reshape(-1).view(torch.uint8).split(PIECE_BYTES):
            there = self.buffer[: len(piece)]
            there.copy_(piece)
            left = there.numpy().data
            while left:
                left = left[file.write(left) :]
            self.done(len(piece))

    def _write_pickle(self, folder: Path, part: Part) -> None:
        from hunyuan_staged.demo.checkpoint_writer import save_glyph_weights

        drawn = {name: self.draw(name, tensor.shape).cpu() for name, tensor in part.tensors.items()}
        save_glyph_weights(folder, drawn)
        self.done(sum(tensor.nbytes for tensor in drawn.values()))

    def draw(self, name: str, shape: "torch.Size") -> "torch.Tensor":
        """As step.random_model: norms around 1, others of 0.7 / sqrt(fan-in), which keeps activations near 1."""
        import torch

        tensor = torch.empty(shape, device=self.device, dtype=self.dtype)
        if name.endswith("gamma") or (tensor.ndim == 1 and name.endswith("weight")):
            return tensor.normal_(1, 0.1, generator=self.generator)
        return tensor.normal_(0, 0.7 / (tensor[0].numel() if tensor.ndim > 1 else 64) ** 0.5, generator=self.generator)
