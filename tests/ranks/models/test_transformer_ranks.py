"""A forward whose tokens are split over processes, and the loop around it."""

import torch
from golden_models import forward, run_loop
from ranks import layouts

from hunyuan_staged.parallel.world import World

NAMES = ("dit_i2v", "dit_meanflow")
MODES = ("torch", "flex-block-attn")
SHARDS = (2, 3, 4, 5, 6, 8)
CACHES = (None, "taylorcache", "firstblock")
LOOPS = ((2, 1), (1, 2), (1, 3), (2, 3))


def all_forwards(world: World, folder, counts: tuple[int, ...], modes: tuple[str, ...]) -> dict[tuple, torch.Tensor]:
    found: dict[tuple, torch.Tensor] = {}
    on = {"device": world.device}
    for (_, shards), layout in layouts(world, [(1, count) for count in counts]):
        found |= {(shards, name, mode): forward(folder, name, layout, mode, **on) for name in NAMES for mode in modes}
        found[shards, "offloaded"] = forward(folder, NAMES[0], layout, offloaded=True, **on)
    return found


def test_shards_give_what_one_process_gives(golden_folder, ranks):
    """4 heads: 2 and 4 divide them; 3 leave one to all; on 5, 6 and 8 all are everybody's. In sparse attention some ranks
    have more heads than others, or none. Sums are split differently, hence not bits."""
    counts = ranks.up_to(SHARDS)
    # A GPU has sparse attention for wider heads than these, in half precision: see test_kernel_ranks.py.
    modes = MODES if ranks.most is None else MODES[:1]
    on = {"device": ranks.device}
    one = {(name, mode): forward(golden_folder, name, mode=mode, **on) for name in NAMES for mode in modes}
    for rank, found in enumerate(ranks.run(max(counts), all_forwards, golden_folder, counts, modes)):
        for (shards, *what), out in found.items():
            if what == ["offloaded"]:
                assert ranks.same(out, found[shards, NAMES[0], MODES[0]])
            else:
                assert ranks.same(out, one[tuple(what)], bits=False), (rank, shards, what)
        assert {shards for shards, *_ in found} == {shards for shards in counts if rank < shards}


def all_loops(world: World, folder, kinds: tuple[tuple[int, int], ...]) -> dict[tuple, torch.Tensor]:
    found: dict[tuple, torch.Tensor] = {}
    for kind, layout in layouts(world, kinds):
        found |= {(kind, c): run_loop(folder, layout, cache_type=c, device=world.device) for c in CACHES}
    return found


def test_caches_and_guidance_branches_go_with_heads_by_queries(golden_folder, ranks):
    """A branch each is the same arithmetic; shards split sums."""
    kinds = tuple(kind for kind in LOOPS if ranks.up_to([kind[0] * kind[1]]))
    one = {cache: run_loop(golden_folder, cache_type=cache, device=ranks.device) for cache in CACHES}
    assert not any(torch.equal(one[cache], one[None]) for cache in CACHES if cache), "steps were reused"
    everyone = ranks.run(max(ranks.up_to((2, 3, 6))), all_loops, golden_folder, kinds)
    for rank, found in enumerate(everyone):
        for (kind, cache), latents in found.items():
            assert ranks.same(latents, one[cache], bits=kind == (2, 1)), (rank, kind, cache)
            assert torch.equal(latents, everyone[0][kind, cache]), "on all ranks alike"
        assert {kind for kind, _ in found} == {kind for kind in kinds if rank < kind[0] * kind[1]}
