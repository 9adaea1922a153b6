"""Decoding: the official numbers, attention without a mask, tiles that cover, the same bits on any number of ranks."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import golden_weights
from safetensors.torch import load_file
from small_vae import ALONE, CONFIG, decode_tiles, decoded, draw_latents, tiny_decoder

from hunyuan_staged.decoding import frames, tiled, tiling
from hunyuan_staged.decoding.tiling import Tiling
from hunyuan_staged.errors import InputError
from hunyuan_staged.models import vae_attention
from hunyuan_staged.models.vae_decoder import Decoder
from hunyuan_staged.models.vae_modules import FrameCausalAttention, VaeConfig, VaeDecoder
from hunyuan_staged.weights.key_maps import VAE_MAP, to_diffusers

# The official numbers


@pytest.fixture(scope="module")
def golden_decoder(golden_folder):
    state = to_diffusers(golden_weights(golden_folder / "vae_shapes.json"), VAE_MAP)
    decoder = VaeDecoder(VaeConfig(block_out_channels=(32, 32, 64, 64, 64), layers_per_block=1)).requires_grad_(False)
    decoder.load_state_dict({k.removeprefix("decoder."): v for k, v in state.items() if k.startswith("decoder.")})
    return decoder


def decoded_by(
    decoder: torch.nn.Module, latents: torch.Tensor, latent_frames_per_chunk: int | None = None
) -> torch.Tensor:
    """[1, 3, T, H, W], as diffusers gives it."""
    return torch.cat(list(Decoder(decoder)(latents, latent_frames_per_chunk))).permute(3, 0, 1, 2)[None]


@pytest.mark.parametrize("latent_frames_per_chunk", [None, 1, 2])
def test_decoder_matches_the_official_one(golden_decoder, golden_folder, latent_frames_per_chunk):
    reference = load_file(golden_folder / "vae_5x7.safetensors")
    decoded = decoded_by(golden_decoder, reference["latents"], latent_frames_per_chunk)
    assert (decoded - reference["decoded"]).norm() / reference["decoded"].norm() < 1e-4


@pytest.mark.parametrize(("frames", "latent_frames_per_chunk"), [(1, 8), (5, 2), (5, 1), (4, 3)])
@pytest.mark.parametrize("layers", [0, 1])
def test_decoder_matches_diffusers_in_chunks(frames, latent_frames_per_chunk, layers):
    """A single frame, chunks of one latent frame, and a last chunk that is shorter."""
    from diffusers.models.autoencoders.autoencoder_kl_hunyuanvideo15 import HunyuanVideo15Decoder3D

    decoder = tiny_decoder(layers=layers)
    for parameter in decoder.parameters():
        if parameter.ndim != 5:  # gammas and biases, which are drawn as ones and nearly nothing
            parameter.add_(torch.randn(parameter.shape) * 0.3)
    reference = HunyuanVideo15Decoder3D(32, 3, (32, 8, 4, 4, 4), layers_per_block=layers).requires_grad_(False)
    reference.load_state_dict(decoder.state_dict())
    latents = draw_latents(frames, 3, 4)
    wanted = reference(latents)
    torch.testing.assert_close(decoded_by(decoder, latents, latent_frames_per_chunk), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("tile_size", "name"), [(None, "decoded"), (64, "decoded_tiled")])
def test_frames_match_the_official_ones(golden_decoder, golden_folder, tile_size, name):
    reference = load_file(golden_folder / "vae_5x7.safetensors")
    latents = reference["latents"] * CONFIG["scaling_factor"]
    video = decoded(golden_decoder, latents, CONFIG, tile_size=tile_size, tile_overlap=0.25, world=ALONE, as_float=True)
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
    ours = VaeDecoder(VaeConfig(block_out_channels=(32,) * 5, layers_per_block=0)).requires_grad_(False)
    ours.load_state_dict(reference.decoder.state_dict())
    video = decoded(ours, latents, CONFIG, tile_size=tile_size, tile_overlap=overlap, world=ALONE, as_float=True)
    torch.testing.assert_close(video.floats, wanted, rtol=0, atol=2e-6)


# Attention


def test_frame_causal_attention_is_the_masked_one():
    from diffusers.models.autoencoders.autoencoder_kl_hunyuanvideo15 import HunyuanVideo15AttnBlock

    torch.manual_seed(1)
    reference = HunyuanVideo15AttnBlock(32).requires_grad_(False)
    ours = FrameCausalAttention(32).requires_grad_(False)
    ours.load_state_dict(reference.state_dict())
    x = torch.randn(1, 32, 5, 3, 4)  # diffusers builds its mask for a batch of one
    torch.testing.assert_close(ours(x), reference(x), rtol=1e-5, atol=1e-6)

    later = x.clone()
    later[:, :, 3:] += 1
    assert torch.equal(ours(later)[:, :, :3], ours(x)[:, :, :3]), "a frame sees later ones"


def test_scores_in_memory_are_the_same_attention():
    q, k, v = torch.randn(3, 1, 1, 7, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    k, v = (torch.cat([x, x.flip(2)], dim=2) for x in (k, v))
    mm = torch.mm
    ours = None
    with pytest.MonkeyPatch.context() as patch:
        # A CPU's product takes no out_dtype; and few scores at once, so that the queries are split.
        patch.setattr(torch, "mm", lambda a, b, out_dtype: mm(a, b))
        patch.setattr(vae_attention, "SCORES_AT_ONCE", 30)
        ours = vae_attention._attend_in_products(q, k, v)
    torch.testing.assert_close(ours, F.scaled_dot_product_attention(q, k, v))


# Tile plans


@pytest.mark.parametrize("overlap", [0, 0.125, 0.25, 0.3, 0.5])
@pytest.mark.parametrize("tile_size", [64, 256, 320])
@pytest.mark.parametrize(("height", "width"), [(45, 80), (30, 53), (68, 120), (5, 7), (17, 16), (38, 13)])
def test_tiles_cover_every_latent_once(height, width, tile_size, overlap):
    plan = tiling.tile_plan(height, width, tile_size=tile_size, tile_overlap=overlap, spatial_ratio=16)
    shown = np.zeros((height, width), int)
    for tile in plan.tiles:
        assert 0 < tile.y.kept <= tile.y.size <= tile_size // 16
        assert tile.y.stop <= height
        assert 0 < tile.x.kept <= tile.x.size <= tile_size // 16
        assert tile.x.stop <= width
        shown[tile.y.start : tile.y.start + tile.y.kept, tile.x.start : tile.x.start + tile.x.kept] += 1
    assert (shown == 1).all()


def test_plan_of_720p():
    plan = tiling.tile_plan(45, 80, tile_size=256, tile_overlap=0.25, spatial_ratio=16)
    assert [(s.start, s.size, s.kept) for s in plan.rows] == [(0, 16, 12), (12, 16, 12), (24, 16, 12), (36, 9, 9)]
    assert [s.start for s in plan.columns] == [0, 12, 24, 36, 48, 60, 72]
    assert plan.columns[-1].size == 8
    assert plan.blend_px == 64
    assert len(plan.tiles) == 28


def test_a_frame_no_larger_than_a_tile_is_not_cut():
    # 14 latents: a second tile would start at 12 and show what the first one holds already.
    assert len(tiling.tile_plan(14, 16, tile_size=256, tile_overlap=0.25, spatial_ratio=16).tiles) == 1


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
        tiling.tile_plan(45, 80, tile_size=tile_size, tile_overlap=overlap, spatial_ratio=16)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8, 40])
def test_tiles_are_dealt_evenly(ranks):
    costs = [tile.cost for tile in tiling.tile_plan(45, 80, tile_size=256, tile_overlap=0.25, spatial_ratio=16).tiles]
    owners = tiling.assign_by_cost(costs, ranks)
    loads = [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(ranks)]
    assert sum(loads) == sum(costs)
    assert owners[0] == 0
    assert max(loads) <= max(sum(costs) / ranks * 1.1, max(costs))


# Refusals


def test_latents_of_another_vae():
    with pytest.raises(
        InputError, match=r"latents \[1, 16, 2, 4, 4\] do not fit this VAE, which takes \[1, 32, t, h, w\]"
    ):
        tiled.plan_decode(torch.zeros(1, 16, 2, 4, 4), CONFIG, Tiling(None))


def test_nan_is_not_a_black_video():
    latents = draw_latents(2, 5, 5)
    latents[0, 0, 1, 4, 4] = float("nan")
    with pytest.raises(FloatingPointError, match=r"tile 1,1 decoded to NaN or Inf in torch\.float32"):
        decoded(tiny_decoder(), latents, CONFIG, tile_size=64, tile_overlap=0, world=ALONE)


def test_8_bits_round_to_the_nearest():
    levels = torch.arange(256) / 255
    assert torch.equal(frames.to_8bit(levels), torch.arange(256, dtype=torch.uint8))
    assert frames.to_8bit(torch.tensor([0.49 / 255, 0.5 / 255, 1.0])).tolist() == [0, 1, 255]


# Streaming


def test_frames_leave_while_the_last_row_of_tiles_is_decoded(monkeypatch):
    """Blocks come in order, each as soon as its chunk of the last row is drawn, one chunk behind the decoder."""
    pieces = []
    begin = Decoder.__call__

    def watched(self, latents, latent_frames_per_chunk=None):
        for piece in begin(self, latents, latent_frames_per_chunk):
            pieces.append(len(piece))
            yield piece

    monkeypatch.setattr(Decoder, "__call__", watched)
    lengths, seen = [], []
    options = {"tile_size": 64, "tile_overlap": 0.25, "world": ALONE, "latent_frames_per_chunk": 1}
    for block in decode_tiles(tiny_decoder(), draw_latents(3, 5, 7), CONFIG, **options):
        lengths.append(len(block.frames))
        seen.append(len(pieces))
    assert lengths == [1, 4, 4]
    # 3 columns, 2 rows, 3 chunks; rank 0 decodes one piece ahead.
    assert seen == [9 + 6 + 1, 9 + 9, 9 + 9]
    assert pieces == [1, 4, 4] * 3 + [1] * 3 + [4] * 6


@pytest.mark.parametrize("latent_frames_per_chunk", [1, 2, 8])
def test_chunks_change_nothing_but_rounding(latent_frames_per_chunk):
    options = {"tile_size": 64, "tile_overlap": 0.25, "world": ALONE, "as_float": True}
    whole, chunked = (
        decoded(tiny_decoder(), draw_latents(5, 5, 7), CONFIG, **options, latent_frames_per_chunk=n).floats
        for n in (99, latent_frames_per_chunk)
    )
    torch.testing.assert_close(chunked, whole, rtol=0, atol=2e-6)


# Out of memory


def failing_at(monkeypatch, limit: int, after: int = 0) -> None:
    """A device on which a tile of more than `limit` latents fits only for the first `after` pieces."""
    begin = Decoder.__call__

    def call(self, latents, latent_frames_per_chunk=None):
        for number, piece in enumerate(begin(self, latents, latent_frames_per_chunk)):
            if latents.shape[-1] * latents.shape[-2] > limit and number >= after:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
            yield piece

    monkeypatch.setattr(Decoder, "__call__", call)


@pytest.mark.parametrize("after", [0, 1])
def test_a_tile_that_does_not_fit_is_decoded_in_halves(monkeypatch, after):
    """The two tiles of 4 x 4 latents do not fit; those at the borders, of 4 x 1, do."""
    latents, said = draw_latents(3, 4, 7), []
    options = {"tile_overlap": 0.25, "world": ALONE, "as_float": True, "latent_frames_per_chunk": 2}
    plain = decoded(tiny_decoder(), latents, CONFIG, tile_size=64, **options)
    halves = decoded(tiny_decoder(), latents, CONFIG, tile_size=32, **options)
    failing_at(monkeypatch, 15, after)
    video = decoded(tiny_decoder(), latents, CONFIG, tile_size=64, **options, warn=said.append)
    line = (
        "out of memory with a tile of 64x64 px: it is decoded in tiles of 32 px instead "
        "(CUDA out of memory. Tried to allocate 2.00 GiB.)"
    )
    assert said == [line] * 2
    assert video.frames.shape == plain.frames.shape
    # The frames that had been decoded stay; the others are those of the smaller tiles, where no large ones blend.
    assert torch.equal(video.floats[:, :, : 5 * after], plain.floats[:, :, : 5 * after])
    inner = (slice(None), slice(None), slice(5 * after, None), slice(0, 48), slice(0, 16))
    torch.testing.assert_close(video.floats[inner], halves.floats[inner], rtol=0, atol=2e-6)
    assert not torch.allclose(video.floats[inner], plain.floats[inner], atol=1e-3)


def test_memory_that_runs_out_again_is_one_line(monkeypatch):
    failing_at(monkeypatch, 3)
    with pytest.raises(
        InputError,
        match=r"^out of memory with tiles of 32 px, too \(CUDA out of memory\. Tried to allocate 2\.00 GiB\.\); the "
        r"latents are on disk: run this stage again with --tile_size 16, or where more memory is free$",
    ):
        decoded(tiny_decoder(), draw_latents(2, 4, 4), CONFIG, tile_size=64, tile_overlap=0.25, world=ALONE)
    failing_at(monkeypatch, 0)
    with pytest.raises(InputError, match=r"a tile of 16x16 px does not fit in memory .* there is none that is smaller"):
        decoded(tiny_decoder(), draw_latents(2, 1, 1), CONFIG, tile_size=None, tile_overlap=0.25, world=ALONE)
