"""What a stage needs, against what was measured and what is free: numbers in, numbers and messages out."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hunyuan_staged import geometry
from hunyuan_staged.bench import cards
from hunyuan_staged.decoding import planning, timing
from hunyuan_staged.errors import InputError
from hunyuan_staged.memory import budget, estimates, timings
from hunyuan_staged.memory.available import host_available
from hunyuan_staged.memory.budget import GIB, BlockWeights, FreeMemory
from hunyuan_staged.memory.cards import find_card
from hunyuan_staged.memory.estimates import DenoisingSize
from hunyuan_staged.memory.offloading import weights_of
from hunyuan_staged.models.modulations import remove_linears, table_bytes
from hunyuan_staged.models.vae_modules import VaeConfig, VaeDecoder
from hunyuan_staged.sampling.cache_settings import resolve
from hunyuan_staged.sampling.calibration import flat
from hunyuan_staged.weights.quantization.fp8_rows import quantise_linears

# The published transformer in bf16 with its modulations' linear maps, as most was measured: 54 blocks of 302 MB, and
# 0.32 GiB of the rest.
WEIGHTS = BlockWeights(54, 302_118_912, 339_069_984)
GPU = "NVIDIA H100 80GB HBM3"
H100 = FreeMemory(int(78.9 * GIB), 100 * GIB)
WHOLE = DenoisingSize(111_600, 256, 2048, 2, "flash4", True)
SHORT = replace(WHOLE, video_tokens=46_800)
RESIDENT, STREAMED = 0, 54


def total(denoising: DenoisingSize, offloaded: int) -> float:
    return sum(budget.device_parts(WEIGHTS, denoising.working, offloaded).values()) / GIB


@pytest.mark.parametrize(
    ("denoising", "offloaded", "measured"),
    [
        (replace(WHOLE, kernel="cudnn"), STREAMED, 3.67),
        (replace(SHORT, kernel="cudnn"), RESIDENT, 16.73),
        (replace(WHOLE, video_tokens=49_290, kernel="cudnn"), STREAMED, 2.16),
        (replace(WHOLE, kernel="flex-block-attn"), RESIDENT, 20.8),
        (replace(SHORT, kernel="cudnn", fused=False), RESIDENT, 19.2),
    ],
)
def test_the_measured_peaks_come_out(denoising, offloaded, measured):
    """docs/benchmarks.md: what was computed with is what the numbers were measured with."""
    assert total(denoising, offloaded) == pytest.approx(measured, abs=0.12)


def test_working_memory_follows_tokens_width_and_dtype():
    assert WHOLE.working == pytest.approx(2.901 * GIB, rel=0.001)
    assert replace(WHOLE, itemsize=4).working == pytest.approx(2 * WHOLE.working, abs=1)
    assert replace(WHOLE, channels=1024).working == pytest.approx(WHOLE.working / 2, abs=1)
    halves = replace(WHOLE, shards=2)
    assert halves.working == int((6.8 + 6) * (55_800 + 256) * 2048 * 2)
    assert replace(WHOLE, block=100, modulations=30).working == WHOLE.working + 130
    odd = replace(WHOLE, video_tokens=111_601)
    assert odd.working - WHOLE.working == pytest.approx(6.8 * 2048 * 2, abs=1), "odd shapes take no more"


@pytest.fixture(scope="module")
def published() -> dict[str | None, BlockWeights]:
    """The weights that stay of the full published transformer, by weights_dtype."""
    found = {}
    for weights_dtype in (None, "fp8"):
        skeleton = cards.skeleton()
        remove_linears(skeleton)
        if weights_dtype:
            quantise_linears(skeleton.transformer_blocks)
        found[weights_dtype] = weights_of(skeleton, skeleton.transformer_blocks, torch.bfloat16)
    return found


def test_a_third_of_the_published_weights_need_not_stay(published):
    """Issue 21: at most 11.3 GB, 5.9 in float8, and 720p with 121 frames resident on a card of 16 GB."""
    assert published[None].count == 54
    assert published[None].total == pytest.approx(11.21e9, rel=0.001) and published[None].total <= 11.3e9
    assert published["fp8"].total == pytest.approx(5.78e9, rel=0.01) and published["fp8"].total <= 5.9e9
    assert published[None].each == pytest.approx(WEIGHTS.each * 2 / 3, rel=0.001), "an offloaded block is a third less"
    table = table_bytes(50, 54, 2048, 2)
    working = replace(WHOLE, kernel="cudnn", modulations=table).working
    fit = budget.plan_blocks("video", published[None], working, budget.card(16))
    assert (fit.offloaded, fit.tight) == (0, False)
    assert fit.total / GIB == pytest.approx(13.47, abs=0.02)
    offloaded = sum(budget.device_parts(published[None], working, 54).values())
    assert offloaded < total(WHOLE, STREAMED) * GIB, (
        "less than when their linear maps travelled, too: 3.67 GiB measured"
    )


# README, "Caches": 49 frames, 12 blocks; the peak with a cache beyond that without.
@pytest.mark.parametrize(("kind", "measured"), [("taylorcache", 0.9), ("firstblock", 1.2), ("magcache", 0.5)])
def test_what_a_cache_takes_is_in_the_plan(kind, measured):
    kept = resolve(kind, {}, 50, 54, flat(50), [1.0] * 50).kept(2)
    more = replace(SHORT, kept=kept).working - SHORT.working
    assert more / GIB == pytest.approx(measured, abs=0.1)


def test_a_cache_on_a_card_that_offloads(published):
    """Without it in the plan, a run would die where the first step is reused."""
    settings = resolve("taylorcache", {}, 50, 54)
    plain, cached = (
        budget.plan_blocks("video", published[None], replace(WHOLE, kept=kept).working, budget.card(12))
        for kept in (0, settings.kept(2))
    )
    assert (plain.offloaded, cached.offloaded) == (18, 29)
    assert cached.total <= budget.card(12).device - budget.RESERVE


def test_tokens_of_a_video():
    assert geometry.video_tokens(121, 720, 1280) == 111_600
    assert geometry.video_tokens(49, 720, 1280) == 46_800
    assert geometry.video_tokens(121, 720, 1280, (1, 2, 2)) == 31 * 22 * 40


def test_on_a_large_gpu_everything_is_resident():
    fit = budget.plan_blocks("video", WEIGHTS, WHOLE.working, H100)
    assert (fit.offloaded, fit.host, fit.tight) == (0, 0, False)
    assert fit.total == WEIGHTS.total + WHOLE.working
    assert fit.describe(54) == "offloaded blocks: none (all of them resident need 18.4 GiB, 78.9 GiB are free)"


@pytest.mark.parametrize(
    ("gigabytes", "denoising", "offloaded"), [(24, WHOLE, 0), (16, WHOLE, 16), (12, WHOLE, 31), (8, WHOLE, 45)]
)
def test_as_many_blocks_as_fit_are_resident(gigabytes, denoising, offloaded):
    free = budget.card(gigabytes)
    fit = budget.plan_blocks("video", WEIGHTS, denoising.working, free)
    assert fit.offloaded == offloaded
    assert fit.total <= free.device - budget.RESERVE
    assert fit.host == offloaded * WEIGHTS.each
    if offloaded:
        one_less = budget.device_parts(WEIGHTS, denoising.working, offloaded - 1)
        assert sum(one_less.values()) > free.device - budget.RESERVE


def test_what_fits_without_the_reserve_alone_is_tried():
    need = int(total(WHOLE, STREAMED) * GIB)
    fit = budget.plan_blocks("video", WEIGHTS, WHOLE.working, FreeMemory(need + 100, 64 * GIB))
    assert fit.offloaded == 54 and fit.tight
    assert fit.describe(54).endswith("are free; that leaves little room)")
    with pytest.raises(InputError, match=r"video with 54 of 54 blocks offloaded needs 3\.8 GiB of GPU memory"):
        budget.plan_blocks("video", WEIGHTS, WHOLE.working, FreeMemory(need - 100, 64 * GIB))


def test_a_number_that_was_asked_for_is_honoured_or_refused():
    assert budget.plan_blocks("video", WEIGHTS, WHOLE.working, H100, asked=7).offloaded == 7
    assert budget.plan_blocks("video", WEIGHTS, WHOLE.working, H100, asked=54).reason == "as asked"
    with pytest.raises(InputError, match="--offload_blocks 55 is more than the 54 blocks of video"):
        budget.plan_blocks("video", WEIGHTS, WHOLE.working, H100, asked=55)
    with pytest.raises(InputError) as refused:
        budget.plan_blocks("video", WEIGHTS, WHOLE.working, budget.card(16), asked=0, remedies=lambda: ["no flag"])
    assert str(refused.value) == (
        "video needs 18.4 GiB of GPU memory (weights 15.5 GiB, working memory 2.9 GiB); "
        "free: GPU 15.2 GiB, host 64.0 GiB. What would help: no flag"
    )


def test_a_host_that_cannot_hold_the_offloaded_blocks_is_named():
    with pytest.raises(InputError, match=r"video with 42 of 54 blocks offloaded needs 11\.8 GiB of host memory"):
        budget.plan_blocks("video", WEIGHTS, WHOLE.working, FreeMemory(8 * GIB, 8 * GIB))


def test_on_a_cpu_each_process_has_its_own_weights_and_one_copy_is_shared():
    assert budget.plan_blocks("video", WEIGHTS, WHOLE.working, FreeMemory(None, 16 * GIB)).offloaded == 0
    with pytest.raises(InputError, match=r"video needs 31\.0 GiB of host memory"):
        budget.plan_blocks("video", WEIGHTS, WHOLE.working, FreeMemory(None, 30 * GIB), ranks=2)
    offloaded = budget.plan_blocks("video", WEIGHTS, WHOLE.working, FreeMemory(None, 18 * GIB), asked=54, ranks=2)
    assert offloaded.host == 54 * WEIGHTS.each


def test_left_heads_travel_to_all_shards():
    """Of 3 shards and 1 of 16 heads: its k and v go to 3 and come from 3, its q stays; q, k, v of 15 go and come."""
    three = replace(WHOLE, shards=3)
    left = replace(three, left=1 / 16)
    activation = (111_600 // 3 + 256) * 2048 * 2
    more = (15 * 6 + 2 * 3 + 2 * 3 + 1) / 16 - 6
    assert left.working - three.working == pytest.approx(more * activation, abs=2)


def test_the_longest_video():
    frame = 45 * 80
    for frames in (1, 5, 49, 121, 125, 1201):
        working = replace(WHOLE, video_tokens=geometry.video_tokens(frames, 720, 1280)).working
        assert estimates.longest_video(working, frame, WHOLE) == frames
        assert estimates.longest_video(working - 1, frame, WHOLE) == (frames - 4 if frames > 1 else None)


def seconds(denoising: DenoisingSize, offloaded: int = 0, **given) -> float | None:
    options = {"layers": 54, "branches": 2, "ranks": 1, "steps": 50} | given
    return timings.expected_seconds(given.pop("gpu", GPU), denoising, offloaded, **options)


def test_a_cache_is_in_the_expected_time():
    plain = seconds(WHOLE)
    for kind, share in (("deepcache", 0.0196), ("teacache", 0.0063 / 4.5), ("taylorcache", 0.0101 / 4.5)):
        settings = resolve(kind, {}, 50, 54)
        worth = timings.steps_worth([1.0] * 50, kind, settings.planned)
        assert worth == pytest.approx(25 + 25 * share)
        assert plain / seconds(WHOLE, steps=worth) == pytest.approx(50 / worth, rel=0.03)
    assert resolve("firstblock", {}, 50, 54).reused is None
    assert timings.steps_worth([1.0] * 50, "firstblock", None) is None
    assert seconds(WHOLE, steps=None) is None
    assert timings.steps_worth([1.0] * 50, None, None) == 50
    assert timings.steps_worth([1.0] * 20 + [0.5] * 30, None, None) == 35, "steps of one branch are half as long"
    assert timings.steps_worth([1.0, 0.5, 1.0], "deepcache", {1}) == pytest.approx(2 + 0.5 * 0.0196)


def test_expected_time_is_a_measured_one_or_unknown():
    assert seconds(WHOLE) == pytest.approx(50 * 17.94 + 17.7)
    assert seconds(replace(SHORT, kernel="cudnn"), 54, steps=10) == pytest.approx(43.8 + 14.4)
    assert seconds(WHOLE, 54) is None
    assert seconds(replace(WHOLE, kernel="flash2")) is None
    assert seconds(replace(WHOLE, video_tokens=111_601)) is None
    for other in ({"layers": 2}, {"branches": 1}, {"ranks": 2}, {"float8": True}):
        assert seconds(WHOLE, **other) is None
    assert timings.expected_seconds("NVIDIA A100", WHOLE, 0, layers=54, branches=2, ranks=1, steps=50) is None


def test_the_times_that_a_plan_states_are_those_of_the_benchmarks():
    by_hand = {
        (111_600, "flash4", True, 0, 17.94, 17.7),
        (46_800, "flash4", True, 0, 3.72, 17.8),
        (49_290, "flash4", True, 0, 4.19, 15.5),
        (111_600, "cudnn", True, 0, 21.69, 14.4),
        (111_600, "cudnn", True, 54, 21.54, 11.9),
        (46_800, "cudnn", True, 0, 4.35, 14.4),
        (46_800, "cudnn", True, 54, 4.38, 14.4),
        (111_600, "flash4", True, 0, 18.21, 0.66),
        (46_800, "flash4", True, 0, 3.71, 0.59),
    }
    steps = timings.measured_steps()
    assert {(s.tokens, s.kernel, s.fused, s.offloaded, s.seconds, s.extra) for s in steps} == by_hand
    assert len(steps) == len(by_hand) and {s.gpu for s in steps} == {GPU, "NVIDIA H200"}


# Stage 3

DECODER = {
    "latent_channels": 32,
    "block_out_channels": [128, 256, 512, 1024, 1024],
    "layers_per_block": 2,
    "spatial_compression_ratio": 16,
    "temporal_compression_ratio": 4,
}
DECODER_WEIGHTS = int(1.62 * GIB)
VIDEO = (121, 720, 1280)


def decoding(free: float, size: tuple[int, int, int] = VIDEO, **asked) -> planning.Decoding:
    memory = FreeMemory(int(free * GIB), 64 * GIB)
    return planning.fit_decoding(DECODER, DECODER_WEIGHTS, 2, size, memory, planning.Request(**asked))


def test_what_a_chunk_of_a_tile_takes():
    """Counted by hand: 3 tensors of 128 channels for 34 frames, and two frames of each convolution's input."""
    by_level = [7 * 1024 / 256, 7 * 1024 / 64, 7 * 512 / 16, 7 * 256 / 4, 7 * 128]
    remembered = 2 * sum(by_level)
    behind = (3 * 128 * 34 + remembered) * 256 * 256 * 2
    values = 1024 * 31 * 256 * 2
    assert planning.decoder_working(8, (121, 256, 256), 256 * 256, DECODER, 2) == behind + values
    # A video of a single chunk remembers nothing; the mid block then takes more than what is behind it.
    assert (
        planning.decoder_working(8, (1, 16, 16), 16 * 16, DECODER, 2)
        == max(3 * 128 * 3 * 256 * 2, 8 * 1024 * 2 + 10) + 1024 * 2
    )


