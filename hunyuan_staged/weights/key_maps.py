"""The names of weights in the official layout and in diffusers'. A map is data, serves both ways, and is closed: a
tensor that no rule names, that a module lacks, or that is missing for a module is an error.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch

from hunyuan_staged.errors import InputError

Named = tuple[str, torch.Tensor]
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True, eq=False)
class Rule:
    """A module's name in the official layout and in diffusers; each # stands for a number, the same on both sides.

    With several diffusers names the official tensor holds them one after the other along its first axis. swap: the two
    halves of the first axis change places.
    """

    official: str
    diffusers: tuple[str, ...]
    swap: bool = False


def _rules(*pairs: tuple[str, str], fused: Sequence[Rule] = ()) -> tuple[Rule, ...]:
    return (*(Rule(official, (diffusers,)) for official, diffusers in pairs), *fused)


_REFINER = "txt_in.individual_token_refiner.blocks.#", "context_embedder.token_refiner.refiner_blocks.#"
_TEXT_TIME = "context_embedder.time_text_embed"

TRANSFORMER_MAP = _rules(
    ("img_in.proj", "x_embedder.proj"),
    ("time_in.mlp.0", "time_embed.timestep_embedder.linear_1"),
    ("time_in.mlp.2", "time_embed.timestep_embedder.linear_2"),
    ("time_r_in.mlp.0", "time_embed.timestep_embedder_r.linear_1"),
    ("time_r_in.mlp.2", "time_embed.timestep_embedder_r.linear_2"),
    ("txt_in.t_embedder.mlp.0", f"{_TEXT_TIME}.timestep_embedder.linear_1"),
    ("txt_in.t_embedder.mlp.2", f"{_TEXT_TIME}.timestep_embedder.linear_2"),
    ("txt_in.c_embedder.linear_1", f"{_TEXT_TIME}.text_embedder.linear_1"),
    ("txt_in.c_embedder.linear_2", f"{_TEXT_TIME}.text_embedder.linear_2"),
    ("txt_in.input_embedder", "context_embedder.proj_in"),
    *(
        (f"{_REFINER[0]}.{official}", f"{_REFINER[1]}.{diffusers}")
        for official, diffusers in (
            ("norm1", "norm1"),
            ("norm2", "norm2"),
            ("self_attn_proj", "attn.to_out.0"),
            ("mlp.fc1", "ff.net.0.proj"),
            ("mlp.fc2", "ff.net.2"),
            ("adaLN_modulation.1", "norm_out.linear"),
        )
    ),
    ("byt5_in.layernorm", "context_embedder_2.norm"),
    ("byt5_in.fc1", "context_embedder_2.linear_1"),
    ("byt5_in.fc2", "context_embedder_2.linear_2"),
    ("byt5_in.fc3", "context_embedder_2.linear_3"),
    ("vision_in.proj.0", "image_embedder.norm_in"),
    ("vision_in.proj.1", "image_embedder.linear_1"),
    ("vision_in.proj.3", "image_embedder.linear_2"),
    ("vision_in.proj.4", "image_embedder.norm_out"),
    ("cond_type_embedding", "cond_type_embed"),
    *(
        (f"double_blocks.#.{official}", f"transformer_blocks.#.{diffusers}")
        for official, diffusers in (
            ("img_mod.linear", "norm1.linear"),
            ("txt_mod.linear", "norm1_context.linear"),
            ("img_attn_q", "attn.to_q"),
            ("img_attn_k", "attn.to_k"),
            ("img_attn_v", "attn.to_v"),
            ("img_attn_q_norm", "attn.norm_q"),
            ("img_attn_k_norm", "attn.norm_k"),
            ("img_attn_proj", "attn.to_out.0"),
            ("txt_attn_q", "attn.add_q_proj"),
            ("txt_attn_k", "attn.add_k_proj"),
            ("txt_attn_v", "attn.add_v_proj"),
            ("txt_attn_q_norm", "attn.norm_added_q"),
            ("txt_attn_k_norm", "attn.norm_added_k"),
            ("txt_attn_proj", "attn.to_add_out"),
            ("img_mlp.fc1", "ff.net.0.proj"),
            ("img_mlp.fc2", "ff.net.2"),
            ("txt_mlp.fc1", "ff_context.net.0.proj"),
            ("txt_mlp.fc2", "ff_context.net.2"),
        )
    ),
    ("final_layer.linear", "proj_out"),
    fused=(
        Rule(f"{_REFINER[0]}.self_attn_qkv", tuple(f"{_REFINER[1]}.attn.to_{part}" for part in "qkv")),
        Rule("final_layer.adaLN_modulation.1", ("norm_out.linear",), swap=True),
    ),
)

# Files of ComfyUI hold the blocks' q, k and v in one tensor, under names that are otherwise the official ones.
FUSED_RULES = tuple(
    Rule(f"double_blocks.#.{stream}_attn_qkv", tuple(f"transformer_blocks.#.attn.{name}" for name in names))
    for stream, names in (("img", ("to_q", "to_k", "to_v")), ("txt", ("add_q_proj", "add_k_proj", "add_v_proj")))
)
# What ComfyUI calls the modules in memory, and so in adapters: (an official name's ending, its own).
_COMFY_ENDINGS = (
    ("_attn_qkv", "_attn.qkv"),
    ("_attn_proj", "_attn.proj"),
    ("_attn_q_norm", "_attn.norm.query_norm"),
    ("_attn_k_norm", "_attn.norm.key_norm"),
    ("mlp.fc1", "mlp.0"),
    ("mlp.fc2", "mlp.2"),
    ("_mod.linear", "_mod.lin"),
    ("c_embedder.linear_1", "c_embedder.in_layer"),
    ("c_embedder.linear_2", "c_embedder.out_layer"),
    ("time_in.mlp.0", "time_in.in_layer"),
    ("time_in.mlp.2", "time_in.out_layer"),
    ("time_r_in.mlp.0", "time_r_in.in_layer"),
    ("time_r_in.mlp.2", "time_r_in.out_layer"),
    ("t_embedder.mlp.0", "t_embedder.in_layer"),
    ("t_embedder.mlp.2", "t_embedder.out_layer"),
)


def _comfy(rule: Rule) -> Rule | None:
    ending = next((pair for pair in _COMFY_ENDINGS if rule.official.endswith(pair[0])), None)
    return ending and Rule(rule.official.removesuffix(ending[0]) + ending[1], rule.diffusers, rule.swap)


COMFY_RULES = tuple(rule for rule in map(_comfy, (*TRANSFORMER_MAP, *FUSED_RULES)) if rule)

_RESNET = ("norm1", "conv1.conv", "norm2", "conv2.conv")
_MID = (("block_1", "resnets.0"), ("block_2", "resnets.1"))
_MID_ATTENTION = (("norm", "norm"), ("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "proj_out"))

VAE_MAP = _rules(
    *(
        pair
        for coder, way, resample in (("encoder", "down", "downsample"), ("decoder", "up", "upsample"))
        for pair in (
            *((f"{coder}.{name}", f"{coder}.{name}") for name in ("conv_in.conv", "norm_out", "conv_out.conv")),
            *((f"{coder}.{way}.#.block.#.{name}", f"{coder}.{way}_blocks.#.resnets.#.{name}") for name in _RESNET),
            (f"{coder}.{way}.#.{resample}.conv.conv", f"{coder}.{way}_blocks.#.{resample}rs.0.conv.conv"),
            *((f"{coder}.mid.{a}.{name}", f"{coder}.mid_block.{b}.{name}") for a, b in _MID for name in _RESNET),
            *((f"{coder}.mid.attn_1.{a}", f"{coder}.mid_block.attentions.0.{b}") for a, b in _MID_ATTENTION),
        )
    )
)


@cache
def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(re.escape(name).replace(r"\#", r"(\d+)"))


def _fill(name: str, numbers: Sequence[str]) -> str:
    """`name` with its # replaced by numbers, in order."""
    parts = name.split("#")
    return "".join(part + number for part, number in zip(parts, [*numbers, ""], strict=True))


