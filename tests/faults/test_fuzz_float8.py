"""Files in scaled float8 that hypothesis changes, their scales and their header: the transformer loads with finite
weights, or is refused in a line that names the file.

Any other exception than InputError fails, and so does a hang (pytest's time-out).
"""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformer_writer as writer
from folders import embed
from forked import run_stage
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hunyuan_staged.demo.tiny import Sizes, build_transformer
from hunyuan_staged.errors import InputError
from hunyuan_staged.versions import parse_version
from hunyuan_staged.weights import components
from hunyuan_staged.weights.key_maps import TRANSFORMER_MAP, to_official
from hunyuan_staged.weights.quantization.stored import StoredLinear
from hunyuan_staged.weights.single_file import open_transformer

CPU, BF16 = torch.device("cpu"), torch.bfloat16
VERSION = parse_version("demo_t2v")
LAYER = "double_blocks.0.img_mlp.fc1"
CONVENTIONS = {
    "LightX2V": (writer.by_rows, "weight_scale"),
    "ComfyUI, older": (writer.comfy_old, "scale_weight"),
    "ComfyUI": (writer.comfy_new, "weight_scale"),
}


@pytest.fixture(scope="module")
def file() -> Callable[[str], dict[str, torch.Tensor]]:
    """The tensors of a file in a convention. A function, because hypothesis prints what a test is given."""
    torch.manual_seed(0)
    model = build_transformer(Sizes(transformer_heads=1, transformer_layers=1), VERSION).requires_grad_(False)
    official = to_official(dict(model.state_dict()), TRANSFORMER_MAP)
    made = {name: write(official)[0] for name, (write, _) in CONVENTIONS.items()}
    return lambda name: dict(made[name])


def load(path: Path) -> Any:
    folder = open_transformer(path, lambda meanflow: VERSION)
    skeleton = components.transformer_skeleton(folder, VERSION.name)
    return components.load_transformer(folder, VERSION.name, device=CPU, dtype=BF16, skeleton=skeleton)


def refusal(path: Path) -> str:
    """The line with which a file is refused; empty where it is read, with weights that are finite."""
    said = ""
    try:
        model = load(path)
    except InputError as error:
        said = str(error)
    if said:
        assert str(path) in said and "\n" not in said
        return said
    kept = [layer.weight for layer in model.modules() if isinstance(layer, StoredLinear)]
    plain = [x for x in model.state_dict().values() if x.is_floating_point() and x.element_size() > 1]
    assert kept and all(torch.isfinite(x).all() for x in (*kept, *plain))
    return ""


NUMBERS = (float("nan"), float("inf"), float("-inf"), -1.0, -1e-30, 0.0, -0.0, 1e-45, 1.0, 1e30, 3e38)
SHAPES = ([], [1], [1, 1], ["rows"], ["rows", 1], [1, "rows"], ["rows", 2], [0], [3], [3, 1], [1, 1, 1], ["rows", 1, 1])
DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int64,
    torch.uint8,
    torch.bool,
    writer.E4M3,
)


