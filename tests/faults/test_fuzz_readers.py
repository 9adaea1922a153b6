"""Twenty thousand files that hypothesis makes up, for the four readers of what others bring: each is read, or refused in a
line that names it.

Any other exception than InputError fails, and so does a hang (pytest's time-out). hypothesis draws a number, and from it
`random` makes the file: drawing each choice takes five times as long as reading.
"""

import functools
import io
import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from hunyuan_staged.encoders import image
from hunyuan_staged.errors import MAX_LINE, InputError, one_line
from hunyuan_staged.files import contract
from hunyuan_staged.files.tensors import load_embeddings, load_latents
from hunyuan_staged.weights import encoder_components, lora
from hunyuan_staged.weights.loading import FLOATS

EMBEDDINGS, ADAPTERS, PICKLES, IMAGES = 5000, 5000, 5000, 5000

# Always the same cases: a test that fails on some days only helps nobody.
fuzz = settings(
    deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck), print_blob=False
)
Entry = tuple[str, list[int], bytes]  # a dtype as safetensors calls it, a shape, the numbers

WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1, "U64": 8, "C64": 8}
WIDTHS |= {"F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "X": 4}
SPECIAL = [math.nan, math.inf, -math.inf, 3e38, 1e-40, -0.0, 0.0, 1.0]


def attempt(read: Callable[[], Any], path: Path) -> Any:
    """What `read` gives, or None where it refuses this file, and says so."""
    try:
        return read()
    except InputError as error:
        said = one_line(error)
        assert str(path) in said and len(said) <= MAX_LINE, said
        return None


def stored(entries: dict[str, Entry], metadata: dict[str, str] | None = None) -> bytes:
    """A safetensors file by hand: torch has not all dtypes that a header may name."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    data = b""
    for name, (dtype, shape, raw) in entries.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def floats(*shape: int, value: float = 0.5) -> Entry:
    return "F32", list(shape), struct.pack("<f", value) * math.prod(shape)


def entry(chance: Random, good: Entry) -> Entry:
    """A tensor that is changed in one way."""
    dtype, shape, raw = good
    kind = chance.choice(["dtype", "shape", "order", "number", "scalar", "short"])
    if kind == "dtype":
        dtype = chance.choice(sorted(WIDTHS))
        return dtype, shape, bytes(WIDTHS[dtype] * math.prod(shape))
    if kind == "shape":
        return dtype, chance.choices([0, 1, 2, 3, 2**31, 2**64], k=chance.randrange(6)), raw
    if kind == "order":
        return dtype, chance.sample(shape, len(shape)), raw
    if kind == "scalar":
        return dtype, [], raw[: WIDTHS[dtype]]
    if kind == "short":
        return dtype, shape, raw[:-1]
    where = chance.randrange(len(raw) // 4) * 4
    return dtype, shape, raw[:where] + struct.pack("<f", chance.choice(SPECIAL)) + raw[where + 4 :]


def changed(chance: Random, good: dict[str, Entry], names: list[str]) -> dict[str, Entry]:
    """Tensors of which some are changed, absent, or there by another name."""
    found = dict(good)
    for name in chance.sample(sorted(good), chance.randrange(min(3, len(good) + 1))):
        what = chance.choice(["changed", "changed", "absent", "renamed"])
        own = found.pop(name)
        if what == "changed":
            found[name] = entry(chance, own)
        elif what == "renamed":
            found[chance.choice(names)] = own
    return found


def mangled(chance: Random, raw: bytes) -> bytes:
    """The bytes as they are, cut short, or with some changed, put in or left out."""
    for _ in range(chance.choice([0, 0, 1, 1, 2, 5])):
        where = chance.randrange(len(raw) + 1)
        put = chance.choice([chance.randbytes(1), chance.randbytes(3), b"", b"\xff" * 4, bytes(8), b"\x7f\xff\xff\xff"])
        left_out = chance.choice([len(put), len(put), 0, 1, len(raw)])
        raw = raw[:where] + put + raw[where + left_out :]
    return raw


chances = given(st.integers(0, 2**64 - 1).map(Random))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


MASK = ("I64", [1, 3], struct.pack("<3q", 1, 1, 0))
TEXT = {
    f"{prefix}{name}": own
    for prefix in ("", "negative_")
    for name, own in {
        "prompt_embeds": floats(1, 3, 2),
        "prompt_embeds_mask": MASK,
        "prompt_embeds_2": floats(1, 3, 2),
        "prompt_embeds_mask_2": MASK,
    }.items()
}
IMAGE = {"image_embeds": floats(1, 2, 2), "image_latents": floats(1, 32, 1, 1, 1)}
NOTES = ['{"prompt_embeds": "bfloat16"}', '{"image_embeds": "int8"}', "[]", "{", '{"x": null}']


@settings(fuzz, max_examples=EMBEDDINGS)
@chances
def test_embeddings(folder, chance):
    good = TEXT | (IMAGE if chance.random() < 0.5 else {})
    entries = changed(chance, good, [*IMAGE, "latents", "image_latents_720p"])
    notes = {"dtype_info": chance.choice(NOTES)} if chance.random() < 0.3 else None
    path = folder / contract.EMBEDDINGS_FILE
    path.write_bytes(mangled(chance, stored(entries, notes)))
    found = attempt(lambda: load_embeddings(folder), path)
    if found is not None:
        assert all(torch.isfinite(tensor).all() for tensor in found[0].values())
        assert found[0].keys() >= TEXT.keys()


SHAPES = {
    "transformer_blocks.0.attn.to_q.weight": (4, 4),
    "transformer_blocks.0.attn.to_k.weight": (4, 4),
    "transformer_blocks.0.attn.to_v.weight": (4, 4),
    "transformer_blocks.0.attn.to_q.bias": (4,),
    "transformer_blocks.0.ff.net.2.weight": (4, 8),
    "norm_out.linear.weight": (8, 4),
    "x_embedder.proj.weight": (4, 2, 1, 1, 1),
}
MODULES = {
    "transformer_blocks.0.attn.to_q": (4, 4),
    "double_blocks.0.img_attn_q": (4, 4),
    "double_blocks.0.img_attn.qkv": (12, 4),
    "double_blocks.0.img_mlp.fc2": (4, 8),
    "final_layer.adaLN_modulation.1": (8, 4),
    "lora_unet_double_blocks_0_img_mlp_fc2": (4, 8),
    "single_blocks.0.linear1": (4, 4),
}
STYLES = [
    ("lora_A.weight", "lora_B.weight"),
    ("lora_down.weight", "lora_up.weight"),
    ("lora_A.x.weight", "lora_B.weight"),
]
SETTINGS = [
    '{"transformer.lora_alpha": 8}',
    '{"lora_alpha": NaN}',
    '{"lora_alpha": 1e999}',
    '{"lora_alpha": 1e300}',
    '{"lora_alpha": true}',
    '{"alpha_pattern": {"(": 1}}',
    '{"alpha_pattern": {"transformer_blocks.0.attn.to_q": 2}, "use_rslora": 1}',
    '{"use_dora": true}',
    "[" * 2000,
]


@settings(fuzz, max_examples=ADAPTERS)
@chances
def test_adapters(folder, chance):
    entries: dict[str, Entry] = {}
    for name in chance.sample(sorted(MODULES), chance.choice([1, 2])):
        outputs, inputs = MODULES[name]
        prefix = chance.choice(["", "transformer.", "diffusion_model.", "base_model.model."])
        down, up = chance.choice(STYLES)
        entries[f"{prefix}{name}.{down}"] = floats(2, inputs)
        entries[f"{prefix}{name}.{up}"] = floats(outputs, 2)
        if chance.random() < 0.5:
            entries[f"{prefix}{name}.alpha"] = floats(value=chance.choice([2.0, *SPECIAL]))
    entries = changed(chance, entries, ["x.dora_scale", "x.alpha", "double_blocks.0.img_mlp.fc2.diff_b"])
    notes = {"lora_adapter_metadata": chance.choice(SETTINGS)} if chance.random() < 0.3 else None
    path = folder / "adapter.safetensors"
    path.write_bytes(mangled(chance, stored(entries, notes)))
    found = attempt(lambda: lora.load([(path, 1.0)], SHAPES), path)
    for name, additions in found.additions.items() if found else ():
        weight = torch.zeros(SHAPES[name])
        assert all(torch.isfinite(addition.scale * torch.ones(())) for addition in additions)
        assert all(addition.to(weight).shape == weight.shape for addition in additions)


def pickled(content: object, *, legacy: bool = False) -> bytes:
    raw = io.BytesIO()
    torch.save(content, raw, _use_new_zipfile_serialization=not legacy)
    return raw.getvalue()


ONE = torch.ones(2, 3)
CONTENTS = [
    {"state_dict": {"module.text_tower.encoder.a": ONE, "other": ONE}},
    {"a": ONE, "b": torch.nn.Parameter(ONE)},
    {"a": ONE.to_sparse()},
    {"a": ONE.to(torch.complex64), "b": ONE.bool()},
    {"a": torch.empty(2, device="meta")},
    {"a": ONE.expand(7, 2, 3), 3: ONE},
    {"state_dict": [ONE]},
    [ONE],
    ONE,
    {"a": 1, "b": None},
]


@functools.cache
def pickles() -> list[bytes]:
    return [pickled(content, legacy=legacy) for content in CONTENTS for legacy in (False, True)]


@pytest.mark.filterwarnings("ignore")
@settings(fuzz, max_examples=PICKLES)
@chances
def test_pickles(folder, chance):
    path = folder / "byt5_model.pt"
    path.write_bytes(mangled(chance, chance.choice(pickles())))
    found = attempt(lambda: dict(encoder_components.glyph_weights(path)), path)
    for tensor in (found or {}).values():
        assert tensor.dtype in FLOATS.values() and tensor.device.type == "cpu"


@functools.cache
def pictures() -> list[bytes]:
    grey = Image.linear_gradient("L").resize((12, 8))
    turned = Image.Exif()
    turned[0x0112] = 6
    found = []
    Image.init()
    for name in image.FORMATS:
        for mode in ("RGB", "L", "P", "RGBA", "1", "I;16", "CMYK") if name in Image.SAVE else ():
            raw = io.BytesIO()
            picture = grey.convert("I").convert(mode) if mode == "I;16" else grey.convert(mode)
            more = {"exif": turned} if name in ("PNG", "JPEG", "WEBP", "TIFF") and mode == "RGB" else {}
            try:
                picture.save(raw, name, **more)
            except (OSError, ValueError):  # a format that has no such mode
                continue
            found.append(raw.getvalue())
    return found


@settings(fuzz, max_examples=IMAGES)
@chances
def test_images(folder, chance):
    path = folder / "picture.png"
    path.write_bytes(mangled(chance, chance.choice(pictures())))
    found = attempt(lambda: image.load_image(path), path)
    assert found is None or (found.mode == "RGB" and min(found.size) > 0)


@pytest.mark.parametrize(
    ("name", "read", "largest"),
    [
        (contract.EMBEDDINGS_FILE, lambda path: load_embeddings(path.parent), 2**30),
        (contract.LATENTS_FILE, lambda path: load_latents(path.parent), 2**33),
        ("large.png", image.load_image, 2**28),
    ],
)
def test_nothing_is_read_beyond_its_size(tmp_path, name, read, largest):
    """These take no place on the disk, and would take all memory."""
    path = tmp_path / name
    with path.open("wb") as opened:
        opened.truncate(2**40)
    with pytest.raises(InputError, match=rf"{name} has {2**40} bytes; at most {largest} are allowed$"):
        read(path)


def test_there_are_twenty_thousand_cases():
    assert EMBEDDINGS + ADAPTERS + PICKLES + IMAGES >= 20_000
