"""One forward against the official implementation's numbers, on one process and on several."""

import json

import pytest
import torch
from conftest import golden_weights
from ranks import run_ranks
from safetensors import safe_open

from hunyuan_staged.attention import choose_attention
from hunyuan_staged.checkpoints import TRANSFORMER_MAP, official_transformer_config, to_diffusers
from hunyuan_staged.offload import stream_blocks
from hunyuan_staged.parallel import Layout, World, make_layout
from hunyuan_staged.transformer import Conditioning, Transformer, conditioning_of

CPU = torch.device("cpu")
SHAPES = {"dit_t2v": "dit_shapes", "dit_i2v": "dit_shapes", "dit_meanflow": "dit_meanflow_shapes"}


def load(path) -> tuple[dict, dict]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def build(folder, config: dict, shapes: str):
    """The diffusers module with the golden weights, through the key map."""
    from diffusers import HunyuanVideo15Transformer3DModel

    weights = golden_weights(folder / f"{shapes}.json")
    model = HunyuanVideo15Transformer3DModel(
        **official_transformer_config(config, weights["byt5_in.fc1.weight"].shape[1])
    )
    model.load_state_dict(to_diffusers(weights, TRANSFORMER_MAP))
    return model.eval()


def golden(folder, name: str):
    """The golden tensors under stage 1's names, and the model that made them."""
    tensors, metadata = load(folder / f"{name}.safetensors")
    model = build(folder, json.loads(metadata["config"]), SHAPES[name])
    embeddings = {
        "prompt_embeds": tensors["text_states"],
        "prompt_embeds_mask": tensors["text_mask"],
        "prompt_embeds_2": tensors["byt5_states"],
        "prompt_embeds_mask_2": tensors["byt5_mask"],
        "image_embeds": tensors["vision_states"],
    }
    return tensors, model, conditioning_of(embeddings, "", device=CPU, dtype=torch.float32)


def forward(folder, name: str, layout: Layout | None = None) -> torch.Tensor:
    tensors, model, conditioning = golden(folder, name)
    attention = choose_attention("torch", CPU, torch.float32)
    velocity = Transformer(model, attention, tensors["hidden_states"].shape[2:], layout)
    return velocity(tensors["hidden_states"], tensors["timestep"], conditioning, tensors.get("timestep_r"))


def distance(ours: torch.Tensor, reference: torch.Tensor) -> float:
    return float((ours - reference).norm() / reference.norm())


@pytest.mark.parametrize("name", SHAPES)
def test_forward_gives_the_official_numbers(shared, name):
    folder = shared / "golden"
    reference = load(folder / f"{name}.safetensors")[0]["output"]
    assert distance(forward(folder, name), reference) < 1e-5


def test_valid_tokens_alone_enter_the_blocks(shared):
    tensors, _, conditioning = golden(shared / "golden", "dit_i2v")
    assert conditioning.language.shape[1] == tensors["text_mask"].sum()
    assert conditioning.glyph.shape[1] == tensors["byt5_mask"].sum()
    assert conditioning.image.shape[1] == tensors["vision_states"].shape[1]
    assert conditioning.length < 20 + 16 + 9
    assert golden(shared / "golden", "dit_t2v")[2].image.shape[1] == 0


def test_attending_to_the_padding_changes_the_output(shared):
    """What the replaced system's sageattn did: with the mask dropped the output is far off, not nearly the same."""
    folder = shared / "golden"
    tensors, model, _ = golden(folder, "dit_t2v")
    padded = Conditioning(tensors["text_states"], tensors["byt5_states"], torch.zeros(1, 0, 0))
    attention = choose_attention("torch", CPU, torch.float32)
    velocity = Transformer(model, attention, tensors["hidden_states"].shape[2:])
    out = velocity(tensors["hidden_states"], tensors["timestep"], padded)
    assert distance(out, tensors["output"]) > 0.01


def test_streamed_blocks_give_the_same_bits(shared):
    tensors, model, conditioning = golden(shared / "golden", "dit_t2v")
    attention = choose_attention("torch", CPU, torch.float32)
    arguments = (tensors["hidden_states"], tensors["timestep"], conditioning)
    resident = Transformer(model, attention, tensors["hidden_states"].shape[2:])(*arguments)
    streamed = Transformer(model, attention, tensors["hidden_states"].shape[2:], blocks=stream_blocks(model, CPU))
    for _ in range(2):
        assert torch.equal(streamed(*arguments), resident)


def sharded(world: World, folder, name: str) -> torch.Tensor:
    return forward(folder, name, make_layout(world, 1))


@pytest.mark.parametrize(("size", "name"), [(3, "dit_i2v"), (5, "dit_meanflow")])
def test_shards_give_what_one_process_gives(shared, size, name):
    """3 does not divide the 4 heads, 5 leaves a rank without one. Sums are split differently, hence not bits."""
    one = forward(shared / "golden", name)
    for out in run_ranks(size, sharded, shared / "golden", name):
        assert distance(out, one) < 1e-5
