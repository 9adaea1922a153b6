"""LoRA adapters: every style of keys against plain arithmetic on the weights, refusals, and the script."""

import json

import pytest
import torch
from folders import embed
from forked import run_ranks, run_stage
from safetensors.torch import save_file

from hunyuan_staged.errors import InputError
from hunyuan_staged.files import provenance
from hunyuan_staged.files.tensors import load_latents
from hunyuan_staged.weights import components, lora
from hunyuan_staged.weights.folder import open_model
from hunyuan_staged.weights.key_maps import TRANSFORMER_MAP, to_official
from hunyuan_staged.weights.quantization.fp8_rows import Float8Linear, dequantise, quantise
from hunyuan_staged.weights.stream import nowhere

CPU = torch.device("cpu")
VERSION = "demo_t2v"
RANK = 2
# Official names: plain, fused (q, k and v of the refiner), swapped halves, and a convolution.
ADAPTED = (
    "double_blocks.1.img_attn_q",
    "double_blocks.0.txt_mlp.fc1",
    "txt_in.individual_token_refiner.blocks.0.self_attn_qkv",
    "final_layer.adaLN_modulation.1",
    "img_in.proj",
)


@pytest.fixture(scope="module")
def folder(tiny_official):
    return open_model(tiny_official, ("transformer",))


@pytest.fixture(scope="module")
def weights(folder) -> dict[str, torch.Tensor]:
    return dict(components.load_transformer(folder, VERSION, device=CPU, dtype=torch.float32).state_dict())


@pytest.fixture(scope="module")
def official(weights) -> dict[str, torch.Tensor]:
    return to_official(weights, TRANSFORMER_MAP)


