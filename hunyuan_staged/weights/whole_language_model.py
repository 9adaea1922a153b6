"""Loading Qwen2.5-VL whole, as the model that writes: all layers, lm_head, and for an image the vision tower."""

from typing import Any

import torch
from torch import nn

from hunyuan_staged.errors import InputError
from hunyuan_staged.runtime.progress import quiet
from hunyuan_staged.weights.boundary import on_meta
from hunyuan_staged.weights.encoder_components import language_tokenizer
from hunyuan_staged.weights.encoder_configs import language_config, whole_config
from hunyuan_staged.weights.folder import ModelFolder
from hunyuan_staged.weights.loading import (
    NO_DESTINATIONS,
    Destinations,
    Progress,
    assign_weights,
    tensor_shape,
    weight_files,
)
from hunyuan_staged.weights.part_tensors import part_content, part_tensors

LAYERS = "model.language_model.layers"  # of the whole model
IMAGE_TOKEN = "<|image_pad|>"
VISION_THETA = 10_000.0  # of the vision tower's rotary positions
_HEAD = "lm_head.weight"


def whole_key(name: str, *, vision: bool) -> str | None:
    """The whole model's own name of a tensor, whichever its prefix; None if it is not used."""
    if name == _HEAD or name == f"language_model.{_HEAD}":
        return _HEAD
    for prefix in ("model.visual.", "visual."):
        if name.startswith(prefix):
            return f"model.visual.{name.removeprefix(prefix)}" if vision else None
    for prefix in ("model.language_model.", "language_model.model.", "language_model.", "model."):
        if name.startswith(prefix):
            return f"model.language_model.{name.removeprefix(prefix)}"
    return name


def load_language_tokenizer(folder: ModelFolder) -> Any:
    """The language model's tokenizer; InputError as load_tokenizer."""
    return language_tokenizer(folder)[0]


def whole_skeleton(folder: ModelFolder, tokenizer: Any, *, vision: bool) -> Any:
    """The model that load_whole fills, on the meta device; without `vision` it has no vision tower.

    InputError where the folder's language model cannot write: diffusers' layout, and the demo, lack lm_head.
    """
    from transformers import Qwen2_5_VLForConditionalGeneration

    origin = folder.origin("text")
    file = folder.files.get("text")
    if file:
        found = next((list(shape) for name, shape in file.shapes.items() if name.endswith(_HEAD)), None)
    else:
        found = next(filter(None, (tensor_shape(path, _HEAD) for path in weight_files(origin))), None)
    content, described = part_content(folder, "text")
    inner, _ = language_config(content, described, skipped=0)
    wanted = [inner.vocab_size, inner.hidden_size]
    if found != wanted:
        held = "no lm_head" if found is None else f"an lm_head of {found}, not {wanted}"
        raise InputError(
            f"local: {origin} holds {held}, so that it cannot write; Qwen2.5-VL-7B-Instruct as on the hub can, and so "
            "can a server: --rewrite URL",
            option="rewrite",
        )
    config = whole_config(content, described, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
    model: Any = on_meta(lambda: Qwen2_5_VLForConditionalGeneration(config), described)
    if not vision:
        model.model.visual = nn.Identity()
    return model


def load_whole(
    folder: ModelFolder,
    skeleton: Any,
    *,
    device: torch.device,
    dtype: torch.dtype,
    vision: bool,
    progress: Progress = quiet,
    destinations: Destinations = NO_DESTINATIONS,
) -> Any:
    """The whole model with its weights; skeleton: what whole_skeleton gave. InputError as load_language_model."""
    inner = skeleton.model.language_model
    # Frequencies are computed, not stored.
    inner.rotary_emb = type(inner.rotary_emb)(skeleton.config.text_config).to(device)
    for module in skeleton.model.visual.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            count = buffer.numel()
            setattr(module, name, VISION_THETA ** -(torch.arange(count, device=device).float() / count))
    tensors = part_tensors(
        folder,
        "text",
        device,
        lambda name: whole_key(name, vision=vision) is not None,
        lambda name: whole_key(name, vision=vision) in destinations.tensors,
        progress,
        "language model",
    )
    renamed = ((whole_key(name, vision=vision) or "", tensor) for name, tensor in tensors)
    return assign_weights(skeleton, renamed, dtype, device, folder.origin("text"), destinations)
