"""One forward against the official implementation's numbers, on one process and on several."""

import pytest
import torch
from golden_models import CPU, SHAPES, distance, forward, golden, load

from hunyuan_staged.attention.choose import choose_attention
from hunyuan_staged.memory.offloading import stream_blocks
from hunyuan_staged.models.embeddings import Conditioning
from hunyuan_staged.models.transformer import Transformer


@pytest.mark.parametrize("name", SHAPES)
def test_forward_gives_the_official_numbers(golden_folder, name):
    folder = golden_folder
    reference = load(folder / f"{name}.safetensors")[0]["output"]
    assert distance(forward(folder, name), reference) < 1e-5


def test_valid_tokens_alone_enter_the_blocks(golden_folder):
    tensors, _, conditioning = golden(golden_folder, "dit_i2v")
    assert conditioning.language.shape[1] == tensors["text_mask"].sum()
    assert conditioning.glyph.shape[1] == tensors["byt5_mask"].sum()
    assert conditioning.image.shape[1] == tensors["vision_states"].shape[1]
    assert conditioning.length < 20 + 16 + 9
    assert golden(golden_folder, "dit_t2v")[2].image.shape[1] == 0


def test_attending_to_the_padding_changes_the_output(golden_folder):
    """What the replaced system's sageattn did: with the mask dropped the output is far off, not nearly the same."""
    folder = golden_folder
    tensors, model, _ = golden(folder, "dit_t2v")
    padded = Conditioning(tensors["text_states"], tensors["byt5_states"], torch.zeros(1, 0, 0))
    attention = choose_attention("torch", CPU, torch.float32)
    velocity = Transformer(model, attention, tensors["hidden_states"].shape[2:])
    out = velocity(tensors["hidden_states"], tensors["timestep"], padded)
    assert distance(out, tensors["output"]) > 0.01


def test_streamed_blocks_give_the_same_bits(golden_folder):
    tensors, model, conditioning = golden(golden_folder, "dit_t2v")
    attention = choose_attention("torch", CPU, torch.float32)
    arguments = (tensors["hidden_states"], tensors["timestep"], conditioning)
    resident = Transformer(model, attention, tensors["hidden_states"].shape[2:])(*arguments)
    streamed = Transformer(model, attention, tensors["hidden_states"].shape[2:], blocks=stream_blocks(model, CPU))
    for _ in range(2):
        assert torch.equal(streamed(*arguments), resident)