LATENTS = 32 * 31 * 3600 * 2


def padded(rows: list[int], columns: list[int]) -> list[int]:
    """Positions of what convolutions take of frames, one more on every side."""
    return [(high + 2) * (wide + 2) for high, wide in zip(rows, columns, strict=True)]


ROWS, COLUMNS, WIDTHS = [45, 90, 180, 360, 720], [80, 160, 320, 640, 1280], [1024, 1024, 512, 256, 128]


def remembered(rows: list[int]) -> int:
    """Two frames of the input of each of 7 convolutions a level."""
    return sum(2 * 7 * width * area for width, area in zip(WIDTHS, padded(rows, COLUMNS), strict=True))


def test_what_a_chunk_of_whole_frames_takes():
    """By hand: a padded input, what goes on and a product, of 128 channels, for 8 frames; the pixels of the 8 before."""
    beside = 2 * 8 * 128 * 720 * 1280 + 3 * 8 * 720 * 1280
    behind = (10 * 128 * 722 * 1282 + beside + remembered(ROWS)) * 2
    assert planning.whole_working(2, 1, 1, VIDEO, DECODER, 2) == behind + 1024 * 31 * 3600 * 2 + LATENTS


def test_what_a_band_takes():
    """The upper of two bands, by hand: behind its 23 rows it needs 7 rows of the last level, and so on downwards."""
    rows = [23 + 14, 2 * 23 + 14, 4 * 23 + 13, 8 * 23 + 11, 16 * 23 + 7]
    beside = 2 * 4 * 128 * rows[-1] * 1280 + 3 * 4 * 16 * 23 * 1280
    behind = (6 * 128 * (rows[-1] + 2) * 1282 + beside + remembered(rows)) * 2
    assert planning.whole_working(1, 2, 1, VIDEO, DECODER, 2) == behind + 1024 * 31 * 3600 * 2 + LATENTS


