"""Key maps against the official names, both layouts bit for bit, and refusals that name the culprit."""

import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import golden_weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hunyuan_staged.demo import checkpoint_writer, tiny
from hunyuan_staged.errors import InputError
from hunyuan_staged.geometry import BUCKET_BASE
from hunyuan_staged.versions import parse_version
from hunyuan_staged.weights import components, configs, encoder_components, loading
from hunyuan_staged.weights.folder import ModelFolder, open_model
from hunyuan_staged.weights.hub import PARTS
from hunyuan_staged.weights.key_maps import TRANSFORMER_MAP, VAE_MAP, to_diffusers, to_official

CPU = torch.device("cpu")
F32 = {"device": CPU, "dtype": torch.float32}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def golden_config(path: Path) -> dict:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["config"])


def meta_transformer(config: dict) -> torch.nn.Module:
    from diffusers import HunyuanVideo15Transformer3DModel

    with torch.device("meta"):
        return HunyuanVideo15Transformer3DModel(**config)


def golden_vae(golden_folder: Path) -> torch.nn.Module:
    from diffusers import AutoencoderKLHunyuanVideo15

    config = configs.official_vae_config(golden_config(golden_folder / "vae_5x7.safetensors"))
    with torch.device("meta"):
        return AutoencoderKLHunyuanVideo15(**config)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def copied(folder: Path, tmp_path: Path, *parts: str) -> Path:
    """A copy of some parts of a drawn checkpoint, to be damaged."""
    for part in parts:
        shutil.copytree(folder / part, tmp_path / part)
    return tmp_path


