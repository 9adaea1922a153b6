"""The three encoders: ours against transformers' own classes, padded and masked as the official code runs them."""

import gc
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from hunyuan_staged.encoders import image, text
from hunyuan_staged.verify.checks import BOUNDS, Check, compared, finite, place_for, weight_bytes, within_rounding
from hunyuan_staged.versions import MAX_GLYPH_BYTES, MAX_TEXT_TOKENS, SKIPPED_LAYERS
from hunyuan_staged.weights import encoder_components
from hunyuan_staged.weights.encoder_components import GLYPH_SHARED, language_key
from hunyuan_staged.weights.encoder_configs import glyph_config
from hunyuan_staged.weights.folder import ModelFolder
from hunyuan_staged.weights.loading import assign_weights, read_tensors, weight_files
from hunyuan_staged.weights.part_tensors import part_content

PROMPT = 'A red circle moves left over a dark blue background, beside a sign that says "7".'
NEGATIVE_PROMPT = "blurry"
WORKING = 2 * 2**30  # bytes, of a forward of a thousand tokens and of what torch holds besides

Found = tuple[list[Check], dict[str, torch.Tensor]]


def picture() -> Image.Image:
    """A drawn image of 160 x 96 px: a slope in each colour."""
    side = [[(5 * x // 4, 2 * y, (x + y) % 256) for x in range(160)] for y in range(96)]
    drawn = Image.new("RGB", (160, 96))
    drawn.putdata([pixel for row in side for pixel in row])
    return drawn


def _released() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@torch.no_grad()
def check_text(folder: ModelFolder, device: torch.device, dtype: torch.dtype) -> Found:
    """The language model: embeddings of two prompts; also what the transformer's check needs of them."""
    skeleton = encoder_components.language_skeleton(folder)
    place = place_for(weight_bytes(skeleton, dtype) + WORKING, device)
    tokenizer, model = encoder_components.load_language_model(folder, device=place, dtype=dtype)
    checks = [finite("text", model)]
    ours = text.language_embeddings(tokenizer, model, PROMPT)
    ours |= text.language_embeddings(tokenizer, model, NEGATIVE_PROMPT, negative=True)
    del model, skeleton
    _released()
    reference = _language_reference(folder.folders("text")[0], dtype, device)
    crop, length = text.template_crop(tokenizer), MAX_TEXT_TOKENS
    for prefix, prompt in (("", PROMPT), ("negative_", NEGATIVE_PROMPT)):
        ids = text.tokenise(tokenizer, prompt).ids
        valid = ours[f"{prefix}prompt_embeds_mask"][0].bool()
        padded = torch.tensor(
            [ids + [tokenizer.pad_token_id or 0] * (crop + length - len(ids))], device=reference.device
        )
        mask = (torch.arange(crop + length, device=reference.device) < len(ids)).long()[None]
        output = reference(input_ids=padded, attention_mask=mask, output_hidden_states=True, use_cache=False)
        theirs = output.hidden_states[-1 - SKIPPED_LAYERS][:, crop:].cpu()[:, valid]
        branch = "unconditional" if prefix else "conditional"
        checks.append(
            compared("text", f"embeddings, {branch}", ours[f"{prefix}prompt_embeds"][:, valid], theirs, BOUNDS[dtype])
        )
    return checks, ours


def _language_reference(path: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """transformers' language model with all its layers; the final norm, which hidden_states[-3] is not through, is left
    out. The rest of Qwen2.5-VL is not read."""
    from transformers import AutoConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

    config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False).get_text_config()
    layers = config.num_hidden_layers
    with torch.device("meta"):
        model: Any = Qwen2_5_VLTextModel(config)
    model.norm = nn.Identity()
    place = place_for(weight_bytes(model, dtype) + WORKING, device)
    model.rotary_emb = type(model.rotary_emb)(config).to(place)  # computed, not stored
    tensors = read_tensors(weight_files(path), lambda name: language_key(name, layers) is not None, place)
    renamed = ((language_key(name, layers) or "", tensor) for name, tensor in tensors)
    return assign_weights(model, renamed, dtype, place, path)


@torch.no_grad()
def check_glyphs(folder: ModelFolder, device: torch.device, dtype: torch.dtype, width: int) -> Found:
    """The glyph encoder: embeddings of the quoted text, against transformers' encoder over all 256 places."""
    from transformers import T5EncoderModel

    tokenizer, model = encoder_components.load_glyph_encoder(folder, device=device, dtype=dtype)
    checks = [finite("glyph", model)]
    ours = text.glyph_embeddings(tokenizer, model, PROMPT, width=width, dtype=dtype)
    config = glyph_config(*part_content(folder, "glyph"))
    config.vocab_size = model.state_dict()[GLYPH_SHARED].shape[0]
    reference = T5EncoderModel(config)
    reference.encoder.load_state_dict(model.state_dict())
    reference = reference.to(device, dtype).eval()
    padding = {"padding": "max_length", "max_length": MAX_GLYPH_BYTES, "return_tensors": "pt"}
    tokens = tokenizer(text.glyph_text(PROMPT), truncation=True, **padding).to(device)
    valid = ours["prompt_embeds_mask_2"][0].bool()
    given = {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"].float()}
    theirs = reference(**given).last_hidden_state.cpu()
    precise = reference.float()(**given).last_hidden_state.cpu()
    mine, theirs, precise = (x[:, valid] for x in (ours["prompt_embeds_2"], theirs, precise))
    checks.append(within_rounding("glyph", "embeddings", mine, theirs, precise))
    return checks, ours


@torch.no_grad()
def check_image(folder: ModelFolder, device: torch.device, dtype: torch.dtype) -> Found:
    """The image encoder in the run's dtype, against transformers' with its plain attention."""
    from transformers import SiglipVisionModel

    processor, model = encoder_components.load_image_encoder(folder, device=device, dtype=dtype)
    checks = [finite("image", model)]
    ours = image.encode_image(processor, model, picture())
    reference: Any = SiglipVisionModel.from_pretrained(
        folder.folders("image")[0], dtype=dtype, attn_implementation="eager", local_files_only=True
    )
    theirs = image.encode_image(processor, reference.eval().to(device), picture())
    precise = image.encode_image(processor, reference.float(), picture())
    checks.append(within_rounding("image", "features", ours, theirs, precise))
    return checks, {"image_embeds": ours}
