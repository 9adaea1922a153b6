"""The Triton kernels of the transformer's blocks against the formulas in torch: interpreted here, compiled on a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from hunyuan_staged.models import blocks
from hunyuan_staged.models.embeddings import rope_table
from hunyuan_staged.models.modules import TransformerConfig, TransformerModules

SHAPES = ((1, 8), (2, 8), (3, 8), (4, 8), (5, 8), (16, 8), (3, 24), (2, 128))  # heads and their width
SIZES = (((1, 1, 1), 1), ((1, 3, 3), 7), ((2, 2, 3), 2))  # grid, text tokens
WIDTHS = {8: (2, 2, 4), 24: (8, 8, 8), 128: (16, 56, 56)}  # of a head; by axis


class Drawn:
    """A block of drawn weights, and what goes into it."""

    def __init__(self, heads: int, width: int, size: tuple, device: str, dtype: torch.dtype) -> None:
        grid, text = size
        sizes = {"num_attention_heads": heads, "attention_head_dim": width, "rope_axes_dim": WIDTHS[width]}
        config = TransformerConfig(**sizes, num_layers=1, num_refiner_layers=1, text_embed_dim=8, text_embed_2_dim=8)
        with torch.device("meta"):
            model = TransformerModules(config)
        draw = torch.Generator().manual_seed(heads * 1000 + width)

        def tensor(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=draw)

        self.heads, self.tokens = heads, grid[0] * grid[1] * grid[2]
        self.block = model.transformer_blocks[0].to_empty(device="cpu").requires_grad_(False)
        for parameter in self.block.parameters():
            fan = parameter.shape[-1] if parameter.ndim > 1 else 1
            parameter.copy_(tensor(*parameter.shape) / fan**0.5)
        self.block.to(device, dtype)
        self.rope = tuple(table.to(device) for table in rope_table(model, *grid))
        channels = heads * width
        self.video, self.text = (tensor(1, n, channels).to(device, dtype) for n in (self.tokens, text))
        self.modulation = tensor(2, 6, channels).to(device, dtype)

    @property
    def inputs(self) -> tuple:
        return self.block, self.video, self.text, self.modulation, self.rope


def same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Equal but for the order in which rows are summed up: of half precision few values, by a place or two.

    The interpreter cuts bfloat16 off where all else rounds it.
    """
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    if ours.dtype == torch.float32:
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)
    elif "TRITON_INTERPRET" in os.environ and ours.dtype == torch.bfloat16:
        torch.testing.assert_close(ours, theirs, rtol=2**-4, atol=2**-4)
    else:
        torch.testing.assert_close(
            ours, theirs, rtol=4 * torch.finfo(ours.dtype).eps, atol=4 * torch.finfo(ours.dtype).eps
        )
        assert float((ours != theirs).float().mean()) < 0.02 + 8 / ours.numel()


@torch.no_grad()
def compare(device: str, dtype: torch.dtype) -> int:
    """Assert that all kernels agree with torch at every size; how many sizes those were."""
    from hunyuan_staged.models import block_kernels

    blocks.fused = lambda x: False  # on a GPU, too, torch is what ours are compared with
    count = 0
    for heads, width in SHAPES:
        for size in SIZES:
            drawn = Drawn(heads, width, size, device, dtype)
            shift, scale, gate = drawn.modulation[0, :3]
            same(
                block_kernels.modulate(drawn.video, shift, scale),
                blocks.modulate(drawn.video, drawn.block.norm2, shift, scale),
            )
            other = torch.randn_like(drawn.video)
            wanted = blocks.add_gated(drawn.video, other, gate)
            ours = block_kernels.add_gated(drawn.video, other, gate)
            same(ours, wanted)
            assert ours is other
            wanted = blocks.joint_qkv(*drawn.inputs)
            for ours, theirs in zip(blocks.joint_qkv_fused(*drawn.inputs), wanted, strict=True):
                assert ours.is_contiguous()
                same(ours, theirs)
            for shares, left in shares_of(heads):
                packed, text = blocks.packed_qkv_fused(shares, left, *drawn.inputs)
                packed_wanted, text_wanted = blocks.packed_qkv(shares, left, *drawn.inputs)
                for ours, theirs in zip([*packed, text], [*packed_wanted, text_wanted], strict=True):
                    same(ours, theirs)
            count += 1
    return count


def shares_of(heads: int) -> list[tuple[tuple[int, ...], int]]:
    """Heads that divide, one left over, and one rank with one more."""
    found = [((heads // 2,) * 2, heads % 2)] if heads > 1 else []
    if heads % 2:
        found.append(((heads // 2 + 1, heads // 2), 0))
    if heads % 4 == 0:
        found.append(((heads // 4,) * 4, 0))
    return found


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_interpreted(dtype):
    """Triton's interpreter takes tensors on a CPU; it must be asked for before triton is imported."""
    pytest.importorskip("triton", reason="triton is not installed")
    program = f"import torch, test_block_kernels; print(test_block_kernels.compare('cpu', torch.{dtype}))"
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parent,
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(
            [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
        )},
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{len(SHAPES) * len(SIZES)}\n"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_compiled(dtype, monkeypatch):
    monkeypatch.setattr(blocks, "fused", blocks.fused)  # put back afterwards
    assert compare("cuda", dtype) == len(SHAPES) * len(SIZES)