def edit(path: Path, **changes: object) -> None:
    """Change keys of a JSON file; None drops one."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


# The maps


@pytest.mark.parametrize("name", ["dit", "dit_meanflow"])
def test_every_official_transformer_name_has_its_place(golden_folder, name):
    golden = golden_folder
    config = golden_config(golden / f"{'dit_t2v' if name == 'dit' else name}.safetensors")
    shapes = json.loads((golden / f"{name}_shapes.json").read_text())
    weights = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    arguments = configs.official_transformer_config(config, shapes["byt5_in.fc1.weight"][1])
    expected = {key: list(tensor.shape) for key, tensor in meta_transformer(arguments).state_dict().items()}
    mapped = {key: list(tensor.shape) for key, tensor in to_diffusers(weights, TRANSFORMER_MAP).items()}
    assert mapped == expected


def test_every_official_vae_name_has_its_place(golden_folder):
    shapes = json.loads((golden_folder / "vae_shapes.json").read_text())
    weights = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    expected = {key: list(tensor.shape) for key, tensor in golden_vae(golden_folder).state_dict().items()}
    assert {key: list(tensor.shape) for key, tensor in to_diffusers(weights, VAE_MAP).items()} == expected


@pytest.mark.parametrize(
    ("name", "rules"),
    [
        ("dit_shapes", TRANSFORMER_MAP),
        ("dit_meanflow_shapes", TRANSFORMER_MAP),
        ("vae_shapes", VAE_MAP),
    ],
)
def test_the_map_there_and_back_gives_the_same_bits(golden_folder, name, rules):
    weights = golden_weights(golden_folder / f"{name}.json")
    renamed = to_diffusers(weights, rules)
    assert same(to_official(renamed, rules), weights)
    assert same(to_diffusers(to_official(renamed, rules), rules), renamed)


@pytest.mark.parametrize("rules", [TRANSFORMER_MAP, VAE_MAP])
def test_no_name_stands_in_two_rules(rules):
    official = [rule.official for rule in rules]
    diffusers = [name for rule in rules for name in rule.diffusers]
    assert len(set(official)) == len(official)
    assert len(set(diffusers)) == len(diffusers)
    assert all(rule.official.count("#") == name.count("#") for rule in rules for name in rule.diffusers)


def test_fused_and_swapped_tensors_are_taken_apart_in_the_right_order():
    refiner = "txt_in.individual_token_refiner.blocks.1.self_attn_qkv.bias"
    mapped = to_diffusers(
        {refiner: torch.arange(6.0), "final_layer.adaLN_modulation.1.bias": torch.arange(4.0)}, TRANSFORMER_MAP
    )
    prefix = "context_embedder.token_refiner.refiner_blocks.1.attn."
    assert {name: tensor.tolist() for name, tensor in mapped.items()} == {
        f"{prefix}to_q.bias": [0, 1],
        f"{prefix}to_k.bias": [2, 3],
        f"{prefix}to_v.bias": [4, 5],
        "norm_out.linear.bias": [2, 3, 0, 1],  # shift, scale → scale, shift
    }


def test_leftovers_on_either_side_are_refused_by_name():
    some = {f"double_blocks.0.img_attn_{x}.weight": torch.zeros(2, 2) for x in "qwxyz"}
    with pytest.raises(InputError) as refused:
        to_diffusers(some, TRANSFORMER_MAP)
    assert str(refused.value) == (
        "tensors that the official layout does not have: double_blocks.0.img_attn_w.weight, "
        "double_blocks.0.img_attn_x.weight, double_blocks.0.img_attn_y.weight and 1 more"
    )
    with pytest.raises(InputError, match=r"^tensors that the diffusers layout does not have: img_in.proj.weight$"):
        to_official({"img_in.proj.weight": torch.zeros(2)}, TRANSFORMER_MAP)
    with pytest.raises(InputError, match=r"layout does not have: decoder.up.0.block.0.conv3.conv.weight$"):
        to_diffusers({"decoder.up.0.block.0.conv3.conv.weight": torch.zeros(2)}, VAE_MAP)


@pytest.mark.parametrize("given", ["q", "k", "qv"])
def test_parts_of_a_fused_tensor_without_the_others_are_refused(given):
    prefix = "context_embedder.token_refiner.refiner_blocks.0.attn."
    absent = ", ".join(f"{prefix}to_{x}.weight" for x in "qkv" if x not in given)
    with pytest.raises(
        InputError, match=f"^{re.escape(f'tensors missing beside those that they are fused with: {absent}')}$"
    ):
        to_official({f"{prefix}to_{x}.weight": torch.zeros(2, 2) for x in given}, TRANSFORMER_MAP)


@pytest.mark.parametrize(
    ("name", "rows", "parts"),
    [
        ("txt_in.individual_token_refiner.blocks.0.self_attn_qkv.weight", 4, 3),
        ("final_layer.adaLN_modulation.1.weight", 3, 2),
    ],
)
def test_a_fused_tensor_that_does_not_split_evenly_is_refused(name, rows, parts):
    with pytest.raises(InputError, match=rf"{name} has shape \[{rows}, 2\]; it holds {parts} equal parts"):
        to_diffusers({name: torch.zeros(rows, 2)}, TRANSFORMER_MAP)


def test_the_mapped_vae_gives_the_official_numbers(golden_folder):
    vae = golden_vae(golden_folder)
    weights = to_diffusers(golden_weights(golden_folder / "vae_shapes.json"), VAE_MAP)
    vae.load_state_dict(weights, assign=True)
    golden = load_file(golden_folder / "vae_5x7.safetensors")
    with torch.no_grad():
        decoded = vae.decoder(golden["latents"])
        # The posterior's mode is its mean, the first half of the channels.
        encoded = vae.encoder(golden["image"]).chunk(2, dim=1)[0]
    for ours, theirs in ((decoded, golden["decoded"]), (encoded, golden["encoded_mode"])):
        assert (ours - theirs).norm() / theirs.norm() < 1e-4


# Configs


def official_config() -> dict:
    return {
        "in_channels": 32,
        "out_channels": 32,
        "hidden_size": 128,
        "heads_num": 4,
        "mm_double_blocks_depth": 3,
        "mlp_width_ratio": 4.0,
        "patch_size": [1, 2, 2],
        "rope_dim_list": [8, 12, 12],
        "rope_theta": 256,
        "text_states_dim": 48,
        "vision_states_dim": 40,
        "use_meanflow": False,
        "ideal_resolution": "720p",
        "ideal_task": "i2v",
    }


def test_an_official_config_becomes_diffusers_arguments():
    assert configs.official_transformer_config(official_config(), 1472) == {
        "in_channels": 65,
        "out_channels": 32,
        "num_attention_heads": 4,
        "attention_head_dim": 32,
        "num_layers": 3,
        "mlp_ratio": 4.0,
        "patch_size_t": 1,
        "patch_size": 2,
        "rope_axes_dim": (8, 12, 12),
        "rope_theta": 256,
        "text_embed_dim": 48,
        "text_embed_2_dim": 1472,
        "image_embed_dim": 40,
        "use_meanflow": False,
        "target_size": 960,
        "task_type": "i2v",
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"mm_single_blocks_depth": 20},
            "c.json: mm_single_blocks_depth is 20; this suite runs mm_single_blocks_depth = 0 only",
        ),
        ({"guidance_embed": True}, "c.json: guidance_embed is True; this suite runs guidance_embed = False only"),
        (
            {"concat_condition": False},
            "c.json: in_channels 32 with concat_condition False is an input of 32 channels; this suite runs 65 and 98 only",
        ),
        ({"ideal_resolution": "8k"}, "c.json: ideal_resolution is '8k'; known: demo, 360p, 480p, 720p, 1080p, demo_hd"),
    ],
)
def test_a_transformer_that_this_suite_does_not_run_is_refused_by_name(change, message):
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        configs.official_transformer_config(official_config() | change, 1472, "c.json")


@pytest.mark.parametrize("key", ["hidden_size", "heads_num", "ideal_resolution", "patch_size"])
def test_a_key_that_a_config_lacks_is_named(key):
    config = official_config()
    del config[key]
    with pytest.raises(InputError, match=f"^c.json lacks: {key}$"):
        configs.official_transformer_config(config, 1472, "c.json")


def test_keys_that_a_config_lacks_have_the_official_classs_defaults():
    """Whose rope_dim_list is that of heads of 128."""
    config = official_config() | {"hidden_size": 512}
    for key in ("use_meanflow", "rope_theta", "rope_dim_list", "ideal_task"):
        del config[key]
    arguments = configs.official_transformer_config(config, 1472)
    assert {name: arguments[name] for name in ("use_meanflow", "rope_theta", "rope_axes_dim", "task_type")} == {
        "use_meanflow": False,
        "rope_theta": 256,
        "rope_axes_dim": (16, 56, 56),
        "task_type": None,
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tile_size": [6, 8, 8], "win_size": [[3, 3, 3]], "ssta_topk": 64, "ssta_lambda": 0.7}, None),
        ({"win_size": [3, 3, 3]}, None),
        ({"tile_size": [4, 8, 8]}, "c.json: attn_param's 'tile_size' is [4, 8, 8]; allowed is [6, 8, 8]"),
        ({"ssta_topk": 32}, "c.json: attn_param's 'ssta_topk' is 32; allowed is 64"),
        (
            {"threshold": 0.1},
            "c.json: attn_param's 'threshold' is 0.1; allowed is tile_size, win_size, ssta_topk, ssta_lambda",
        ),
        (7, "c.json: attn_param is 7; allowed is an object, or null"),
    ],
)
def test_a_sparse_attention_other_than_ours_is_refused(given, message):
    config = official_config() | {"attn_param": given}
    if message is None:
        assert configs.official_transformer_config(config, 1472) == configs.official_transformer_config(
            official_config(), 1472
        )
        return
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        configs.official_transformer_config(config, 1472, "c.json")


def test_a_vae_with_a_shift_is_refused():
    with pytest.raises(InputError, match=r"^c.json: shift_factor is 0.5; this suite runs none$"):
        configs.official_vae_config({"shift_factor": 0.5}, "c.json")


# Loading, both layouts


@pytest.fixture(params=["official", "diffusers"])
def folder(request, tiny_official, tiny_diffusers):
    path = {"official": tiny_official, "diffusers": tiny_diffusers}[request.param]
    return open_model(path, tuple(PARTS))


def test_layouts_and_versions(tiny_official, tiny_diffusers):
    official, diffusers = open_model(tiny_official, ()), open_model(str(tiny_diffusers), ())
    assert (official.layout, official.versions()) == ("official", ["demo_i2v", "demo_t2v"])
    assert (diffusers.layout, diffusers.versions()) == ("diffusers", ["demo_t2v"])
    assert official.resolutions() == diffusers.resolutions() == ["demo"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_transformer_is_loaded_whole_from_either_layout(folder, tiny_official, dtype):
    model = components.load_transformer(folder, "demo_t2v", device=CPU, dtype=dtype)
    stored = to_diffusers(load_file(tiny_official / "transformer" / "demo_t2v" / WEIGHTS), TRANSFORMER_MAP)
    assert same(model.state_dict(), {name: tensor.to(dtype) for name, tensor in stored.items()})
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert type(model).__name__ == "TransformerModules"
    assert model.config.target_size == 128


def test_loaded_weights_lie_in_memory_of_their_own(folder):
    """On a CPU safetensors gives views of the file's map: bits followed the alignment, and so the layout."""
    models = [
        components.load_transformer(folder, "demo_t2v", **F32),
        components.load_vae_decoder(folder, **F32)[0],
        encoder_components.load_language_model(folder, **F32)[1],
        encoder_components.load_glyph_encoder(folder, **F32)[1],
        encoder_components.load_image_encoder(folder, **F32)[1],
    ]
    weights = [parameter for model in models for parameter in model.parameters()]
    assert {weight.data_ptr() % 64 for weight in weights} == {0}
    assert all(weight.untyped_storage().nbytes() == weight.nbytes for weight in weights)


