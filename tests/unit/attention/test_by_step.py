"""--attn_schedule: what it may say, and which attention each step runs."""

import json
from itertools import combinations

import pytest
import torch
from golden_models import CPU, build, distance, golden_branches, load

from hunyuan_staged.attention.by_step import choose_by_step
from hunyuan_staged.attention.choose import AttentionMode, choose_attention
from hunyuan_staged.attention.modes import Stretch, check_schedule, parse_schedule
from hunyuan_staged.errors import InputError
from hunyuan_staged.models.transformer import Transformer
from hunyuan_staged.sampling.conditions import condition_channels
from hunyuan_staged.sampling.loop import Sampling, denoise
from hunyuan_staged.sampling.schedule import flow_sigmas


def test_a_schedule_is_modes_by_step_and_block():
    assert parse_schedule("exact:0-9, sparse:10-39@2-51,cudnn:49") == (
        Stretch("flash", range(10)),
        Stretch("flex-block-attn", range(10, 40), range(2, 52)),
        Stretch("cudnn", range(49, 50)),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is not MODE:FIRST-LAST or MODE:FIRST-LAST@BLOCKS, as in sparse:10-39@2-51"),
        ("exact", "'exact' is not MODE:FIRST-LAST"),
        ("exact:a-b", "'exact:a-b' is not MODE:FIRST-LAST"),
        ("exact:9-3", "9-3 is not FIRST-LAST with FIRST <= LAST"),
        ("sparse:1-2@7-3", "7-3 is not FIRST-LAST with FIRST <= LAST"),
        ("fastest:0-3", "mode 'fastest' is unknown; known: exact, sparse, flash, flash2"),
        ("exact:0-3,sparse:3-5", "sparse:3-5: step 3 has a mode already"),
    ],
)
def test_no_schedule(text, message):
    with pytest.raises(InputError) as error:
        parse_schedule(text)
    assert str(error.value).startswith(f"--attn_schedule {message}")


def test_steps_and_blocks_that_a_run_does_not_have():
    schedule = parse_schedule("sparse:3-8@0-4")
    check_schedule(schedule, 9, 5)
    with pytest.raises(InputError, match="--attn_schedule step 8 is none of this run's 8, 0 to 7"):
        check_schedule(schedule, 8, 5)
    with pytest.raises(InputError, match="--attn_schedule block 4 is none of this run's 4, 0 to 3"):
        check_schedule(schedule, 9, 4)


def choose(mode: str):
    return choose_attention(mode, CPU, torch.float32, head_width=32)


def test_what_is_chosen_is_said():
    found = choose_by_step(parse_schedule("sparse:2-3,sparse:4@1-2"), 6, choose("flash"), choose)
    assert found.names == ("torch", "flex-block-attn") and found.hungriest == "flex-block-attn"
    assert found.describe() == (
        "torch at steps 0-1, flex-block-attn at steps 2-3, flex-block-attn in blocks 1-2 at steps 4-4, torch at steps 5-5"
    )
    assert found.record() == [["flex-block-attn", 2, 3], ["flex-block-attn", 4, 4, 1, 2]]
    with pytest.raises(InputError, match="--attn_mode cudnn needs a GPU, and this run is on a cpu"):
        choose_by_step(parse_schedule("cudnn:1"), 6, choose("flash"), choose)


def test_each_step_runs_its_attention(golden_folder):
    """A kernel that doubles what attention gives stands in for a sparse one."""
    tensors, _ = load(golden_folder / "loop_cfg6_shift5.safetensors")
    config = json.loads(load(golden_folder / "dit_t2v.safetensors")[1]["config"])
    exact = choose("torch")

    def doubled(grid):
        return lambda *qkv: 2 * exact.make(grid)(*qkv)

    kinds = {"torch": exact, "flex-block-attn": AttentionMode("flex-block-attn", "a test", doubled)}
    forward = Transformer(build(golden_folder, config, "dit_shapes"), exact, tensors["noise"].shape[2:])
    last = len(forward.model.transformer_blocks) - 1

    def latents(schedule: str):
        by_step = choose_by_step(parse_schedule(schedule), 4, exact, kinds.__getitem__)
        sampling = Sampling(6.0, before_step=lambda step: forward.use(by_step.modes[step]))
        channels = condition_channels(tensors["noise"], None)
        return denoise(forward, tensors["noise"], channels, golden_branches(tensors), flow_sigmas(4, 5.0), sampling)

    plain, sparse = latents("torch:0-3"), latents("sparse:0-3")
    assert torch.equal(latents("torch:2"), plain) and torch.equal(latents(f"sparse:0-3@0-{last}"), sparse)
    different = [plain, sparse, latents("sparse:1-2"), latents("sparse:0-3@0")]
    assert all(distance(one, other) > 1e-4 for one, other in combinations(different, 2))
