"""Products in float8: torch's own on a CPU against the same sums in float32, how far they are off, and who is refused."""

import pytest
import torch
from folders import embed
from forked import run_stage
from torch import nn

from hunyuan_staged.errors import InputError
from hunyuan_staged.models.blocks import feed_forward
from hunyuan_staged.models.layers import FeedForward
from hunyuan_staged.weights.quantization import fp8_matmul
from hunyuan_staged.weights.quantization.fp8_matmul import compute_in_float8, product, quantise_rows
from hunyuan_staged.weights.quantization.fp8_rows import Float8Linear, quantise_linears
from hunyuan_staged.weights.quantization.scaled_linear import ScaledLinear, scale_bytes

BF16 = torch.bfloat16


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_rows_use_the_whole_range_whatever_their_size():
    x = drawn(5, 64) * torch.tensor([1e-6, 1.0, 30.0, 1e4, 0.0])[:, None]
    rows, scale = quantise_rows(x.to(BF16))
    assert (rows.dtype, scale.dtype, scale.shape) == (torch.float8_e4m3fn, torch.float32, (5, 1))
    assert rows.float().abs().amax(dim=1).tolist() == [448, 448, 448, 448, 0]
    error = (rows.float() * scale - x.to(BF16).float()).abs()
    # e4m3 rounds to half of 2^-3 of a value, and its smallest subnormal is 2^-9 of 448 that a row's largest is.
    assert (error <= x.abs() * 2.0**-4 * 1.01 + x.abs().amax(dim=1, keepdim=True) / 448 * 2.0**-9).all()


@pytest.mark.parametrize("kind", ["ours", "the file's"])
def test_a_layer_computes_what_its_float8_numbers_say(kind):
    """The sums in float32 of exactly these numbers; only the order of the sum and the last rounding are torch's."""
    linear = nn.Linear(64, 48).to(BF16)
    layer = Float8Linear(linear) if kind == "ours" else ScaledLinear(linear)
    if kind != "ours":
        stored, scale = quantise_rows(linear.weight.detach())
        layer.stored.data, layer.scale.data = stored, scale_bytes(scale)
    x = drawn(2, 7, 64, seed=1).to(BF16)
    wide = layer(x)
    assert compute_in_float8([layer]) == 1
    found = layer(x)
    rows, scale = quantise_rows(x.view(-1, 64))
    exact = (rows.double() * scale) @ (layer.stored.double() * layer.row_scale.double()).mT + linear.bias.double()
    assert found.shape == wide.shape == (2, 7, 48) and found.dtype == BF16
    assert ((found.view(-1, 48) - exact).abs() <= exact.abs() * 2.0**-8 + 1e-3).all()
    off = (found.float() - wide.float()).norm() / wide.float().norm()
    assert 1e-3 < off < 2.0**-4, "as e4m3 rounds activations"
    compute_in_float8([layer], on=False)
    assert torch.equal(layer(x), wide)


def test_a_feed_forward_in_float8_is_near_its_own_weights_made_wide():
    ff = FeedForward(64, 4.0, activation="gelu").to(BF16)
    quantise_linears([ff])
    x = drawn(1, 9, 64, seed=2).to(BF16)
    wide = feed_forward(ff, x)
    assert compute_in_float8([ff]) == 2
    found = feed_forward(ff, x)
    assert 1e-3 < (found - wide).float().norm() / wide.float().norm() < 0.1


@torch.no_grad()
def test_a_compiler_takes_it_in_one_graph():
    layer = Float8Linear(nn.Linear(64, 48).to(BF16))
    compute_in_float8([layer])
    x = drawn(3, 64).to(BF16)
    compiled = torch.compile(lambda module, x: module(x), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(layer, x), product(x, layer.stored, layer.row_scale, layer.bias))


@pytest.mark.parametrize(
    ("capability", "dtype", "message"),
    [
        (None, BF16, "needs a GPU of compute capability 9.0 (Hopper) or newer"),
        ((8, 9), BF16, "needs a GPU of compute capability 9.0 (Hopper) or newer; this one has 8.9"),
        ((9, 0), torch.float32, "computes with --dtype bf16, not float32"),
    ],
)
def test_other_gpus_and_dtypes_are_refused(capability, dtype, message):
    with pytest.raises(InputError) as error:
        fp8_matmul.check(capability, dtype)
    assert str(error.value) == f"--fp8_matmul {message}"
    fp8_matmul.check((9, 0), BF16)
    fp8_matmul.check((12, 0), BF16)


def test_the_script_refuses_a_cpu_and_plans_for_a_card(tiny_official, tmp_path):
    inputs = embed(tmp_path / "in", tiny_official, {"dtype": "auto"})
    asked = ("--input_dir", inputs, "--fp8_matmul")
    for more, message in (
        ((), "--fp8_matmul needs --weights_dtype fp8"),
        (("--weights_dtype", "fp8"), "--fp8_matmul needs a GPU of compute capability 9.0 (Hopper) or newer"),
        (("--weights_dtype", "fp8", "--dry_run", "--assume_gpu", "4090"), "or newer; this one has 8.9"),
    ):
        status, said = run_stage(2, *asked, *more, said=tmp_path / "said")
        assert status == 2 and message in said.strip().splitlines()[-1], said
    planned = ("--weights_dtype", "fp8", "--dry_run", "--assume_gpu", "H100")
    status, said = run_stage(2, *asked, *planned, said=tmp_path / "said")
    assert status == 0 and "fp8; computed in float8 and torch.bfloat16" in said, said
