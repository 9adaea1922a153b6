"""The forms in which the instrument stores weights are those that stage 2 runs."""

import pytest
import torch
from torch import nn

from hunyuan_staged.demo import stored_weights
from hunyuan_staged.demo.tiny import Sizes, build_transformer
from hunyuan_staged.versions import parse_version
from hunyuan_staged.weights.quantization.fp8_rows import Float8Linear
from hunyuan_staged.weights.quantization.gguf_blocks import GgufLinear

# Half a step of each form, of a weight (3 bits of mantissa), or of the widest of 32 weights (256, 32, 16 steps).
HALF_A_STEP = {"bf16": 2.0**-8, "fp8": 2.0**-4, "fp8-matmul": 2.0**-4, "gguf-q8_0": 1 / 254, "gguf-q5_1": 1 / 31}
HALF_A_STEP["gguf-q4_1"] = 1 / 15


@pytest.mark.parametrize("form", stored_weights.FORMS)
def test_weights_are_those_of_the_model_within_the_forms_step(form):
    torch.manual_seed(0)
    model = build_transformer(Sizes(transformer_heads=1, transformer_layers=2), parse_version("demo_t2v"))
    made = stored_weights.stored(model, form)
    kind = nn.Linear if form == "bf16" else GgufLinear if form in stored_weights.GGUF else Float8Linear
    layers = dict(made.transformer_blocks.named_modules())
    for name, layer in model.transformer_blocks.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        modulation = ".norm" in name
        plain = form == "bf16" or (modulation and form not in stored_weights.GGUF)
        assert type(layers[name]) is (nn.Linear if plain else kind), name
        assert layers[name].weight.dtype == torch.bfloat16
        assert getattr(layers[name], "fp8_matmul", False) == (form == "fp8-matmul" and not modulation)
        widest = layer.weight.unflatten(1, (-1, 32)).abs().amax(dim=2).repeat_interleave(32, dim=1)
        # bf16 rounds before and after
        allowed = widest * (HALF_A_STEP["bf16"] if plain else HALF_A_STEP[form] * 1.01 + 2.0**-7)
        assert ((layers[name].weight.float() - layer.weight).abs() <= allowed).all(), name
    assert made.proj_out.weight.dtype == torch.bfloat16 and model.proj_out.weight.dtype == torch.float32