@cache
def _by_form(rules: tuple[Rule, ...]) -> dict[str, list[Rule]]:
    """The rules by what their official names are with # for every number, also those that are the same in all."""
    found: dict[str, list[Rule]] = {}
    for rule in rules:
        found.setdefault(_NUMBER.sub("#", rule.official), []).append(rule)
    return found


def diffusers_names(name: str, rules: tuple[Rule, ...]) -> tuple[Rule, list[str]] | None:
    """The rule for an official tensor, and its diffusers name or names; None where no rule names it."""
    module, _, leaf = name.rpartition(".")
    for rule in _by_form(rules).get(_NUMBER.sub("#", module), ()):
        match = _pattern(rule.official).fullmatch(module)
        if match:
            return rule, [f"{_fill(target, match.groups())}.{leaf}" for target in rule.diffusers]
    return None


def diffusers_tensors(name: str, tensor: torch.Tensor, rules: tuple[Rule, ...]) -> list[Named] | None:
    """One official tensor under its diffusers name or names; None where no rule names it.

    Raises InputError for a fused tensor that does not split evenly.
    """
    found = diffusers_names(name, rules)
    if found is None:
        return None
    rule, names = found
    count = 2 if rule.swap else len(names)
    if count > 1 and (not tensor.ndim or tensor.shape[0] % count):
        raise InputError(f"{name} has shape {list(tensor.shape)}; it holds {count} equal parts, one after the other")
    return list(zip(names, split(tensor, rule), strict=True))