def test_a_rank_takes_what_its_rows_take():
    """8 ranks, 6 rows each, in chunks of 8 latent frames."""
    beside = 2 * 32 * 128 * 96 * 1280 + 3 * 32 * 96 * 1280
    behind = (34 * 128 * 98 * 1282 + beside + remembered([6, 12, 24, 48, 96])) * 2
    assert planning.whole_working(8, 1, 8, VIDEO, DECODER, 2) == behind + 1024 * 31 * 480 * 2 + LATENTS
    assert decoding(80, ranks=8).latent_frames_per_chunk == 8


@pytest.mark.parametrize(
    ("size", "asked", "peak"),
    [
        (VIDEO, {"latent_frames_per_chunk": 1, "frames_per_piece": 4}, 10.91),
        (VIDEO, {}, 12.26),
        (VIDEO, {"frames_per_piece": 8}, 13.59),
        ((49, 720, 1280), {}, 12.13),
        ((121, 1072, 1904), {}, 22.11),
        (VIDEO, {"ranks": 2}, 10.55),
        (VIDEO, {"latent_frames_per_chunk": 1, "bands": 2}, 7.08),
        (VIDEO, {"latent_frames_per_chunk": 1, "bands": 4}, 4.93),
    ],
)
def test_whole_frames_take_what_is_planned(size, asked, peak):
    """The peaks of an H200, in GiB (benchmarks.json)."""
    with torch.device("meta"):
        decoder = VaeDecoder(VaeConfig())
    weights = 2 * sum(parameter.numel() for parameter in decoder.parameters())
    request = planning.Request(whole=True, **asked)
    plan = planning.fit_decoding(DECODER, weights, 2, size, FreeMemory(130 * GIB, 130 * GIB), request)
    assert peak <= round(plan.total / GIB, 2) <= peak + 0.3