def parts(official, seed: int = 1) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(down, up) of each adapted module, by its official name."""
    draw, found = torch.Generator().manual_seed(seed), {}
    for module in ADAPTED:
        shape = official[f"{module}.weight"].shape
        down = torch.randn(RANK, *shape[1:], generator=draw)
        found[module] = down, torch.randn(shape[0], RANK, *[1] * (len(shape) - 2), generator=draw) * 0.1
    return found


def adapted(official, drawn, scale: float) -> dict[str, torch.Tensor]:
    """The official weights with the additions, in float64."""
    found = {name: x.double() for name, x in official.items()}
    for module, (down, up) in drawn.items():
        delta = up.double().flatten(1) @ down.double().flatten(1)
        found[f"{module}.weight"] = found[f"{module}.weight"] + scale * delta.view(official[f"{module}.weight"].shape)
    return found


def fused(folder, *given) -> dict[str, torch.Tensor]:
    adapters = lora.load(given, components.transformer_shapes(folder, VERSION))
    model = components.load_transformer(folder, VERSION, device=CPU, dtype=torch.float32, adapt=adapters.fused)
    return to_official(dict(model.state_dict()), TRANSFORMER_MAP)


def check(found, expected) -> None:
    for name, x in expected.items():
        assert torch.allclose(found[name].double(), x, rtol=1e-6, atol=1e-6), name


OFFICIAL_STYLES = {
    "peft": ("base_model.model.{}.lora_A.default.weight", "base_model.model.{}.lora_B.default.weight"),
    "bare": ("{}.lora_A.weight", "{}.lora_B.weight"),
    "comfy": ("diffusion_model.{}.lora_down.weight", "diffusion_model.{}.lora_up.weight"),
}


def write(path, drawn, style: tuple[str, str], alpha: float | None = None, alpha_key: str = "{}.alpha", metadata=None):
    tensors = {}
    for module, pair in drawn.items():
        for key, tensor in zip(style, pair, strict=True):
            tensors[key.format(module)] = tensor.contiguous()
        if alpha is not None:
            tensors[alpha_key.format(module)] = torch.tensor(alpha)
    save_file(tensors, path, metadata)
    return path


@pytest.mark.parametrize("adapted", [False, True])
def test_tensors_are_read_straight_to_their_places_unless_adapters_change_them(folder, monkeypatch, adapted):
    """Whoever gave the loader a function that changes nothing had them read to memory of their own."""
    places = []

    def recorded(*args, place, **options):
        places.append(place)
        return read(*args, place=place, **options)

    read = components.transformer_tensors
    monkeypatch.setattr(components, "transformer_tensors", recorded)
    adapt = lora.Adapters().fused if adapted else None
    components.load_transformer(folder, VERSION, device=CPU, dtype=torch.float32, adapt=adapt)
    assert (places == [nowhere]) == adapted


@pytest.mark.parametrize("style", OFFICIAL_STYLES)
def test_official_keys_add_to_the_weights(folder, official, tmp_path, style):
    drawn = parts(official)
    path = write(tmp_path / "a.safetensors", drawn, OFFICIAL_STYLES[style])
    check(fused(folder, (path, 0.5)), adapted(official, drawn, 0.5))


def test_alpha_scales_by_the_rank(folder, official, tmp_path):
    drawn = parts(official)
    path = write(tmp_path / "a.safetensors", drawn, OFFICIAL_STYLES["bare"], alpha=8.0)
    check(fused(folder, (path, 1.0)), adapted(official, drawn, 8.0 / RANK))


def test_kohya_keys_with_underscores(folder, official, tmp_path):
    drawn = {module.replace(".", "_"): pair for module, pair in parts(official).items()}
    style = ("lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight")
    path = write(tmp_path / "a.safetensors", drawn, style, 1.0, "lora_unet_{}.alpha")
    check(fused(folder, (path, 1.0)), adapted(official, parts(official), 1.0 / RANK))


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"transformer.r": RANK, "transformer.lora_alpha": 6}, 3.0),
        ({"r": RANK, "lora_alpha": 6, "use_rslora": True}, 6 / RANK**0.5),
        ({"r": RANK, "lora_alpha": 1, "alpha_pattern": {"attn.to_q": 10}}, 5.0),
    ],
)
def test_diffusers_keys_with_the_alpha_of_the_metadata(folder, official, tmp_path, config, scale):
    down, up = parts(official)["double_blocks.1.img_attn_q"]
    path = tmp_path / "a.safetensors"
    stem = "transformer.transformer_blocks.1.attn.to_q"
    metadata = {"lora_adapter_metadata": json.dumps(config)}
    save_file({f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}, path, metadata)
    check(fused(folder, (path, 1.0)), adapted(official, {"double_blocks.1.img_attn_q": (down, up)}, scale))


def test_two_at_once_are_their_sum_and_weight_0_changes_no_bit(folder, official, tmp_path):
    first, second = parts(official, 1), parts(official, 2)
    paths = [
        write(tmp_path / f"{n}.safetensors", drawn, OFFICIAL_STYLES["bare"]) for n, drawn in enumerate((first, second))
    ]
    expected = adapted(official, first, 1.0)
    for name, x in adapted(official, second, -0.5).items():
        expected[name] = expected[name] + x - official[name].double()
    check(fused(folder, (paths[0], 1.0), (paths[1], -0.5)), expected)
    nothing = fused(folder, (paths[0], 0.0))
    assert all(torch.equal(nothing[name], x) for name, x in official.items())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {f"transformer_blocks.{n}.attn.to_q.lora_A.weight": (RANK, 4) for n in (90, 91, 92, 93)},
            "keys that are no adapter of this transformer: transformer_blocks.90.attn.to_q.lora_A.weight, "
            "transformer_blocks.91.attn.to_q.lora_A.weight, transformer_blocks.92.attn.to_q.lora_A.weight and 1 more",
        ),
        ({"double_blocks.0.img_attn_q.lora_mid.weight": (4,)}, "keys that are no adapter of this transformer"),
        ({"double_blocks.0.img_attn_q_norm.lora_A.weight": (4,)}, "keys that are no adapter of this transformer"),
        ({"double_blocks.0.img_attn_q.lora_A.weight": (RANK, 4)}, "modules without both a down (lora_A) and an up"),
        (
            {
                "double_blocks.0.img_attn_q.lora_A.weight": (RANK, 5),
                "double_blocks.0.img_attn_q.lora_B.weight": ("out", RANK),
            },
            "weights that do not fit: double_blocks.0.img_attn_q.lora_A.weight [2, 5] for a weight [",
        ),
        (
            {
                "double_blocks.0.img_attn_q.lora_A.weight": (RANK, "in"),
                "double_blocks.0.img_attn_q.lora_B.weight": ("out", RANK + 1),
            },
            "weights that do not fit: double_blocks.0.img_attn_q.lora_B.weight [",
        ),
        ({}, "holds no tensors"),
    ],
)
def test_what_does_not_fit_is_refused_even_at_weight_0(folder, official, tmp_path, keys, message):
    out, inner = official["double_blocks.0.img_attn_q.weight"].shape
    path = tmp_path / "a.safetensors"
    sizes = {"out": out, "in": inner}
    save_file({key: torch.ones([sizes.get(n, n) for n in shape]) for key, shape in keys.items()}, path)
    with pytest.raises(InputError) as error:
        lora.load([(path, 0.0)], components.transformer_shapes(folder, VERSION))
    assert str(error.value).startswith(f"--lora {path}") and message in str(error.value)


def test_nan_and_dora_and_broken_files_are_refused(folder, official, tmp_path):
    shapes, path = components.transformer_shapes(folder, VERSION), tmp_path / "a.safetensors"
    drawn = {ADAPTED[0]: parts(official)[ADAPTED[0]]}
    drawn[ADAPTED[0]][1][0, 0] = float("nan")
    write(path, drawn, OFFICIAL_STYLES["bare"])
    with pytest.raises(InputError, match="which hold NaN, Inf or whole numbers"):
        lora.load([(path, 1.0)], shapes)
    metadata = {"lora_adapter_metadata": json.dumps({"use_dora": True})}
    write(path, {ADAPTED[0]: parts(official)[ADAPTED[0]]}, OFFICIAL_STYLES["bare"], metadata=metadata)
    with pytest.raises(InputError, match="is a DoRA adapter"):
        lora.load([(path, 1.0)], shapes)
    path.write_bytes(b"no such thing")
    with pytest.raises(InputError, match="is not a whole safetensors file"):
        lora.load([(path, 1.0)], shapes)


def test_float8_rounds_the_adapted_weights(folder, official, tmp_path):
    """What is stored is the sum's float8, not the float8 weights with something added."""
    path = write(tmp_path / "a.safetensors", parts(official), OFFICIAL_STYLES["bare"])
    adapters = lora.load([(path, 1.0)], components.transformer_shapes(folder, VERSION))
    options = {"device": CPU, "dtype": torch.float32, "adapt": adapters.fused}
    whole = components.load_transformer(folder, VERSION, **options)
    small = components.load_transformer(
        folder, VERSION, skeleton=components.transformer_skeleton(folder, VERSION, weights_dtype="fp8"), **options
    )
    for name in ("transformer_blocks.1.attn.to_q", "transformer_blocks.0.ff_context.net.0.proj"):
        linear, weight = small.get_submodule(name), whole.get_submodule(name).weight
        assert isinstance(linear, Float8Linear) and torch.equal(linear.weight, dequantise(*quantise(weight)))
    plain = components.load_transformer(folder, VERSION, device=CPU, dtype=torch.float32)
    assert not torch.allclose(weight, plain.get_submodule(name).weight, atol=0.1)


