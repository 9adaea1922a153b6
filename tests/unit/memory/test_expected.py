"""Cards and the time that is expected on them."""

from dataclasses import asdict

import pytest
import torch

from hunyuan_staged.attention import ssta
from hunyuan_staged.errors import InputError
from hunyuan_staged.memory import expected, operations, timings
from hunyuan_staged.memory.cards import Card, assumed_card, find_card, known_cards
from hunyuan_staged.memory.expected import Expected
from hunyuan_staged.models.vae_modules import VaeConfig, VaeDecoder, VaeEncoder
from hunyuan_staged.pipeline import vae_encoding

FULL = {"layers": 54, "heads": 16, "width": 128, "mlp_ratio": 4.0}


def test_every_card_has_memory_rate_capability_and_source():
    rows = timings.benchmarks()["cards"]
    assert len({row["name"] for row in rows}) == len(rows)
    for row in rows:
        assert row["memory_gb"] >= 8 and 20 < row["bf16_tflops"] < 3000 and row["source"]
        assert (8, 0) <= tuple(row["capability"]) <= (12, 1), "what bf16 and the kernels need"
    names = " ".join(row["name"] for row in rows)
    assert all(name in names for name in ("3090", "4090", "5090", "L40S", "A100", "H100", "H200", "B200"))


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("4090", "NVIDIA GeForce RTX 4090"),
        ("rtx 4060ti", "NVIDIA GeForce RTX 4060 Ti"),
        ("4060", "NVIDIA GeForce RTX 4060"),
        ("a100", "NVIDIA A100-SXM4-80GB"),
        ("A100 40GB", "NVIDIA A100-SXM4-40GB"),
        ("NVIDIA H100 80GB HBM3", "NVIDIA H100 80GB HBM3"),
        ("24", None),
        ("24 gb", None),
    ],
)
def test_a_card_is_named_or_given_by_its_memory(said, name):
    card = assumed_card(said)
    assert card.name == name
    assert card == (find_card(name) or Card(None, 24.0))


@pytest.mark.parametrize("said", ["", "rtx", "0", "-1", "4091", "h100 24gb", "24 GiB", "nan"])
def test_other_words_are_refused_with_the_names(said):
    with pytest.raises(InputError, match=r"neither GB of memory nor a known card; known: RTX 3070, .*, B200$"):
        assumed_card(said)


def test_the_operations_are_those_of_the_measured_steps():
    """share_of_peak of the benchmarks was computed by bench from what it ran."""
    peak = timings.benchmarks()["practical_peak_tflops"] * 1e12
    rows = [row for row in timings.benchmarks()["steps"] if row["in_plan"] and row["share_of_peak"]]
    assert len(rows) >= 5
    for row in rows:
        tokens = ((row["num_frames"] - 1) // 4 + 1) * row["height"] * row["width"] // 256
        flops = row["branches"] * operations.step_flops(tokens, operations.TEXT_TOKENS, **FULL)
        assert flops == pytest.approx(row["seconds"] * row["share_of_peak"] * peak, rel=0.02)


def test_the_measured_times_lie_in_the_estimated_ranges():
    h100 = find_card("NVIDIA H100 80GB HBM3")
    for row in timings.benchmarks()["steps"]:
        if row["in_plan"] and row["fused"]:
            tokens = ((row["num_frames"] - 1) // 4 + 1) * row["height"] * row["width"] // 256
            flops = row["branches"] * operations.step_flops(tokens, operations.TEXT_TOKENS, **FULL)
            range_ = expected.estimated(flops, flops, h100)
            assert range_.least < row["seconds"] < range_.most


def test_a_process_has_its_share_of_the_operations():
    whole = operations.step_flops(1000, 0, **FULL)
    assert operations.step_flops(1000, 0, shards=4, **FULL) == pytest.approx(whole / 4)
    attention = 54 * operations.attention_flops(1000, 16, 128)
    # 16 heads on 3 processes: the one that is left over is everybody's, but in sparse attention one process has 6.
    linear = operations.step_flops(999, 0, attended=0.0, **FULL)
    for attended, share in ((1.0, 1 / 3), (0.5, 0.5 * 6 / 16)):
        three = operations.step_flops(999, 0, shards=3, attended=attended, **FULL)
        assert three == pytest.approx(attention * 0.999**2 * share + linear / 3)
    assert ssta.attended_share((31, 45, 80)) == pytest.approx((27 + 32) / (6 * 6 * 10))
    assert ssta.attended_share((5, 6, 10)) == 1


def test_parts_add_up_and_small_estimates_do_not_hide_what_was_measured():
    assert expected.total([Expected(1, 2), Expected(10, 10)]) == Expected(11, 12)
    assert expected.total([Expected(1, 2), None]) is None
    assert expected.total([Expected(0.1, 0.2), Expected(100, 100)]).how == "measured"
    assert expected.estimated(1e12, 2e12, Card("x", 1, tflops=1.0, reached=(0.5, 1.0))) == Expected(1, 4)
    assert expected.estimated(1, 1, Card(None, 33)) is None
    assert str(Expected(914.7, 914.7)) == "15.2 min"
    assert [str(Expected(a, b)) for a, b in ((3.4, 5.6), (70, 700), (3600, 11000))] == [
        *("3.4 to 5.6 s", "1.2 to 12 min", "1.0 to 3.1 hours"),
    ]


def test_a_driver_calls_no_two_cards_the_same():
    assert find_card(None) is None and find_card("NVIDIA T4") is None
    assert all(find_card(card.name) == card for card in known_cards())


def convolved(module: torch.nn.Module, x: torch.Tensor) -> float:
    """Operations of a module's 3 x 3 x 3 convolutions, by what goes through them."""
    found = []
    for layer in module.modules():
        if isinstance(layer, torch.nn.Conv3d) and layer.kernel_size == (3, 3, 3):
            layer.register_forward_hook(lambda layer, _, out: found.append(54.0 * layer.in_channels * out.numel()))
    module(x)
    return sum(found)


def test_the_operations_of_the_vae_are_those_of_its_convolutions():
    config = VaeConfig()
    with torch.device("meta"), torch.no_grad():
        encoded = convolved(VaeEncoder(config), torch.empty(1, 3, 9, 32, 48))
        decoded = convolved(VaeDecoder(config), torch.empty(1, 32, 3, 2, 3))
    assert operations.encoder_flops(asdict(config), 9, 32, 48) == encoded
    assert operations.decoder_flops(asdict(config), 3, 2, 3) == decoded


def test_encoding_a_video_takes_as_long_as_measured_or_by_its_operations():
    h200 = find_card("NVIDIA H200")
    video, config = (121, 720, 1280), asdict(VaeConfig())
    one, two = (vae_encoding.EncodingPlan(video, ranks, {}) for ranks in (1, 2))
    measured = vae_encoding.encoding_time(one, config, h200)
    assert measured == expected.measured(3.285)
    estimate = vae_encoding.encoding_time(two, config, h200)
    assert estimate.how == "an estimate" and estimate.least < estimate.most < measured.least
    other = vae_encoding.encoding_time(one, config | {"block_out_channels": [8, 8, 8, 8, 8]}, h200)
    assert other.most < 1