def chosen(free: float, **given) -> tuple[int | None, int, int]:
    found = decoding(free, **given)
    return found.tile_size, found.bands, found.latent_frames_per_chunk


def test_whole_frames_then_bands_then_tiles():
    """The longest chunk of use, shorter ones, as few bands as fit, tiles of 256 px and of 128."""
    assert [chosen(free) for free in (80, 13.8, 12.8, 11.5)] == [(None, 1, 2), (None, 1, 2), (None, 1, 1), (None, 1, 1)]
    assert [decoding(free).frames_per_piece for free in (80, 12.8, 11.5)] == [4, None, 2]
    assert [chosen(free) for free in (10.5, 8, 7.25, 6)] == [(None, 2, 2), (None, 2, 1), (None, 3, 2), (None, 4, 1)]
    assert [chosen(free) for free in (5.5, 5, 4, 3.5)] == [(256, 1, 4), (256, 1, 2), (128, 1, 8), (128, 1, 4)]
    # The size of super resolution, also on a card of 24 GB; with less free in pieces of 2 frames.
    for free, piece in ((23.25, None), (21, 2)):
        assert chosen(free, size=(121, 1072, 1904)) == (None, 1, 1)
        assert decoding(free, size=(121, 1072, 1904)).frames_per_piece == piece
    assert chosen(20, size=(121, 1072, 1904)) == (None, 2, 1)
    assert decoding(80).reason == "the default"
    assert decoding(9).reason == "in one piece they would need 10.0 GiB, 9.0 GiB are free"
    assert decoding(4).reason == "whole frames in 8 bands of rows would need 5.1 GiB, 4.0 GiB are free"
    # A chunk's frames leave while the next come; in bands all wait for the last one.
    assert decoding(80).parts["frames"] == 2 * 8 * 720 * 1280 * 3
    assert decoding(9).parts["frames"] == (121 + 8) * 720 * 1280 * 3
    with pytest.raises(InputError, match=r"tiles of 128 px, 121 frames, needs 2\.6 GiB .*What would help: more memory"):
        decoding(2)


