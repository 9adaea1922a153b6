"""What stage 2 takes on which card by the file that the transformer is in, computed by the planner."""

from dataclasses import replace

from hunyuan_staged import geometry, options, versions
from hunyuan_staged.bench.cards import LONG, plan_cell, skeleton
from hunyuan_staged.memory import budget, estimates
from hunyuan_staged.memory.operations import TEXT_TOKENS

CARDS = (8, 12, 16, 24, 80)  # GB
RESOLUTION = "480p"
FILES = {
    "bf16, float16 or float32": ("", "--transformer FILE"),
    "scaled float8": ("float8", "--transformer FILE"),
    "GGUF Q8_0": ("Q8_0", "--transformer FILE.gguf"),
    "GGUF Q6_K": ("Q6_K", "--transformer FILE.gguf"),
    "GGUF Q4_K": ("Q4_K", "--transformer FILE.gguf"),
}


def table(steps: int) -> list[tuple[str, ...]]:
    """(file, command, what it takes on each of CARDS) at 480p, 121 frames, on one GPU; steps: of the schedule."""
    return [(name, command, *_cells(kind, steps)) for name, (kind, command) in FILES.items()]


def _cells(kind: str, steps: int) -> list[str]:
    import torch
    from torch import nn

    from hunyuan_staged.memory import offloading
    from hunyuan_staged.models.modulations import remove_linears, table_bytes
    from hunyuan_staged.weights.quantization import gguf_blocks
    from hunyuan_staged.weights.quantization.scaled_linear import ScaledLinear
    from hunyuan_staged.weights.quantization.stored import replace_linears

    dtype, model = torch.bfloat16, skeleton(1)  # one block stands for all of them
    remove_linears(model)
    if kind:
        make = ScaledLinear if kind == "float8" else gguf_blocks.keeping(kind)
        names = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
        replace_linears(model, {f"{name}.weight": make for name in names if name.startswith("transformer_blocks.")})
    block = model.transformer_blocks[0]
    weights = replace(offloading.weights_of(model, [block], dtype), count=versions.LAYERS)
    width = model.config.width
    size = geometry.size_for_ratio(RESOLUTION, options.DEFAULT_ASPECT_RATIO)
    working = estimates.DenoisingSize(
        geometry.video_tokens(LONG, *size),
        TEXT_TOKENS,
        width,
        dtype.itemsize,
        "cudnn",
        True,
        block=offloading.widened_bytes([block], dtype),
        modulations=table_bytes(steps, versions.LAYERS, width, dtype.itemsize),
    ).working
    return [plan_cell(weights, working, budget.card(card), "blocks") for card in CARDS]
