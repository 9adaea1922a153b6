"""The transformer with its blocks' weights as `--weights_dtype fp8` and GGUF files store them, for demo/quality.py."""

import copy
from typing import Any

import torch
from torch import nn

from hunyuan_staged.models.modulations import NORMS
from hunyuan_staged.weights.quantization.fp8_matmul import compute_in_float8
from hunyuan_staged.weights.quantization.fp8_rows import Float8Linear
from hunyuan_staged.weights.quantization.gguf_blocks import GgufLinear
from hunyuan_staged.weights.quantization.stored import replace_linears

BF16, FP8, FP8_MATMUL = "bf16", "fp8", "fp8-matmul"
# The demo's rows of 160 and 640 are no whole blocks of 256, as Q4_K has: Q4_1 is its next of kin, a scale and a minimum
# for 32 values, which Q4_K in turn rounds to 6 bits.
GGUF = {"gguf-q8_0": "Q8_0", "gguf-q5_1": "Q5_1", "gguf-q4_1": "Q4_1"}
FORMS = (BF16, FP8, FP8_MATMUL, *GGUF)


def stored(model: Any, form: str) -> Any:
    """A copy of a transformer in bf16, with the blocks' linear weights in a form.

    As in stage 2, modulations come from weights in bf16 with float8, and from what the file says with GGUF.
    """
    made = copy.deepcopy(model).to(torch.bfloat16)
    for block in made.transformer_blocks:
        names = [name for name, layer in block.named_modules() if isinstance(layer, nn.Linear)]
        if form in GGUF:
            replace_linears(block, {f"{name}.weight": lambda linear: _gguf(linear, GGUF[form]) for name in names})
        elif form != BF16:
            kept = [name for name in names if name.partition(".")[0] not in NORMS]
            replace_linears(block, {f"{name}.weight": Float8Linear for name in kept})
    if form == FP8_MATMUL:
        compute_in_float8(made.transformer_blocks)
    return made


def _gguf(linear: nn.Linear, kind: str) -> GgufLinear:
    """Quantised by the gguf package."""
    from gguf import GGMLQuantizationType, quants

    made = GgufLinear(linear, kind)
    data = quants.quantize(linear.weight.detach().float().cpu().numpy(), GGMLQuantizationType[kind])
    made.stored.data = torch.from_numpy(data).to(linear.weight.device)
    return made
