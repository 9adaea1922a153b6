"""Blocks that travel: the same bits as blocks that stay, in one copy for all processes of a machine."""

import gc
from pathlib import Path

import pytest
import torch
from offloaded import loaded
from torch import nn

from hunyuan_staged.memory import budget
from hunyuan_staged.memory.host import HostBlocks, packed_layout
from hunyuan_staged.memory.offloading import StreamedBlocks, evenly_spaced, stream_blocks, weights_of
from hunyuan_staged.parallel.world import World
from hunyuan_staged.weights import components
from hunyuan_staged.weights.folder import open_model

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)


class Model(nn.Module):
    """A chain of blocks, as stream_blocks knows it."""

    def __init__(self, count: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(8, 8)
        self.transformer_blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(count))

    def run(self, x: torch.Tensor, blocks=None) -> torch.Tensor:
        for block in self.transformer_blocks if blocks is None else blocks[:]:
            x = block(x).sin()
        return x


X = torch.linspace(-1, 1, 24).view(3, 8)


@pytest.mark.parametrize(
    ("offloaded", "count", "which"),
    [(0, 5, []), (1, 5, [0]), (2, 5, [0, 2]), (3, 6, [0, 2, 4]), (5, 5, [0, 1, 2, 3, 4]), (4, 54, [0, 13, 27, 40])],
)
def test_offloaded_blocks_are_spread_over_the_others(offloaded, count, which):
    assert evenly_spaced(offloaded, count) == which


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("offloaded", [1, 2, 3, 4, 6])
@torch.no_grad()
def test_any_number_of_offloaded_blocks_gives_the_same_bits(offloaded, device):
    place = torch.device(device)
    model = Model(6)
    whole, x = model.to(place).run(X.to(place)), X.to(place)
    blocks = stream_blocks(model.cpu(), place, offloaded)
    assert len(blocks) == 6
    on_host = blocks.host_blocks.memory.untyped_storage().data_ptr()
    resting = [t for t in model.parameters() if t.untyped_storage().data_ptr() == on_host]
    assert len(resting) == 2 * offloaded, "weight and bias of each"
    assert all(t.device.type == device for t in model.parameters() if not any(t is other for other in resting))
    for _ in range(3):
        assert torch.equal(model.run(x, blocks), whole)


@torch.no_grad()
def test_an_iteration_that_is_left_early_does_no_harm():
    """As a cache does that looks at the first blocks only."""
    model = Model(5)
    whole = model.run(X)
    blocks = stream_blocks(model, CPU, 4)
    for stop in (1, 2, 3):
        for index, _ in enumerate(blocks[:]):
            if index == stop:
                break
        assert torch.equal(model.run(X, blocks), whole)


@torch.no_grad()
def test_blocks_that_are_passed_over_do_no_harm():
    """As in a cache's reused step: the first block and the last."""
    model = Model(6)
    whole, few = model.run(X), model.run(X, [*model.transformer_blocks[:1], *model.transformer_blocks[5:]])
    blocks = stream_blocks(model, CPU, 5)
    for _ in range(2):
        x = X
        for part in (slice(0, 1), slice(5, None)):
            for block in blocks[part]:
                x = block(x).sin()
        assert torch.equal(x, few)
        assert torch.equal(model.run(X, blocks), whole)


@torch.no_grad()
def test_two_blocks_at_a_time_are_off_the_host():
    model = Model(4)
    blocks = stream_blocks(model, CPU)
    assert len(blocks.slots) == 2
    host = {view.data_ptr() for index in range(4) for view in blocks.host_blocks.views(index)}
    slots = {view.data_ptr() for slot in blocks.slots for view in blocks.host_blocks.layouts[0].views(slot)}
    for index, block in enumerate(blocks[:]):
        assert {tensor.data_ptr() for tensor in block.parameters()} <= slots
        others = [other for other in range(4) if other != index]
        assert all(t.data_ptr() in host for other in others for t in model.transformer_blocks[other].parameters())
    assert all(tensor.data_ptr() in host for tensor in model.transformer_blocks.parameters())