def split(tensor: torch.Tensor, rule: Rule) -> list[torch.Tensor]:
    """What each diffusers module of a rule has of an official tensor, whose first axis divides evenly."""
    if rule.swap:
        return [torch.cat(tensor.chunk(2)[::-1])]
    return list(tensor.chunk(len(rule.diffusers))) if len(rule.diffusers) > 1 else [tensor]


def module_aliases(modules: Collection[str], rules: Sequence[Rule]) -> dict[str, tuple[Rule, list[str]]]:
    """By the official name of each of these diffusers modules: its rule, and the diffusers module or modules it is."""
    found = {}
    for rule in rules:
        for module in modules:
            match = _pattern(rule.diffusers[0]).fullmatch(module)
            if match:
                targets = [_fill(target, match.groups()) for target in rule.diffusers]
                found[_fill(rule.official, match.groups())] = rule, targets
    return found


def refuse_names(what: str, names: Sequence[str]) -> None:
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise InputError(f"{what}: {', '.join(names[:3])}{more}")


def to_diffusers(state_dict: Mapping[str, torch.Tensor], rules: tuple[Rule, ...]) -> dict[str, torch.Tensor]:
    """An official state dict under diffusers' names; InputError names the tensors that no rule knows."""
    renamed = {name: diffusers_tensors(name, tensor, rules) for name, tensor in state_dict.items()}
    refuse_names(
        "tensors that the official layout does not have", [name for name, pairs in renamed.items() if pairs is None]
    )
    return {name: tensor for pairs in renamed.values() for name, tensor in pairs or ()}


def to_official(state_dict: Mapping[str, torch.Tensor], rules: Sequence[Rule]) -> dict[str, torch.Tensor]:
    """A diffusers state dict under the official names.

    Raises InputError for tensors that no rule knows, and for some of a fused tensor's parts without the others.
    """
    official: dict[str, torch.Tensor] = {}
    unknown: list[str] = []
    half_fused: dict[str, None] = {}
    for name in state_dict:
        module, _, leaf = name.rpartition(".")
        found = next(
            (
                (rule, match.groups())
                for rule in rules
                for target in rule.diffusers
                if (match := _pattern(target).fullmatch(module))
            ),
            None,
        )
        if found is None:
            unknown.append(name)
            continue
        rule, numbers = found
        siblings = [f"{_fill(target, numbers)}.{leaf}" for target in rule.diffusers]
        absent = [sibling for sibling in siblings if sibling not in state_dict]
        half_fused |= dict.fromkeys(absent)
        if name == siblings[0] and not absent:
            parts = [state_dict[sibling] for sibling in siblings]
            parts = list(parts[0].chunk(2)[::-1]) if rule.swap else parts
            official[f"{_fill(rule.official, numbers)}.{leaf}"] = torch.cat(parts) if len(parts) > 1 else parts[0]
    refuse_names("tensors that the diffusers layout does not have", unknown)
    refuse_names("tensors missing beside those that they are fused with", list(half_fused))
    return official
