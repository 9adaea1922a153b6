"""Weights in float8: how far they are off, that scaling is exact, and a whole forward."""

import copy

import pytest
import torch
from golden_models import distance, golden
from torch import nn

from hunyuan_staged.attention.choose import choose_attention
from hunyuan_staged.models.transformer import Transformer
from hunyuan_staged.weights.quantization.fp8_rows import Float8Linear, dequantise, quantise, quantise_linears
from hunyuan_staged.weights.quantization.stored import FLOAT8

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_keeps_three_bits_whatever_its_size(dtype):
    rows = torch.randn(6, 512, generator=torch.Generator().manual_seed(0))
    weight = (rows * torch.tensor([1e-6, 1e-3, 1.0, 30.0, 1e4, 0.0])[:, None]).to(dtype)
    stored, scale = quantise(weight)
    assert (stored.dtype, scale.dtype, scale.shape) == (torch.float8_e4m3fn, dtype, (6, 1))
    back = dequantise(stored, scale)
    assert back.dtype == dtype
    # e4m3 rounds to 3 bits behind the leading one: half of 2^-3, relative, above its subnormals (2^-6 of up to 448).
    large = weight.abs() > weight.abs().amax(dim=1, keepdim=True) * 2**-13
    error = ((back - weight).abs() / weight.abs())[large]
    assert error.max() <= 2**-4
    assert 0.02 < error.mean() < 0.03
    assert not back[5].any()


def test_scales_are_powers_of_two_that_use_the_range():
    weight = torch.tensor([[448.0, 1.0], [449.0, 1.0], [3.5, 0.1], [1e-20, 0.0]])
    stored, scale = quantise(weight)
    assert scale.flatten().tolist()[:3] == [1.0, 2.0, 2.0**-7]
    assert torch.equal(torch.log2(scale), torch.log2(scale).round())
    largest = stored.float().abs().amax(dim=1)
    assert ((largest > 200) & (largest <= 448)).all()


def test_a_value_that_float8_holds_comes_back_to_the_bit():
    weight = torch.tensor([[1.5, -0.875, 448.0], [2.0**-9, 2.0**-8, 0.25]]) * 2**-3
    assert torch.equal(dequantise(*quantise(weight)), weight)


def test_a_scale_for_each_row_is_closer_than_one_for_all():
    """Rows of very different size, as modulations have: why there is a scale for each."""
    sizes = torch.logspace(-5, 0, 64)[:, None]
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(1)) * sizes
    by_row = dequantise(*quantise(weight))
    stored, scale = quantise(weight.view(1, -1))
    by_tensor = dequantise(stored, scale).view_as(weight)

    def error(back: torch.Tensor) -> torch.Tensor:
        return ((back - weight).norm(dim=1) / weight.norm(dim=1)).max()

    assert error(by_row) < 0.04 < 0.4 < error(by_tensor)


def test_linears_are_replaced_also_without_memory():
    block = nn.Sequential(nn.Linear(8, 4), nn.LayerNorm(4), nn.Sequential(nn.Linear(4, 2)))
    quantise_linears([block])
    assert isinstance(block[0], Float8Linear) and isinstance(block[2][0], Float8Linear)
    assert isinstance(block[1], nn.LayerNorm)
    with torch.device("meta"):
        meta = nn.Sequential(nn.Linear(8, 4), nn.LayerNorm(4), nn.Sequential(nn.Linear(4, 2)))
    quantise_linears([meta])
    described = {name: (tensor.shape, tensor.dtype) for name, tensor in block.state_dict().items()}
    assert described == {name: (tensor.shape, tensor.dtype) for name, tensor in meta.state_dict().items()}
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(block[0](x), nn.functional.linear(x, block[0].weight, block[0].bias))


def test_a_forward_in_float8_is_near_the_official_numbers(golden_folder):
    """Golden weights are random, so nothing averages out as in a trained model; the bound is what e4m3 leaves."""
    tensors, model, conditioning = golden(golden_folder, "dit_t2v")
    arguments = (tensors["hidden_states"], tensors["timestep"], conditioning)
    attention = choose_attention("torch", CPU, torch.float32)
    quantised = copy.deepcopy(model)
    quantise_linears(quantised.transformer_blocks)
    grid = tensors["hidden_states"].shape[2:]
    out = Transformer(quantised, attention, grid)(*arguments)
    assert 1e-4 < distance(out, tensors["output"]) < 0.05


def test_a_compiler_takes_the_weights_in_one_graph():
    linear = Float8Linear(nn.Linear(8, 4))

    def own(module: Float8Linear, x: torch.Tensor) -> torch.Tensor:
        return module(x) + nn.functional.linear(x, module.weight)

    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(own, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(linear, x), own(linear, x))
    assert linear.stored.dtype == FLOAT8