def test_a_file_read_in_several_goes_is_whole(tiny_official, monkeypatch):
    """A file's map is closed now and then, here after every tensor; all of them come, once."""
    expected = components.load_vae_encoder(open_model(tiny_official, ()), **F32)[0].state_dict()
    opened = []

    def counted(path, *args, **options):
        opened.append(path)
        return safe_open(path, *args, **options)

    monkeypatch.setattr(loading, "safe_open", counted)
    monkeypatch.setattr(loading, "MAPPED_BYTES", 1)
    loaded = components.load_vae_encoder(open_model(tiny_official, ()), **F32)[0].state_dict()
    assert len(opened) == 1 + len(expected)  # the names, then each tensor
    assert same(loaded, expected)


def test_both_layouts_say_the_same_of_the_transformer_and_the_vae(tiny_official, tiny_diffusers):
    official, diffusers = open_model(tiny_official, ()), open_model(tiny_diffusers, ())
    ours, theirs = (
        components.transformer_config(official, "demo_t2v"),
        components.transformer_config(diffusers, "demo_t2v"),
    )
    assert {name: theirs[name] for name in ours if name != "rope_axes_dim"} == {
        name: value for name, value in ours.items() if name != "rope_axes_dim"
    }
    assert ours["rope_axes_dim"] == tuple(theirs["rope_axes_dim"])
    assert ours["text_embed_2_dim"] == 64
    assert components.vae_config(official) == components.vae_config(diffusers)


