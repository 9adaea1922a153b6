"""Transformer and VAE from either layout, bit for bit, and weights that do not fit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import CPU, F32, WEIGHTS, copied, same
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hunyuan_staged.errors import InputError
from hunyuan_staged.weights import components, encoder_components, loading, stream
from hunyuan_staged.weights.folder import ModelFolder, open_model
from hunyuan_staged.weights.key_maps import TRANSFORMER_MAP, VAE_MAP, to_diffusers
from hunyuan_staged.weights.packing import ALIGNMENT, block_memory


def test_layouts_and_versions(tiny_official, tiny_diffusers):
    official, diffusers = open_model(tiny_official, ()), open_model(str(tiny_diffusers), ())
    assert (official.layout, official.versions()) == ("official", ["demo_i2v", "demo_t2v"])
    assert (diffusers.layout, diffusers.versions()) == ("diffusers", ["demo_t2v"])
    assert official.resolutions() == diffusers.resolutions() == ["demo"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_transformer_is_loaded_whole_from_either_layout(either_layout, tiny_official, dtype):
    model = components.load_transformer(either_layout, "demo_t2v", device=CPU, dtype=dtype)
    stored = to_diffusers(load_file(tiny_official / "transformer" / "demo_t2v" / WEIGHTS), TRANSFORMER_MAP)
    assert same(model.state_dict(), {name: tensor.to(dtype) for name, tensor in stored.items()})
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert type(model).__name__ == "TransformerModules"
    assert model.config.target_size == 128


def test_loaded_weights_lie_in_memory_of_their_own(either_layout):
    """On a CPU safetensors gives views of the file's map: bits followed the alignment, and so the layout."""
    models = [
        components.load_transformer(either_layout, "demo_t2v", **F32),
        components.load_vae_decoder(either_layout, **F32)[0],
        encoder_components.load_language_model(either_layout, **F32)[1],
        encoder_components.load_glyph_encoder(either_layout, **F32)[1],
        encoder_components.load_image_encoder(either_layout, **F32)[1],
    ]
    weights = [parameter for model in models for parameter in model.parameters()]
    assert {weight.data_ptr() % 64 for weight in weights} == {0}
    held: dict[tuple[int, int], list[int]] = {}
    for weight in weights:
        storage = weight.untyped_storage()
        held.setdefault((storage.data_ptr(), storage.nbytes()), []).append(weight.nbytes)
    for (_, size), parts in held.items():
        rounded = sum(-(-part // ALIGNMENT) * ALIGNMENT for part in parts)
        assert size in (sum(parts), rounded), "a tensor of its own, or a block's tensors, and nothing else"


def threads_read(monkeypatch) -> None:
    """Files are read on a CPU as they are on a GPU, a few bytes at a time."""
    monkeypatch.setattr(loading, "_stays_mapped", lambda _: False)
    monkeypatch.setattr(stream, "PIECE_BYTES", 1000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights_dtype", [None, "fp8"])
def test_what_threads_read_is_what_the_map_gives(either_layout, dtype, weights_dtype, monkeypatch):
    """The tiny files are in float32: in bf16 they are converted on their way."""

    def load() -> list[dict[str, torch.Tensor]]:
        skeleton = components.transformer_skeleton(either_layout, "demo_t2v", weights_dtype=weights_dtype)
        options: Any = {"device": CPU, "dtype": dtype}
        transformer = components.load_transformer(either_layout, "demo_t2v", skeleton=skeleton, **options)
        language = encoder_components.load_language_model(either_layout, **options)[1]
        decoder = components.load_vae_decoder(either_layout, **options)[0]
        return [dict(model.named_parameters()) for model in (transformer, language, decoder)]

    mapped = load()
    threads_read(monkeypatch)
    for one, other in zip(mapped, load(), strict=True):
        assert same(one, other)


def test_a_tensor_is_read_straight_to_its_place(either_layout, monkeypatch):
    """No second memory for a weight, but for those that the file holds in another form."""
    threads_read(monkeypatch)
    place, copied = loading.assign_weights, []

    def assigned(module, tensors, dtype, device, origin, destinations):
        own = destinations.memory

        def seen():
            for name, tensor in tensors:
                if name in own and tensor.data_ptr() != own[name].data_ptr():
                    copied.append(name)
                yield name, tensor

        return place(module, seen(), dtype, device, origin, destinations)

    monkeypatch.setattr(components, "assign_weights", assigned)
    components.load_transformer(either_layout, "demo_t2v", device=CPU, dtype=torch.bfloat16)
    fused = ("norm_out.linear.", *(f"refiner_blocks.{block}.attn.to_{part}." for block in range(2) for part in "qkv"))
    expected = either_layout.official and [name for name in copied if any(part in name for part in fused)]
    assert copied == (expected or []) and bool(copied) == either_layout.official


def test_a_blocks_weights_share_memory_that_the_last_of_them_frees():
    shapes = {"blocks.0.a": (3, 5), "blocks.0.b.1.weight": (7,), "blocks.1.a": (0, 4), "blocks.10.a": (2,), "norm": ()}
    memory = block_memory(shapes, torch.bfloat16, CPU)
    assert {name: tuple(x.shape) for name, x in memory.items()} == shapes
    assert {x.dtype for x in memory.values()} == {torch.bfloat16}
    storages = {name: x.untyped_storage().data_ptr() for name, x in memory.items()}
    assert storages["blocks.0.a"] == storages["blocks.0.b.1.weight"]
    assert len({storages[name] for name in ("blocks.0.a", "blocks.10.a", "norm")}) == 3
    assert memory["blocks.0.b.1.weight"].data_ptr() - memory["blocks.0.a"].data_ptr() == ALIGNMENT
    assert memory["blocks.0.a"].untyped_storage().nbytes() == 2 * ALIGNMENT
    assert memory["blocks.10.a"].untyped_storage().nbytes() == ALIGNMENT


def test_modulations_and_blocks_can_be_let_go_of(either_layout):
    """Whoever removes them has their memory back."""
    model: Any = components.load_transformer(either_layout, "demo_t2v", **F32)
    blocks = [{x.untyped_storage().data_ptr() for x in block.parameters()} for block in model.transformer_blocks]
    assert not set.intersection(*blocks)
    for block in model.transformer_blocks:
        own = {name: x.untyped_storage().data_ptr() for name, x in block.named_parameters()}
        linear = [name for name in own if name.startswith(("norm1.linear", "norm1_context.linear"))]
        assert len({own[name] for name in linear}) == 4
        assert len({place for name, place in own.items() if name not in linear}) == 1
        assert not {own[name] for name in linear} & {own[name] for name in own if name not in linear}


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


def test_the_vae_decodes_in_float32_where_its_config_asks_for_it(tiny_official, tmp_path):
    model = copied(tiny_official, tmp_path, "vae")
    path, gpu = model / "vae" / "config.json", torch.device("cuda")
    config = json.loads(path.read_text())
    for given, wanted in ((None, torch.float16), (False, torch.float16), (True, torch.float32)):
        path.write_text(json.dumps(config | ({} if given is None else {"force_upcast": given})))
        folder = open_model(model, ())
        assert components.vae_decoder_dtype(folder, gpu) == wanted
        assert components.vae_decoder_dtype(folder, CPU) == torch.float32
        assert "force_upcast" not in components.vae_config(folder)
    path.write_text(json.dumps(config | {"force_upcast": "yes"}))
    with pytest.raises(InputError, match=r"config\.json: force_upcast is 'yes'; allowed is true or false$"):
        components.vae_decoder_dtype(open_model(model, ()), gpu)


@pytest.mark.parametrize("coder", ["decoder", "encoder"])
def test_one_half_of_the_vae_is_loaded_without_the_other(either_layout, tiny_official, tmp_path, coder):
    loaded, config = getattr(components, f"load_vae_{coder}")(either_layout, **F32)
    assert type(loaded).__name__ == f"Vae{coder.title()}"
    assert config["scaling_factor"] == 1.03682
    assert config["spatial_compression_ratio"] == 16
    stored = load_file(tiny_official / "vae" / WEIGHTS)
    half = {name: tensor for name, tensor in to_diffusers(stored, VAE_MAP).items() if name.startswith(coder)}
    assert same({f"{coder}.{name}": tensor for name, tensor in loaded.state_dict().items()}, half)
    # The other half need not even be there.
    damaged = copied(either_layout.path, tmp_path, "vae")
    kept = {name: tensor for name, tensor in load_file(damaged / "vae" / WEIGHTS).items() if name.startswith(coder)}
    save_file(kept, damaged / "vae" / WEIGHTS)
    alone = ModelFolder(damaged, either_layout.layout)
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
