"""The weights of a folder by another way than weights/ reads them: plain safetensors, and a table of names of its own.

If ours and the reference came through one loader, a tensor that it put into the wrong place would be wrong in both, and
no comparison would show it. So nothing here uses weights.key_maps, and each name is changed word by word instead of
being looked up. Source of the names: diffusers' own conversion of the official checkpoints.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from hunyuan_staged.errors import InputError
from hunyuan_staged.weights.folder import ModelFolder
from hunyuan_staged.weights.loading import weight_files

Words = Sequence[tuple[str, str | Callable[[re.Match[str]], str]]]

VAE_WORDS: Words = (
    (r"\.(down|up)\.(\d+)\.", r".\1_blocks.\2."),
    (r"\.block\.(\d+)\.", r".resnets.\1."),
    (r"\.(down|up)sample\.", r".\1samplers.0."),
    (r"\.mid\.", ".mid_block."),
    (r"\.block_(\d+)\.", lambda match: f".resnets.{int(match[1]) - 1}."),
    (r"\.attn_1\.", ".attentions.0."),
    (r"\.([qkv])\.", r".to_\1."),
)
TRANSFORMER_WORDS: Words = (
    (r"^time_(r_)?in\.", lambda match: f"time_embed.timestep_embedder{'_r' if match[1] else ''}."),
    (r"^txt_in\.individual_token_refiner\.blocks\.", "context_embedder.token_refiner.refiner_blocks."),
    (r"^txt_in\.input_embedder\.", "context_embedder.proj_in."),
    (r"^txt_in\.t_embedder\.", "context_embedder.time_text_embed.timestep_embedder."),
    (r"^txt_in\.c_embedder\.", "context_embedder.time_text_embed.text_embedder."),
    (r"(embedder(?:_r)?)\.mlp\.0\.", r"\1.linear_1."),
    (r"(embedder(?:_r)?)\.mlp\.2\.", r"\1.linear_2."),
    (r"self_attn_proj\.", "attn.to_out.0."),
    (r"(refiner_blocks\.\d+)\.adaLN_modulation\.1\.", r"\1.norm_out.linear."),
    (r"(refiner_blocks\.\d+)\.mlp\.", r"\1.ff."),
    (r"^byt5_in\.layernorm\.", "context_embedder_2.norm."),
    (r"^byt5_in\.fc", "context_embedder_2.linear_"),
    (r"^vision_in\.proj\.0\.", "image_embedder.norm_in."),
    (r"^vision_in\.proj\.1\.", "image_embedder.linear_1."),
    (r"^vision_in\.proj\.3\.", "image_embedder.linear_2."),
    (r"^vision_in\.proj\.4\.", "image_embedder.norm_out."),
    (r"^img_in\.", "x_embedder."),
    (r"^cond_type_embedding\.", "cond_type_embed."),
    (r"^double_blocks\.", "transformer_blocks."),
    (r"\.img_mod\.", ".norm1."),
    (r"\.txt_mod\.", ".norm1_context."),
    (r"\.img_attn_([qk])_norm\.", r".attn.norm_\1."),
    (r"\.txt_attn_([qk])_norm\.", r".attn.norm_added_\1."),
    (r"\.img_attn_([qkv])\.", r".attn.to_\1."),
    (r"\.txt_attn_([qkv])\.", r".attn.add_\1_proj."),
    (r"\.img_attn_proj\.", ".attn.to_out.0."),
    (r"\.txt_attn_proj\.", ".attn.to_add_out."),
    (r"\.img_mlp\.", ".ff."),
    (r"\.txt_mlp\.", ".ff_context."),
    (r"\.(ff|ff_context)\.fc1\.", r".\1.net.0.proj."),
    (r"\.(ff|ff_context)\.fc2\.", r".\1.net.2."),
    (r"^final_layer\.linear\.", "proj_out."),
    (r"^final_layer\.adaLN_modulation\.1\.", "norm_out.linear."),
)
FUSED = "self_attn_qkv."  # of the refiner's blocks: q, k and v, one after the other
HALVES_SWAPPED = "final_layer.adaLN_modulation.1."  # shift, scale there; scale, shift in diffusers


def renamed(name: str, words: Words) -> str:
    """An official name with every word changed that has another form in diffusers."""
    for pattern, word in words:
        name = re.sub(pattern, word, name)
    return name


def opened(files: Sequence[Path]) -> Iterator[Any]:
    """Each safetensors file, open; InputError for one that is none."""
    for path in files:
        try:
            with safe_open(path, "pt") as file:
                yield file
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path} is not a whole safetensors file ({error})") from error


def vae_coder(folder: ModelFolder, coder: str, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The state dict of diffusers' VAE "encoder" or "decoder"."""
    found = {}
    for file in opened(weight_files(folder.folders("vae")[0])):
        for name in file.keys():  # noqa: SIM118 (no iterator)
            if name.startswith(f"{coder}."):
                own = renamed(name, VAE_WORDS) if folder.official else name
                found[own.removeprefix(f"{coder}.")] = file.get_tensor(name).to(device, dtype)
    return found


def misplaced(folder: ModelFolder, version: str, model: torch.nn.Module) -> tuple[int, list[str]]:
    """(how many of the transformer's tensors were compared, those of ours that are not the file's).

    Of each the first, the middle and the last row: two tensors of one shape that changed places differ there.
    """
    ours = dict(model.named_parameters())
    wrong: list[str] = []
    seen: set[str] = set()
    for file in opened(folder.transformer_files(version)):
        for name in file.keys():  # noqa: SIM118 (no iterator)
            stored = file.get_slice(name)
            count = stored.get_shape()[0]
            for own, start, rows in _parts(name, count, folder.official):
                seen.add(own)
                shift = count // 2 if folder.official and name.startswith(HALVES_SWAPPED) else 0
                for row in {0, rows // 2, rows - 1}:
                    place = (start + row + shift) % count
                    expected = stored[place : place + 1]
                    found = ours[own][row : row + 1] if own in ours else None
                    if found is None or not torch.equal(found.cpu(), expected.to(found.dtype)):
                        wrong.append(own)
                        break
    return len(seen), wrong + sorted(ours.keys() - seen)


def _parts(name: str, count: int, official: bool) -> list[tuple[str, int, int]]:
    """(diffusers' name, first row, rows) of each tensor that one of the file's holds."""
    if not official:
        return [(name, 0, count)]
    if FUSED in name:
        third = count // 3
        own = renamed(name, TRANSFORMER_WORDS)
        return [(own.replace(FUSED, f"attn.to_{part}."), i * third, third) for i, part in enumerate("qkv")]
    return [(renamed(name, TRANSFORMER_WORDS), 0, count)]