@pytest.mark.parametrize("coder", ["decoder", "encoder"])
def test_one_half_of_the_vae_is_loaded_without_the_other(folder, tiny_official, tmp_path, coder):
    loaded, config = getattr(components, f"load_vae_{coder}")(folder, **F32)
    assert type(loaded).__name__ == f"Vae{coder.title()}"
    assert config["scaling_factor"] == 1.03682
    assert config["spatial_compression_ratio"] == 16
    stored = load_file(tiny_official / "vae" / WEIGHTS)
    half = {name: tensor for name, tensor in to_diffusers(stored, VAE_MAP).items() if name.startswith(coder)}
    assert same({f"{coder}.{name}": tensor for name, tensor in loaded.state_dict().items()}, half)
    # The other half need not even be there.
    damaged = copied(folder.path, tmp_path, "vae")
    kept = {name: tensor for name, tensor in load_file(damaged / "vae" / WEIGHTS).items() if name.startswith(coder)}
    save_file(kept, damaged / "vae" / WEIGHTS)
    alone = ModelFolder(damaged, folder.layout)
    assert same(getattr(components, f"load_vae_{coder}")(alone, **F32)[0].state_dict(), loaded.state_dict())


def sharded(path: Path) -> list[str]:
    """Deal a weight file's tensors to three shards with an index; returns the shards' names."""
    weights = load_file(path)
    shards = [f"{path.stem}-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]
    index = {name: shards[number % 3] for number, name in enumerate(weights)}
    for shard in shards:
        save_file({name: weights[name] for name in weights if index[name] == shard}, path.parent / shard)
    path.unlink()
    Path(f"{path}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return shards


def test_shards_are_read_one_by_one_with_a_bar(tiny_official, tmp_path):
    whole = components.load_transformer(open_model(tiny_official, ()), "demo_t2v", **F32)
    model = copied(tiny_official, tmp_path, "transformer/demo_t2v")
    shards = sharded(model / "transformer" / "demo_t2v" / WEIGHTS)
    # A file that the index does not list is of no concern.
    (model / "transformer" / "demo_t2v" / "stray.safetensors").write_bytes(b"no weights")
    seen = []

    def progress(iterable, **said):
        seen.append(said | {"files": [path.name for path in iterable]})
        return iterable

    loaded = components.load_transformer(open_model(model, ()), "demo_t2v", **F32, progress=progress)
    assert same(loaded.state_dict(), whole.state_dict())
    assert seen == [{"desc": "loading transformer", "unit": "shard", "files": shards}]


def test_a_listed_shard_that_is_absent_is_named(tiny_official, tmp_path):
    model = copied(tiny_official, tmp_path, "transformer/demo_t2v")
    shards = sharded(model / "transformer" / "demo_t2v" / WEIGHTS)
    (model / "transformer" / "demo_t2v" / shards[1]).unlink()
    with pytest.raises(InputError, match=f"demo_t2v lacks shards that its index lists: {shards[1]}$"):
        components.load_transformer(open_model(model, ()), "demo_t2v", **F32)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing", "lacks tensors of the model: x_embedder.proj.bias$"),
        ("leftover", "holds single_blocks.0.linear.weight, which the official layout does not have$"),
        ("of another block", "holds tensors that the model does not have: transformer_blocks.9.attn.to_q.weight$"),
        ("shape", r"x_embedder.proj.bias has shape \[3\]; its config says \[96\]$"),
        ("cut short", rf"{WEIGHTS} is not a whole safetensors file \(.+\)$"),
        ("none", f"holds 0 safetensors files; expected {WEIGHTS} or model.safetensors, alone or with its index$"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tiny_official, tmp_path, damage, message):
    model = copied(tiny_official, tmp_path, "transformer/demo_t2v")
    path = model / "transformer" / "demo_t2v" / WEIGHTS
    weights = load_file(path)
    path.unlink()
    if damage == "missing":
        del weights["img_in.proj.bias"]
    elif damage == "leftover":
        weights["single_blocks.0.linear.weight"] = torch.zeros(2)
    elif damage == "of another block":
        weights["double_blocks.9.img_attn_q.weight"] = torch.zeros(2)
    elif damage == "shape":
        weights["img_in.proj.bias"] = torch.zeros(3)
    if damage != "none":
        save_file(weights, path)
    if damage == "cut short":
        path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(InputError, match=message):
        components.load_transformer(open_model(model, ()), "demo_t2v", **F32)


def test_a_vae_tensor_of_neither_half_is_refused(tiny_official, tmp_path):
    model = copied(tiny_official, tmp_path, "vae")
    path = model / "vae" / WEIGHTS
    save_file(load_file(path) | {"quant_conv.weight": torch.zeros(2)}, path)
    with pytest.raises(InputError, match=r"holds quant_conv.weight, which the official layout does not have$"):
        components.load_vae_decoder(open_model(model, ()), **F32)


# The encoders


def whole_language_model(official: Path) -> torch.nn.Module:
    """The uncut language model with its last norm, by transformers' own means."""
    from transformers import Qwen2_5_VLConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

    folder = official / "text_encoder" / "llm"
    weights = {}
    for path in folder.glob("*.safetensors"):
        weights |= load_file(path)
    model = Qwen2_5_VLTextModel(Qwen2_5_VLConfig.from_pretrained(folder).get_text_config())
    model.load_state_dict({k.removeprefix("model."): v for k, v in weights.items() if k.startswith("model.")})
    return model.eval()


def padded_prompt(vocab: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(vocab, (1, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[:, 9:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def test_the_cut_language_model_ends_where_the_official_one_reads(folder, tiny_official):
    tokenizer, model = encoder_components.load_language_model(folder, **F32)
    inputs = padded_prompt(len(tokenizer))
    whole = whole_language_model(tiny_official)
    expected = whole(**inputs, output_hidden_states=True).hidden_states
    assert len(model.layers) == len(whole.layers) - 2
    assert len(expected) == len(whole.layers) + 1
    assert torch.equal(model(**inputs).last_hidden_state, expected[-3])
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_language_model_is_of_the_dtype_asked_for(folder):
    _, model = encoder_components.load_language_model(folder, device=CPU, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.rotary_emb.inv_freq.dtype == torch.float32, "the angles of late tokens need all their bits"


@pytest.mark.parametrize(
    "names",
    [
        {"model.": "model.language_model.", "visual.": "model.visual."},
        {"model.": "language_model.model.", "lm_head.": "language_model.lm_head."},
        {"model.": "language_model."},
        {"model.": ""},
    ],
)
@torch.no_grad()
def test_the_language_model_is_read_under_every_name_it_was_published(tiny_official, tmp_path, names):
    expected = encoder_components.load_language_model(open_model(tiny_official, ()), **F32)[1]
    model = copied(tiny_official, tmp_path, "text_encoder/llm")
    weights = {}
    for path in (model / "text_encoder" / "llm").glob("*model*"):
        weights |= load_file(path) if path.suffix == ".safetensors" else {}
        path.unlink()
    renamed = {}
    for name, tensor in weights.items():
        old = next((prefix for prefix in names if name.startswith(prefix)), "")
        renamed[names.get(old, "") + name.removeprefix(old)] = tensor
    save_file(renamed, model / "text_encoder" / "llm" / "model.safetensors")
    loaded = encoder_components.load_language_model(open_model(model, ()), **F32)[1]
    assert same(loaded.state_dict(), expected.state_dict())


def test_a_language_model_with_a_tensor_too_many_is_refused(tiny_official, tmp_path):
    model = copied(tiny_official, tmp_path, "text_encoder/llm")
    path = model / "text_encoder" / "llm" / "model-00001-of-00002.safetensors"
    save_file(load_file(path) | {"model.layers.0.extra.weight": torch.zeros(2)}, path)
    with pytest.raises(InputError, match=r"holds tensors that the model does not have: layers.0.extra.weight$"):
        encoder_components.load_language_model(open_model(model, ()), **F32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, r"config.json: model_type is 'llama'; allowed are qwen2_5_vl and qwen2_5_vl_text$"),
        ({"num_hidden_layers": 2}, r"config.json: num_hidden_layers is 2; allowed is a whole number from 3 to 256$"),
    ],
)
def test_another_text_encoder_is_refused(tiny_diffusers, tmp_path, change, message):
    model = copied(tiny_diffusers, tmp_path, "text_encoder", "tokenizer", "transformer")
    edit(model / "text_encoder" / "config.json", layer_types=None, **change)
    with pytest.raises(InputError, match=message):
        encoder_components.load_language_model(open_model(model, ()), **F32)


def test_a_folder_without_a_tokenizer_is_named(tiny_official, tmp_path):
    """transformers makes an empty tokenizer of a folder that has none, and every prompt would be the same."""
    model = copied(tiny_official, tmp_path, "text_encoder/llm", "text_encoder/byt5-small", "text_encoder/Glyph-SDXL-v2")
    for path in (model / "text_encoder").glob("*/tokenizer*"):
        path.unlink()
    with pytest.raises(InputError, match=r"text_encoder/llm holds no tokenizer: tokenizer.json or vocab.json$"):
        encoder_components.load_language_model(open_model(model, ()), **F32)
    with pytest.raises(InputError, match=r"text_encoder/byt5-small holds no tokenizer: tokenizer_config.json$"):
        encoder_components.load_glyph_encoder(open_model(model, ()), **F32)


def test_a_tokenizer_that_cannot_be_read_is_named(tiny_official, tmp_path):
    model = copied(tiny_official, tmp_path, "text_encoder/llm")
    (model / "text_encoder" / "llm" / "tokenizer.json").write_text('{"model": 7}')
    with pytest.raises(InputError, match=r"text_encoder/llm holds no tokenizer that transformers can read \(.+\)$"):
        encoder_components.load_language_model(open_model(model, ()), **F32)


def test_glyph_tokens_are_named_as_the_official_code_names_them():
    fonts = {"en-Montserrat-Regular": 0, "cn-HYQiHei": 0, "en-Lato": 1}
    assert encoder_components.glyph_tokens({"white": 0, "black": 1}, fonts) == [
        "<color-0>",
        "<color-1>",
        "<en-font-0>",
        "<cn-font-0>",
        "<en-font-1>",
    ]


def test_glyph_tokens_follow_byt5s_own(folder):
    tokenizer, model = encoder_components.load_glyph_encoder(folder, **F32)
    assert tokenizer.convert_tokens_to_ids("<color-0>") == 384
    assert tokenizer("é").input_ids == [0xC3 + 3, 0xA9 + 3, 1]
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer) > 384


@torch.no_grad()
def test_the_glyph_encoder_is_the_one_in_the_file(folder, tiny_official):
    from transformers import T5Config, T5EncoderModel

    tokenizer, model = encoder_components.load_glyph_encoder(folder, **F32)
    stored = torch.load(
        tiny_official / "text_encoder" / "Glyph-SDXL-v2" / "checkpoints" / "byt5_model.pt", weights_only=True
    )["state_dict"]
    prefix = "module.text_tower.encoder."
    assert same(model.state_dict(), {name.removeprefix(prefix): tensor for name, tensor in stored.items()})
    # transformers' own whole encoder, with the same weights, gives the same numbers.
    config = T5Config.from_pretrained(tiny_official / "text_encoder" / "byt5-small", vocab_size=len(tokenizer))
    reference = T5EncoderModel(config).eval()
    reference.encoder.load_state_dict(model.state_dict())
    inputs = tokenizer('Text "Hi". ', padding="max_length", max_length=20, return_tensors="pt")
    assert torch.equal(model(**inputs).last_hidden_state, reference(**inputs).last_hidden_state)


def glyph_copy(tiny_official: Path, tmp_path: Path) -> tuple[Path, Path]:
    model = copied(tiny_official, tmp_path, "text_encoder/byt5-small", "text_encoder/Glyph-SDXL-v2")
    return model, model / "text_encoder" / "Glyph-SDXL-v2" / "checkpoints" / "byt5_model.pt"


def test_a_glyph_file_without_state_dict_is_read_as_it_is(tiny_official, tmp_path):
    expected = encoder_components.load_glyph_encoder(open_model(tiny_official, ()), **F32)[1].state_dict()
    model, path = glyph_copy(tiny_official, tmp_path)
    torch.save(dict(expected), path)
    assert same(encoder_components.load_glyph_encoder(open_model(model, ()), **F32)[1].state_dict(), expected)


class Trap:
    """A pickle that would run code."""

    def __reduce__(self):
        return (Path.touch, (Path("trapped"),))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (Trap(), r"byt5_model.pt is not a whole file of tensors \(.+\)$"),
        (b"", r"byt5_model.pt is not a whole file of tensors \(.+\)$"),
        ([1, 2], "byt5_model.pt does not hold named tensors, alone or under state_dict$"),
        ({"a": 1}, "byt5_model.pt does not hold named tensors, alone or under state_dict$"),
        (
            {"state_dict": {"module.other": torch.zeros(1)}},
            "byt5_model.pt lacks tensors of the model: embed_tokens.weight, ",
        ),
    ],
)
def test_a_glyph_file_that_is_not_one_is_refused(tiny_official, tmp_path, monkeypatch, content, message):
    model, path = glyph_copy(tiny_official, tmp_path)
    monkeypatch.chdir(tmp_path)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, Trap):
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path)
    with pytest.raises(InputError, match=message):
        encoder_components.load_glyph_encoder(open_model(model, ()), **F32)
    assert not (tmp_path / "trapped").exists()


