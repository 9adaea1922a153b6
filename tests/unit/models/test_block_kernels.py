"""The Triton kernels of the transformer's blocks against the formulas in torch: interpreted here, compiled on a GPU."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
    """Equal but for the order in which rows are summed up: nearer than one more rounding would leave them.

    The interpreter cuts bfloat16 off where all else rounds it.
    """
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    cut = "TRITON_INTERPRET" in os.environ and ours.dtype == torch.bfloat16
    places = 8.0 if ours.dtype == torch.float32 else 4.0 if cut else 0.25
    distance = (ours.double() - theirs.double()).norm() / theirs.double().norm()
    assert float(distance) < places * torch.finfo(ours.dtype).eps, float(distance)


def by(kernels: bool, function: Callable[..., Any], *given: Any) -> list[torch.Tensor]:
    """What a part of a block gives by the kernels or by torch, wherever it runs."""
    chosen, blocks.fused = blocks.fused, lambda x: kernels
    try:
        found = function(*given)
    finally:
        blocks.fused = chosen
    found = found if isinstance(found, tuple) else (found,)
    return [tensor for part in found for tensor in (part if isinstance(part, list) else [part])]


@torch.no_grad()
def compare(device: str, dtype: torch.dtype) -> int:
    """Assert that the kernels agree with torch at every size; how many sizes those were."""
    for heads, width in SHAPES:
        for size in SIZES:
            drawn = Drawn(heads, width, size, device, dtype)
            block, video, text, modulation, _ = drawn.inputs
            other, other_text = torch.randn_like(video), torch.randn_like(text)
            outs = (x[0].unflatten(-1, (heads, width)) for x in (other, other_text))
            calls: list[tuple] = [
                (blocks.modulate, video, block.norm2, *modulation[0, :2]),
                (blocks.joint_qkv, *drawn.inputs),
                (blocks.attention_residual, block, video, text, *outs, modulation),
                (blocks.mlp_residual, block, video, text, modulation),
            ]
            calls += [(blocks.packed_qkv, *split, *drawn.inputs) for split in shares_of(heads)]
            before = [video.clone(), text.clone()]
            for call in calls:
                for ours, theirs in zip(by(True, *call), by(False, *call), strict=True):
                    assert ours.is_contiguous()
                    same(ours, theirs)
            (wanted,) = by(False, blocks.add_gated, video, other, modulation[0, 2])
            (ours,) = by(True, blocks.add_gated, video, other, modulation[0, 2])
            same(ours, wanted)
            assert ours is other
            assert all(map(torch.equal, before, (video, text)))
    return len(SHAPES) * len(SIZES)


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
def test_compiled(dtype):
    assert compare("cuda", dtype) == len(SHAPES) * len(SIZES)
