"""A transformer as one file: every format by an independent writer against the official folder, and refusals."""

import json

import pytest
import torch
import transformer_writer as writer
from folders import embed
from forked import run_stage

from hunyuan_staged.errors import InputError
from hunyuan_staged.files.tensors import load_latents
from hunyuan_staged.versions import parse_version
from hunyuan_staged.weights import components
from hunyuan_staged.weights.folder import open_model
from hunyuan_staged.weights.key_maps import FUSED_RULES, TRANSFORMER_MAP, to_diffusers, to_official
from hunyuan_staged.weights.quantization.scaled_linear import ScaledLinear
from hunyuan_staged.weights.single_file import guess_version, open_transformer

CPU = torch.device("cpu")
VERSION = parse_version("demo_t2v")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(scope="module")
def folder(tiny_official):
    return open_model(tiny_official, ("transformer",))


@pytest.fixture(scope="module")
def official(folder) -> dict[str, torch.Tensor]:
    model = components.load_transformer(folder, VERSION.name, device=CPU, dtype=F32)
    return to_official(dict(model.state_dict()), TRANSFORMER_MAP)


def opened(path):
    return open_transformer(path, lambda meanflow: VERSION)


def loaded(path, dtype: torch.dtype = F32, **options) -> dict[str, torch.Tensor]:
    return dict(
        components.load_transformer(opened(path), VERSION.name, device=CPU, dtype=dtype, **options).state_dict()
    )


def check_equal(found, official, dtype: torch.dtype = F32) -> None:
    wanted = to_diffusers(official, (*TRANSFORMER_MAP, *FUSED_RULES))
    assert found.keys() == wanted.keys()
    assert not [name for name, x in wanted.items() if not torch.equal(found[name], x.to(dtype))]


@pytest.mark.parametrize("stored", [F32, BF16, F16])
@pytest.mark.parametrize("style", ["official", "fused", "diffusers"])
def test_exact_formats_give_the_weights_themselves(official, tmp_path, style, stored):
    rounded = {name: x.to(stored) for name, x in official.items()}
    tensors = rounded if style == "official" else getattr(writer, style)(rounded)
    path = writer.save(tmp_path / "any.safetensors", tensors)
    check_equal(loaded(path), {name: x.float() for name, x in rounded.items()})


def test_a_prefix_is_taken_off_and_the_config_follows_from_the_shapes(folder, official, tmp_path):
    tensors = {f"model.diffusion_model.{name}": x for name, x in writer.fused(official).items()}
    path = writer.save(tmp_path / "any.safetensors", tensors)
    check_equal(loaded(path), official)
    config, said = (
        components.transformer_config(opened(path), VERSION.name),
        components.transformer_config(folder, VERSION.name),
    )
    assert {name: value for name, value in config.items() if name in said} == {
        name: tuple(value) if isinstance(value, list) else value for name, value in said.items() if name in config
    }
    count = len(tensors)
    assert opened(path).describe() == (
        f"any.safetensors: taken for a transformer demo_t2v of {config['num_layers']} blocks, {count} weights by "
        "official or ComfyUI's names, float32"
    )


FLOAT8 = {
    "rows": writer.by_rows,
    "comfy old": writer.comfy_old,
    "comfy new": writer.comfy_new,
    "ModelOpt": lambda official: writer.by_tensor(writer.diffusers(official), "weight_scale", "input_scale"),
}


@pytest.mark.parametrize("convention", FLOAT8)
def test_scaled_float8_is_q_times_its_scale(official, tmp_path, convention):
    tensors, exact = FLOAT8[convention](official)
    path = writer.save(tmp_path / "any.safetensors", tensors)
    found = loaded(path)
    if convention == "ModelOpt":
        assert not [name for name, x in exact.items() if not torch.equal(found[name], x)]
    else:
        check_equal(found, exact)
    plain = to_diffusers(official, TRANSFORMER_MAP)
    changed = [name for name, x in plain.items() if not torch.equal(found[name], x)]
    assert changed
    for name in changed:
        # e4m3: half a step is 2^-4 of a value, and at least half of the smallest subnormal, 2^-10 x scale
        x = plain[name]
        bound = x.abs() * 2.0**-4 + x.abs().max() / writer.LARGEST * 2.0**-9
        assert ((found[name] - x).abs() <= bound).all(), name


