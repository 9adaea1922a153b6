"""The whole Qwen2.5-VL writes a prompt out at length: greedily, so that the same question gets the same answer."""

from typing import Any

import torch
from PIL import Image
from torch import nn

from hunyuan_staged.encoders.endpoint import RewritingFailed
from hunyuan_staged.encoders.rewriting import Instructions

MAX_NEW_TOKENS = 700  # of an answer; the instructions ask for 200 words, 300 tokens
# Source: Qwen2.5-VL-7B-Instruct's generation_config.json; without it a greedy answer may go in circles.
REPETITION_PENALTY = 1.05
# An image is shrunk to so many pixels, a token for each 28 x 28 of them.
MAX_IMAGE_PIXELS = 768 * 28 * 28
_ENDS = ("<|im_end|>", "<|endoftext|>")


def chat_ids(tokenizer: Any, instructions: Instructions, prompt: str, image_tokens: int = 0) -> list[int]:
    """Tokens of Qwen2.5-VL's chat template, written out as in text.py, with so many places for an image."""
    image = f"<|vision_start|>{'<|image_pad|>' * image_tokens}<|vision_end|>" if image_tokens else ""
    text = (
        f"<|im_start|>system\n{instructions.text}<|im_end|>\n<|im_start|>user\n{image}{prompt}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def image_inputs(model: Any, image: Image.Image) -> dict[str, torch.Tensor]:
    """pixel_values [patches, values] and image_grid_thw [1, 3] for the vision tower."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    vision = model.config.vision_config
    smallest = (vision.patch_size * vision.spatial_merge_size) ** 2
    processor: Any = Qwen2VLImageProcessorPil(
        size={"shortest_edge": 4 * smallest, "longest_edge": max(MAX_IMAGE_PIXELS, 4 * smallest)},
        patch_size=vision.patch_size,
        temporal_patch_size=vision.temporal_patch_size,
        merge_size=vision.spatial_merge_size,
    )
    found = processor(images=[image.convert("RGB")], return_tensors="pt")
    return {name: found[name] for name in ("pixel_values", "image_grid_thw")}


@torch.no_grad()
def write(
    tokenizer: Any,
    model: nn.Module,
    instructions: Instructions,
    prompt: str,
    image: Image.Image | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> str:
    """The model's answer. RewritingFailed where it does not come to an end within max_new_tokens.

    model: Qwen2_5_VLForConditionalGeneration, with its vision tower where there is an image.
    """
    from transformers import GenerationConfig

    whole: Any = model
    weight = whole.lm_head.weight
    inputs: dict[str, Any] = {}
    count = 0
    if image is not None:
        inputs = image_inputs(whole, image)
        merged = whole.config.vision_config.spatial_merge_size**2
        count = int(inputs["image_grid_thw"].prod()) // merged
        inputs["pixel_values"] = inputs["pixel_values"].to(weight.dtype)
    inputs["input_ids"] = torch.tensor([chat_ids(tokenizer, instructions, prompt, count)])
    if image is not None:
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == whole.config.image_token_id).int()
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    ends = tokenizer.convert_tokens_to_ids(list(_ENDS))
    settings: Any = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        repetition_penalty=REPETITION_PENALTY,
        eos_token_id=ends,
        pad_token_id=ends[-1],
    )
    output = whole.generate(**{name: x.to(weight.device) for name, x in inputs.items()}, generation_config=settings)
    answer = output[0, inputs["input_ids"].shape[1] :].tolist()
    if answer[-1] not in ends:
        raise RewritingFailed(f"the language model did not come to an end within {max_new_tokens} tokens")
    text: str = tokenizer.decode(answer, skip_special_tokens=True)
    return text