def test_glyph_weights_for_other_tokens_are_refused(tiny_official, tmp_path):
    model, _ = glyph_copy(tiny_official, tmp_path)
    colors = model / "text_encoder" / "Glyph-SDXL-v2" / "assets" / "color_idx.json"
    rows = len(encoder_components.load_glyph_encoder(open_model(tiny_official, ()), **F32)[0])
    edit(colors, one_more=99)
    with pytest.raises(InputError) as refused:
        encoder_components.load_glyph_encoder(open_model(model, ()), **F32)
    assert f"embed_tokens.weight has shape [{rows}, 64]; its config says [{rows + 1}, 64]" in str(refused.value)


@torch.no_grad()
def test_the_image_encoder_is_the_same_in_both_layouts(tiny_official, tiny_diffusers):
    loaded = [
        encoder_components.load_image_encoder(open_model(path, ()), **F32) for path in (tiny_official, tiny_diffusers)
    ]
    (processor, model), (other_processor, other) = loaded
    assert type(model).__name__ == "SiglipVisionModel"
    assert same(model.state_dict(), other.state_dict())
    assert processor.to_dict() == other_processor.to_dict()
    assert processor.size["height"] == 28
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


# What a folder holds


def test_only_version_folders_count(tmp_path):
    for name in ("720p_t2v", "480p_i2v_step_distilled", "720p_i2v_distilled_sparse", "720p_sr_distilled", "notes"):
        (tmp_path / "transformer" / name).mkdir(parents=True)
        (tmp_path / "transformer" / name / "config.json").write_text("{}")
    (tmp_path / "transformer" / "480p_t2v").mkdir()
    model = open_model(tmp_path, ("transformer",))
    assert model.versions() == ["480p_i2v_step_distilled", "720p_i2v_distilled_sparse", "720p_t2v"]
    assert model.resolutions() == ["480p", "720p"]


