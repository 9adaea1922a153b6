"""Whole frames by rows over ranks: the same bits, and what is sent."""

import json

import numpy as np
import pytest
from ranks import run_ranks
from small_vae import CONFIG, decode, draw_latents, tiny_decoder

from hunyuan_staged.decoding import whole
from hunyuan_staged.decoding.frames import DecodeContext
from hunyuan_staged.decoding.planning import Decoding
from hunyuan_staged.parallel.world import World


def decode_as(
    world: World, sizes: tuple[int, ...], height: int, latent_frames_per_chunk: int, piece: int | None
) -> dict[str, np.ndarray]:
    """Decode as the first n of these processes would, for each n; rank 0 returns what it got."""
    results = {}
    for size in sizes:
        if world.rank < size:
            part = World(world.rank, size, world.device)
            chunks = {"latent_frames_per_chunk": latent_frames_per_chunk, "frames_per_piece": piece}
            video = decode(draw_latents(3, height, 7), world=part, **chunks)
            assert (video is None) == (world.rank > 0)
            if video is not None:
                results[json.dumps([size, "frames"])] = video.frames.numpy()
                results[json.dumps([size, "floats"])] = video.floats.numpy()
    return results


@pytest.mark.parametrize(("height", "latent_frames_per_chunk", "piece"), [(11, 2, 3), (5, 1, None)])
def test_any_number_of_ranks_gives_the_same_bits(height, latent_frames_per_chunk, piece):
    """Rows that do not divide, one row each, and more ranks than rows."""
    results = run_ranks(8, decode_as, (1, 2, 3, 4, 8), height, latent_frames_per_chunk, piece)[0]
    assert len(results) == 5 * 2
    for name, array in results.items():
        size, what = json.loads(name)
        assert np.array_equal(array, results[json.dumps([1, what])]), f"{size} ranks, {what}"
    assert results[json.dumps([1, "frames"])].std() > 1


def counted(world: World) -> list[tuple[int, int]]:
    """(messages sent, received) of each exchange of a rank."""
    batches = []

    def exchange(outgoing, incoming):
        batches.append((len(outgoing), len(incoming)))
        whole_exchange(outgoing, incoming)

    whole_exchange = whole.exchange
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(whole, "exchange", exchange)
        how = Decoding(None, 1, "", {})
        list(whole.decode_whole(tiny_decoder(), draw_latents(2, 6, 3), CONFIG, how, DecodeContext(world)))
    return batches


def test_halos_go_in_one_batch_a_layer():
    first, middle, last = run_ranks(3, counted)
    # Convolutions: before the chunks conv_in and 4 of the mid block; then 2 a level, 4 upsamplers, conv_out.
    before, chunk = 5, 5 * 2 + 4 + 1
    halos = before + 2 * chunk
    for batches, neighbours in ((first, 1), (middle, 2), (last, 1)):
        assert batches.count((neighbours, neighbours)) == halos + 2 * (neighbours == 2), "and keys and values, once"
    # Pixels and whether they are finite, of each chunk.
    assert first.count((0, 2)) == middle.count((1, 0)) == last.count((1, 0)) == 4
