"""Decoding: the official numbers, attention without a mask, tiles that cover, the same bits on any number of ranks."""

import copy
import json

import numpy as np
import pytest
import torch
from conftest import golden_weights
from ranks import run_ranks
from safetensors.torch import load_file

from hunyuan_staged import InputError, tiles, vae
from hunyuan_staged.parallel import World

ALONE = World(0, 1, torch.device("cpu"))
CONFIG = {
    "scaling_factor": 1.03682,
    "latent_channels": 32,
    "spatial_compression_ratio": 16,
    "temporal_compression_ratio": 4,
}


def tiny_decoder(seed: int = 0) -> torch.nn.Module:
    """A decoder of the real structure, with the fewest channels that it allows."""
    from diffusers.models.autoencoders.autoencoder_kl_hunyuanvideo15 import HunyuanVideo15Decoder3D

    torch.manual_seed(seed)
    return HunyuanVideo15Decoder3D(32, 3, (32, 8, 4, 4, 4), layers_per_block=0).eval().requires_grad_(False)


def draw_latents(frames: int, height: int, width: int) -> torch.Tensor:
    return torch.randn(1, 32, frames, height, width, generator=torch.Generator().manual_seed(5))


# The official numbers


@pytest.fixture(scope="module")
def golden_decoder(shared):
    from diffusers.models.autoencoders.autoencoder_kl_hunyuanvideo15 import HunyuanVideo15Decoder3D

    from hunyuan_staged.checkpoints import VAE_MAP, to_diffusers

    state = to_diffusers(golden_weights(shared / "golden" / "vae_shapes.json"), VAE_MAP)
    decoder = HunyuanVideo15Decoder3D(32, 3, (64, 64, 64, 32, 32), layers_per_block=1).eval().requires_grad_(False)
    decoder.load_state_dict({k.removeprefix("decoder."): v for k, v in state.items() if k.startswith("decoder.")})
    return vae.prepare_decoder(decoder)


def test_decoder_matches_the_official_one(golden_decoder, shared):
    reference = load_file(shared / "golden" / "vae_5x7.safetensors")
    decoded = golden_decoder(reference["latents"])
    assert (decoded - reference["decoded"]).norm() / reference["decoded"].norm() < 1e-4


@pytest.mark.parametrize(("tile_size", "name"), [(None, "decoded"), (64, "decoded_tiled")])
def test_frames_match_the_official_ones(golden_decoder, shared, tile_size, name):
    reference = load_file(shared / "golden" / "vae_5x7.safetensors")
    latents = reference["latents"] * CONFIG["scaling_factor"]
    video = vae.decode_frames(
        golden_decoder, latents, CONFIG, tile_size=tile_size, tile_overlap=0.25, world=ALONE, as_float=True
    )
    wanted = (reference[name] / 2 + 0.5).clamp(0, 1)
    assert (video.floats - wanted).norm() / wanted.norm() < 1e-4
    levels = torch.floor(wanted[0].permute(1, 2, 3, 0) * 255 + 0.5)
    # One level apart where float32 rounding falls on the other side of a half, and hardly ever that.
    assert (video.frames - levels).abs().max() <= 1
    assert (video.frames == levels).float().mean() > 0.999


