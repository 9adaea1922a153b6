"""Adapters in every style that people have, by an independent writer, against plain arithmetic and each other."""

import json

import adapter_writer as writer
import pytest
import torch
from safetensors.torch import load_file, save_file

from hunyuan_staged.errors import InputError
from hunyuan_staged.weights import components, lora
from hunyuan_staged.weights.folder import open_model
from hunyuan_staged.weights.key_maps import TRANSFORMER_MAP, to_official

CPU = torch.device("cpu")
VERSION = "demo_t2v"
ALPHA = 8.0  # twice the rank
SCALE = ALPHA / writer.RANK


@pytest.fixture(scope="module")
def folder(tiny_official):
    return open_model(tiny_official, ("transformer",))


@pytest.fixture(scope="module")
def official(folder) -> dict[str, torch.Tensor]:
    return merged(folder)


@pytest.fixture(scope="module")
def blocks(folder) -> int:
    return components.transformer_config(folder, VERSION)["num_layers"]


@pytest.fixture(scope="module")
def drawn(official, blocks) -> writer.Drawn:
    return writer.draw(official, blocks)


def merged(folder, *given) -> dict[str, torch.Tensor]:
    """The official weights of the run, with adapters."""
    adapters = lora.load(given, components.transformer_shapes(folder, VERSION))
    model = components.load_transformer(folder, VERSION, device=CPU, dtype=torch.float32, adapt=adapters.fused)
    return to_official(dict(model.state_dict()), TRANSFORMER_MAP)


def expected(official, drawn, scale: float, *, deltas: bool = False) -> dict[str, torch.Tensor]:
    """W + scale * (up @ down) in float32, as the suite promises."""
    found = dict(official)
    for name, (down, up) in drawn.pairs.items():
        weight = official[f"{name}.weight"]
        product = torch.cat([part.flatten(1).float() @ down.flatten(1).float() for part in parts(name, up)])
        found[f"{name}.weight"] = weight + (scale * product).view(weight.shape)
    if deltas:
        found |= {f"{name}.bias": official[f"{name}.bias"] + delta.float() for name, delta in drawn.biases.items()}
        found |= {f"{name}.weight": official[f"{name}.weight"] + x.float() for name, x in drawn.weights.items()}
    return found