@pytest.mark.parametrize(
    ("config", "guidance", "name"),
    [
        ({"target_size": 640, "task_type": "t2v"}, 6.0, "480p_t2v"),
        ({"target_size": 960, "task_type": "i2v"}, None, "720p_i2v"),
        ({"target_size": 960, "task_type": "t2v", "use_meanflow": False}, 1.0, "720p_t2v_distilled"),
        ({"target_size": 640, "task_type": "i2v", "use_meanflow": True}, 1.0, "480p_i2v_step_distilled"),
    ],
)
def test_a_diffusers_folder_is_of_the_version_that_its_configs_say(tmp_path, config, guidance, name):
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(config))
    if guidance is not None:
        (tmp_path / "guider").mkdir()
        (tmp_path / "guider" / "guider_config.json").write_text(json.dumps({"guidance_scale": guidance}))
    assert open_model(tmp_path, ("transformer",)).versions() == [name]


@pytest.mark.parametrize(
    ("pipeline", "encoder", "name"),
    [
        ("HunyuanVideo15Pipeline", False, "480p_t2v"),
        ("HunyuanVideo15ImageToVideoPipeline", True, "480p_i2v"),
        (None, True, "480p_i2v"),
    ],
)
def test_a_diffusers_folder_is_of_its_pipelines_task(tmp_path, pipeline, encoder, name):
    """diffusers' conversion script writes task_type i2v for all; here it says the opposite of the pipeline."""
    (tmp_path / "transformer").mkdir()
    wrong = {"t2v": "i2v", "i2v": "t2v"}[name[-3:]]
    (tmp_path / "transformer" / "config.json").write_text(json.dumps({"target_size": 640, "task_type": wrong}))
    if pipeline:
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    if encoder:
        (tmp_path / "image_encoder").mkdir()
        (tmp_path / "feature_extractor").mkdir()
    opened = open_model(tmp_path, ("transformer",))
    assert opened.versions() == [name]
    assert components.transformer_config(opened, name)["task_type"] == name[-3:]