def test_several_ranks_decode_rows_or_tiles():
    assert chosen(79, ranks=2) == (None, 1, 4)
    assert chosen(8, ranks=2) == (None, 1, 1), "half of the rows, and no bands of them"
    assert chosen(5, ranks=2) == (256, 1, 2)
    assert decoding(5, ranks=2).reason == ("whole frames, rows over 2 processes would need 6.0 GiB, 5.0 GiB are free")
    assert decoding(79, ranks=2).describe(2) == "whole frames, rows over 2 processes"
    assert decoding(79, ranks=2, tile_size=256).describe(2) == "tiles of 256 px, tiles over 2 processes"
    assert decoding(6).describe() == "whole frames in 4 bands of rows"


def test_small_frames_go_in_longer_chunks():
    assert [chosen(80, size=(121, *sides))[2] for sides in ((480, 848), (192, 320), (1072, 1904))] == [4, 8, 1]


def test_what_was_asked_for_is_honoured_or_refused():
    assert decoding(80, tile_size=128).tile_size == 128
    assert decoding(80, tile_size=256).reason == "as asked"
    assert decoding(3.85, tile_size=256).latent_frames_per_chunk == 1, "without the reserve it fits"
    with pytest.raises(InputError, match=r"tiles of 256 px, 121 frames, needs 3\.8 GiB "):
        decoding(3.5, tile_size=256)
    assert chosen(24, whole=True) == (None, 1, 2)
    assert chosen(10.5, whole=True) == (None, 2, 2), "bands are whole frames, too"
    with pytest.raises(InputError, match=r"whole frames in 8 bands .*, 121 frames, needs 5\.1 GiB "):
        decoding(5, whole=True)


