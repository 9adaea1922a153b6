"""A prompt → stage 1's eight text tensors: language and glyph embeddings with masks, for both guidance branches.

Letters: W width of an encoder, L tokens after the crop (1000), B glyph bytes (256).
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from hunyuan_staged.errors import InputError
from hunyuan_staged.versions import MAX_GLYPH_BYTES, MAX_TEXT_TOKENS

# Qwen2.5-VL's chat template is written out here: a tokenizer folder's own is a program, and would be run. The system text
# is word for word what the model was trained with, the eight spaces before each number included.
SYSTEM_PROMPT = (
    "You are a helpful assistant. Describe the video by detailing the following aspects: "
    "        1. The main content and theme of the video. "
    "        2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects. "
    "        3. Actions, events, behaviors temporal relationships, physical movement changes of the objects. "
    "        4. background environment, light, style and atmosphere. "
    "        5. camera angles, movements, and transitions used in the video."
)
USER_TURN = "<|im_start|>user\n"
QUOTED_TEXT = re.compile(r"\"(.*?)\"|“(.*?)”")


@dataclass(frozen=True)
class PromptTokens:
    """A prompt in the chat template: ids, how many leading ones are the template's, and how many did not fit."""

    ids: list[int]
    crop: int
    dropped: int


def encode_prompt(
    tokenizer: Any, model: nn.Module, prompt: str, *, max_tokens: int = MAX_TEXT_TOKENS
) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings [1, L, W] in the model's dtype and mask [1, L] int64, both on the CPU.

    model: a causal language model whose last_hidden_state is hidden_states[-3] of the full Qwen2.5-VL (two layers
    skipped, no final norm). Source: the official text encoder's "llm" path (facts.md, Stage 1). InputError as tokenise.
    """
    tokens = tokenise(tokenizer, prompt, max_tokens=max_tokens)
    # Only valid tokens are run: in a causal model padding on the right cannot change them. The official code keeps
    # what the model gives on the padding; here those rows are zero, and the mask lets nobody read them.
    return _encode(model, partial(model, use_cache=False), tokens.ids, tokens.crop, max_tokens)


def tokenise(tokenizer: Any, prompt: str, *, max_tokens: int = MAX_TEXT_TOKENS) -> PromptTokens:
    """The prompt as the model was trained to see it, at most max_tokens behind the crop.

    Where it is longer, its end is cut off (and the template's end with it), as in the official code; `dropped` counts
    those tokens so that a caller can warn. InputError as template_crop.
    """
    ids = _chat_ids(tokenizer, prompt or " ")
    crop = template_crop(tokenizer)
    return PromptTokens(ids[: crop + max_tokens], crop, max(0, len(ids) - crop - max_tokens))


def template_crop(tokenizer: Any) -> int:
    """How many tokens the template puts before the user's text, USER_TURN included (108 with Qwen2.5-VL's tokenizer).

    It is measured on a plain word: a prompt that begins with a line break would melt into the turn's own one. InputError
    for a tokenizer that melts the turn into what is around it, as Qwen's does not.
    """
    ids = _chat_ids(tokenizer, "word")
    turn = tokenizer(USER_TURN, add_special_tokens=False)["input_ids"]
    for start in range(len(ids) - len(turn) + 1):
        if ids[start : start + len(turn)] == turn:
            return start + len(turn)
    raise InputError(f"the tokenizer does not keep {USER_TURN!r} apart; the text encoder must be Qwen2.5-VL's")


def language_embeddings(
    tokenizer: Any, model: nn.Module, prompt: str, *, negative: bool = False, max_tokens: int = MAX_TEXT_TOKENS
) -> dict[str, torch.Tensor]:
    """prompt_embeds [1, L, W] and prompt_embeds_mask [1, L], or their negative_ twins; see encode_prompt."""
    prefix = "negative_" if negative else ""
    embeds, mask = encode_prompt(tokenizer, model, prompt, max_tokens=max_tokens)
    return {f"{prefix}prompt_embeds": embeds, f"{prefix}prompt_embeds_mask": mask}


def quoted_texts(prompt: str) -> list[str]:
    """The texts in quotation marks, once each, in order."""
    return list(dict.fromkeys(straight or curly for straight, curly in QUOTED_TEXT.findall(prompt)))


def glyph_text(prompt: str) -> str:
    """What the glyph encoder reads: `Text "…". ` for each text in quotation marks, once each, in order; "" if none."""
    return "".join(f'Text "{text}". ' for text in quoted_texts(prompt))


def encode_glyphs(
    tokenizer: Any,
    model: nn.Module | None,
    prompt: str,
    *,
    width: int,
    dtype: torch.dtype,
    max_bytes: int = MAX_GLYPH_BYTES,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings [1, B, W] in dtype and mask [1, B] int64, both on the CPU; all zero for a prompt without quoted text.

    tokenizer and model (T5EncoderModel with Glyph-SDXL-v2's weights) may be None for such a prompt. width: what the
    transformer takes; InputError where the encoder's differs.
    """
    text = glyph_text(prompt)
    if not text:
        return torch.zeros(1, max_bytes, width, dtype=dtype), torch.zeros(1, max_bytes, dtype=torch.int64)
    assert model is not None, "a prompt with quoted text needs the glyph encoder"
    ids = tokenizer(text, truncation=True, max_length=max_bytes, add_special_tokens=True)["input_ids"]
    # T5's attention sees positions only relative to each other and never the padding, so it is left out here too.

    def run(input_ids: torch.Tensor) -> Any:
        return model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids))

    embeds, mask = _encode(model, run, ids, 0, max_bytes)
    if embeds.shape[2] != width:
        raise InputError(f"the glyph encoder is {embeds.shape[2]} wide, the transformer takes {width}")
    return embeds.to(dtype), mask


def glyph_embeddings(
    tokenizer: Any,
    model: nn.Module | None,
    prompt: str,
    *,
    width: int,
    dtype: torch.dtype,
    max_bytes: int = MAX_GLYPH_BYTES,
) -> dict[str, torch.Tensor]:
    """prompt_embeds_2 [1, B, W], prompt_embeds_mask_2 [1, B] and their negative_ twins, which are always zero."""
    embeds, mask = encode_glyphs(tokenizer, model, prompt, width=width, dtype=dtype, max_bytes=max_bytes)
    return {
        "prompt_embeds_2": embeds,
        "prompt_embeds_mask_2": mask,
        "negative_prompt_embeds_2": torch.zeros_like(embeds),
        "negative_prompt_embeds_mask_2": torch.zeros_like(mask),
    }


def _chat_ids(tokenizer: Any, user: str) -> list[int]:
    text = f"<|im_start|>system\n{SYSTEM_PROMPT}<|im_end|>\n{USER_TURN}{user}<|im_end|>\n<|im_start|>assistant\n"
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@torch.no_grad()
def _encode(
    model: nn.Module, run: Callable[[torch.Tensor], Any], ids: Sequence[int], crop: int, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run ids, drop the first crop rows, pad with zeros: [1, length, W] and the mask [1, length] of what is not."""
    device = next(model.parameters()).device
    input_ids = torch.tensor([list(ids)], device=device)
    hidden = run(input_ids).last_hidden_state[:, crop:].cpu()
    padding = length - hidden.shape[1]
    mask = F.pad(torch.ones(1, hidden.shape[1], dtype=torch.int64), (0, padding))
    return F.pad(hidden, (0, 0, 0, padding)), mask