@torch.no_grad()
def test_hooks_bring_the_weights_of_a_model_whose_forward_is_not_ours():
    model = Model(5)
    whole = model.run(X)
    stream_blocks(model, CPU, 3).hook()
    host = [tensor.data_ptr() for tensor in model.transformer_blocks.parameters()]
    for _ in range(2):
        assert torch.equal(model.run(X), whole)
        assert [tensor.data_ptr() for tensor in model.transformer_blocks.parameters()] == host


def test_a_blocks_tensors_are_aligned_and_apart():
    layout = packed_layout(nn.Linear(3, 5), torch.bfloat16)
    assert layout.pieces == (("weight", (5, 3), torch.bfloat16, 0), ("bias", (5,), torch.bfloat16, 256))
    assert layout.size == 512
    flat = torch.zeros(layout.size, dtype=torch.uint8)
    weight, bias = layout.views(flat)
    weight.fill_(1)
    assert not bias.any() and weight.shape == (5, 3)


def test_blocks_of_different_sizes_share_the_slots_of_the_largest():
    """As in GGUF files, whose blocks have weights of different types."""
    blocks = nn.ModuleList([nn.Linear(3, 5), nn.Linear(50, 30)])
    host = HostBlocks(blocks, [0, 1], CPU, ALONE)
    assert host.size == packed_layout(blocks[1]).size > packed_layout(blocks[0]).size
    assert [view.shape for view in host.views(0)] == [(5, 3), (5,)]
    assert [view.shape for view in host.views(1)] == [(30, 50), (30,)]


@pytest.mark.parametrize("weights_dtype", [None, "fp8"])
@pytest.mark.parametrize("layout", ["official", "diffusers"])
def test_weights_are_loaded_straight_into_their_places(layout, weights_dtype, tiny_official, tiny_diffusers):
    folder = {"official": tiny_official, "diffusers": tiny_diffusers}[layout]
    whole, none = loaded(folder, 0, weights_dtype=weights_dtype)
    assert none is None
    model, blocks = loaded(folder, 2, weights_dtype=weights_dtype)
    states = whole.state_dict(), model.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name].float(), states[1][name].float()) for name in states[0])
    start = blocks.host_blocks.memory.data_ptr()
    inside = [
        index
        for index, block in enumerate(model.transformer_blocks)
        if all(start <= tensor.data_ptr() < start + blocks.host_blocks.memory.nbytes for tensor in block.parameters())
    ]
    assert inside == blocks.host_blocks.which and len(inside) == 2


def test_the_plan_counts_what_is_loaded(tiny_official):
    skeleton = components.transformer_skeleton(open_model(tiny_official, ["transformer"]), "demo_t2v")
    weights = weights_of(skeleton, skeleton.transformer_blocks, torch.float32)
    model, _ = loaded(tiny_official, 0)
    exact = sum(tensor.nbytes for tensor in model.parameters())
    # Up to 255 bytes of padding behind each of a block's tensors.
    assert exact <= weights.total < exact + 256 * len(list(model.parameters()))
    assert weights.count == len(model.transformer_blocks)
    halved = components.transformer_skeleton(
        open_model(tiny_official, ["transformer"]), "demo_t2v", weights_dtype="fp8"
    )
    small = weights_of(halved, halved.transformer_blocks, torch.float32)
    assert small.each < 0.3 * weights.each and small.rest == weights.rest, "a quarter of float32, and the biases"


def test_nothing_is_left_of_the_memory(tiny_official):
    gc.collect()  # of other tests in this process
    model, blocks = loaded(tiny_official, 2)
    assert "/memfd:hunyuan_staged" in Path("/proc/self/maps").read_text()
    assert not [path for path in Path("/dev/shm").iterdir() if "hunyuan" in path.name]
    del model, blocks
    assert "/memfd:hunyuan_staged" not in Path("/proc/self/maps").read_text()


@pytest.mark.gpu
@torch.no_grad()
def test_the_hosts_copy_is_pinned_and_let_go():
    device = torch.device("cuda")
    model = Model(4)
    blocks = stream_blocks(model, device)
    assert blocks.host_blocks.memory.is_pinned()
    assert isinstance(blocks, StreamedBlocks) and budget.SLOTS == 2
    model.run(X.to(device), blocks)
    del model, blocks
    assert "/memfd:hunyuan_staged" not in Path("/proc/self/maps").read_text()
