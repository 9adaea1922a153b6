"""Tiles over any number of ranks: the same bits."""

import json

import pytest
import torch
import torch.distributed as dist
from small_vae import CONFIG, decode_tiles, decoded, draw_latents, tiny_decoder

from hunyuan_staged.decoding import tiled
from hunyuan_staged.decoding.tiling import Tiling
from hunyuan_staged.parallel.world import World


def decode_as(world: World, counts: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Decode as the first n of these processes would, for each n; rank 0 returns what it wrote."""
    results = {}
    decoder, latents = tiny_decoder().to(world.device), draw_latents(3, 5, 7)
    for size in counts:
        for tile_size in (64, 96, None):
            if world.rank >= size:
                continue
            part = World(world.rank, size, world.device)
            options = {
                "tile_size": tile_size,
                "tile_overlap": 0.25,
                "world": part,
                "as_float": True,
                "latent_frames_per_chunk": 2,
            }
            if world.rank > 0:
                assert list(decode_tiles(decoder, latents, CONFIG, **options)) == []
            else:
                video = decoded(decoder, latents, CONFIG, **options)
                results[json.dumps([size, tile_size, "frames"])] = video.frames
                results[json.dumps([size, tile_size, "floats"])] = video.floats
    return results


def test_any_number_of_ranks_gives_the_same_bits(ranks):
    """Six tiles of 64 px; four of 96 px, fewer than the six ranks; one, whole."""
    counts = [len(tiled.plan_decode(draw_latents(3, 5, 7), CONFIG, Tiling(n)).tiles) for n in (64, 96, None)]
    assert counts == [6, 4, 1]
    sizes = ranks.up_to((1, 2, 3, 4, 6))
    results = ranks.run(sizes[-1], decode_as, sizes)[0]
    assert len(results) == len(sizes) * 3 * 2
    for name, pixels in results.items():
        size, *rest = json.loads(name)
        # Equal to the bit: the ranks only decode, and rank 0 does all later arithmetic.
        assert ranks.same_pixels(pixels, results[json.dumps([1, *rest])]), f"{size} ranks, {rest}"
    assert results[json.dumps([1, 64, "frames"])].float().std() > 1


def transfers(world: World) -> tuple[int, int]:
    """(in batches, by themselves) of the tensors that a rank sends and receives while it decodes tiles."""
    counts, inside = [0, 0], []
    batch = dist.batch_isend_irecv

    def batched(operations):
        inside.append(True)
        try:
            return batch(operations)
        finally:
            inside.pop()

    def counted(send):
        def call(*args, **options):
            counts[0 if inside else 1] += 1
            return send(*args, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "batch_isend_irecv", batched)
        for name in ("isend", "irecv"):
            own = counted(getattr(dist, name))
            for module in (dist, dist.distributed_c10d):
                patch.setattr(module, name, own)
        decode_as(world, (world.size,))
    return counts[0], counts[1]


def test_pieces_travel_in_batches_alone(ranks):
    """What is sent by itself, torch puts in a queue with all else, and warns of it on every rank."""
    (received, *rest), *others = ranks.run(ranks.up_to((2, 3))[-1], transfers)
    assert rest == [0] and received == sum(sent for sent, _ in others) > 0
    assert all(alone == 0 for _, alone in others)