def fitting(
    free: float, size: tuple[int, int, int] = VIDEO, **asked
) -> list[tuple[str, tuple[int, int, int], int | None]]:
    """What would help, with the size and the tiles that it leads to."""

    def fit(size: tuple[int, int, int], request: planning.Request) -> planning.Decoding:
        memory = FreeMemory(int(free * GIB), 64 * GIB)
        return planning.fit_decoding(DECODER, DECODER_WEIGHTS, 2, size, memory, request)

    return [
        (flag, size, how.tile_size) for flag, size, how in timing.what_fits(fit, size, planning.Request(**asked), 4)
    ]


def test_other_tiles_or_fewer_frames_are_what_helps():
    assert fitting(3.5, tile_size=256) == [("no flag about tiles", VIDEO, 128)], "which is the same as to ask for them"
    assert fitting(5, whole=True) == [("no flag about tiles", VIDEO, 256), ("--tile_size 128", VIDEO, 128)]
    ((flag, size, _),) = fitting(2.2)
    assert flag == f"--video_length {size[0]} or less in stage 2" and size[1:] == VIDEO[1:]
    assert decoding(2.2, size=size).total <= 2.2 * GIB
    with pytest.raises(InputError):
        decoding(2.2, size=(size[0] + 4, *VIDEO[1:]))
    assert fitting(1) == []


def test_a_decoding_that_was_not_measured_is_estimated():
    card, whole = find_card(GPU), decoding(80, latent_frames_per_chunk=1)
    assert str(timing.decoding_time(card, DECODER, VIDEO, whole, 0.25, 1)) == "5.1 s"
    config = DECODER | {"latent_channels": 32, "out_channels": 3}
    bands = timing.decoding_time(card, config, VIDEO, decoding(9), 0.25, 1)
    assert bands.how == "an estimate" and bands.least < bands.most