def test_a_diffusers_transformer_of_unknown_size_is_refused(tmp_path):
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text('{"target_size": 7}')
    with pytest.raises(InputError, match=r"config.json: target_size is 7; allowed is 128, 480, 640, 960, 1440, 192$"):
        open_model(tmp_path, ("transformer",)).versions()


def test_a_version_that_the_folder_lacks_is_refused_with_those_it_holds(tiny_official):
    command = 'hf download tencent/HunyuanVideo-1.5 --include "transformer/720p_t2v/*" --local-dir '
    said = f"{tiny_official} has no transformer 720p_t2v; it holds demo_i2v, demo_t2v; get it: {command}{tiny_official}"
    with pytest.raises(InputError, match=f"^{re.escape(said)}$"):
        components.load_transformer(open_model(tiny_official, ()), "720p_t2v", **F32)


PUBLISHED = (
    *(f"{size}_{task}{kind}" for size in ("480p", "720p") for task in ("t2v", "i2v") for kind in ("", "_distilled")),
    "480p_i2v_step_distilled",
    "720p_i2v_distilled_sparse",
    "720p_t2v_distilled_sparse",
)


def test_every_published_version_loads_in_both_layouts(tmp_path):
    """The diffusers layout has one version a folder, and no way to say that it is sparse."""
    modules = tiny.build_modules(tiny.TINY, 0, PUBLISHED)
    official = open_model(checkpoint_writer.save_official(tmp_path / "official", modules), ())
    assert official.versions() == sorted(PUBLISHED)
    for name in PUBLISHED:
        version = parse_version(name)
        model = components.load_transformer(official, name, **F32)
        assert model.config.use_meanflow == version.step_distilled
        assert (model.config.target_size, model.config.task_type) == (BUCKET_BASE[version.resolution], version.task)
        if not version.sparse:
            other = open_model(checkpoint_writer.save_diffusers(tmp_path / name, modules, version=name), ())
            assert other.versions() == [name] and other.flow_shift(name) == version.flow_shift
            assert same(model.state_dict(), components.load_transformer(other, name, **F32).state_dict())


def test_the_shift_is_the_diffusers_schedulers(tiny_official, tiny_diffusers, tmp_path):
    assert open_model(tiny_official, ()).flow_shift("demo_t2v") is None
    assert open_model(tiny_diffusers, ()).flow_shift("demo_t2v") == 5.0
    model = copied(tiny_diffusers, tmp_path, "transformer", "scheduler")
    edit(model / "scheduler" / "scheduler_config.json", shift=9)
    assert open_model(model, ()).flow_shift("demo_t2v") == 9.0


