"""What the configs of a model folder may say: each key that is read, its type and range, and what must add up.

A folder may come from anyone, so nothing of it reaches a constructor unchecked. The upper limits are far above every
published model and low enough that no config alone can fill the memory or the time.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hunyuan_staged.errors import InputError
from hunyuan_staged.geometry import BUCKET_BASE, SPATIAL_RATIO, TEMPORAL_RATIO
from hunyuan_staged.versions import SKIPPED_LAYERS, TASKS

QUOTED = 80  # characters of a value in a message


@dataclass(frozen=True)
class Rule:
    """Which values a key may have: in words, and as a test."""

    allowed: str
    holds: Callable[[Any], bool]


def whole(low: int, high: int) -> Rule:
    return Rule(f"a whole number from {low} to {high}", lambda x: type(x) is int and low <= x <= high)


def number(low: float, high: float) -> Rule:
    # NaN is in no range.
    return Rule(f"a number from {low:g} to {high:g}", lambda x: type(x) in (int, float) and low <= x <= high)


def one_of(*values: Any) -> Rule:
    allowed = ", ".join("null" if value is None else repr(value) for value in values)
    return Rule(allowed, lambda x: any(type(x) is type(value) and x == value for value in values))


def items(rule: Rule, low: int, high: int) -> Rule:
    count = str(low) if low == high else f"{low} to {high}"
    return Rule(
        f"a list of {count} items, each {rule.allowed}",
        lambda x: isinstance(x, (list, tuple)) and low <= len(x) <= high and all(map(rule.holds, x)),
    )


def optional(rule: Rule) -> Rule:
    return Rule(f"{rule.allowed}, or null", lambda x: x is None or rule.holds(x))


def either(*rules: Rule) -> Rule:
    return Rule(", or ".join(rule.allowed for rule in rules), lambda x: any(rule.holds(x) for rule in rules))


def table(rule: Rule, high: int) -> Rule:
    """An object whose values are all of one kind."""
    return Rule(
        f"an object of at most {high} entries, each {rule.allowed}",
        lambda x: isinstance(x, dict) and len(x) <= high and all(map(rule.holds, x.values())),
    )


BOOLEAN = Rule("true or false", lambda x: type(x) is bool)
TEXT = Rule("text", lambda x: isinstance(x, str))
ANYTHING = Rule("anything", lambda x: True)

Schema = Mapping[str, Rule]

WIDTH, LAYERS, HEADS, CHANNELS = whole(1, 32_768), whole(1, 256), whole(1, 256), whole(1, 8_192)
THETA, EPSILON = number(1, 1e9), number(1e-12, 0.1)
FACTOR = number(1e-6, 1e6)
ROPE = items(whole(2, 1024), 3, 3)
RESOLUTION, TASK = one_of(*BUCKET_BASE), one_of(*TASKS, None)

OFFICIAL_TRANSFORMER: Schema = {
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "hidden_size": WIDTH,
    "heads_num": HEADS,
    "mm_double_blocks_depth": LAYERS,
    "mlp_width_ratio": number(0.01, 64),
    "patch_size": Rule(
        "[t, n, n] with whole numbers from 1 to 8",
        lambda x: items(whole(1, 8), 3, 3).holds(x) and x[1] == x[2],
    ),
    "rope_dim_list": ROPE,
    "rope_theta": THETA,
    "text_states_dim": WIDTH,
    "vision_states_dim": WIDTH,
    "use_meanflow": optional(BOOLEAN),
    "concat_condition": BOOLEAN,
    "ideal_task": TASK,
}
DIFFUSERS_TRANSFORMER: Schema = {
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "num_attention_heads": HEADS,
    "attention_head_dim": whole(1, 1024),
    "num_layers": LAYERS,
    "num_refiner_layers": LAYERS,
    "mlp_ratio": number(0.01, 64),
    "patch_size": whole(1, 8),
    "patch_size_t": whole(1, 8),
    "qk_norm": one_of("rms_norm"),
    "text_embed_dim": WIDTH,
    "text_embed_2_dim": WIDTH,
    "image_embed_dim": WIDTH,
    "rope_theta": THETA,
    "rope_axes_dim": ROPE,
    "target_size": one_of(*BUCKET_BASE.values()),
    "task_type": TASK,
    "use_meanflow": BOOLEAN,
}
_VAE: Schema = {
    "in_channels": one_of(3),
    "out_channels": one_of(3),
    "latent_channels": whole(1, 256),
    "block_out_channels": items(CHANNELS, 5, 5),
    "layers_per_block": whole(0, 16),
    "downsample_match_channel": BOOLEAN,
    "upsample_match_channel": BOOLEAN,
    "scaling_factor": FACTOR,
}
VAE_DTYPE: Schema = {"force_upcast": BOOLEAN}
OFFICIAL_VAE: Schema = {**_VAE, "ffactor_spatial": one_of(SPATIAL_RATIO), "ffactor_temporal": one_of(TEMPORAL_RATIO)}
DIFFUSERS_VAE: Schema = {
    **_VAE,
    "spatial_compression_ratio": one_of(SPATIAL_RATIO),
    "temporal_compression_ratio": one_of(TEMPORAL_RATIO),
}
LANGUAGE: Schema = {
    "hidden_size": WIDTH,
    "intermediate_size": whole(1, 131_072),
    "num_hidden_layers": whole(SKIPPED_LAYERS + 1, 256),
    "num_attention_heads": HEADS,
    "num_key_value_heads": optional(HEADS),
    "vocab_size": whole(1, 1_000_000),
    "max_position_embeddings": whole(2048, 10_000_000),
    "rms_norm_eps": EPSILON,
    "rope_theta": THETA,
    "hidden_act": one_of("silu"),
    "use_sliding_window": one_of(False, None),
    "layer_types": optional(items(one_of("full_attention"), 1, 256)),
}
ROPE_SCALING: Schema = {
    "type": one_of("mrope", "default"),
    "rope_type": one_of("mrope", "default"),
    "mrope_section": items(whole(1, 1024), 3, 3),
    "rope_theta": THETA,
}
VISION: Schema = {
    "depth": LAYERS,
    "hidden_size": WIDTH,
    "intermediate_size": whole(1, 131_072),
    "num_heads": HEADS,
    "out_hidden_size": WIDTH,
    "hidden_act": one_of("silu"),
    "in_chans": one_of(3),
    "in_channels": one_of(3),
    "patch_size": whole(1, 512),
    "spatial_merge_size": whole(1, 16),
    "temporal_patch_size": whole(1, 16),
    "window_size": whole(1, 4096),
    "fullatt_block_indexes": items(whole(0, 255), 0, 256),
    "tokens_per_second": number(0.01, 1000),
}
GLYPH: Schema = {
    "vocab_size": whole(1, 1_000_000),
    "d_model": WIDTH,
    "d_kv": whole(1, 1024),
    "d_ff": whole(1, 131_072),
    "num_layers": LAYERS,
    "num_heads": HEADS,
    "relative_attention_num_buckets": whole(4, 1024),
    "relative_attention_max_distance": whole(4, 100_000),
    "layer_norm_epsilon": EPSILON,
    "feed_forward_proj": one_of("gated-gelu", "relu"),
}
GLYPH_TOKENIZER: Schema = {
    "extra_ids": whole(0, 1000),
    "additional_special_tokens": optional(items(ANYTHING, 0, 10_000)),
    "extra_special_tokens": optional(either(items(ANYTHING, 0, 10_000), table(ANYTHING, 10_000))),
    "added_tokens_decoder": optional(table(ANYTHING, 10_000)),
    "tokenizer_class": one_of("ByT5Tokenizer"),
}
LANGUAGE_TOKENIZER: Schema = {
    "additional_special_tokens": optional(items(ANYTHING, 0, 10_000)),
    "extra_special_tokens": optional(either(items(ANYTHING, 0, 10_000), table(ANYTHING, 10_000))),
    "added_tokens_decoder": optional(table(ANYTHING, 10_000)),
    "tokenizer_class": one_of("Qwen2Tokenizer", "Qwen2TokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend"),
}
IMAGE: Schema = {
    "hidden_size": WIDTH,
    "intermediate_size": whole(1, 131_072),
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_channels": one_of(3),
    "image_size": whole(1, 4096),
    "patch_size": whole(1, 512),
    "hidden_act": one_of("gelu_pytorch_tanh", "gelu"),
    "layer_norm_eps": EPSILON,
    "vision_use_head": BOOLEAN,
}
IMAGE_PROCESSOR: Schema = {
    "do_resize": BOOLEAN,
    "do_rescale": BOOLEAN,
    "do_normalize": BOOLEAN,
    "do_convert_rgb": optional(BOOLEAN),
    "image_mean": items(number(-10, 10), 3, 3),
    "image_std": items(number(1e-3, 10), 3, 3),
    "resample": whole(0, 5),
    "rescale_factor": number(1e-6, 1),
    "size": Rule(
        "an object with height and width, each a whole number from 1 to 4096",
        lambda x: (
            isinstance(x, dict) and x.keys() == {"height", "width"} and all(map(whole(1, 4096).holds, x.values()))
        ),
    ),
}
SCHEDULER: Schema = {"shift": optional(number(0.01, 100))}
GUIDER: Schema = {"guidance_scale": optional(number(0, 100))}
GLYPH_TABLE = table(whole(0, 1_000_000), 10_000)  # of colours, and of fonts


def quoted(value: object) -> str:
    """A value as it stands in a message."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= QUOTED else f"{text[:QUOTED]}…"


def check(config: Mapping[str, Any], schema: Schema, origin: object) -> None:
    """InputError for the first key whose value its rule does not allow; keys that are absent are not looked for."""
    for name, rule in schema.items():
        if name in config and not rule.holds(config[name]):
            raise InputError(f"{origin}: {name} is {quoted(config[name])}; allowed is {rule.allowed}")


def picked(config: Mapping[str, Any], schema: Schema, origin: object) -> dict[str, Any]:
    """The keys of a schema alone, checked: what else a config says, an attention implementation say, reaches nobody."""
    check(config, schema, origin)
    return {name: config[name] for name in schema if name in config}


def require_equal(origin: object, what: str, given: object, wanted: object) -> None:
    """InputError where two numbers of a config that must agree do not."""
    if given != wanted:
        raise InputError(f"{origin}: {what} is {quoted(given)}; allowed is {quoted(wanted)}")


def require_rope(origin: object, name: str, axes: Sequence[int], head_width: int) -> None:
    """The angles of the axes share the width of a head, each in pairs."""
    require_equal(origin, f"the sum of {name} {list(axes)}", sum(axes), head_width)
    if any(axis % 2 for axis in axes):
        raise InputError(f"{origin}: {name} is {list(axes)}; allowed are even numbers")
