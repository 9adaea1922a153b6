"""The Triton kernels of the VAE decoder against what they stand for in torch: interpreted here, compiled on a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from hunyuan_staged.models import vae_decoder


def parts(channels: int, frames: int, device: str, dtype: torch.dtype, seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw).to(device, dtype)

    size = (frames, 4, 5, channels)
    return {
        "product": tensor(*size),
        "bias": tensor(channels),
        "residual": tensor(*size),
        "gamma": tensor(channels),
        "before": tensor(2, 6, 7, channels),
    }


def compare(device: str, dtype: torch.dtype, tolerance: float) -> int:
    """Assert that both kernels agree with torch in every combination of what they take; how many those were."""
    from hunyuan_staged.models import vae_kernels

    def near(ours: torch.Tensor, theirs: torch.Tensor) -> None:
        torch.testing.assert_close(ours.double().cpu(), theirs.double(), rtol=tolerance, atol=tolerance)

    count = 0
    for channels, frames in ((8, 3), (24, 2), (3, 1)):  # a power of two, none, and what the encoder takes
        for which in range(64):
            given = parts(channels, frames, device, dtype, which)
            bias, residual, gamma, before = (
                given[name] if which >> place & 1 else None
                for place, name in enumerate(("bias", "residual", "gamma", "before"))
            )
            keep, roll = bool(which >> 4 & 1), bool(which >> 5)
            x = given["product"].double().cpu()
            for term in (bias, residual):
                x = x if term is None else x + term.double().cpu()
            wide_gamma, wide_before = (None if one is None else one.double().cpu() for one in (gamma, before))
            wanted, added = vae_decoder.norm_silu_pad(x, wide_gamma, wide_before, roll=roll)
            ours, kept = vae_kernels.norm_silu_pad(
                given["product"], bias, residual, gamma, before, keep=keep, roll=roll
            )
            near(ours, wanted)
            if keep:
                near(kept, added)
            if before is not None:
                near(before, wide_before)
                assert torch.equal(
                    before, ours[-2:] if roll else parts(channels, frames, device, dtype, which)["before"]
                )
            count += 1
    for time, group, repeats in ((1, 6, 3), (1, 12, 3), (2, 6, 2), (2, 4, 4)):
        share = (6 if group > 4 else 4) // repeats
        draw = torch.Generator().manual_seed(1)
        product = torch.randn(3, 2, 5, time * 4 * group, generator=draw).to(device, dtype)
        bias, x = (torch.randn(*shape, time * 4 * n, generator=draw).to(device, dtype)
                   for shape, n in (((), group), ((3, 2, 5), share)))  # fmt: skip
        ours = vae_kernels.spread(product, bias, x, time, group, repeats)
        options = {"time": time, "group": group, "repeats": repeats}
        near(ours, vae_decoder.spread(product.double().cpu(), bias.double().cpu(), x.double().cpu(), **options))
        count += 1
    return count


def test_interpreted():
    """Triton's interpreter takes tensors on a CPU; it must be asked for before triton is imported."""
    pytest.importorskip("triton", reason="triton is not installed")
    program = "import torch, test_vae_kernels; print(test_vae_kernels.compare('cpu', torch.float32, 1e-5))"
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parent,
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "196\n"


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 4e-3)])
def test_compiled(dtype, tolerance):
    assert compare("cuda", dtype, tolerance) == 196


@pytest.mark.gpu
def test_the_decoder_on_a_gpu_gives_what_it_gives_on_a_cpu():
    """In float32, and in float16 no further from that than diffusers' own forward is in float16."""
    from diffusers.models.autoencoders.autoencoder_kl_hunyuanvideo15 import HunyuanVideo15Decoder3D

    torch.manual_seed(0)
    module = HunyuanVideo15Decoder3D(32, 3, (64, 64, 32, 32, 16), layers_per_block=1).eval().requires_grad_(False)
    latents = torch.randn(1, 32, 4, 6, 5)
    reference = module(latents)[0].permute(1, 2, 3, 0)

    def distance(frames: torch.Tensor) -> float:
        return float((frames.float().cpu() - reference).norm() / reference.norm())

    with torch.backends.cudnn.flags(allow_tf32=False):
        for chunk in (None, 2):
            assert distance(torch.cat(list(vae_decoder.Decoder(module.cuda())(latents, chunk)))) < 1e-5
    theirs = distance(module.half()(latents.half().cuda())[0].permute(1, 2, 3, 0))
    for chunk in (None, 1):
        assert distance(torch.cat(list(vae_decoder.Decoder(module)(latents, chunk)))) < 1.2 * theirs
