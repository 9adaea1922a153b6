"""What the config of a part in one file would say, from the shapes of its tensors.

The width of a head, the image's size and the VAE's factor show in no shape. They are those of a config in the model folder
whose other numbers are the file's, else the published model's.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hunyuan_staged.errors import InputError
from hunyuan_staged.models.vae_modules import VaeConfig
from hunyuan_staged.weights.key_maps import refuse_names

Shapes = Mapping[str, Sequence[int]]  # by the file's names

# Qwen2.5-VL-7B-Instruct
_QWEN_HEAD, _QWEN_ROPE = 128, {"type": "mrope", "mrope_section": [16, 24, 24]}
# google/siglip-so400m-patch14-384, by (width, side of a patch, patches)
_SIGLIP = {(1152, 14, 729): {"num_attention_heads": 16, "image_size": 384}}
# Of SigLIP's published preprocessor_config.json
SIGLIP_PROCESSOR = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "resample": 3,
    "rescale_factor": 1 / 255,
}


def _by_ending(shapes: Shapes, endings: Iterable[str], what: Path) -> list[Sequence[int]]:
    """The shape of the tensor with each of these endings; InputError where one is absent, or is no matrix."""
    endings = list(endings)
    found = [next((shape for name, shape in shapes.items() if name.endswith(ending)), None) for ending in endings]
    refuse_names(f"{what} lacks", [ending for ending, shape in zip(endings, found, strict=True) if shape is None])
    shaped = [shape for shape in found if shape is not None]
    refuse_names(
        f"{what} holds what is no matrix",
        [f"{ending} {list(shape)}" for ending, shape in zip(endings, shaped, strict=True) if len(shape) < 2],
    )
    return shaped


def _count(names: Iterable[str], stem: str) -> int:
    """How many numbered modules there are behind a stem."""
    pattern = re.compile(rf"(?:^|\.){re.escape(stem)}\.(\d{{1,4}})\.")
    return len({match[1] for name in names if (match := pattern.search(name))})


def _fits(known: Mapping[str, Any], derived: Mapping[str, Any]) -> bool:
    return all(known.get(name) == value for name, value in derived.items())


def text_config(shapes: Shapes, known: Mapping[str, Any], what: Path) -> dict[str, Any]:
    """config.json of the language model; known: that of the model folder, {} where there is none."""
    language = {name: shape for name, shape in shapes.items() if "visual." not in name}
    embed, gate, query, key = _by_ending(
        language,
        ("embed_tokens.weight", *(f"layers.0.{leaf}.weight" for leaf in _TEXT_LEAVES)),
        what,
    )
    derived = {
        "hidden_size": embed[1],
        "intermediate_size": gate[0],
        "num_hidden_layers": _count(language, "layers"),
        "vocab_size": embed[0],
    }
    nested = known.get("text_config")
    inner = nested if isinstance(nested, dict) else known
    heads, shared = inner.get("num_attention_heads"), inner.get("num_key_value_heads")
    if _fits(inner, derived) and type(heads) is int and heads and query[0] == embed[1]:
        shared = heads if shared is None else shared
        if type(shared) is int and shared * (embed[1] // heads) == key[0]:
            return dict(known)
    if query[0] % _QWEN_HEAD or key[0] % _QWEN_HEAD or query[0] != embed[1]:
        raise InputError(
            f"{what}: heads of {_QWEN_HEAD} do not divide queries of {query[0]} and keys of {key[0]} in a width of "
            f"{embed[1]}; another text encoder than Qwen2.5-VL-7B needs its config in the model folder"
        )
    return derived | {
        "model_type": "qwen2_5_vl",
        "num_attention_heads": query[0] // _QWEN_HEAD,
        "num_key_value_heads": key[0] // _QWEN_HEAD,
        "max_position_embeddings": 128_000,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_scaling": _QWEN_ROPE,
        "vision_config": known.get("vision_config"),
    }


_TEXT_LEAVES = ("mlp.gate_proj", "self_attn.q_proj", "self_attn.k_proj")


def glyph_config(shapes: Shapes, known: Mapping[str, Any], what: Path) -> dict[str, Any]:
    """config.json of the glyph encoder, all of which the shapes tell but what every T5 has in common."""
    layer = "block.0.layer"
    query, bias, out = _by_ending(
        shapes,
        (f"{layer}.0.SelfAttention.{leaf}.weight" for leaf in ("q", "relative_attention_bias", "o")),
        what,
    )
    gated = any(name.endswith("DenseReluDense.wi_1.weight") for name in shapes)
    wide = f"{layer}.1.DenseReluDense.{'wi_0' if gated else 'wi'}.weight"
    (inner,) = _by_ending(shapes, (wide,), what)
    embed = next((shapes[n] for n in shapes if n.endswith(("embed_tokens.weight", "shared.weight"))), None)
    if embed is None or len(embed) != 2 or not bias[1]:
        raise InputError(f"{what} lacks the embeddings of a glyph encoder's tokens (shared.weight)")
    derived = {
        "model_type": "t5",
        "vocab_size": embed[0],
        "d_model": out[0],
        "d_kv": query[0] // bias[1],
        "d_ff": inner[0],
        "num_layers": _count(shapes, "block"),
        "num_heads": bias[1],
        "relative_attention_num_buckets": bias[0],
        "feed_forward_proj": "gated-gelu" if gated else "relu",
    }
    own = ("relative_attention_max_distance", "layer_norm_epsilon")
    return derived | {name: known[name] for name in own if name in known}


def image_config(shapes: Shapes, known: Mapping[str, Any], what: Path) -> dict[str, Any]:
    """config.json of the image encoder; InputError for one that is neither published nor described in the folder."""
    patch, positions, inner = _by_ending(
        shapes,
        (
            "embeddings.patch_embedding.weight",
            "embeddings.position_embedding.weight",
            "encoder.layers.0.mlp.fc1.weight",
        ),
        what,
    )
    if len(patch) != 4:
        raise InputError(f"{what}: embeddings.patch_embedding.weight is {list(patch)}; it has 4 axes")
    derived = {
        "hidden_size": patch[0],
        "intermediate_size": inner[0],
        "num_hidden_layers": _count(shapes, "encoder.layers"),
        "patch_size": patch[2],
    }
    nested = known.get("vision_config")
    inside = nested if isinstance(nested, dict) else known
    side = inside.get("image_size")
    if _fits(inside, derived) and type(side) is int and (side // max(1, patch[2])) ** 2 == positions[0]:
        return dict(known)
    published = _SIGLIP.get((patch[0], patch[2], positions[0]))
    if published is None:
        raise InputError(
            f"{what}: {positions[0]} patches of {patch[2]} px in a width of {patch[0]} are not those of "
            "siglip-so400m-patch14-384; another image encoder needs its config in the model folder"
        )
    return derived | published | {"model_type": "siglip_vision_model"}


def vae_config(shapes: Shapes, known: Mapping[str, Any], what: Path) -> dict[str, Any]:
    """diffusers' arguments of the VAE. shapes: by diffusers' names; known: the arguments that the folder's config gives."""
    levels = range(_count(shapes, "decoder.up_blocks"))
    first, *wide = _by_ending(
        shapes,
        (
            "decoder.conv_in.conv.weight",
            *(f"decoder.up_blocks.{level}.resnets.0.conv2.conv.weight" for level in levels),
        ),
        what,
    )
    derived = {
        "latent_channels": first[1],
        "block_out_channels": [shape[0] for shape in wide][::-1],
        "layers_per_block": _count((n for n in shapes if "decoder.up_blocks.0." in n), "resnets") - 1,
    }
    inside = {**known, "block_out_channels": list(known.get("block_out_channels", ()))}
    if _fits(inside, derived):
        return dict(known)
    return {**VaeConfig().__dict__, **derived}
