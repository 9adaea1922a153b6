"""Blocks of mixed forms: compiled once all the same, with the numbers that they give one by one."""

import gguf_writer as writer
import pytest
import torch
from torch import nn

from hunyuan_staged.attention.choose import choose_attention
from hunyuan_staged.demo.tiny import Sizes, build_transformer
from hunyuan_staged.memory.offloading import stream_blocks
from hunyuan_staged.models.embeddings import Conditioning
from hunyuan_staged.models.modules import TransformerModules
from hunyuan_staged.parallel.layout import Layout
from hunyuan_staged.pipeline.denoiser import Denoiser
from hunyuan_staged.versions import parse_version
from hunyuan_staged.weights.quantization import gguf_blocks
from hunyuan_staged.weights.quantization.fp8_matmul import compute_in_float8, quantise_rows
from hunyuan_staged.weights.quantization.fp8_rows import Float8Linear, quantise_linears
from hunyuan_staged.weights.quantization.gguf_blocks import GgufLinear
from hunyuan_staged.weights.quantization.one_kind import OneKind, are_mixed
from hunyuan_staged.weights.quantization.scaled_linear import ScaledLinear, scale_bytes
from hunyuan_staged.weights.quantization.stored import StoredLinear, replace_linears

CPU, BF16 = torch.device("cpu"), torch.bfloat16
BLOCKS = 12  # each of its own mixture, and more than a compiler takes (8)


def gguf(linear: nn.Linear, kind: str) -> GgufLinear:
    layer = GgufLinear(linear, kind)
    layer.stored.data = torch.from_numpy(writer.quantised(linear.weight.detach() * 0.1, kind)[0])
    return layer


def scaled(linear: nn.Linear) -> ScaledLinear:
    layer = ScaledLinear(linear)
    stored, scale = quantise_rows(linear.weight.detach())
    layer.stored.data, layer.scale.data = stored, scale_bytes(scale)
    return layer


def model_of(form: str) -> TransformerModules:
    """Blocks whose layers take forms by turns, shifted by one from block to block."""
    torch.manual_seed(0)
    sizes = Sizes(transformer_heads=8, transformer_layers=BLOCKS)
    model = build_transformer(sizes, parse_version("demo_t2v")).to(BF16).eval().requires_grad_(False)
    # To one that is left plain, too
    makes = {
        "gguf": [*(lambda linear, kind=kind: gguf(linear, kind) for kind in gguf_blocks.TYPES), None],
        "float8": [Float8Linear, scaled, None],
        "products": [Float8Linear, scaled, scaled, scaled, scaled],
    }[form]
    for index, block in enumerate(model.transformer_blocks):
        names = [name for name, layer in block.named_modules() if isinstance(layer, nn.Linear) and "norm" not in name]
        # Some blocks differ in one layer, others in all.
        turns = {
            f"{name}.weight": makes[(place + index * (index % 3)) % len(makes)] for place, name in enumerate(names)
        }
        replace_linears(block, {name: make for name, make in turns.items() if make})
        if form == "products":
            quantise_linears([block])
    if form == "products":
        compute_in_float8(model.transformer_blocks)
    return model


def velocities(denoiser: Denoiser, *, compile: bool) -> list[torch.Tensor]:
    """For texts of two lengths, in both guidance branches' order."""
    forward = denoiser.forward(choose_attention("torch", CPU, BF16), (1, 4, 4), Layout(), compile=compile)
    generator = torch.Generator().manual_seed(1)
    none = torch.zeros(1, 0, 0, dtype=BF16)
    found = []
    for length in (5, 9):
        text = torch.randn(1, length, denoiser.model.config.text_embed_dim, generator=generator).to(BF16)
        inputs = torch.randn(1, 65, 1, 4, 4, generator=generator)
        found.append(forward(inputs, torch.tensor([500.0]), Conditioning(text, none, none)))
    return found


@pytest.mark.parametrize("form", ["gguf", "float8", "products"])
def test_each_part_of_a_block_is_compiled_once(monkeypatch, form):
    """It was compiled for each mixture, and failed at the ninth."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda part, **_: real(part, fullgraph=True, backend=backend))
    model = model_of(form)
    assert are_mixed(model.transformer_blocks)
    layers = [type(layer) for layer in model.modules() if isinstance(layer, StoredLinear)]
    expected = velocities(Denoiser(model), compile=False)
    found = velocities(Denoiser(model), compile=True)
    assert all(torch.equal(one, other) and one.norm() > 0 for one, other in zip(found, expected, strict=True))
    assert len(graphs) == 3, "queries to values, what attention adds, the feed-forward"
    assert layers == [type(layer) for layer in model.modules() if isinstance(layer, StoredLinear)]
    # With blocks that come and go, too.
    streamed = Denoiser(model, blocks=stream_blocks(model, CPU, 5))
    found = velocities(streamed, compile=True)
    assert all(map(torch.equal, found, expected)) and len(graphs) == 3


def test_blocks_that_are_alike_stay_as_they_are():
    torch.manual_seed(0)
    model = build_transformer(Sizes(transformer_layers=3), parse_version("demo_t2v")).to(BF16)
    assert not are_mixed(model.transformer_blocks)
    quantise_linears(model.transformer_blocks)
    assert not are_mixed(model.transformer_blocks)


def test_a_block_is_wide_only_while_it_is_current():
    model = model_of("gguf")
    seen = []
    for block, stored in zip(OneKind(model.transformer_blocks)[2:5], model.transformer_blocks[2:5], strict=True):
        kept = {name: x for name, x in stored.named_parameters() if x.dtype != torch.uint8}
        shared = {name: x for name, x in block.named_parameters() if name in kept}
        assert shared.keys() == kept.keys() and all(x is kept[name] for name, x in shared.items())
        assert torch.equal(block.ff.net[2].weight, stored.ff.net[2].weight)
        seen.append(block)
    assert len({id(block) for block in seen}) == 1
