"""What a plan says would help: every choice is planned anew as a user would give it."""

from dataclasses import replace

import pytest
import torch

from hunyuan_staged.errors import InputError
from hunyuan_staged.memory import budget
from hunyuan_staged.memory.budget import GIB, FreeMemory
from hunyuan_staged.options import DenoiseOptions
from hunyuan_staged.parallel.world import World
from hunyuan_staged.pipeline import common, denoising, denoising_records, forecast_target
from hunyuan_staged.pipeline.choices import Goal, choices
from hunyuan_staged.pipeline.denoising import DenoiseSetup
from hunyuan_staged.pipeline.forecast_denoising import assumed_job

CUDA = torch.device("cuda")
FLAGS = {
    "no flag about offloading": {"offload_blocks": None},
    "--weights_dtype fp8": {"weights_dtype": "fp8"},
    "--disable_cache": {"enable_cache": False},
    "no --enable_cache": {"enable_cache": False},
    "--cfg_parallel off": {"cfg_parallel": "off"},
}


CACHED = {"offload_blocks": 0, "enable_cache": True, "cache_type": "taylorcache"}


def resolved(processes: int = 1, **options) -> DenoiseSetup:
    """A run of the published weights on a card of 12 GB, for which nothing is read."""
    given = DenoiseOptions(**{"dry_run": True, "assume_gpu": "12", "transformer_version": "720p_t2v"} | options)
    return denoising.resolve(given, assumed_job(given, {}, None), World(0, processes, CUDA))


def found(setup: DenoiseSetup, gib: float, **goal) -> list[str]:
    return [str(choice) for choice in choices(setup, Goal(FreeMemory(int(gib * GIB), 64 * GIB), **goal))]


def test_each_choice_fits_and_the_fastest_is_first():
    free = budget.card(12)
    setup = resolved(**CACHED)
    listed = choices(setup, Goal(free))
    assert [choice.changes.split(" and ") for choice in listed] == [
        ["--video_length 13 or less"],
        ["no flag about offloading"],
        ["--weights_dtype fp8"],
    ]
    seconds = [choice.expected.most for choice in listed]
    assert seconds == sorted(seconds) and seconds[0] > 0
    shorter = resolved(**CACHED, video_length=13)
    assert shorter.plan(free).total == listed[0].plan.total
    assert resolved(**CACHED | {"offload_blocks": None}).plan(free) == listed[1].plan
    with pytest.raises(InputError):
        resolved(**CACHED, video_length=17).plan(free)


def test_changes_go_together_where_none_helps_alone():
    setup = resolved(**CACHED)
    free = FreeMemory(5 * GIB, 64 * GIB)
    listed = choices(setup, Goal(free))
    assert "no flag about offloading and no --enable_cache" in [choice.changes for choice in listed]
    for choice in listed:
        assert choice.changes.count(" and ") == 1, "pairs, and nothing more than is needed"
        flags = choice.changes.split(" and ")
        if all(flag in FLAGS for flag in flags):
            assert resolved(**CACHED | FLAGS[flags[0]] | FLAGS[flags[1]]).plan(free) == choice.plan


def test_a_cache_and_the_split_over_gpus_are_among_them():
    cached = resolved(enable_cache=True, cache_type="taylorcache", offload_blocks=54)
    listed = found(cached, 4.5)
    assert any(one.startswith("no --enable_cache (3.7 GiB, 54 blocks offloaded") for one in listed), listed
    assert any(one.startswith("4 GPUs (") for one in listed), listed
    by_preset = found(resolved(preset="balanced", offload_blocks=54), 4.5)
    assert any(one.startswith("--disable_cache (") for one in by_preset), by_preset
    split = found(resolved(processes=4, offload_blocks=54), 2.8)
    assert any(one.startswith("--cfg_parallel off (") for one in split), split
    assert any(one.startswith("--resolution 480p in stage 1 (") for one in split), split


def test_what_keeps_all_blocks_on_the_device_is_told_where_some_are_offloaded():
    setup = resolved()
    listed = found(setup, 11.25, resident=True)
    assert listed[-1] == "--weights_dtype fp8 (8.6 GiB, 8.4 to 13 hours)"
    assert not any("offloaded" in one for one in listed)
    float8 = replace(setup.options, weights_dtype="fp8")
    again = denoising.resolve(float8, setup.job, setup.world)
    assert found(again, 8.0, resident=True)[-1].startswith("--video_length "), "float8 there already is no choice"


def test_nothing_helps_where_there_is_nothing():
    assert found(resolved(), 0.2) == []
    with pytest.raises(InputError, match=r"free: GPU 205 MiB, host 64\.0 GiB\. What would help: more memory$"):
        resolved().plan(FreeMemory(int(0.2 * GIB), 64 * GIB))


def test_heads_that_do_not_divide_are_in_the_plan():
    for processes, left, said in (
        (4, 0, "4: 2 guidance branches x 2 sequence shards"),
        (6, 1, "6: 2 guidance branches x 3 sequence shards, 5 heads a shard, and 1 head that each shard attends with"),
    ):
        setup = resolved(processes=processes)
        assert setup.size.left == left / 16
        assert denoising_records.rows(setup, setup.plan(budget.card(24)), budget.card(24))["ranks"].startswith(said)
    sparse = resolved(processes=6, attn_mode="flex-block-attn")
    assert sparse.size.left == 0 and sparse.heads.describe().startswith(", 5 or 6 heads a shard")


def test_of_several_gpus_the_smallest_decides(monkeypatch):
    sizes = {0: 80, 1: 24, 2: 48}
    names = {0: "NVIDIA H100 80GB HBM3", 1: "NVIDIA GeForce RTX 4090", 2: "NVIDIA L40S"}
    monkeypatch.setattr(common.available, "free_memory", lambda device: budget.card(sizes[device.index]))
    monkeypatch.setattr(forecast_target, "gpu_name", lambda device: names[device.index])
    here = World(0, 3, torch.device("cuda", 0))
    target = forecast_target.target_of(DenoiseOptions(), here)
    assert (target.free, str(target.card)) == (budget.card(24), "NVIDIA GeForce RTX 4090")
    assert target.world == replace(here, device=torch.device("cuda", 1))
    first = forecast_target.target_of(DenoiseOptions(), replace(here, size=1))
    assert first.free == budget.card(80), "one process takes the first"