@pytest.mark.parametrize("convention", FLOAT8)
def test_scaled_float8_is_kept_in_the_blocks_with_the_files_scales(official, tmp_path, convention):
    tensors, exact = FLOAT8[convention](official)
    folder = opened(writer.save(tmp_path / "any.safetensors", tensors))
    exact = exact if convention == "ModelOpt" else to_diffusers(exact, (*TRANSFORMER_MAP, *FUSED_RULES))
    for dtype in (BF16, F32):
        skeleton = components.transformer_skeleton(folder, VERSION.name)
        model = components.load_transformer(folder, VERSION.name, device=CPU, dtype=dtype, skeleton=skeleton)
        layers = {name: module for name, module in model.named_modules() if isinstance(module, ScaledLinear)}
        assert len(layers) == 12 * len(model.transformer_blocks)
        wide = {f"{name}.weight": layer.weight for name, layer in layers.items()}
        assert not [name for name, weight in wide.items() if not torch.equal(weight, exact[name].to(dtype))]
        assert all(layer.stored.dtype == writer.E4M3 and layer.row_scale.dtype == F32 for layer in layers.values())
    assert "float8 with its scales, kept so in the blocks" in folder.describe()
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(0))
    layer = next(iter(layers.values()))
    compiled = torch.compile(lambda module, x: module(x), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(layer, x), layer(x))


def test_latents_of_scaled_float8_are_those_of_its_exact_weights(tiny_official, official, tmp_path):
    """Kept in float8, on the device or offloaded, or taken as --weights_dtype fp8."""
    inputs = embed(tmp_path / "in", tiny_official)
    tensors, exact = writer.by_rows(official)
    files = {
        "float8": writer.save(tmp_path / "a_demo_t2v.safetensors", tensors),
        "plain": writer.save(tmp_path / "b_demo_t2v.safetensors", exact),
    }
    found = {}
    for name, file, *more in (
        ("plain", "plain"),
        ("kept", "float8"),
        ("offloaded", "float8", "--enable_offloading"),
        ("asked", "float8", "--weights_dtype", "fp8"),
    ):
        args = ["--input_dir", inputs, "--output_dir", tmp_path / name, "--transformer", files[file], *more]
        status, said = run_stage(2, *args, "--video_length", 5, "--num_inference_steps", 2, said=tmp_path / "said")
        assert status == 0, said
        found[name] = load_latents(tmp_path / name)[0]
    assert [name for name, latents in found.items() if not torch.equal(latents, found["plain"])] == []


def test_float8_without_scales_and_what_the_header_says(official, tmp_path):
    tensors = {name: x.to(writer.E4M3) if x.ndim == 2 else x for name, x in official.items()}
    check_equal(loaded(writer.save(tmp_path / "a.safetensors", tensors)), {n: x.float() for n, x in tensors.items()})
    said = {"format_version": "1.0", "layers": {"double_blocks.0.img_attn_q": {"format": "float8_e4m3fn"}}}
    tensors, exact = writer.by_rows(official)
    path = writer.save(tmp_path / "b.safetensors", tensors, {"_quantization_metadata": json.dumps(said)})
    check_equal(loaded(path), exact)
    said["layers"]["double_blocks.0.img_attn_q"]["format"] = "mxfp8"
    path = writer.save(tmp_path / "b.safetensors", tensors, {"_quantization_metadata": json.dumps(said)})
    refused(path, "quantised in a format other than float8_e4m3fn and float8_e5m2: double_blocks.0.img_attn_q in mxfp8")


def refused(path, message: str) -> None:
    with pytest.raises(InputError) as error:
        opened(path)
    assert str(path) in str(error.value) and message in str(error.value) and "\n" not in str(error.value)


