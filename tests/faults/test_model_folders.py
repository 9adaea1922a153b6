"""Model folders from anyone: whatever a config or a weights file says, loading ends in one line that names the file, or
in a model. In one process, because there are many."""

import copy
import json
import os
import shutil
import struct
import types
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hunyuan_staged.errors import InputError, one_line
from hunyuan_staged.weights import boundary, components, encoder_components, encoder_configs, schema
from hunyuan_staged.weights.folder import ModelFolder

F32 = {"device": torch.device("cpu"), "dtype": torch.float32}
VERSION = "demo_t2v"
WEIGHTS = "diffusion_pytorch_model.safetensors"

OFFICIAL_LANGUAGE = "text_encoder/llm/config.json"

Load = Callable[[ModelFolder], object]
LOADERS: dict[str, Load] = {
    "versions": lambda folder: folder.versions(),
    "shift": lambda folder: folder.flow_shift(VERSION),
    "transformer": lambda folder: components.load_transformer(folder, VERSION, **F32),
    "skeleton": lambda folder: components.transformer_skeleton(folder, VERSION),
    "vae": lambda folder: components.load_vae_decoder(folder, **F32),
    "vae dtype": lambda folder: components.vae_decoder_dtype(folder, F32["device"]),
    "vae encoder": lambda folder: components.load_vae_encoder(folder, **F32),
    "text": lambda folder: encoder_components.load_language_model(folder, **F32),
    "vision": lambda folder: encoder_configs.whole_config(
        boundary.read_json(folder.path / OFFICIAL_LANGUAGE), folder.path / OFFICIAL_LANGUAGE, image_token=9
    ),
    "glyph": lambda folder: encoder_components.load_glyph_encoder(folder, **F32),
    "image": lambda folder: encoder_components.load_image_encoder(folder, **F32),
}

# Values that no key of a kind may have.
ANY = ["four", [], {}, [[[]]], "9" * 5000]
WHOLE = [*ANY, True, 0, -1, 1.5, 10**9, 10**30, None]
NUMBER = [*ANY, True, -1, -1e-300, 1e30, 10**400]
FLAG = [*ANY, 1, 0.5, "true"]
CHOICE = [*ANY, 7, True, -1]
TRIPLE = [
    *ANY,
    1,
    [1],
    [16, 56],
    [0, 16, 16],
    [-8, 20, 20],
    [8.0, 12, 12],
    ["8", 12, 12],
    [8, 12, 10**9],
    [16, 56, 56],
    [7, 13, 12],
]