def test_the_time_of_a_decoding_is_a_measured_one_or_unknown():
    def seconds(decoding: planning.Decoding, **given) -> float | None:
        options = {"gpu": GPU, "config": DECODER, "size": VIDEO, "overlap": 0.25, "ranks": 1} | given
        return timing.decoding_seconds(decoding=decoding, **options)

    tiles = decoding(80, tile_size=256)
    assert seconds(tiles) == 8.61
    in_one = decoding(80, frames_per_piece=8)
    assert seconds(in_one) == seconds(in_one, overlap=0) == 4.936
    assert seconds(decoding(80)) is None, "pieces were not measured"
    assert seconds(decoding(80, latent_frames_per_chunk=1)) == 5.133
    assert seconds(decoding(80, latent_frames_per_chunk=4, frames_per_piece=16)) == 4.858
    short = decoding(80, size=(49, 720, 1280), frames_per_piece=8)
    assert seconds(short, size=(49, 720, 1280)) == 1.997
    assert seconds(decoding(5)) is None, "shorter chunks were not measured"
    assert seconds(decoding(9)) is None, "bands were not measured"
    narrow = DECODER | {"block_out_channels": [16, 32, 32, 64, 64]}
    for other in ({"gpu": None}, {"gpu": "NVIDIA A100"}, {"config": narrow}, {"overlap": 0}, {"ranks": 2}):
        assert seconds(tiles, **other) is None


def test_a_tile_is_no_larger_than_the_frame():
    asked = planning.Request(tile_size=256)
    parts = planning.fit_decoding(DECODER, 1, 2, (9, 96, 160), FreeMemory(GIB, GIB), asked).parts
    values = 1024 * 3 * 60 * 2
    assert parts["working memory"] == 3 * 128 * 11 * 96 * 160 * 2 + values + planning.WORKSPACE
    on_host = planning.fit_decoding(DECODER, 1, 2, (9, 96, 160), FreeMemory(None, GIB), asked).parts
    assert on_host["working memory"] == 3 * 128 * 11 * 96 * 160 * 2 + values


# What is free


def machine(root: Path, cgroup: str, files: dict[str, str]) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text("MemTotal: 1000 kB\nMemAvailable:     800 kB\n")
    (root / "proc/self/cgroup").write_text(cgroup)
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


@pytest.mark.parametrize(
    ("cgroup", "files", "available"),
    [
        ("0::/\n", {}, 800 * 1024),
        ("", {}, 800 * 1024),
        ("0::/a/b\n", {"sys/fs/cgroup/a/b/memory.max": "max\n", "sys/fs/cgroup/a/b/memory.current": "1"}, 800 * 1024),
        (
            "0::/a/b\n",  # the parent's limit holds; its page cache is given back
            {
                "sys/fs/cgroup/a/b/memory.max": "max\n",
                "sys/fs/cgroup/a/b/memory.current": "1",
                "sys/fs/cgroup/a/memory.max": "1000",
                "sys/fs/cgroup/a/memory.current": "900",
                "sys/fs/cgroup/a/memory.stat": "anon 400\ninactive_file 200\nactive_file 50\n",
            },
            350,
        ),
        (
            "0::/host/path\n",  # a container that sees its own group as the mount
            {"sys/fs/cgroup/memory.max": "500", "sys/fs/cgroup/memory.current": "700"},
            0,
        ),
        (
            "5:cpu:/x\n4:memory:/x\n",
            {
                "sys/fs/cgroup/memory/x/memory.limit_in_bytes": "1000",
                "sys/fs/cgroup/memory/x/memory.usage_in_bytes": "300",
                "sys/fs/cgroup/memory/x/memory.stat": "total_inactive_file 10\ninactive_file 99\n",
            },
            710,
        ),
    ],
)
def test_host_memory_is_what_the_kernel_or_a_cgroup_leaves(tmp_path, cgroup, files, available):
    assert host_available(machine(tmp_path, cgroup, files)) == available
