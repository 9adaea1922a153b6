"""Whole frames by rows over ranks: the same bits, and what is sent."""

import json

import pytest
import torch
from small_vae import CONFIG, decode, draw_latents, rough_decoder, tiny_decoder

from hunyuan_staged.decoding import whole
from hunyuan_staged.decoding.frames import DecodeContext
from hunyuan_staged.decoding.planning import Decoding
from hunyuan_staged.parallel.world import World

# Rows of latents, latent frames of a chunk, frames of a piece.
CASES = ((11, 2, 3), (5, 1, None))


def decode_as(world: World, sizes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Decode each case as the first n of these processes would, for each n; rank 0 returns what it got."""
    results = {}
    for height, latent_frames_per_chunk, piece in CASES:
        for size in sizes:
            if world.rank < size:
                part = World(world.rank, size, world.device)
                chunks = {"latent_frames_per_chunk": latent_frames_per_chunk, "frames_per_piece": piece}
                decoder = rough_decoder().to(world.device)
                video = decode(draw_latents(3, height, 7), world=part, decoder=decoder, **chunks)
                assert (video is None) == (world.rank > 0)
                if video is not None:
                    results[json.dumps([height, size, "frames"])] = video.frames
                    results[json.dumps([height, size, "floats"])] = video.floats
    return results


def test_any_number_of_ranks_gives_the_same_bits(ranks):
    """Rows that do not divide, one row each, and more ranks than rows."""
    sizes = ranks.up_to((1, 2, 3, 4, 8))
    results = ranks.run(sizes[-1], decode_as, sizes)[0]
    assert len(results) == len(CASES) * len(sizes) * 2
    for name, pixels in results.items():
        height, size, what = json.loads(name)
        assert ranks.same_pixels(pixels, results[json.dumps([height, 1, what])]), f"{height} rows, {size} ranks, {what}"
    assert all(results[json.dumps([height, 1, "frames"])].float().std() > 1 for height, *_ in CASES)


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
        list(
            whole.decode_whole(
                tiny_decoder().to(world.device), draw_latents(2, 6, 3), CONFIG, how, DecodeContext(world)
            )
        )
    return batches


def test_halos_go_in_one_batch_a_layer(ranks):
    first, middle, last = ranks.run(3, counted)
    # Convolutions: before the chunks conv_in and 4 of the mid block; then 2 a level, 4 upsamplers, conv_out.
    before, chunk = 5, 5 * 2 + 4 + 1
    halos = before + 2 * chunk
    for batches, neighbours in ((first, 1), (middle, 2), (last, 1)):
        assert batches.count((neighbours, neighbours)) == halos + 2 * (neighbours == 2), "and keys and values, once"
    # Pixels and whether they are finite, of each chunk.
    assert first.count((0, 2)) == middle.count((1, 0)) == last.count((1, 0)) == 4
