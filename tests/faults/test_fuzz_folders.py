"""Two thousand model folders that hypothesis changes, one to three files of each: the part loads, or is refused in a line
that names the folder.

Any other exception than InputError fails, and so does a hang (pytest's time-out).
"""

import json
import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from hunyuan_staged.demo.tiny import LAYOUTS, Sizes, draw_checkpoint
from hunyuan_staged.errors import MAX_LINE, InputError, one_line
from hunyuan_staged.weights import components, encoder_components
from hunyuan_staged.weights.folder import open_model
from hunyuan_staged.weights.hub import PARTS

FOLDERS = 2000
VERSION = "demo_t2v"
SMALLEST = Sizes(
    vocab=300,
    text_width=16,
    text_layers=3,
    text_heads=2,
    text_kv_heads=1,
    text_mlp=16,
    glyph_width=8,
    glyph_layers=1,
    glyph_heads=1,
    glyph_mlp=8,
    image_width=8,
    image_heads=1,
    transformer_heads=1,
    transformer_layers=1,
    transformer_mlp_ratio=1.0,
    vae_channels=(8,) * 5,
    vae_layers=0,
)
F32 = {"device": torch.device("cpu"), "dtype": torch.float32}
LOADERS = {
    "transformer": lambda folder: components.load_transformer(folder, VERSION, **F32),
    "scheduler": lambda folder: folder.flow_shift(VERSION),
    "vae": lambda folder: (components.load_vae_decoder(folder, **F32), components.load_vae_encoder(folder, **F32)),
    "text": lambda folder: encoder_components.load_language_model(folder, **F32),
    "glyph": lambda folder: encoder_components.load_glyph_encoder(folder, **F32),
    "image": lambda folder: encoder_components.load_image_encoder(folder, **F32),
}

