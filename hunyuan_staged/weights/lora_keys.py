"""The keys of adapters: which module of the transformer each one names, in every style that trainers write.

A key is [prefix]module.leaf. The module is named as in the official layout, as in ComfyUI (with q, k and v in one module)
or as in diffusers; in kohya's style with _ for every dot.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from hunyuan_staged.weights.key_maps import COMFY_RULES, FUSED_RULES, TRANSFORMER_MAP, Rule, module_aliases

_PREFIX = re.compile(r"^(?:base_model\.model\.|transformer\.|diffusion_model\.|model\.|unet\.)+")
_KOHYA = "lora_unet_"
# peft puts an adapter's name ("default") between the two words of a leaf. diff and diff_b: whole deltas of a weight and a
# bias, which ComfyUI's extraction writes where a low rank does not pay.
_LEAF = re.compile(
    r"\.(?:(?P<down>lora_A(?:\.\w+)?\.weight|lora_down\.weight|lora\.down\.weight)"
    r"|(?P<up>lora_B(?:\.\w+)?\.weight|lora_up\.weight|lora\.up\.weight)|(?P<alpha>alpha)"
    r"|(?P<diff>diff)|(?P<diff_b>diff_b))$"
)
# What other kinds of adapters have in their keys.
_KINDS = {
    "LoKr": re.compile(r"\.lokr_(?:w1|w2|t2)(?:_[ab])?(?:\.|$)"),
    "LoHa": re.compile(r"\.hada_(?:w1|w2|t1|t2)(?:_[ab])?(?:\.|$)"),
    "DoRA": re.compile(r"\.(?:dora_scale|lora_magnitude_vector)(?:\.|$)"),
    "OFT": re.compile(r"\.oft_(?:blocks|diag|R|S)(?:\.|$)"),
}


@dataclass(frozen=True)
class Module:
    """A module by one of its names: the rule that says which parts of it each of the diffusers modules is."""

    rule: Rule
    names: Sequence[str]
    style: str


def without_prefix(name: str) -> str:
    """A module's name without what trainers put before it."""
    return _PREFIX.sub("", name)


def named_modules(names: Iterable[str]) -> dict[str, Module]:
    """Every way to name a module of a transformer with weights of these (diffusers) names."""
    own = [name.removesuffix(".weight") for name in names if name.endswith(".weight")]
    found: dict[str, Module] = {}
    for style, rules in (("official", TRANSFORMER_MAP), ("ComfyUI", (*FUSED_RULES, *COMFY_RULES))):
        for alias, (rule, targets) in module_aliases(own, rules).items():
            found.setdefault(alias, Module(rule, targets, style))
    for name in own:
        found.setdefault(name, Module(Rule(name, (name,)), [name], "diffusers"))
    return {_KOHYA + name.replace(".", "_"): module for name, module in found.items()} | found


def other_kind(keys: Iterable[str]) -> str | None:
    """The kind of adapter, other than LoRA, that has such keys: "LoKr", "LoHa", …"""
    return next((kind for key in keys for kind, pattern in _KINDS.items() if pattern.search(key)), None)


def group(keys: Iterable[str], modules: Mapping[str, Module]) -> tuple[dict[str, dict[str, str]], list[str], list[str]]:
    """(by module its keys, by what they are: down, up, alpha, diff, diff_b; unknown keys; keys for what another has)."""
    parts: dict[str, dict[str, str]] = {}
    unknown, twice = [], []
    for key in keys:
        match = _LEAF.search(key)
        module = without_prefix(key[: match.start()]) if match else ""
        if match is None or module not in modules:
            unknown.append(key)
        elif match.lastgroup in (own := parts.setdefault(module, {})):
            twice.append(key)
        else:
            own[match.lastgroup or ""] = key
    return parts, unknown, twice