def test_other_formats_are_refused_by_name(official, tmp_path):
    path = tmp_path / "any.safetensors"
    path.write_bytes(b"PK\3\4....")
    refused(path, "is a pickled PyTorch file; read is safetensors in float32")
    path.write_bytes(b"\0" * 20)
    refused(path, "is not a whole safetensors file")
    (tmp_path / "dcp").mkdir()
    (tmp_path / "dcp" / "__0_0.distcp").write_bytes(b"")
    refused(tmp_path / "dcp", "is a DCP checkpoint")
    layer = "double_blocks.0.img_attn_q"
    byte = torch.zeros(4, 4, dtype=torch.uint8)
    for added, name in (
        ({f"{layer}.weight": byte, f"{layer}.weight_scale": byte.to(writer.E4M3)}, "is NVFP4"),
        ({f"{layer}.weight_scale_2": torch.ones(1)}, "is NVFP4"),
        ({f"{layer}.weight_scale_inv": torch.ones(1, 1)}, "is float8 in blocks"),
        ({f"{layer}.lokr_w1": torch.ones(2, 2)}, "is a LoKr adapter"),
        ({f"{layer}.hada_w1_a": torch.ones(2, 2)}, "is a LoHa adapter"),
        ({f"{layer}.lora_A.weight": torch.ones(2, 2)}, "is a LoRA adapter; give it as --lora"),
        ({f"{layer}.weight": byte}, "holds tensors in U8"),
    ):
        refused(writer.save(path, official | added), name)


def test_half_a_set_and_left_over_keys_are_refused(official, tmp_path):
    path = tmp_path / "any.safetensors"
    few = {name: x for name, x in official.items() if "img_attn_k." not in name}
    refused(
        writer.save(path, few),
        "lacks tensors of the transformer: transformer_blocks.0.attn.to_k.weight, transformer_blocks.0.attn.to_k.bias, "
        "transformer_blocks.1.attn.to_k.weight and ",
    )
    more = official | {f"single_blocks.{n}.linear1.weight": torch.ones(2, 2) for n in range(4)}
    refused(writer.save(path, more), "that no transformer of this suite has: single_blocks.0.linear1.weight, single_")
    refused(writer.save(path, official | writer.fused(official)), "holds tensors for what others have: ")
    bad = official | {"double_blocks.0.img_attn_q.weight": torch.ones(3, 3)}
    refused(writer.save(path, bad), "do not fit each other: transformer_blocks.0.attn.to_q.weight [3, 3], not [")
    refused(writer.save(path, {"a.weight": torch.ones(1)}), "that no transformer of this suite has: a.weight")
    with pytest.raises(InputError, match="lacks time_r_in, and is no 480p_t2v_step_distilled"):
        open_transformer(writer.save(path, official), lambda meanflow: parse_version("480p_t2v_step_distilled"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: torch.ones(3, 1), "scales that do not fit: double_blocks.0.img_attn_q.weight_scale F32 [3, 1]"),
        (lambda rows: torch.full((rows, 1), float("inf")), "which holds what is no finite number from 0 on"),
        (lambda rows: torch.ones(rows, 1, dtype=torch.int64), "double_blocks.0.img_attn_q.weight_scale I64 ["),
        (None, "float8 weights without a scale: double_blocks.0.img_attn_q.weight"),
    ],
)
def test_scales_that_do_not_fit(official, tmp_path, change, message):
    tensors, _ = writer.by_rows(official)
    scale = tensors.pop("double_blocks.0.img_attn_q.weight_scale")
    if change:
        tensors["double_blocks.0.img_attn_q.weight_scale"] = change(len(scale))
    refused(writer.save(tmp_path / "any.safetensors", tensors), message)
    if change:
        tensors["img_in.proj.weight_scale"] = scale
        tensors["double_blocks.0.img_attn_q.weight_scale"] = scale
        path = writer.save(tmp_path / "any.safetensors", tensors)
        refused(path, "img_in.proj.weight_scale, without a float8 weight of its own")