NAMES = st.text(max_size=5) | st.sampled_from(
    ["auto_map", "attn_implementation", "_name_or_path", "quantization_config"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 300) | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
SMALL_NUMBERS = st.sampled_from([0, 1, 2, 3, 7, 8, 16, 2**31, 2**63, 2**64 - 1, -1])
DTYPES = [
    "F64",
    "F32",
    "F16",
    "BF16",
    "I64",
    "I8",
    "U8",
    "BOOL",
    "F8_E4M3",
    "F8_E8M0",
    "U64",
    "C64",
    "F4",
    "X",
    3,
    None,
]


def changed_json(draw, raw: bytes) -> bytes:
    """Some entries, at any depth, dropped or replaced by anything that JSON has, or some that it never had."""
    content = json.loads(raw)
    for _ in range(draw(st.integers(1, 2))):
        inside: Any = content
        while True:
            keys = sorted(inside) if isinstance(inside, dict) else list(range(len(inside)))
            key = draw(st.sampled_from(keys)) if keys else None
            if key is None or not isinstance(inside[key], (dict, list)) or draw(st.booleans()):
                break
            inside = inside[key]
        what = draw(st.sampled_from(["replaced", "replaced", "absent", "new"]))
        if what == "new" or key is None:
            if isinstance(inside, dict):
                inside[draw(NAMES)] = draw(VALUES)
        elif what == "absent":
            del inside[key]
        else:
            inside[key] = draw(VALUES)
    return json.dumps(content).encode(errors="surrogatepass")


def changed_tensors(draw, raw: bytes) -> bytes:
    """A safetensors file with one entry of its header changed, or with numbers that are not finite."""
    (length,) = struct.unpack("<Q", raw[:8])
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    name = draw(st.sampled_from(sorted(header)))
    what = draw(st.sampled_from(["number", "dtype", "shape", "offsets", "absent", "renamed", "twice"]))
    own = header[name]
    if what == "number":
        where = draw(st.integers(0, len(data) // 2 - 1)) * 2
        data = data[:where] + draw(st.sampled_from([b"\xc0\x7f", b"\x80\xff", b"\x7f\x7f"])) + data[where + 2 :]
    elif what == "absent" or "shape" not in own:
        del header[name]
    elif what in ("renamed", "twice"):
        header[draw(st.text(max_size=5) | st.sampled_from(sorted(header)))] = own
        if what == "renamed":
            header.pop(name, None)
    elif what == "dtype":
        own["dtype"] = draw(st.sampled_from(DTYPES))
    elif what == "shape":
        own["shape"] = draw(st.permutations(own["shape"]) | st.lists(SMALL_NUMBERS, max_size=5))
    else:
        own["data_offsets"] = draw(st.lists(SMALL_NUMBERS, max_size=3))
    text = json.dumps(header).encode(errors="surrogatepass")
    return struct.pack("<Q", len(text)) + text + data


def mangled(draw, raw: bytes) -> bytes:
    where = draw(st.integers(0, max(0, len(raw) - 1)))
    what = draw(st.sampled_from(["cut", "changed", "longer", "end"]))
    put = draw(st.binary(min_size=1, max_size=4))
    if what == "cut":
        return raw[:where]
    if what == "changed":
        return raw[:where] + put + raw[where + len(put) :]
    return raw + put if what == "end" else raw[:where] + put + raw[where:]


JUNK = [b"", b"{}", b"[]", b"null", b"<html>404</html>", b"\xff" * 100, b"[" * 3000, b"PK\x03\x04", b"\x80\x02c"]
PLACES = {
    "absent": lambda path: None,
    "folder": Path.mkdir,
    "FIFO": os.mkfifo,
    "loop": lambda path: path.symlink_to(path.name),
    "dangling": lambda path: path.symlink_to("nothing"),
    "endless": lambda path: path.symlink_to("/dev/zero"),
}


def change(draw, path: Path) -> None:
    """Change a file, or put something else in its place."""
    raw = path.read_bytes()
    own = {".json": changed_json, ".safetensors": changed_tensors}.get(path.suffix, mangled)
    what = draw(st.sampled_from(["own", "own", "own", "mangled", "junk", "place"]))
    if what == "own":
        raw = own(draw, raw)
    elif what == "mangled":
        raw = mangled(draw, raw)
    elif what == "junk":
        raw = draw(st.sampled_from(JUNK))
    path.unlink()
    if what == "place":
        PLACES[draw(st.sampled_from(sorted(PLACES)))](path)
    else:
        path.write_bytes(raw)


ADDED = {
    "model.safetensors": b"{}",
    "diffusion_pytorch_model.safetensors": b"",
    "model.safetensors.index.json": b'{"weight_map": {"a": "../../../etc/passwd"}}',
    "diffusion_pytorch_model.safetensors.index.json": b'{"weight_map": {"a": 3}}',
    "special_tokens_map.json": b'{"eos_token": ["a"], "pad_token": 7}',
    "added_tokens.json": b'{"a": -1, "b": 10000000000}',
    "chat_template.jinja": b"{% for i in range(10**9) %}x{% endfor %}",
    "tokenizer.model": b"x",
    "vocab.json": b'{"a": 0}',
    "generation_config.json": b"[]",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("smallest")
    return {
        layout: draw_checkpoint(
            place / layout, sizes=SMALLEST, layout=layout, versions=(VERSION,), dtype=torch.bfloat16
        )
        for layout in LAYOUTS
    }


def files_of(folder: Path, layout: str) -> dict[str, list[Path]]:
    """Each part's files; what belongs to none is with the transformer, which tells the version."""
    own = {part: list(PARTS[part].official if layout == "official" else PARTS[part].diffusers) for part in LOADERS}
    found: dict[str, list[Path]] = {part: [] for part in LOADERS}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            part = next((part for part, places in own.items() if name.startswith(tuple(f"{x}/" for x in places))), None)
            found[part or "transformer"].append(path)
    return found


def parameters(loaded: Any) -> Iterator[torch.Tensor]:
    if isinstance(loaded, nn.Module):
        yield from loaded.parameters()
    for one in loaded if isinstance(loaded, tuple) else ():
        yield from parameters(one)


@settings(
    max_examples=FOLDERS,
    deadline=None,
    derandomize=True,  # always the same cases: a test that fails on some days only helps nobody
    database=None,
    suppress_health_check=list(HealthCheck),
    print_blob=False,
)
@given(data=st.data())
def test_a_changed_folder_loads_or_is_refused_in_one_line(folders, data):
    layout = data.draw(st.sampled_from(LAYOUTS))
    path = folders[layout].with_name("changed")
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(folders[layout], path, copy_function=os.link)
    parts = files_of(path, layout)
    part = data.draw(st.sampled_from(sorted(parts)))
    for file in data.draw(st.lists(st.sampled_from(parts[part]), min_size=1, max_size=3, unique=True)):
        change(data.draw, file)
        if data.draw(st.integers(0, 9)) == 0:
            name = data.draw(st.sampled_from(sorted(ADDED)))
            if not os.path.lexists(file.with_name(name)):
                file.with_name(name).write_bytes(ADDED[name])
    try:
        folder = open_model(path, (part,))
        folder.versions()
        folder.fingerprint((part,), VERSION)
        loaded = LOADERS[part](folder)
    except InputError as error:
        said = one_line(error)
        assert str(path) in said and len(said) <= MAX_LINE, said
    else:
        assert all(torch.isfinite(tensor).all() for tensor in parameters(loaded))