OFFICIAL_DIT, OFFICIAL_SIGLIP = f"transformer/{VERSION}", "vision_encoder/siglip"
# (layout, what loads it, the file, {key: values that it may not have}); a key of an object inside is "object.key".
TABLE: list[tuple[str, str, str, dict[str, list[Any]]]] = [
    (
        "official",
        "skeleton",
        f"{OFFICIAL_DIT}/config.json",
        {
            **dict.fromkeys(
                (
                    "in_channels",
                    "out_channels",
                    "hidden_size",
                    "heads_num",
                    "mm_double_blocks_depth",
                    "text_states_dim",
                ),
                WHOLE,
            ),
            "vision_states_dim": WHOLE,
            "mlp_width_ratio": [*NUMBER, 0, None],
            "rope_theta": [*NUMBER, 0, None],
            "patch_size": [*ANY, 1, [1, 1], [1, 0, 0], [1, 2, 1], [1, 1.0, 1.0], [1, -1, -1], [1, 99, 99], None],
            "rope_dim_list": [*TRIPLE, None],
            "use_meanflow": FLAG,
            "concat_condition": FLAG,
            "ideal_resolution": [*CHOICE, None, "8k"],
            "ideal_task": [*CHOICE, "v2v"],
            "mm_single_blocks_depth": [*ANY, 20, -1],
            "guidance_embed": [*ANY, True],
            "is_reshape_temporal_channels": [*ANY, True],
            "attn_param": ["four", [], 7, {"tile_size": [4, 4, 4]}, {"unheard": 1}],
        },
    ),
    (
        "diffusers",
        "skeleton",
        "transformer/config.json",
        {
            **dict.fromkeys(
                (
                    "in_channels",
                    "out_channels",
                    "num_attention_heads",
                    "attention_head_dim",
                    "num_layers",
                    "patch_size",
                ),
                WHOLE,
            ),
            **dict.fromkeys(
                ("num_refiner_layers", "patch_size_t", "text_embed_dim", "text_embed_2_dim", "image_embed_dim"), WHOLE
            ),
            "mlp_ratio": [*NUMBER, 0, None],
            "rope_theta": [*NUMBER, 0, None],
            "rope_axes_dim": [*TRIPLE, None],
            "qk_norm": [*CHOICE, "layer_norm", None],
            "target_size": [*WHOLE, 127],
            "task_type": [*CHOICE, "v2v"],
            "use_meanflow": [*FLAG, None],
        },
    ),
    *(
        (
            layout,
            "vae",
            "vae/config.json",
            {
                **dict.fromkeys(("in_channels", "out_channels", "latent_channels"), WHOLE),
                "layers_per_block": [value for value in WHOLE if value != 0],
                "block_out_channels": [
                    *ANY,
                    16,
                    [16],
                    [16] * 4,
                    [16] * 9,
                    [0] * 5,
                    [16, 16, 32, 32, -64],
                    [16.0] * 5,
                    None,
                ],
                "scaling_factor": [*NUMBER, 0, None],
                f"{spatial}": [*WHOLE, 8, 32],
                f"{temporal}": [*WHOLE, 8],
                "downsample_match_channel": [*FLAG, None],
                "upsample_match_channel": [*FLAG, None],
                **({"shift_factor": ["four", 7, True, -0.5, [1]]} if layout == "official" else {}),
            },
        )
        for layout, spatial, temporal in (
            ("official", "ffactor_spatial", "ffactor_temporal"),
            ("diffusers", "spatial_compression_ratio", "temporal_compression_ratio"),
        )
    ),
    *(
        (layout, "vae dtype", "vae/config.json", {"force_upcast": [*FLAG, None]})
        for layout in ("official", "diffusers")
    ),
    *(
        (
            layout,
            "text",
            f"{folder}/config.json",
            {
                **dict.fromkeys(
                    ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"),
                    WHOLE,
                ),
                "num_key_value_heads": WHOLE[:-1],
                "max_position_embeddings": WHOLE[:-2],
                "rms_norm_eps": [*NUMBER, 0, None],
                "hidden_act": [*CHOICE, "relu", None],
                "use_sliding_window": [*FLAG, True],
                "layer_types": ["four", 7, {}, [], ["sliding_attention"] * 4, [None]],
                "rope_theta": [*NUMBER, 0, None],
                f"{rope}.rope_theta": [*NUMBER, 0, None],
                f"{rope}.rope_type": [*CHOICE, "yarn", None],
                f"{rope}.mrope_section": [*TRIPLE, None],
                f"{rope}.type": [*CHOICE, "yarn", None],
                "model_type": [*CHOICE, "llama", None],
            },
        )
        for layout, folder, rope in (
            ("official", "text_encoder/llm", "rope_scaling"),
            ("diffusers", "text_encoder", "rope_parameters"),
        )
    ),
    (
        "official",
        "vision",
        OFFICIAL_LANGUAGE,
        {
            **dict.fromkeys(
                (
                    f"vision_config.{name}"
                    for name in (
                        *("depth", "hidden_size", "intermediate_size", "num_heads", "out_hidden_size", "in_channels"),
                        *("in_chans", "patch_size", "spatial_merge_size", "temporal_patch_size", "window_size"),
                    )
                ),
                WHOLE,
            ),
            "vision_config.hidden_act": [*CHOICE, "relu", None],
            "vision_config.fullatt_block_indexes": ["four", 7, {}, [-1], [1.5], [256], [True], [0] * 257, None],
            "vision_config.tokens_per_second": [*NUMBER, 0, None],
        },
    ),
    *(
        (
            layout,
            "glyph",
            f"{folder}/config.json",
            {
                **dict.fromkeys(("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads"), WHOLE),
                "relative_attention_num_buckets": WHOLE,
                "relative_attention_max_distance": WHOLE,
                "layer_norm_epsilon": [*NUMBER, 0, None],
                "feed_forward_proj": [*CHOICE, "gated-silu", None],
                "model_type": [*CHOICE, "mt5", None],
            },
        )
        for layout, folder in (("official", "text_encoder/byt5-small"), ("diffusers", "text_encoder_2"))
    ),
    *(
        (
            layout,
            "image",
            f"{folder}image_encoder/config.json",
            {
                **dict.fromkeys(
                    ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels"),
                    WHOLE,
                ),
                "image_size": WHOLE,
                "patch_size": WHOLE,
                "layer_norm_eps": [*NUMBER, 0, None],
                "hidden_act": [*CHOICE, "relu", None],
                "vision_use_head": [*FLAG, None],
                "model_type": [*CHOICE, "clip", None],
            },
        )
        for layout, folder in (("official", f"{OFFICIAL_SIGLIP}/"), ("diffusers", ""))
    ),
    *(
        (
            layout,
            "image",
            f"{folder}feature_extractor/preprocessor_config.json",
            {
                "do_resize": [*FLAG, None],
                "do_rescale": [*FLAG, None],
                "do_normalize": [*FLAG, None],
                "do_convert_rgb": FLAG,
                "image_mean": [*ANY, [0.5], [0.5, 0.5, "x"], [1e9] * 3, None],
                "image_std": [*ANY, [0.5], [0.5, 0.5, 0], [-1] * 3, None],
                "resample": [*ANY, -1, 99, 1.5, None],
                "rescale_factor": [*NUMBER, 0, None],
                "size": [
                    "four",
                    [],
                    {},
                    28,
                    {"height": 28},
                    {"height": 28, "width": 0},
                    {"height": 56, "width": 56},
                    None,
                ],
            },
        )
        for layout, folder in (("official", f"{OFFICIAL_SIGLIP}/"), ("diffusers", ""))
    ),
    ("diffusers", "shift", "scheduler/scheduler_config.json", {"shift": [*NUMBER, 0]}),
    ("diffusers", "versions", "guider/guider_config.json", {"guidance_scale": NUMBER}),
    *(
        (
            layout,
            load,
            f"{folder}/tokenizer_config.json",
            {
                "tokenizer_class": [*CHOICE, "BertTokenizer", "TrustMe"],
                "added_tokens_decoder": ["four", 7, [1]],
                "additional_special_tokens": ["four", 7, ["x"] * 20_000],
                "extra_special_tokens": ["four", 7, ["x"] * 20_000],
                **({"extra_ids": [*ANY, -1, 10**12, 1.5]} if load == "glyph" else {}),
            },
        )
        for layout, load, folder in (
            ("official", "text", "text_encoder/llm"),
            ("official", "glyph", "text_encoder/byt5-small"),
            ("diffusers", "text", "tokenizer"),
            ("diffusers", "glyph", "tokenizer_2"),
        )
    ),
]
CASES = [
    pytest.param(layout, load, file, key, value, id=f"{layout}-{file}-{key}-{index}")
    for layout, load, file, keys in TABLE
    for key, values in keys.items()
    for index, value in enumerate(values)
]


