"""GGUF transformers: the gguf package's numbers bit for bit, kept as bytes in memory, and broken files."""

import struct
import sys

import gguf_writer as writer
import pytest
import torch
from folders import embed
from forked import run_stage
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformer_writer import save

from hunyuan_staged.demo.tiny import Sizes, draw_checkpoint
from hunyuan_staged.errors import InputError
from hunyuan_staged.files.tensors import load_latents
from hunyuan_staged.versions import parse_version
from hunyuan_staged.weights import components
from hunyuan_staged.weights.folder import open_model
from hunyuan_staged.weights.key_maps import FUSED_RULES, TRANSFORMER_MAP, to_diffusers, to_official
from hunyuan_staged.weights.quantization import gguf_blocks, gguf_file
from hunyuan_staged.weights.quantization.gguf_blocks import GgufLinear
from hunyuan_staged.weights.single_file import open_transformer

CPU, F32 = torch.device("cpu"), torch.float32
VERSION = parse_version("demo_t2v")
EIGHT = tuple(gguf_blocks.TYPES)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A drawn checkpoint whose rows are whole blocks of 256."""
    sizes = Sizes(transformer_heads=8, transformer_layers=2)
    return draw_checkpoint(tmp_path_factory.mktemp("wide") / "model", sizes=sizes, versions=("demo_t2v",))


@pytest.fixture(scope="module")
def official(wide) -> dict[str, torch.Tensor]:
    model = components.load_transformer(open_model(wide, ()), VERSION.name, device=CPU, dtype=F32)
    return to_official(dict(model.state_dict()), TRANSFORMER_MAP)


def opened(path):
    return open_transformer(path, lambda meanflow: VERSION)


@pytest.mark.parametrize("kind", EIGHT)
def test_each_type_is_the_packages_own_to_the_bit(kind):
    assert (gguf_blocks.TYPES[kind].values, gguf_blocks.TYPES[kind].size) == GGML_QUANT_SIZES[
        GGMLQuantizationType[kind]
    ]
    weight = torch.randn(6, 512, generator=torch.Generator().manual_seed(1))
    data, exact = writer.quantised(weight, kind)
    stored = torch.from_numpy(data)
    found = gguf_blocks.dequantise(stored, kind, F32)
    assert torch.equal(found, exact) and found.abs().max() > 0
    assert gguf_blocks.are_finite(stored, kind)
    assert torch.equal(gguf_blocks.dequantise(stored, kind, torch.bfloat16), exact.bfloat16())
    if kind not in writer.HALVES:  # quantised from the weight: at most half a step off, of 16, 32 or 256 a block
        steps = {"4": 15, "5": 31, "8": 255}[kind[1]]
        widest = weight.view(6, -1, 32).abs().amax(dim=2).repeat_interleave(32, dim=1)
        assert ((found - weight).abs() <= 2 * widest * (1.1 / steps)).all()


@pytest.mark.parametrize("kinds", [("Q8_0",), ("Q4_K", "Q6_K"), EIGHT], ids=lambda kinds: "+".join(kinds))
def test_a_file_gives_its_numbers_wide_and_kept(official, tmp_path, kinds):
    path, exact = writer.write(tmp_path / "any.gguf", official, *kinds)
    wanted = to_diffusers(exact, (*TRANSFORMER_MAP, *FUSED_RULES))
    folder = opened(path)
    plain = components.load_transformer(folder, VERSION.name, device=CPU, dtype=F32).state_dict()
    assert plain.keys() == wanted.keys() and not [name for name, x in wanted.items() if not torch.equal(plain[name], x)]
    skeleton = components.transformer_skeleton(folder, VERSION.name)
    model = components.load_transformer(folder, VERSION.name, device=CPU, dtype=torch.bfloat16, skeleton=skeleton)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, GgufLinear)}
    assert len(layers) == 2 * 12
    for name, layer in layers.items():
        assert layer.stored.dtype == torch.uint8
        assert torch.equal(layer.weight, wanted[f"{name}.weight"].bfloat16())
    held = sum(layer.stored.nbytes for layer in layers.values())
    qkv_and_rest = sum(
        length
        for name, (_, length) in folder.header.places.items()
        if writer.IN_FLOAT8.fullmatch(name) and "_mod." not in name
    )
    assert held == qkv_and_rest, "memory is the file's"
    said = folder.describe()
    assert f"GGUF {', '.join(sorted(kinds))}, kept so in the blocks" in said


def test_latents_are_those_of_the_exact_weights(wide, official, tmp_path):
    """Also with every block in host memory, though blocks are of different types, and with an adapter beside."""
    path, exact = writer.write(tmp_path / "a_demo_t2v.gguf", official, "Q4_K", "Q6_K", "Q5_K", "Q8_0", "Q5_0")
    plain = save(tmp_path / "plain_demo_t2v.safetensors", exact)
    inputs = embed(tmp_path / "in", wide)
    adapter = {f"transformer_blocks.0.attn.to_q.lora_{half}.weight": torch.full((256, 2), 0.01) for half in "AB"}
    adapter["transformer_blocks.0.attn.to_q.lora_A.weight"] = torch.full((2, 256), 0.01)
    lora = save(tmp_path / "lora.safetensors", adapter)

    def run(name: str, *more: object) -> tuple[torch.Tensor, str]:
        args = ["--input_dir", inputs, "--output_dir", tmp_path / name, "--video_length", 5, "--num_inference_steps", 2]
        status, said = run_stage(2, *args, *more, said=tmp_path / "said")
        assert status == 0, said
        return load_latents(tmp_path / name)[0], said

    expected = run("plain", "--transformer", plain)[0]
    found, said = run("gguf", "--transformer", path)
    assert torch.equal(found, expected) and "a_demo_t2v.gguf: taken for a transformer demo_t2v of 2 blocks" in said
    assert torch.equal(run("offloaded", "--transformer", path, "--enable_offloading")[0], expected)
    assert torch.equal(run("model", "--model_path", path)[0], expected)
    adapted = run("adapted", "--transformer", path, "--lora", lora)[0]
    near = run("near", "--transformer", plain, "--lora", lora)[0]
    # The one weight that the adapter changes is stored in float8 anew: half a step of 2^-3 of it at most.
    assert not torch.equal(adapted, expected) and (adapted - near).norm() / near.norm() < 2**-4
    fp8 = run("fp8", "--transformer", path, "--weights_dtype", "fp8")[0]
    assert torch.equal(fp8, run("fp8_plain", "--transformer", plain, "--weights_dtype", "fp8")[0])
    status, said = run_stage(2, "--input_dir", inputs, "--transformer", path, "--dry_run", said=tmp_path / "said")
    assert status == 0 and ", GGUF; computed in torch.float32" in said, said


def test_a_compiler_takes_a_kept_layer_in_one_graph():
    linear = GgufLinear(torch.nn.Linear(256, 4), "Q6_K")
    linear.stored.data = torch.from_numpy(writer.quantised(torch.ones(4, 256), "Q6_K")[0])
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(lambda module, x: module(x), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(linear, x), linear(x))


def refused(path, message: str) -> None:
    with pytest.raises(InputError) as error:
        opened(path)
    assert str(path) in str(error.value) and message in str(error.value) and "\n" not in str(error.value)


def test_without_the_package_one_line_says_how_to_get_it(tmp_path, monkeypatch):
    (tmp_path / "any.gguf").write_bytes(b"GGUF\3\0\0\0")
    monkeypatch.setitem(sys.modules, "gguf.constants", None)
    refused(tmp_path / "any.gguf", "needs the package gguf: pip install 'hunyuan-staged[gguf]', or pip install gguf")


def header(tensors: bytes = b"", metadata: bytes = b"", counts: tuple[int, int] = (0, 0), version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, *counts) + metadata + tensors


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def tensor(name: str, kind: int, *shape: int, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header(version=1), "its version is 1; read are 2 and 3"),
        (header(counts=(2**60, 0)), f"it says that it has {2**60} tensors"),
        (header(counts=(1, 0)), "its header is cut off"),
        (header(metadata=text("a") + struct.pack("<IIQ", 9, 6, 2**61), counts=(0, 1)), "its header is cut off"),
        (header(metadata=text("a") + struct.pack("<IIQ", 9, 9, 1), counts=(0, 1)), "a list of type 9"),
        (header(metadata=text("a") + struct.pack("<I", 77), counts=(0, 1)), "a value of type 77"),
        (header(tensor("a", 0, 2**40), counts=(1, 0)), "'a' ends behind the file's end"),
        (header(tensor("a", 12, 300, 2), counts=(1, 0)), "'a' [2, 300] is no whole number of blocks of 256"),
        (header(tensor("a", 0, 1) * 2 + bytes(64), counts=(2, 0)), "it holds 'a' twice"),
        (header(tensor("a", 20, 32), counts=(1, 0)), "holds a in IQ4_NL; read are F32, F16, BF16, Q4_0"),
        (header(tensor("a", 99, 32), counts=(1, 0)), "holds a in type 99; read are"),
        (header(tensor("a", 0, 1, 1, 1, 1, 1, 1), counts=(1, 0)), "'a' has 6 axes"),
        (
            header(metadata=text("general.alignment") + struct.pack("<II", 4, 3), counts=(0, 1)),
            "its alignment is 3",
        ),
    ],
)
def test_broken_headers_are_one_line(tmp_path, content, message):
    path = tmp_path / "any.gguf"
    path.write_bytes(content)
    refused(path, message)


def test_scales_that_are_no_numbers_are_named(official, tmp_path):
    path, _ = writer.write(tmp_path / "any.gguf", official, "Q4_K")
    start, _ = opened(path).header.places["double_blocks.1.img_mlp.fc2.weight"]
    with path.open("r+b") as file:
        file.seek(start + 144 * 7 + 2)
        file.write(b"\xff\xff")
    folder = opened(path)
    for skeleton in (None, components.transformer_skeleton(folder, VERSION.name)):
        with pytest.raises(
            InputError, match=r"fc2.weight has scales that are no finite|holds NaN or Inf, in .*ff.net.2"
        ):
            components.load_transformer(folder, VERSION.name, device=CPU, dtype=F32, skeleton=skeleton)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_fuzzed_headers_end_in_a_header_or_in_one_line(tmp_path, data):
    """Bytes of a good header changed, cut off and moved: never a crash, and never a walk without end."""
    good = header(
        tensor("double_blocks.0.img_attn_q.weight", 12, 256, 4) + tensor("b", 0, 3, offset=576),
        text("general.architecture")
        + struct.pack("<I", 8)
        + text("hyvid")
        + text("comfy.gguf.orig_shape.b")
        + struct.pack("<IIQ3i", 9, 5, 3, 1, 3, 1),
        (2, 2),
    )
    content = bytearray(good + bytes(2048))
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(4, len(good) - 1))
        content[at] = data.draw(st.sampled_from([0, 1, 8, 9, 127, 128, 255]))
    path = tmp_path / "any.gguf"
    path.write_bytes(content[: data.draw(st.sampled_from([len(content), len(good), len(good) // 2]))])
    said = ""
    try:
        found = gguf_file.read_header("--transformer", path)
        list(gguf_file.tensors(found, list(found.shapes), CPU))
    except InputError as error:
        said = str(error)
    assert not said or ("\n" not in said and str(path) in said)