def test_float8_offloading_and_two_processes_through_the_script(tiny_official, official, tmp_path):
    inputs = embed(tmp_path / "in", tiny_official)
    path = write(tmp_path / "a.safetensors", parts(official), OFFICIAL_STYLES["bare"])
    small = ["--input_dir", inputs, "--video_length", 5, "--num_inference_steps", 2]

    def run(name: str, *more: object, size: int = 1) -> tuple[torch.Tensor, dict[str, str]]:
        ranks = run_ranks(2, size, *small, "--output_dir", tmp_path / name, *more, said=tmp_path / "said")
        assert [rank.status() for rank in ranks] == [0] * size, ranks[0].said()
        return load_latents(tmp_path / name)

    def distance(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a - b).norm() / b.norm())

    fp8 = ("--weights_dtype", "fp8")
    one, _ = run("one", "--lora", path)
    two, recorded = run("two", "--lora", path, size=2)
    assert distance(two, one) < 1e-5 and json.loads(recorded["lora"])[0]["sha256"] == provenance.sha256(path)
    # Both guidance branches on both processes: the sequence is what is split.
    assert distance(run("split", "--lora", path, "--cfg_parallel", "off", size=2)[0], one) < 1e-5
    stored, without = run("stored", "--lora", path, *fp8)[0], run("without", *fp8)[0]
    assert torch.equal(run("streamed", "--lora", path, *fp8, "--enable_offloading")[0], stored)
    # The rounding moves the latents far less than the adapter does.
    assert 0 < 4 * distance(stored, one) < distance(stored, without)


def test_through_the_script(tiny_official, official, tmp_path):
    """Recorded; the same latents with offloading; weight 0 has the bytes of a run without, but for the record."""
    inputs = embed(tmp_path / "in", tiny_official)
    path = write(tmp_path / "a.safetensors", parts(official), OFFICIAL_STYLES["peft"])

    def run(name: str, *more: object) -> tuple[torch.Tensor, dict[str, str]]:
        args = ["--input_dir", inputs, "--output_dir", tmp_path / name, "--video_length", 5, "--num_inference_steps", 2]
        status, said = run_stage(2, *args, *more, said=tmp_path / "said")
        assert status == 0, said
        assert ("LoRA a.safetensors: 5 of 5 modules (official names); weight" in said) == bool(more)
        return load_latents(tmp_path / name)

    plain, nothing = run("plain"), run("nothing", "--lora", f"{path}:0")
    assert torch.equal(plain[0], nothing[0])
    assert plain[1] == {name: value for name, value in nothing[1].items() if name != "lora"}
    resident, streamed = run("resident", "--lora", path), run("streamed", "--lora", path, "--enable_offloading")
    assert torch.equal(resident[0], streamed[0]) and not torch.allclose(resident[0], plain[0], atol=1e-3)
    record = {"file": "a.safetensors", "sha256": provenance.sha256(path), "weight": 1.0}
    assert json.loads(resident[1]["lora"]) == [record]
    assert resident[1]["made_from_sha256"] != plain[1]["made_from_sha256"]
    for given, message in (
        ("/nowhere.safetensors", "there is no file /nowhere.safetensors; allowed is FILE[:WEIGHT]"),
        (f"{path}:nan", "the weight is nan; allowed is -1000 to 1000"),
        (f"{path}:much", f"there is no file {path}:much"),
    ):
        status, said = run_stage(2, "--input_dir", inputs, "--lora", given, said=tmp_path / "said")
        assert status == 2 and f"error: --lora {given}: {message}" in said