def linked(folder: Path, place: Path) -> Path:
    """A copy whose weights are links, so that its files can be replaced one by one."""
    return Path(shutil.copytree(folder, place, copy_function=lambda a, b: Path(b).symlink_to(Path(a).resolve())))


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_official, tiny_diffusers) -> dict[str, ModelFolder]:
    place = tmp_path_factory.mktemp("models")
    given = {"official": tiny_official, "diffusers": tiny_diffusers}
    return {layout: ModelFolder(linked(path, place / layout), layout) for layout, path in given.items()}


@pytest.fixture
def replaced() -> Iterator[Callable[[Path], Path]]:
    """Makes room for another file in a link's place; afterwards the link is back."""
    kept: dict[Path, Path] = {}

    def remove(path: Path) -> Path:
        kept[path] = path.readlink()
        path.unlink()
        return path

    yield remove
    for path, target in kept.items():
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink(missing_ok=True)
        path.symlink_to(target)


def refused(load: str, folder: ModelFolder, *said: str) -> None:
    """Loading ends in an InputError that says all this, in a line of decent length."""
    with pytest.raises(InputError) as error:
        LOADERS[load](folder)
    text = one_line(error.value)
    assert all(part in text for part in said), text
    assert len(text) < 1000, len(text)


def test_the_folders_are_whole(folders):
    """Else all that follows would be refused for another reason."""
    for folder in folders.values():
        for name, load in LOADERS.items():
            if name != "vision" or folder.official:
                load(folder)