@pytest.mark.parametrize(
    ("height", "width", "tile_size", "overlap"), [(5, 7, 64, 0.25), (9, 4, 64, 0.5), (6, 5, 48, 0)]
)
def test_tiles_match_diffusers(height, width, tile_size, overlap):
    """The same decoder through diffusers' own tiled_decode, at sizes whose last tiles are narrower than the overlap."""
    from diffusers import AutoencoderKLHunyuanVideo15

    torch.manual_seed(0)
    reference = AutoencoderKLHunyuanVideo15(block_out_channels=(32,) * 5, layers_per_block=0).eval()
    reference.enable_tiling(tile_size, tile_size, tile_size // 16, tile_size // 16)
    reference.tile_overlap_factor = overlap
    latents = draw_latents(2, height, width)
    with torch.no_grad():
        wanted = (reference.tiled_decode(latents / CONFIG["scaling_factor"]) / 2 + 0.5).clamp(0, 1)
    video = vae.decode_frames(
        reference.decoder, latents, CONFIG, tile_size=tile_size, tile_overlap=overlap, world=ALONE, as_float=True
    )
    torch.testing.assert_close(video.floats, wanted, rtol=0, atol=2e-6)


# Attention


def test_frame_causal_attention_is_the_masked_one():
    from diffusers.models.autoencoders.autoencoder_kl_hunyuanvideo15 import HunyuanVideo15AttnBlock

    torch.manual_seed(1)
    reference = HunyuanVideo15AttnBlock(32).requires_grad_(False)
    ours = vae.prepare_decoder(copy.deepcopy(reference))
    x = torch.randn(1, 32, 5, 3, 4)  # diffusers builds its mask for a batch of one
    torch.testing.assert_close(ours(x), reference(x), rtol=1e-5, atol=1e-6)

    later = x.clone()
    later[:, :, 3:] += 1
    assert torch.equal(ours(later)[:, :, :3], ours(x)[:, :, :3]), "a frame sees later ones"


def test_no_mask_is_built(monkeypatch):
    from diffusers.models.autoencoders import autoencoder_kl_hunyuanvideo15 as official

    def refuse(*_, **__):
        raise AssertionError("a mask of S x S was built")

    monkeypatch.setattr(official.HunyuanVideo15AttnBlock, "prepare_causal_attention_mask", staticmethod(refuse))
    assert vae.prepare_decoder(tiny_decoder())(draw_latents(3, 2, 2)).shape == (1, 3, 9, 32, 32)


# Tile plans


@pytest.mark.parametrize("overlap", [0, 0.125, 0.25, 0.3, 0.5])
@pytest.mark.parametrize("tile_size", [64, 256, 320])
@pytest.mark.parametrize(("height", "width"), [(45, 80), (30, 53), (68, 120), (5, 7), (17, 16), (38, 13)])
def test_tiles_cover_every_latent_once(height, width, tile_size, overlap):
    plan = tiles.tile_plan(height, width, tile_size=tile_size, tile_overlap=overlap, spatial_ratio=16)
    shown = np.zeros((height, width), int)
    for tile in plan.tiles:
        assert 0 < tile.y.kept <= tile.y.size <= tile_size // 16
        assert tile.y.stop <= height
        assert 0 < tile.x.kept <= tile.x.size <= tile_size // 16
        assert tile.x.stop <= width
        shown[tile.y.start : tile.y.start + tile.y.kept, tile.x.start : tile.x.start + tile.x.kept] += 1
    assert (shown == 1).all()


def test_plan_of_720p():
    plan = tiles.tile_plan(45, 80, tile_size=256, tile_overlap=0.25, spatial_ratio=16)
    assert [(s.start, s.size, s.kept) for s in plan.rows] == [(0, 16, 12), (12, 16, 12), (24, 16, 12), (36, 9, 9)]
    assert [s.start for s in plan.columns] == [0, 12, 24, 36, 48, 60, 72]
    assert plan.columns[-1].size == 8
    assert plan.blend_px == 64
    assert len(plan.tiles) == 28


def test_a_frame_no_larger_than_a_tile_is_not_cut():
    # 14 latents: a second tile would start at 12 and show what the first one holds already.
    assert len(tiles.tile_plan(14, 16, tile_size=256, tile_overlap=0.25, spatial_ratio=16).tiles) == 1


@pytest.mark.parametrize(
    ("tile_size", "overlap", "message"),
    [
        (100, 0.25, "--tile_size 100 is not a positive multiple of 16 px"),
        (0, 0.25, "--tile_size 0 is not"),
        (-256, 0.25, "--tile_size -256 is not"),
        (256, 0.6, "--tile_overlap 0.6 is outside 0 to 0.5"),
        (256, -0.1, "--tile_overlap -0.1 is outside 0 to 0.5"),
        (256, float("nan"), "--tile_overlap nan is outside"),
        (16, 0.25, "--tile_overlap 0.25 of --tile_size 16 leaves no step between tiles; .* at least 32 px"),
    ],
)
def test_tilings_that_make_no_sense(tile_size, overlap, message):
    with pytest.raises(InputError, match=message):
        tiles.tile_plan(45, 80, tile_size=tile_size, tile_overlap=overlap, spatial_ratio=16)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8, 40])