@pytest.mark.parametrize(
    ("name", "meanflow", "version"),
    [
        ("hy1.5_t2v_480p_lightx2v_4step.safetensors", False, "480p_t2v_distilled"),
        ("hy15_720p_i2v_fp8_e4m3_lightx2v.safetensors", False, "720p_i2v"),
        ("hunyuanvideo1.5_720p_t2v_fp16.safetensors", False, "720p_t2v"),
        ("hunyuanvideo1.5_480p_i2v_cfg_distilled_fp8_scaled.safetensors", False, "480p_i2v_distilled"),
        ("hunyuanvideo1.5_480p_i2v_step_distilled_fp16.safetensors", True, "480p_i2v_step_distilled"),
        ("model.safetensors", False, None),
        ("720p.safetensors", False, None),
    ],
)
def test_the_version_is_guessed_from_a_name(name, meanflow, version):
    found = guess_version(name, meanflow=meanflow)
    assert (found and found.name) == version


def test_through_the_script(tiny_official, official, tmp_path):
    """The same latents from a fused file as from the folder, also with blocks in host memory and weights in float8."""
    inputs = embed(tmp_path / "in", tiny_official)
    path = writer.save(tmp_path / "my_demo_t2v.safetensors", writer.fused(official))

    def run(name: str, *more: object) -> tuple[torch.Tensor, dict[str, str], str]:
        args = ["--input_dir", inputs, "--output_dir", tmp_path / name, "--video_length", 5, "--num_inference_steps", 2]
        status, said = run_stage(2, *args, *more, said=tmp_path / "said")
        assert status == 0, said
        return *load_latents(tmp_path / name), said

    plain, file = run("plain"), run("file", "--transformer", path)
    assert torch.equal(plain[0], file[0])
    assert file[1]["transformer_file"] == path.name and file[1]["transformer_file_version"] == "demo_t2v"
    assert "its name is taken to mean demo_t2v; where that is wrong, give --transformer_version" in file[2]
    assert "my_demo_t2v.safetensors: taken for a transformer demo_t2v of " in file[2]
    given = run("given", "--model_path", path, "--transformer_version", "demo_t2v", "--enable_offloading")
    assert torch.equal(plain[0], given[0]) and "is taken to mean" not in given[2]
    four = ("--transformer", path, "--transformer_version", "demo_t2v", "--four_steps")
    status, said = run_stage(2, "--input_dir", inputs, *four, "--video_length", 5, said=tmp_path / "said")
    warned = "--four_steps is for weights or an adapter made for it, and demo_t2v has no adapter"
    assert status == 0 and warned in said and "needs guidance" not in said
    recorded = load_latents(inputs)[1]
    assert [float(recorded[name]) for name in ("num_inference_steps", "guidance_scale", "flow_shift")] == [4, 1, 5]
    shifted = run("shifted", "--flow_shift", 3)
    assert shifted[1]["flow_shift"] == "3.0" and not torch.equal(shifted[0], plain[0])
    for more, message in (
        (["--four_steps", "--flow_shift", 7], "--flow_shift 7 contradicts --four_steps, 5"),
        (["--flow_shift", 0], "--flow_shift 0 is not above 0 and up to 100"),
    ):
        status, said = run_stage(2, "--input_dir", inputs, *more, said=tmp_path / "said")
        assert status == 2 and message in said, said
    fp8 = ("--weights_dtype", "fp8")
    assert torch.equal(run("fp8", *fp8)[0], run("file8", "--transformer", path, *fp8, "--enable_offloading")[0])
    for more, message in (
        (["--transformer", tmp_path / "none"], f"--transformer {tmp_path / 'none'} does not exist"),
        (["--transformer", path, "--transformer_version", "odd"], "transformer version 'odd' is not of the form"),
        (["--transformer_version", "demo_t2v"], "--transformer_version belongs to a file as --transformer"),
    ):
        status, said = run_stage(2, "--input_dir", inputs, *more, said=tmp_path / "said")
        assert status == 2 and message in said, said