def changed(content: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    *outer, last = key.split(".")
    content = copy.deepcopy(content)
    inside = content
    for name in outer:
        inside = inside[name]
    inside[last] = value
    return content


@pytest.mark.parametrize(("layout", "load", "file", "key", "value"), CASES)
def test_no_config_says_what_it_may_not(folders, replaced, layout, load, file, key, value):
    path = folders[layout].path / file
    content = json.loads(path.read_text())
    replaced(path).write_text(json.dumps(changed(content, key, value)))
    refused(load, folders[layout], str(path), key.rpartition(".")[2])


# Which entry of the table holds the cases of a schema: (layout, what loads it, the object inside the file).
SCHEMAS = {
    "OFFICIAL_TRANSFORMER": ("official", "skeleton", ""),
    "DIFFUSERS_TRANSFORMER": ("diffusers", "skeleton", ""),
    "_VAE": ("official", "vae", ""),
    "OFFICIAL_VAE": ("official", "vae", ""),
    "DIFFUSERS_VAE": ("diffusers", "vae", ""),
    "VAE_DTYPE": ("official", "vae dtype", ""),
    "LANGUAGE": ("official", "text", ""),
    "ROPE_SCALING": ("official", "text", "rope_scaling."),
    "VISION": ("official", "vision", "vision_config."),
    "GLYPH": ("official", "glyph", ""),
    "GLYPH_TOKENIZER": ("official", "glyph", ""),
    "LANGUAGE_TOKENIZER": ("official", "text", ""),
    "IMAGE": ("official", "image", ""),
    "IMAGE_PROCESSOR": ("official", "image", ""),
    "SCHEDULER": ("diffusers", "shift", ""),
    "GUIDER": ("diffusers", "versions", ""),
}


def test_every_key_of_every_schema_has_cases():
    """A key that is added has to be tried."""
    schemas = {
        name: value
        for name, value in vars(schema).items()
        if isinstance(value, dict) and value and all(isinstance(rule, schema.Rule) for rule in value.values())
    }
    assert schemas.keys() == SCHEMAS.keys()
    for name, keys in schemas.items():
        layout, load, inside = SCHEMAS[name]
        tried = {key for own, how, _, cases in TABLE if (own, how) == (layout, load) for key in cases}
        assert {f"{inside}{key}" for key in keys} - tried == set(), name


class Noting(dict[str, Any]):
    """A config that notes which of its keys somebody looks for."""

    def __init__(self, content: dict[str, Any], seen: set[str], inside: str = "") -> None:
        self.seen, self.inside = seen, inside
        super().__init__(
            {
                key: Noting(value, seen, f"{inside}{key}.") if isinstance(value, dict) else value
                for key, value in content.items()
            }
        )

    def __getitem__(self, key: str) -> Any:
        self.seen.add(f"{self.inside}{key}")
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.seen.add(f"{self.inside}{key}")
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.seen.add(f"{self.inside}{key}")
        return super().__contains__(key)


# Read as a whole, or only looked at for what kind of object it is; what may be wrong with them is tried elsewhere here.
OBJECTS = {"text_config", "rope_parameters", "rope_scaling", "vision_config", "weight_map", "_class_name"}


def test_every_key_that_is_read_has_cases(folders, monkeypatch):
    """Also one that no schema names."""
    read: dict[str, set[str]] = {}
    genuine, regular = json.loads, boundary.require_regular
    now: list[str] = []

    def require_regular(path: Path, *limits: int) -> Path:
        now[:] = [str(path)]
        return regular(path, *limits)

    def loads(text: str, **how: Any) -> Any:
        content = genuine(text, **how)
        return Noting(content, read.setdefault(now[0], set())) if isinstance(content, dict) else content

    monkeypatch.setattr(boundary, "require_regular", require_regular)
    monkeypatch.setattr(boundary, "json", types.SimpleNamespace(loads=loads))
    tried: dict[str, set[str]] = {}
    for layout, _, file, cases in TABLE:
        tried.setdefault(str(folders[layout].path / file), set()).update(cases)
    for folder in folders.values():
        for name, load in LOADERS.items():
            if name != "vision" or folder.official:
                load(folder)
    assert len(read) > 12
    assert {key for keys in read.values() for key in keys} > {"ideal_resolution", "model_type", "rope_scaling.type"}
    for path, keys in read.items():
        left = {key for key in keys - tried.get(path, set()) if key not in OBJECTS}
        assert left == set(), path


def test_the_table_is_as_long_as_promised():
    assert len(CASES) >= 150


PICKLE = "text_encoder/Glyph-SDXL-v2/checkpoints/byt5_model.pt"
CONFIGS = sorted({(layout, load, file) for layout, load, file, _ in TABLE})
FILES = [
    *CONFIGS,
    ("official", "transformer", f"{OFFICIAL_DIT}/{WEIGHTS}"),
    ("diffusers", "transformer", f"transformer/{WEIGHTS}"),
    ("official", "vae", f"vae/{WEIGHTS}"),
    ("official", "text", "text_encoder/llm/tokenizer.json"),
    ("official", "text", "text_encoder/llm/model-00001-of-00002.safetensors"),
    ("official", "text", "text_encoder/llm/model.safetensors.index.json"),
    ("official", "glyph", PICKLE),
    ("official", "glyph", "text_encoder/Glyph-SDXL-v2/assets/color_idx.json"),
    ("official", "glyph", "text_encoder/Glyph-SDXL-v2/assets/multilingual_10-lang_idx.json"),
    ("official", "image", f"{OFFICIAL_SIGLIP}/image_encoder/model.safetensors"),
    ("diffusers", "versions", "model_index.json"),
]
KINDS: dict[str, Callable[[Path], object]] = {
    "FIFO": os.mkfifo,
    "folder": Path.mkdir,
    "endless": lambda path: path.symlink_to("/dev/zero"),
    "empty": Path.touch,
    "junk": lambda path: path.write_bytes(b"\xff\xfe<html>" * 100),
    "list": lambda path: path.write_text("[1, 2]"),
    "NaN": lambda path: path.write_text('{"a": NaN}'),
    "deep": lambda path: path.write_text("[" * 100_000),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("layout", "load", "file"), FILES)
def test_what_lies_in_a_files_place(folders, replaced, layout, load, file, kind):
    path = folders[layout].path / file
    KINDS[kind](replaced(path))
    refused(load, folders[layout], str(path.parent))


@pytest.mark.parametrize(("layout", "load", "file"), CONFIGS)
def test_a_config_is_not_read_beyond_its_size(folders, replaced, layout, load, file):
    """3 GB of it took 6 GB of memory. This one takes no place on the disk."""
    path = replaced(folders[layout].path / file)
    with path.open("wb") as opened:
        opened.truncate(3 * 2**30)
    refused(load, folders[layout], f"{path} has {3 * 2**30} bytes; at most {boundary.MAX_JSON_BYTES} are allowed")


def test_the_pickle_is_not_read_beyond_its_size(folders, replaced):
    path = replaced(folders["official"].path / PICKLE)
    with path.open("wb") as opened:
        opened.truncate(2**40)
    refused("glyph", folders["official"], f"{path} has {2**40} bytes; at most 4294967296 are allowed")


def test_a_compressed_pickle_is_not_unpacked_beyond_its_size(folders, replaced):
    """torch reads such archives, and a few kilobytes can fill the memory."""
    path = replaced(folders["official"].path / PICKLE)
    torch.save({"a": torch.zeros(2**18)}, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, raw in members.items():
            archive.writestr(name, raw)
    raw = path.read_bytes()
    size, large = (struct.pack("<I", number) for number in (2**20, 2**32 - 2))
    path.write_bytes(raw.replace(size, large))  # what it says of itself
    refused("glyph", folders["official"], f"{path} has ", "bytes unpacked; at most 4294967296 are allowed")


PARTS = {
    "transformer": ("official", f"{OFFICIAL_DIT}/{WEIGHTS}", "img_in.proj.weight"),
    "vae": ("official", f"vae/{WEIGHTS}", "decoder.conv_in.conv.weight"),
    "vae encoder": ("diffusers", f"vae/{WEIGHTS}", "encoder.conv_in.conv.weight"),
    "text": ("diffusers", "text_encoder/model.safetensors", "layers.0.self_attn.q_proj.weight"),
    "glyph": ("diffusers", "text_encoder_2/model.safetensors", "encoder.block.0.layer.0.SelfAttention.q.weight"),
    "image": ("diffusers", "image_encoder/model.safetensors", "vision_model.embeddings.patch_embedding.weight"),
}
DTYPES = {
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "U64": torch.uint64,
    "I64": torch.int64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
}


def rewrite(
    path: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor], place: Callable[[Path], Path]
) -> None:
    weights = load_file(path)
    weights[name] = change(weights[name]).contiguous()
    save_file(weights, place(path))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("load", PARTS)
def test_weights_that_are_no_floating_point_numbers_are_refused(folders, replaced, load, dtype):
    layout, file, name = PARTS[load]
    path = folders[layout].path / file
    rewrite(path, name, lambda x: x.to(DTYPES[dtype]), replaced)
    refused(load, folders[layout], f"{path}: {name} is {dtype}; allowed are F64, F32, F16, BF16")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("load", PARTS)
def test_one_number_that_is_not_finite_is_found(folders, replaced, load, value):
    layout, file, name = PARTS[load]
    path = folders[layout].path / file
    rewrite(path, name, lambda x: x.index_fill(0, torch.tensor([len(x) - 1]), value), replaced)
    refused(load, folders[layout], f"{path.parent} holds NaN or Inf, in torch.float32, in")


@pytest.mark.parametrize("load", PARTS)
def test_a_tensor_without_dimensions_is_refused(folders, replaced, load):
    layout, file, name = PARTS[load]
    path = folders[layout].path / file
    rewrite(path, name, lambda x: x.sum(), replaced)
    refused(load, folders[layout], str(path.parent), "has shape []")


def test_a_number_that_float16_cannot_hold_is_found(folders, replaced):
    layout, file, name = PARTS["vae"]
    rewrite(folders[layout].path / file, name, lambda x: x * 1e6, replaced)
    with pytest.raises(InputError, match=r"vae holds NaN or Inf, in torch.float16, in: conv_in.conv.weight$"):
        components.load_vae_decoder(folders[layout], device=torch.device("cpu"), dtype=torch.float16)


def test_float8_blocks_of_weights_that_are_not_finite_are_refused(folders, replaced):
    """Quantised they are NaN, which float8 has too."""
    layout, file, _ = PARTS["transformer"]
    name = "double_blocks.0.img_attn_q.weight"
    rewrite(folders[layout].path / file, name, lambda x: x.index_fill(0, torch.tensor([1]), float("inf")), replaced)
    skeleton = components.transformer_skeleton(folders[layout], VERSION, weights_dtype="fp8")
    with pytest.raises(InputError, match=r"holds NaN or Inf, in torch.bfloat16, in: transformer_blocks.0.attn.to_q"):
        components.load_transformer(
            folders[layout], VERSION, device=torch.device("cpu"), dtype=torch.bfloat16, skeleton=skeleton
        )


def test_a_config_chooses_no_attention_of_its_own(folders, replaced):
    """transformers would fetch such a name from the hub, and run it."""
    for layout, load, file in (
        ("official", "text", "text_encoder/llm/config.json"),
        ("official", "glyph", "text_encoder/byt5-small/config.json"),
        ("official", "image", f"{OFFICIAL_SIGLIP}/image_encoder/config.json"),
    ):
        path = folders[layout].path / file
        content = json.loads(path.read_text())
        for key in ("_attn_implementation", "attn_implementation", "_attn_implementation_internal"):
            content[key] = "stranger/kernel"
        replaced(path).write_text(json.dumps(content | {"auto_map": {"AutoModel": "code.Model"}}))
        model: Any = LOADERS[load](folders[layout])[1]  # type: ignore[index]
        own = getattr(model.config, "_attn_implementation", None)
        assert own == (None if load == "text" else "sdpa"), "the language model's config has no place for one"
