"""Ten thousand configs, metadata and safetensors headers that hypothesis makes up: read, or refused in our own words.

Any other exception than InputError fails, and so does a hang (pytest's time-out).
"""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from hunyuan_staged.errors import InputError
from hunyuan_staged.files import contract, provenance, tensors
from hunyuan_staged.files.config import CONFIG_KEYS, SIBLING_KEYS, read_config, update_config
from hunyuan_staged.parallel.world import World
from hunyuan_staged.sampling.state import RunIdentity, StateSaver

CONFIGS, METADATA, HEADERS = 4000, 3000, 3000

# Always the same cases: a test that fails on some days only helps nobody.
fuzz = settings(
    deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck), print_blob=False
)

KNOWN = [name for keys in CONFIG_KEYS.values() for name in keys] + list(SIBLING_KEYS)
ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=20)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3), max_leaves=4
)


def plausible(name: str) -> st.SearchStrategy:
    """Values of a kind that a key may have, so that many a config gets past the first check."""
    kinds = {kind for keys in CONFIG_KEYS.values() for key, kind in keys.items() if key == name}
    return {str: ANY_TEXT, int: st.integers()}.get(next(iter(kinds), None), st.floats(allow_nan=False)) | st.none()


@st.composite
def configs(draw) -> bytes:
    entries = {name: draw(plausible(name)) for name in draw(st.lists(st.sampled_from(KNOWN), max_size=5))}
    entries |= draw(st.dictionaries(st.sampled_from(KNOWN) | ANY_TEXT, VALUES, max_size=2))
    raw = json.dumps(entries, ensure_ascii=draw(st.booleans())).encode(errors="surrogatepass")
    return mangle(draw, raw)


def mangle(draw, raw: bytes) -> bytes:
    """The bytes as they are, cut short, with a byte changed, or with some put in."""
    where = draw(st.integers(0, max(0, len(raw) - 1)))
    kind = draw(st.sampled_from(["as it is", "as it is", "cut", "changed", "longer"]))
    if kind == "cut":
        return raw[:where]
    if kind == "changed" and raw:
        return raw[:where] + bytes([draw(st.integers(0, 255))]) + raw[where + 1 :]
    if kind == "longer":
        return raw[:where] + draw(st.binary(max_size=8)) + raw[where:]
    return raw


def attempt(read: Callable[[], Any], name: str) -> Any:
    """What `read` gives, or None where it refuses the file of this name, and says so."""
    try:
        return read()
    except InputError as error:
        if name in str(error):
            return None
        raise


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@settings(fuzz, max_examples=CONFIGS)
@given(raw=configs())
def test_configs(folder, raw):
    """What is read can also be written again: a stage adds to it after its work is done."""
    path = folder / contract.CONFIG_FILE
    path.write_bytes(raw)
    config = attempt(lambda: read_config(folder), str(path))
    if config is None:
        return
    assert config.keys() <= set(KNOWN)
    update_config(folder, {"stage3_decode_time": 1.0})
    again = read_config(folder)
    assert again["stage3_decode_time"] == 1.0
    stage3 = CONFIG_KEYS[3]
    assert {k: v for k, v in again.items() if k not in stage3} == {k: v for k, v in config.items() if k not in stage3}


LATENTS = torch.ones(1, 32, 1, 2, 2)
NOTES = ["dtype_info", "num_frames", "embeddings_sha256", "made_from_sha256", "format", "step", "settings", "origins"]
IDENTITY = RunIdentity({"seed": 1}, {"processes": 1}, {})
GOOD_STATE = {
    "format": "1",
    "step": "2",
    "settings": json.dumps(IDENTITY.inputs),
    "circumstances": json.dumps(IDENTITY.environment),
    "origins": "{}",
    contract.MADE_FROM: IDENTITY.digest(),
}
ODD_NOTES = (
    st.text(max_size=12)
    | st.integers().map(str)
    | VALUES.map(json.dumps)
    | st.sampled_from(['{"latents": "bfloat16"}', '{"latents": "torch.int4"}', '{"x": "bool"}', "[" * 5000])
)


def state_keeper(folder: Path) -> StateSaver:
    world = World(0, 1, torch.device("cpu"))
    return StateSaver(folder, IDENTITY, steps=4, every=1, world=world)


@settings(fuzz, max_examples=METADATA)
@given(
    notes=st.dictionaries(st.sampled_from(NOTES) | st.text(max_size=5), ODD_NOTES, max_size=3),
    dropped=st.sets(st.sampled_from(sorted(GOOD_STATE)), max_size=1),
)
def test_metadata(folder, notes, dropped):
    (folder / contract.LATENTS_FILE).write_bytes(save({"latents": LATENTS}, notes))
    state = {name: value for name, value in GOOD_STATE.items() if name not in dropped} | notes
    (folder / contract.STATE_FILE).write_bytes(save({"latents": LATENTS}, state))
    loaded = attempt(lambda: tensors.load_latents(folder), contract.LATENTS_FILE)
    if loaded is not None:
        assert loaded[0].shape == LATENTS.shape
        provenance.latents_mismatch(folder, {"embeddings_sha256": "0"}, loaded[1])
        provenance.embeddings_mismatch(folder, {"prompt": "a"}, loaded[1], "0")
    kept = attempt(lambda: state_keeper(folder).load(LATENTS.shape, resume=True), contract.STATE_FILE)
    if kept is not None:
        assert 1 <= kept.done <= 4
        assert torch.equal(kept.latents, LATENTS)


DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "U16", "C64", "F4", "E8M0", "X"]
NUMBERS = st.sampled_from([0, 1, 2, 4, 16, 32, 128, 512, -1, 2**31, 2**63, 2**64 - 1, 10**30]) | st.integers(0, 64)
TENSORS = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(DTYPES),
        "shape": st.just([1, 32, 1, 2, 2]) | st.lists(NUMBERS, max_size=6),
        "data_offsets": st.just([0, 512]) | st.just([0, 128]) | st.lists(NUMBERS, max_size=3),
    }
)


@st.composite
def headers(draw) -> bytes:
    entries: dict = draw(
        st.dictionaries(st.sampled_from(["latents", "latents2"]) | ANY_TEXT, TENSORS | VALUES, max_size=2)
    )
    if draw(st.booleans()):
        entries["latents"] = draw(TENSORS)
    if draw(st.booleans()):
        entries["__metadata__"] = draw(st.dictionaries(ANY_TEXT, ANY_TEXT | VALUES, max_size=2))
    text = mangle(draw, json.dumps(entries).encode())
    length = draw(st.just(len(text)) | st.integers(0, 2**64 - 1)) if draw(st.booleans()) else len(text)
    return struct.pack("<Q", length) + text + draw(st.sampled_from([0, 128, 511, 512, 1024])) * b"\x3c"


@settings(fuzz, max_examples=HEADERS)
@given(raw=headers())
def test_safetensors_headers(folder, raw):
    path = folder / contract.LATENTS_FILE
    path.write_bytes(raw)
    loaded = attempt(lambda: tensors.load_latents(folder), str(path))
    if loaded is not None:
        assert loaded[0].is_floating_point()
        assert torch.isfinite(loaded[0]).all()


def test_there_are_ten_thousand_cases():
    assert CONFIGS + METADATA + HEADERS >= 10_000