@pytest.mark.parametrize(
    ("part", "title", "folder", "command"),
    [
        (
            "transformer",
            "transformer",
            "transformer",
            'hf download tencent/HunyuanVideo-1.5 --include "transformer/720p_t2v/*" --local-dir {path}',
        ),
        ("vae", "VAE", "vae", 'hf download tencent/HunyuanVideo-1.5 --include "vae/*" --local-dir {path}'),
        (
            "text",
            "text encoder",
            "text_encoder/llm",
            "hf download Qwen/Qwen2.5-VL-7B-Instruct --local-dir {path}/text_encoder/llm",
        ),
        (
            "glyph",
            "glyph encoder",
            "text_encoder/byt5-small",
            "hf download google/byt5-small --local-dir {path}/text_encoder/byt5-small",
        ),
        (
            "glyph",
            "glyph encoder",
            "text_encoder/Glyph-SDXL-v2",
            "modelscope download --model AI-ModelScope/Glyph-SDXL-v2 --local_dir {path}/text_encoder/Glyph-SDXL-v2",
        ),
        (
            "image",
            "image encoder",
            "vision_encoder/siglip/image_encoder",
            "hf download black-forest-labs/FLUX.1-Redux-dev --local-dir {path}/vision_encoder/siglip",
        ),
    ],
)
def test_a_part_that_is_absent_is_named_with_the_command_that_gets_it(tmp_path, part, title, folder, command):
    for name in PARTS[part].official:
        if name != folder:
            (tmp_path / name).mkdir(parents=True)
    (tmp_path / "vision_encoder").mkdir(exist_ok=True)
    model = ModelFolder(tmp_path, "official")
    assert not model.has(part)
    with pytest.raises(InputError) as refused:
        model.require(part)
    assert str(refused.value) == f"{tmp_path} has no {title} ({folder}); get it: {command.format(path=tmp_path)}"
    (tmp_path / folder).mkdir(parents=True)
    assert model.has(part)
    assert tmp_path / folder in model.require(part)


def test_a_part_that_a_diffusers_folder_lacks_comes_from_its_own_repository(tmp_path):
    (tmp_path / "transformer").mkdir()
    config = {"target_size": 640, "task_type": "i2v"}
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError) as refused:
        encoder_components.load_image_encoder(open_model(tmp_path, ()), **F32)
    assert str(refused.value) == (
        f"{tmp_path} has no image encoder (image_encoder); get it: hf download "
        f'hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_i2v --include "image_encoder/*" --local-dir {tmp_path}'
    )


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(
        InputError, match=f"^{re.escape(str(tmp_path))} is no model folder: it has neither the official"
    ):
        open_model(tmp_path, ("vae",))


@pytest.mark.parametrize("path", ["no/such/folder", "nowhere", "../nowhere", "/no/folder"])
def test_a_path_that_is_neither_folder_nor_hub_id_is_refused(path):
    with pytest.raises(InputError, match=f"^{re.escape(path)} does not exist, and it is no hub id"):
        open_model(path, ("vae",))


# The hub


@pytest.fixture
def hub(monkeypatch, tiny_official):
    """huggingface_hub with one repository, owner/model: the drawn checkpoint. Holds what was asked of it."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked = []

    def snapshot_download(repo, allow_patterns, revision, etag_timeout):
        asked.append((repo, sorted(allow_patterns), revision))
        if repo != "owner/model":
            raise LocalEntryNotFoundError("no connection\nand more")
        return str(tiny_official)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_of_a_hub_id_only_the_wanted_parts_are_downloaded(hub, tiny_official):
    model = open_model("owner/model", ("vae", "glyph"))
    wanted = [
        "*.json",
        "text_encoder/Glyph-SDXL-v2/*",
        "text_encoder/byt5-small/*",
        "text_encoder_2/*",
        "tokenizer_2/*",
    ]
    assert hub == [("owner/model", [*wanted, "vae/*"], None)]
    assert model.path == tiny_official
    components.load_vae_decoder(model, **F32)
    assert len(hub) == 1


def test_of_the_hubs_transformers_only_the_version_that_is_read_is_downloaded(hub, tiny_official):
    model = open_model("owner/model", ("transformer", "scheduler"))
    assert model.versions() == ["demo_i2v", "demo_t2v"]
    assert hub == [("owner/model", ["*.json", "scheduler/*"], None)]
    components.load_transformer(model, "demo_i2v", **F32)
    # From the same snapshot, whatever was pushed since.
    assert set(map(str, hub[1:])) == {str(("owner/model", ["transformer/demo_i2v/*"], tiny_official.name))}


def test_a_hub_that_does_not_answer_is_one_line(hub):
    with pytest.raises(InputError) as refused:
        open_model("owner/none", ("vae",))
    assert str(refused.value) == (
        "owner/none is no folder here, and the hub did not give it (no connection); to have it in a folder: hf download "
        'tencent/HunyuanVideo-1.5 --include "transformer/720p_t2v/*" "vae/*" "scheduler/*" --local-dir DIR'
    )