@pytest.mark.parametrize("convention", CONVENTIONS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_scales_of_any_number_shape_and_dtype(tmp_path, file, convention, data):
    tensors, leaf = file(convention), CONVENTIONS[convention][1]
    path = tmp_path / "any.safetensors"
    rows = len(tensors[f"{LAYER}.weight"])
    change = data.draw(st.sampled_from(["numbers", "shape", "dtype", "absent", "weight absent", "twice", "marked"]))
    value, shape, dtype = data.draw(st.sampled_from(NUMBERS)), tensors[f"{LAYER}.{leaf}"].shape, torch.float32
    good = change == "numbers" and 0 <= value <= 1e30
    if change == "numbers":
        tensors[f"{LAYER}.{leaf}"] = torch.full(shape, value)
        if shape.numel() > 1:  # one row alone
            tensors[f"{LAYER}.{leaf}"] = torch.ones(shape).index_fill_(0, torch.tensor([rows // 2]), value)
    elif change == "shape":
        shape = [rows if axis == "rows" else axis for axis in data.draw(st.sampled_from(SHAPES))]
        tensors[f"{LAYER}.{leaf}"] = torch.ones(shape)
        good = shape in ([], [1], [1, 1], [rows], [rows, 1])
    elif change == "dtype":
        dtype = data.draw(st.sampled_from(DTYPES))
        tensors[f"{LAYER}.{leaf}"] = torch.ones(shape).to(dtype)
        good = dtype in DTYPES[:3]
    elif change == "twice":
        other = {"weight_scale": "scale_weight", "scale_weight": "weight_scale"}[leaf]
        tensors[f"{LAYER}.{other}"] = torch.ones(shape)
    elif change == "marked":
        tensors[f"{LAYER}.comfy_quant"] = torch.tensor(
            list(
                data.draw(
                    st.sampled_from([b"{}", b"[]", b"{", b"\xff", b'{"format": "nvfp4"}', b'{"format": []}', b"1"])
                )
            ),
            dtype=torch.uint8,
        )
    else:
        del tensors[f"{LAYER}.{leaf if change == 'absent' else 'weight'}"]
    said = refusal(writer.save(path, tensors))
    assert bool(said) != good, f"{change} {value} {list(shape)} {dtype}: {said or 'read'}"


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_headers(tmp_path, file, data):
    """A header whose entries say something else, or that is cut."""
    content = writer.save(tmp_path / "good.safetensors", file("LightX2V")).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, rest = json.loads(content[8 : 8 + length]), content[8 + length :]
    names = [f"{LAYER}.weight", f"{LAYER}.weight_scale", "img_in.proj.weight"]
    for _ in range(data.draw(st.integers(1, 2))):
        entry = header[data.draw(st.sampled_from(names))]
        field = data.draw(st.sampled_from(list(entry)))
        dtypes = st.sampled_from(["F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "F32", "F16", "I8", "BOOL", "", None])
        ints = st.lists(st.integers(-1, 2**70), max_size=3)
        entry[field] = data.draw({"dtype": dtypes, "shape": ints, "data_offsets": ints}.get(field, st.none()))
    if data.draw(st.booleans()):
        layers = st.sampled_from([{}, [], 1, {"a": 1}, {LAYER: {"format": "nvfp4"}}, {LAYER: {"format": None}}])
        said = data.draw(
            st.sampled_from(["", "1", "{", "[]", "[" * 5000]) | layers.map(lambda x: json.dumps({"layers": x}))
        )
        header["__metadata__"] = {"_quantization_metadata": said}
    made = json.dumps(header).encode()
    path = tmp_path / "any.safetensors"
    path.write_bytes(struct.pack("<Q", len(made)) + made + rest)
    refusal(path)


def test_a_weight_that_is_no_number_is_named(tmp_path, file):
    """Float8 has NaN, which a scale makes no better."""
    tensors = file("LightX2V")
    tensors[f"{LAYER}.weight"] = tensors[f"{LAYER}.weight"].clone()
    tensors[f"{LAYER}.weight"].view(torch.uint8)[3, 5] = 0x7F
    said = refusal(writer.save(tmp_path / "any.safetensors", tensors))
    assert said.endswith("holds NaN or Inf, in torch.bfloat16, in: transformer_blocks.0.ff.net.0.proj.stored")


@pytest.mark.parametrize("value", [float("nan"), -1.0, 3e38, None])
def test_through_the_script(tiny_official, tmp_path, file, value):
    tensors = file("LightX2V")
    scale = tensors.pop(f"{LAYER}.weight_scale")
    if value is not None:
        tensors[f"{LAYER}.weight_scale"] = torch.full_like(scale, value)
    path = writer.save(tmp_path / "a_demo_t2v.safetensors", tensors)
    inputs, out = embed(tmp_path / "in", tiny_official), tmp_path / "out"
    status, said = run_stage(
        2, "--input_dir", inputs, "--output_dir", out, "--transformer", path, said=tmp_path / "said"
    )
    what = "float8 weights without a scale" if value is None else "scales that do not fit"
    name = f"{LAYER}.weight" if value is None else f"{LAYER}.weight_scale, which holds what is no finite number"
    assert status == 2 and not out.exists()
    assert said.strip().splitlines()[-1].startswith(f"error: {path}: {what}: {name}"), said
