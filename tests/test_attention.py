"""Which kernel a mode means, and what is refused."""

import pytest
import torch

from hunyuan_staged import InputError
from hunyuan_staged.attention import choose_attention

CPU = torch.device("cpu")


@pytest.mark.parametrize("mode", ["flash", "torch"])
def test_on_a_cpu_exact_attention_is_torchs(mode):
    attention = choose_attention(mode, CPU, torch.float32)
    assert attention.name == "torch"
    q, k, v = torch.randn(3, 1, 9, 2, 8, generator=torch.Generator().manual_seed(0))
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k).div(8**0.5).softmax(-1)
    assert torch.allclose(attention(q, k, v), torch.einsum("bhqk,bkhd->bqhd", weights, v), atol=1e-6)


def test_no_heads_no_work():
    q = torch.zeros(1, 4, 0, 8)
    assert choose_attention("flash", CPU, torch.float32)(q, q, q).shape == (1, 4, 0, 8)


@pytest.mark.parametrize("mode", ["flash2", "flash3"])
def test_a_gpu_mode_on_a_cpu_is_refused(mode):
    with pytest.raises(
        InputError, match=f"--attn_mode {mode} needs a GPU, and this run is on a cpu; use flash or torch"
    ):
        choose_attention(mode, CPU, torch.bfloat16)


@pytest.mark.parametrize("mode", ["sageattn", "flex-block-attn"])
def test_a_mode_of_a_later_release_is_refused_by_name(mode):
    with pytest.raises(InputError, match=f"--attn_mode {mode}: .* is not part of this release yet"):
        choose_attention(mode, CPU, torch.bfloat16)


def test_an_unknown_mode_lists_the_known():
    with pytest.raises(InputError, match="'fast' is unknown; known: flash, flash2, flash3, sageattn"):
        choose_attention("fast", CPU, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["flash", "flash2", "torch"])
def test_every_kernel_agrees_with_float32_on_the_gpu(mode):
    device = torch.device("cuda")
    q, k, v = torch.randn(3, 1, 1111, 4, 128, device=device, dtype=torch.bfloat16)
    out = choose_attention(mode, device, torch.bfloat16)(q, k, v).float()
    exact = choose_attention("torch", CPU, torch.float32)(*(x.float().cpu() for x in (q, k, v)))
    assert (out.cpu() - exact).norm() / exact.norm() < 5e-3