def parts(name: str, up: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The refiner's q, k and v are multiplied one by one: as in the modules that run."""
    return up.chunk(3) if name.endswith("_qkv") else (up,)


def check_equal(found, wanted) -> None:
    assert found.keys() == wanted.keys()
    differ = [name for name, x in wanted.items() if not torch.equal(found[name], x)]
    assert not differ


STYLES = {
    "peft folder": (lambda path, drawn, blocks: writer.peft_folder(path, drawn, ALPHA), SCALE),
    "musubi": (lambda path, drawn, blocks: writer.musubi(path, drawn, ALPHA), SCALE),
    "diffusion-pipe": (writer.diffusion_pipe, 1.0),
    "SimpleTuner": (writer.simple_tuner, 1.0),
    "diffusers": (lambda path, drawn, blocks: writer.diffusers(path, drawn, blocks, ALPHA), SCALE),
}


@pytest.mark.parametrize("style", STYLES)
def test_every_style_gives_the_same_bits(folder, official, drawn, blocks, tmp_path, style):
    write, scale = STYLES[style]
    path = write(tmp_path / "adapter", drawn, blocks)
    check_equal(merged(folder, (path, 1.0)), expected(official, drawn, scale))


def test_bias_and_weight_deltas_of_an_extracted_adapter_in_bf16(folder, official, blocks, tmp_path):
    small = writer.draw(official, blocks, torch.bfloat16)
    path = writer.comfy_extracted(tmp_path / "a.safetensors", small, blocks)
    check_equal(merged(folder, (path, 1.0)), expected(official, small, 1.0, deltas=True))
    adapters = lora.load([(path, 0.5)], components.transformer_shapes(folder, VERSION))
    modules = len({key.rsplit(".diff", 1)[0].split(".lora_")[0] for key in load_file(path)})
    told = f"LoRA a.safetensors: {modules} of {modules} modules (official and ComfyUI names), "
    assert adapters.found == [f"{told}3 weight deltas, {modules - 3} bias deltas; weight 0.5"]
    half = merged(folder, (path, 0.5))
    name = "double_blocks.0.txt_attn_v"
    assert torch.equal(half[f"{name}.bias"], official[f"{name}.bias"] + 0.5 * small.biases[name].float())


def test_block_sparse_ups_add_the_same_but_for_the_order_of_sums(folder, official, drawn, blocks, tmp_path):
    """Zeros times the other parts' downs are in the sum, so kernels may add in another order."""
    path = writer.musubi_for_comfy(tmp_path / "a.safetensors", drawn, blocks, ALPHA)
    found = merged(folder, (path, 1.0))
    for name, x in expected(official, drawn, SCALE).items():
        assert torch.allclose(found[name], x, rtol=1e-6, atol=1e-6), name


def test_a_peft_file_takes_the_scale_from_the_settings_beside_it(folder, official, drawn, tmp_path):
    weights = writer.peft_folder(tmp_path / "lora", drawn, ALPHA) / "default" / "adapter_model.safetensors"
    wanted = expected(official, drawn, SCALE)
    check_equal(merged(folder, (weights, 1.0)), wanted)
    check_equal(merged(folder, (weights.parent, 1.0)), wanted)
    one = lora.load([(weights.parent, 1.0)], components.transformer_shapes(folder, VERSION))
    assert one.given[0]["file"] == "adapter_model.safetensors"
    settings = weights.with_name("adapter_config.json")
    settings.write_text(settings.read_text().replace("8.0", "4.0"))
    assert lora.load([(weights, 1.0)], components.transformer_shapes(folder, VERSION)).facts() != one.facts()


def test_folders_that_are_no_adapter_are_refused(folder, drawn, tmp_path):
    shapes, path = components.transformer_shapes(folder, VERSION), tmp_path / "lora"
    path.mkdir()
    with pytest.raises(InputError, match="holds no safetensors file; allowed in a folder is adapter_model"):
        lora.load([(path, 1.0)], shapes)
    settings = writer.peft_folder(path, drawn, ALPHA) / "default" / "adapter_config.json"
    good = json.loads(settings.read_text())
    for change, message in (
        ({"peft_type": "LOHA"}, "says peft_type 'LOHA'; allowed is 'LORA'"),
        ({"use_dora": True}, "is a DoRA adapter"),
        (
            {"lora_alpha": "much"},
            "lora_alpha or alpha_pattern of its adapter_config.json: 'much' is not a number from -1e+06 to 1e+06",
        ),
        ({"alpha_pattern": {".*q": 3}}, "alpha_pattern '.*q' of its adapter_config.json; allowed are names of modules"),
    ):
        settings.write_text(json.dumps(good | change))
        with pytest.raises(InputError) as error:
            lora.load([(path, 1.0)], shapes)
        assert message in str(error.value)


@pytest.mark.parametrize(
    ("leaves", "kind"),
    [
        (("lokr_w1", "lokr_w2", "alpha"), "LoKr"),
        (("lokr_w1_a", "lokr_w1_b", "lokr_w2"), "LoKr"),
        (("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), "LoHa"),
        (("lora_down.weight", "lora_up.weight", "dora_scale"), "DoRA"),
        (("oft_blocks",), "OFT"),
    ],
)
def test_other_kinds_are_refused_by_name(folder, tmp_path, leaves, kind):
    path = tmp_path / "a.safetensors"
    save_file({f"lora_unet_double_blocks_0_img_attn_q.{leaf}": torch.ones(2, 2) for leaf in leaves}, path)
    with pytest.raises(InputError, match=f"is a {kind} adapter; LoRA is allowed"):
        lora.load([(path, 1.0)], components.transformer_shapes(folder, VERSION))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"diffusion_model.img_in.proj.diff": (3,)}, "img_in.proj.diff [3] for a weight ["),
        (
            {"double_blocks.0.img_attn_q_norm.diff_b": (3,)},
            "double_blocks.0.img_attn_q_norm.diff_b, whose module has no",
        ),
        ({"double_blocks.0.img_attn.qkv.diff_b": (4,)}, "which does not divide into 3 equal parts"),
        ({"double_blocks.0.img_attn_q.alpha": (1,)}, "modules without both a down (lora_A) and an up (lora_B) weight"),
        (
            {"double_blocks.0.img_attn.qkv.diff_b": ("out",), "double_blocks.0.img_attn_q.diff_b": ("in",)},
            "double_blocks.0.img_attn_q and double_blocks.0.img_attn.qkv are two names of one module",
        ),
        (
            {"transformer.img_in.proj.diff_b": ("in",), "img_in.proj.diff_b": ("in",)},
            "keys for what another key has: transformer.img_in.proj.diff_b",
        ),
    ],
)
def test_deltas_that_do_not_fit(folder, official, tmp_path, change, message):
    width, path = official["double_blocks.0.img_attn_q.bias"].shape[0], tmp_path / "a.safetensors"
    sizes = {"in": width, "out": 3 * width}
    save_file({key: torch.ones([sizes.get(n, n) for n in shape]) for key, shape in change.items()}, path)
    with pytest.raises(InputError) as error:
        lora.load([(path, 1.0)], components.transformer_shapes(folder, VERSION))
    assert str(error.value).startswith(f"--lora {path}: ") and message in str(error.value)
