"""One rank's share of a step without the others: as many bytes move as would, and the sizes are right."""

import pytest
import torch
from golden_models import CPU, golden

from hunyuan_staged.attention.choose import choose_attention
from hunyuan_staged.bench.command import build_parser
from hunyuan_staged.bench.share import describe_share, lone_share
from hunyuan_staged.errors import InputError
from hunyuan_staged.models.transformer import Transformer
from hunyuan_staged.parallel.layout import split_evenly


@pytest.mark.parametrize(
    ("ranks", "branches", "cfg_parallel"),
    [(2, 1, "auto"), (3, 2, "auto"), (4, 2, "auto"), (4, 2, "off"), (6, 2, "off")],
)
def test_the_bytes_of_a_share(golden_folder, ranks, branches, cfg_parallel):
    tensors, model, conditioning = golden(golden_folder, "dit_t2v")
    layout = lone_share(ranks, branches, cfg_parallel)
    attention = choose_attention("torch", CPU, torch.float32)
    forward = Transformer(model, attention, tensors["hidden_states"].shape[2:], layout)
    out = forward(tensors["hidden_states"], tensors["timestep"], conditioning)
    assert out.shape == tensors["output"].shape and torch.isfinite(out).all()
    config, shards = model.config, layout.shards
    heads, width = config.num_attention_heads, config.attention_head_dim
    mine = split_evenly(forward.total, shards)[0]
    own, left = divmod(heads, shards)
    there = (3 * own + 2 * left) * mine * (shards - 1) * width
    back = (forward.total - mine) * own * width
    text = (shards - 1) * conditioning.length * own * width
    gathered = (shards - 1) * mine * config.out_channels
    expected = 4 * (config.num_layers * (there + back + text) + gathered)
    assert sum(layout.sent) == expected
    layout.sent.extend([expected])
    assert describe_share(layout, 8.0, [3.0, 2.5, 2.0], 2) == {
        "share_of": ranks,
        "share_layout": layout.describe(),
        "share_seconds": 2.5,
        "share_times_an_even_part": 2.5 * ranks / 8,
        "all_shares": [3.0, 2.5, 2.0],
        "exchanged_bytes_per_step": expected,
    }


def test_a_share_has_the_layout_of_its_run():
    layout = lone_share(8, 2, "auto")
    assert (layout.branches, layout.shards, layout.my_branches(2)) == (2, 4, [0])
    velocity = torch.ones(1, 2)
    assert [part.tolist() for part in layout.gather_branches(velocity)] == [[[1.0, 1.0]]] * 2
    assert layout.sent == [8]
    with pytest.raises(InputError, match="--cfg_parallel on: the number of processes, 3, is odd"):
        lone_share(3, 2, "on")
    assert build_parser().parse_args(["stage2", "--share_of", "8", "--cfg_parallel", "off"]).share_of == 8
