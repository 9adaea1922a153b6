"""A forward whose tokens are split over processes, and the loop around it."""

import torch
from golden_models import distance, forward, run_loop
from ranks import layouts, run_ranks

from hunyuan_staged.parallel.world import World

NAMES = ("dit_i2v", "dit_meanflow")
MODES = ("torch", "flex-block-attn")
SHARDS = (2, 3, 4, 5, 6, 8)
CACHES = (None, "taylorcache", "firstblock")
LOOPS = ((2, 1), (1, 3), (2, 3))


def all_forwards(world: World, folder) -> dict[tuple, torch.Tensor]:
    found: dict[tuple, torch.Tensor] = {}
    for (_, shards), layout in layouts(world, [(1, count) for count in SHARDS]):
        found |= {(shards, name, mode): forward(folder, name, layout, mode) for name in NAMES for mode in MODES}
        found[shards, "offloaded"] = forward(folder, NAMES[0], layout, offloaded=True)
    return found


def test_shards_give_what_one_process_gives(golden_folder):
    """4 heads: 2 and 4 divide them; 3 leave one to all; on 5, 6 and 8 all are everybody's. In sparse attention some ranks
    have more heads than others, or none. Sums are split differently, hence not bits."""
    one = {(name, mode): forward(golden_folder, name, mode=mode) for name in NAMES for mode in MODES}
    for rank, found in enumerate(run_ranks(max(SHARDS), all_forwards, golden_folder)):
        for (shards, *what), out in found.items():
            if what == ["offloaded"]:
                assert torch.equal(out, found[shards, NAMES[0], MODES[0]])
            else:
                assert distance(out, one[tuple(what)]) < 1e-5, (rank, shards, what)
        assert {shards for shards, *_ in found} == {shards for shards in SHARDS if rank < shards}


def all_loops(world: World, folder) -> dict[tuple, torch.Tensor]:
    found: dict[tuple, torch.Tensor] = {}
    for kind, layout in layouts(world, LOOPS):
        found |= {(kind, cache): run_loop(folder, layout, cache_type=cache) for cache in CACHES}
    return found


def test_caches_and_guidance_branches_go_with_heads_by_queries(golden_folder):
    """A branch each is the same arithmetic; shards split sums."""
    one = {cache: run_loop(golden_folder, cache_type=cache) for cache in CACHES}
    assert not any(torch.equal(one[cache], one[None]) for cache in CACHES if cache), "steps were reused"
    ranks = run_ranks(6, all_loops, golden_folder)
    for rank, found in enumerate(ranks):
        for (kind, cache), latents in found.items():
            if kind == (2, 1):
                assert torch.equal(latents, one[cache])
            else:
                assert distance(latents, one[cache]) < 1e-5, (rank, kind, cache)
            assert torch.equal(latents, ranks[0][kind, cache]), "on all ranks alike"
    assert {kind for kind, _ in ranks[5]} == {(2, 3)}