def test_tiles_are_dealt_evenly(ranks):
    costs = [tile.cost for tile in tiles.tile_plan(45, 80, tile_size=256, tile_overlap=0.25, spatial_ratio=16).tiles]
    owners = tiles.deal(costs, ranks)
    loads = [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(ranks)]
    assert sum(loads) == sum(costs)
    assert owners[0] == 0
    assert max(loads) <= max(sum(costs) / ranks * 1.1, max(costs))


# Refusals


def test_latents_of_another_vae():
    with pytest.raises(
        InputError, match=r"latents \[1, 16, 2, 4, 4\] do not fit this VAE, which takes \[1, 32, t, h, w\]"
    ):
        vae.plan_decode(torch.zeros(1, 16, 2, 4, 4), CONFIG, tile_size=None, tile_overlap=0.25)


def test_nan_is_not_a_black_video():
    latents = draw_latents(2, 5, 5)
    latents[0, 0, 1, 4, 4] = float("nan")
    with pytest.raises(FloatingPointError, match=r"tile 1,1 decoded to NaN or Inf in torch\.float32"):
        vae.decode_frames(tiny_decoder(), latents, CONFIG, tile_size=64, tile_overlap=0, world=ALONE)


def test_8_bits_round_to_the_nearest():
    levels = torch.arange(256) / 255
    assert torch.equal(vae.to_8bit(levels), torch.arange(256, dtype=torch.uint8))
    assert vae.to_8bit(torch.tensor([0.49 / 255, 0.5 / 255, 1.0])).tolist() == [0, 1, 255]


# Ranks


def decode_as(world: World, counts: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Decode as the first n of these processes would, for each n; rank 0 returns what it wrote."""
    results = {}
    decoder, latents = tiny_decoder(), draw_latents(3, 5, 7)
    for size in counts:
        for tile_size in (64, 96, None):
            if world.rank >= size:
                continue
            part = World(world.rank, size, world.device)
            video = vae.decode_frames(
                decoder, latents, CONFIG, tile_size=tile_size, tile_overlap=0.25, world=part, as_float=True
            )
            assert (video is None) == (world.rank > 0)
            if video is not None:
                results[json.dumps([size, tile_size, "frames"])] = video.frames.numpy()
                results[json.dumps([size, tile_size, "floats"])] = video.floats.numpy()
    return results


def test_any_number_of_ranks_gives_the_same_bits():
    """Six tiles of 64 px; four of 96 px, fewer than the six ranks; one, whole."""
    counts = [
        len(vae.plan_decode(draw_latents(3, 5, 7), CONFIG, tile_size=n, tile_overlap=0.25).tiles)
        for n in (64, 96, None)
    ]
    assert counts == [6, 4, 1]
    results = run_ranks(6, decode_as, (1, 2, 3, 4, 6))[0]
    assert len(results) == 5 * 3 * 2
    for name, array in results.items():
        size, *rest = json.loads(name)
        # Equal to the bit: the ranks only decode, and rank 0 does all later arithmetic.
        assert np.array_equal(array, results[json.dumps([1, *rest])]), f"{size} ranks, {rest}"
    assert results[json.dumps([1, 64, "frames"])].std() > 1
