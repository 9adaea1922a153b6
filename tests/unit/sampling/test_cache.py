"""Feature caches: the plan, what each type computes, several processes against one, and going on from a saved state."""

import copy
import functools
import json
import os
import shutil
import signal
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from folders import embed
from forked import Moment, run_stage
from forked import run_ranks as run_stages
from golden_models import CPU, build, distance, golden_branches, load

from hunyuan_staged.attention.choose import choose_attention
from hunyuan_staged.demo import CHECKPOINT
from hunyuan_staged.errors import InputError
from hunyuan_staged.files.tensors import load_latents, load_state
from hunyuan_staged.memory.offloading import stream_blocks
from hunyuan_staged.models.transformer import Transformer
from hunyuan_staged.parallel.layout import Layout
from hunyuan_staged.parallel.world import World
from hunyuan_staged.sampling import calibration
from hunyuan_staged.sampling.cache import Cache
from hunyuan_staged.sampling.cache_settings import CACHE_TYPES, CacheSettings, check_flags, resolve
from hunyuan_staged.sampling.calibration import Calibration, Curve, Polynomial, noise_levels, parse, published
from hunyuan_staged.sampling.conditions import condition_channels
from hunyuan_staged.sampling.loop import Sampling, denoise
from hunyuan_staged.sampling.schedule import flow_sigmas
from hunyuan_staged.weights.fingerprint import CALIBRATION_FILE

INF = float("inf")
ALONE = World(0, 1, CPU)
STEPS = 8
# Of 8 steps: computed 0 1 2 5, reused 3 4 6.
PLAN = {"steps": STEPS, "start": 2, "end": 7, "interval": 3}


def settings(kind: str, **other) -> CacheSettings:
    more = {"edge": 1} if kind == "deepcache" else {}
    more |= {"threshold": INF} if kind in ("firstblock", "magcache") else {}
    if kind == "magcache":
        reused_steps = set() if other.get("threshold") == 0 else {3, 4, 6}
        more["chosen"] = frozenset(reused_steps)
    return CacheSettings(kind, **(PLAN | more | other))


def reused(chosen: CacheSettings) -> list[int]:
    return [step for step in range(chosen.steps) if chosen.may_reuse(step)]


# -- the plan --


def test_the_defaults_are_the_official_schedule_of_50_steps():
    """no_cache_steps = range(0, 11) + range(11, 45, 4) + range(45, 50): 25 computed, 25 reused."""
    chosen = resolve("deepcache", {}, 50, 54)
    computed = {*range(11), *range(11, 45, 4), *range(45, 50)}
    assert reused(chosen) == sorted(set(range(50)) - computed) and len(reused(chosen)) == 25
    assert chosen.edge == 53 and chosen.last_reuse == 44
    assert chosen.record() == {
        "type": "deepcache",
        "start_step": 11,
        "end_step": 45,
        "step_interval": 4,
        "no_cache_block_id": 53,
    }


@pytest.mark.parametrize(
    ("steps", "plan", "count"), [(100, (22, 90, 8), 59), (30, (7, 27, 2), 10), (12, (3, 11, 2), 4), (8, (2, 7, 2), 2)]
)
def test_other_schedules_keep_their_share(steps, plan, count):
    chosen = resolve("teacache", {}, steps, 54)
    assert (chosen.start, chosen.end, chosen.interval) == plan
    assert len(reused(chosen)) == count
    given = {"cache_start_step": 1, "cache_end_step": 90, "cache_step_interval": 3}
    chosen = resolve("teacache", given, steps, 54)
    assert (chosen.start, chosen.end, chosen.interval) == (1, 90, 3), "what is given is taken as it is"


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        (
            "teacache",
            {"no_cache_block_id": "53"},
            "--no_cache_block_id belongs to --cache_type deepcache, not to teacache",
        ),
        (
            "deepcache",
            {"cache_threshold": 0.1},
            "--cache_threshold belongs to --cache_type teacache, firstblock, magcache, not to deepcache",
        ),
        ("magcache", {"cache_threshold": -0.1}, "--cache_threshold -0.1 is not a number from 0 on"),
        ("magcache", {"cache_threshold": float("nan")}, "--cache_threshold nan is not a number from 0 on"),
        ("teacache", {"cache_step_interval": 1}, "--cache_step_interval 1 reuses no step; 2 computes every other one"),
        ("teacache", {"cache_start_step": -1}, "--cache_start_step -1 is below 0"),
        ("teacache", {"cache_end_step": 0}, "--cache_end_step 0 is below 1"),
        (
            "teacache",
            {"cache_start_step": 9, "cache_end_step": 9},
            "--cache_end_step 9 is not behind --cache_start_step 9",
        ),
        ("deepcache", {"no_cache_block_id": "9-3"}, "--no_cache_block_id '9-3' is not FIRST-LAST"),
        ("quickcache", {}, "--cache_type 'quickcache' is unknown; known: deepcache, teacache"),
    ],
)
def test_flags_that_no_run_can_use(kind, given, message):
    with pytest.raises(InputError) as error:
        check_flags(kind, given)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("given", "steps", "message"),
    [
        ({"no_cache_block_id": "20"}, 50, "of 54 blocks that is 53, or FIRST-53 with FIRST from 1 on"),
        ({"no_cache_block_id": "50-60"}, 50, "of 54 blocks that is 53"),
        ({"no_cache_block_id": "0-53"}, 50, "of 54 blocks that is 53"),
        ({}, 2, "of 2 steps none between --cache_start_step 1 and --cache_end_step 2 can be reused"),
        ({"cache_start_step": 30}, 30, "of 30 steps none between --cache_start_step 30 and --cache_end_step 27"),
    ],
)
def test_settings_that_a_run_cannot_have(given, steps, message):
    with pytest.raises(InputError) as error:
        resolve("deepcache", given, steps, 54)
    assert message in str(error.value)
    assert resolve("deepcache", {"no_cache_block_id": "50-53"}, 50, 54).edge == 50


# -- what each type computes, over blocks that only add --


class Adding:
    """Two blocks; at step t the first adds 1 + t/100 to the video and 2 to the text, the second first(t) + the text."""

    def __init__(self) -> None:
        self.step, self.runs = 0, []

    def __call__(self, video, text, first, last):
        for block in range(2)[first:last]:
            self.runs.append((self.step, block))
            video = video + (1 + self.step / 100) if block == 0 else video + 10 + self.step + text.mean()
            text = text + 2
        return video, text


def outcomes(chosen: CacheSettings) -> tuple[list[float], list[tuple[int, int]], Cache]:
    """The video behind the last block at each step, for an input of 1000 * step and a text of zeros."""
    cache, blocks, found = Cache(chosen, Layout(), 3), Adding(), []
    for step in range(STEPS):
        blocks.step = step
        video = cache(0, step, blocks, torch.full((1, 3, 2), 1000.0 * step), torch.zeros(1, 4, 2))
        found.append(video.mean().item())
    return found, blocks.runs, cache


def plain(step: int, video: float | None = None) -> float:
    return (1000 * step if video is None else video) + 1 + step / 100 + 10 + step + 2


def test_deepcache_takes_what_came_before_the_last_block():
    found, runs, cache = outcomes(settings("deepcache"))
    before = {3: 2, 4: 2, 6: 5}
    for step, value in enumerate(found):
        source = before.get(step, step)
        assert value == pytest.approx(1000 * source + 1 + source / 100 + 10 + step + 2)
    assert [run for run in runs if run[0] in before] == [(3, 1), (4, 1), (6, 1)]
    assert cache.counts == (5, 3) and not cache.branches, "the state is freed"


def test_teacache_adds_what_all_blocks_added():
    found, runs, cache = outcomes(settings("teacache"))
    for step, value in enumerate(found):
        source = {3: 2, 4: 2, 6: 5}.get(step, step)
        assert value == pytest.approx(1000 * step + plain(source, 0))
    assert not [run for run in runs if run[0] in (3, 4, 6)]
    assert cache.counts == (5, 3) and not cache.branches


def test_taylorcache_follows_what_grows_evenly():
    """The blocks add a linear function of the step, which a first-order expansion gives exactly."""
    found, _, cache = outcomes(settings("taylorcache"))
    assert found == pytest.approx([plain(step) for step in range(STEPS)])
    assert cache.counts == (5, 3) and not cache.branches


def test_firstblock_computes_the_first_block_and_stops_at_the_threshold():
    """The first block's addition changes by 1/102 a step from step 2 on, so 0.015 lets one step pass, and inf two."""
    found, runs, cache = outcomes(settings("firstblock", threshold=0.015))
    assert [step for step in range(STEPS) if (step, 1) not in runs] == [3, 5]
    assert [step for step in range(STEPS) if (step, 0) in runs] == list(range(STEPS))
    for step, value in enumerate(found):
        source = {3: 2, 5: 4}.get(step, step)
        assert value == pytest.approx(1000 * step + 1 + step / 100 + 10 + source + 2)
    assert cache.counts == (6, 2) and not cache.branches
    assert [step for step in range(STEPS) if (step, 1) not in outcomes(settings("firstblock"))[1]] == [3, 4, 6]


# What the blocks add, recorded at 8 steps of shift 5: it grows by 10 % a step to step 4, and shrinks by 1 % after it.
GROWING = Curve(
    STEPS, 5.0, ((1.0, 1.1, 1.1, 1.1, 1.1, 0.99, 0.99, 0.99),) * 2, "a test", threshold=0.25, retention=0.25
)


def magcache(steps: int = STEPS, shift: float = 5.0, **flags) -> CacheSettings:
    given = {f"cache_{name}": value for name, value in flags.items()}
    return resolve("magcache", given, steps, 54, Calibration(curves=(GROWING,)), noise_levels(steps, shift))


def test_magcache_reuses_while_the_recorded_size_drifts_little():
    """From step 2 on: 0.1 is below 0.25, 0.1 + 0.21 is not; from step 3 0.1 + 0.089, and then 0.078 more is not."""
    assert sorted(magcache().planned) == [2, 4, 5, 7] and not magcache().adapts
    assert sorted(magcache(threshold=0.1).planned) == [5, 6, 7]
    assert sorted(magcache(threshold=0.02).planned) == [5, 7]
    assert magcache(threshold=0.0).planned == frozenset() and magcache(threshold=0.0).last_reuse == -1
    assert sorted(magcache(threshold=INF, step_interval=3).planned) == [2, 3, 5, 6]
    assert magcache().record()["reused_steps"] == [2, 4, 5, 7] and magcache().record()["threshold"] == 0.25


def test_a_curve_serves_other_schedules_by_the_nearest_sigma():
    whole = GROWING.sizes_of(noise_levels(STEPS, 5.0))[0]
    assert whole == pytest.approx([1.1**n for n in range(5)] + [1.1**4 * 0.99**n for n in range(1, 4)])
    fewer, more = (GROWING.sizes_of(noise_levels(*schedule)) for schedule in ((4, 5.0), (30, 9.0)))
    assert fewer[1] == [whole[n] for n in (0, 2, 4, 6)], "ratios of what is left out multiply"
    assert len(more[0]) == 30 and set(more[0]) <= set(whole)


def test_a_branch_that_did_not_run_at_the_source_computes_the_step():
    """Step 3 takes over from step 2; a branch that step 2 left out has an older state, or none."""
    cache, blocks = Cache(settings("teacache"), Layout(), 3), Adding()
    for branch, step in ((0, 1), (1, 2), (0, 3), (1, 3), (2, 3)):
        blocks.step = step
        cache(branch, step, blocks, torch.zeros(1, 3, 2), torch.zeros(1, 4, 2))
    assert [run for run in blocks.runs if run[1] == 0] == [(1, 0), (2, 0), (3, 0), (3, 0)], "branch 1 reused step 3"


class Modulating(Adding):
    """Whose first block makes of the video what the step says: 1, 2, 4, 8, ..: twice what it was, a change of 1."""

    def modulated(self, video):
        return torch.full_like(video, 2.0**self.step)


def test_teacache_with_a_threshold_adds_up_the_polynomial():
    """1 a step by the identity: below 2.5 two steps in a row pass, below 1.5 one; first and last steps are computed."""
    calibration = Calibration(Polynomial((1.0, 0.0), "a test"))
    for threshold, computed in ((2.5, [0, 3, 6, 7]), (1.5, [0, 2, 4, 6, 7]), (0.5, list(range(STEPS)))):
        chosen = resolve("teacache", {"cache_threshold": threshold}, STEPS, 54, calibration)
        assert chosen.adapts and chosen.record()["coefficients"] == [1.0, 0.0]
        cache, blocks = Cache(chosen, Layout(), 3), Modulating()
        for step in range(STEPS):
            blocks.step = step
            cache(0, step, blocks, torch.full((1, 3, 2), 1000.0 * step), torch.zeros(1, 4, 2))
        assert sorted({step for step, _ in blocks.runs}) == computed, threshold


@pytest.mark.parametrize(("kind", "given"), [("magcache", {}), ("teacache", {"cache_threshold": 0.1})])
def test_a_cache_without_its_calibration_is_refused(kind, given):
    with pytest.raises(InputError, match=r"needs a calibration of these weights.*hunyuan_staged.calibrate records one"):
        resolve(kind, given, 50, 54)


def test_published_calibrations_are_for_the_version_that_they_were_made_for():
    found = {name: published(name) for name in ("480p_t2v", "720p_t2v", "480p_i2v", "720p_i2v")}
    assert {name: len(one.polynomial.coefficients) for name, one in found.items()} == {
        "480p_t2v": 6,
        "720p_t2v": 6,
        "480p_i2v": 5,
        "720p_i2v": 5,
    }
    assert {name: [curve.steps for curve in one.curves] for name, one in found.items() if one.curves} == {
        "720p_t2v": [20, 40],
        "480p_i2v": [50],
    }
    curve = found["480p_i2v"].curve(30)
    assert (curve.ratios[1][49], curve.ratios[0][47], curve.ratios[1][31]) == (0.88672, 0.93359, 0.99219)
    assert found["720p_t2v"].curve(50).steps == 40 and published("720p_t2v_distilled") is None


@pytest.mark.parametrize(
    "content", [[], {"magcache": [{}]}, {"teacache": {"coefficients": ["x"], "source": ""}}, {"magcache": 3}]
)
def test_a_broken_calibration_is_refused(content):
    with pytest.raises(InputError, match="a file is no calibration of caches"):
        parse(content, "a file")


def test_bench_counts_a_run_from_its_computed_and_reused_steps():
    """Each block of Adding costs a second: of 50 steps 25 take two, and 25 one (deepcache) or none (magcache)."""
    from hunyuan_staged.bench.command import build_parser
    from hunyuan_staged.bench.stage2 import cached_seconds

    for kind, share, state in (("deepcache", 1, 3 * 2 * 4 + 4 * 2 * 4), ("magcache", 0, 3 * 2 * 4)):
        args = build_parser().parse_args(["stage2", "--cache_type", kind])
        blocks = Adding()

        def step(through, blocks=blocks) -> float:
            before, blocks.step = len(blocks.runs), blocks.step + 1
            through(0, 0, blocks, torch.zeros(1, 3, 2), torch.zeros(1, 4, 2))
            return float(len(blocks.runs) - before)

        found = cached_seconds(args, step, Layout(), SimpleNamespace(total=3), 2, 2.0)
        assert found["computed_step_seconds"] == 2 and found["reused_step_seconds"] == share
        assert found["steps_computed_and_reused"] == [25, 25]
        assert found["run_seconds"] == 50 + 25 * share and found["run_seconds_without"] == 100
        assert found["times_as_fast"] == round(100 / (50 + 25 * share), 3)
        assert found["state_gib_per_rank"] == round(state / 2**30, 3)


def test_the_demo_compares_each_type_at_three_strengths(tmp_path):
    """Latents that are off by a tenth for each reused step."""
    from hunyuan_staged.demo import caches

    def latents(prompt, seed, setting, caching):
        count = sum(map(caching.may_reuse, range(30))) if caching else 0
        return torch.ones(1, 2, 2, 2, 2) * (1 + count / 10), (30 - count, count)

    generator = SimpleNamespace(
        setting=lambda: SimpleNamespace(steps=30),
        caching=lambda kind, given: resolve(kind, given, 30, 5, calibration.flat(30), [1.0] * 30),
        latents=latents,
    )
    tenth_more = SimpleNamespace(latents=lambda *given: (latents(*given)[0] + 0.1, latents(*given)[1]))
    rows = caches.measure({"torch": generator, "sageattn": tenth_more}, ["deepcache", "magcache"], 2)
    assert [row["type"] for row in rows] == (["none"] + ["deepcache"] * 3 + ["magcache"] * 3) * 2
    assert [row["attn_mode"] for row in rows] == ["torch"] * 7 + ["sageattn"] * 7
    assert [row["error"] for row in rows[7:9]] == [0.1, 1.1]  # against the exact mode without a cache
    assert rows[0]["error"] == 0 and rows[0]["computed"] == 1
    # Of the steps 7 to 26 every 2nd, 3rd and 5th is computed: 10, 13 and 16 are reused.
    assert [row["error"] for row in rows[1:4]] == [1.0, 1.3, 1.6]
    assert [row["computed"] for row in rows[1:4]] == [round((30 - n) / 30, 4) for n in (10, 13, 16)]
    assert rows[5]["settings"]["threshold"] == 0.06
    caches.plot(rows, tmp_path / "caches.png")
    assert (tmp_path / "caches.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompts", "0"], "--prompts 0 is not a positive number"),
        (
            ["--attn_modes", "sageattn"],
            "--attn_mode sageattn needs a GPU, and this run is on a cpu; use flash or torch",
        ),
    ],
)
def test_the_demos_comparison_refuses_in_one_line(flags, message, tmp_path, capsys, monkeypatch):
    from hunyuan_staged.demo import caches

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert caches.main(["--model_path", str(CHECKPOINT), "--output_dir", str(tmp_path / "out"), *flags]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"
    assert not (tmp_path / "out").exists()


# -- in the loop --


@functools.cache
def golden_model(folder):
    return build(folder, json.loads(load(folder / "dit_t2v.safetensors")[1]["config"]), "dit_shapes")


def run_loop(folder, chosen: CacheSettings | None, layout: Layout | None = None, device=CPU, **options):
    """The latents of STEPS guided steps of the golden model, and the cache. With `streamed` its blocks are offloaded."""
    tensors, _ = load(folder / "loop_cfg6_shift5.safetensors")
    branches = golden_branches(tensors, device)
    model, blocks = copy.deepcopy(golden_model(folder)), None
    if options.pop("streamed", False):
        blocks = stream_blocks(model, device)
    model = model if blocks else model.to(device)
    attention = choose_attention("torch", device, torch.float32)
    forward = Transformer(model, attention, tensors["noise"].shape[2:], layout, blocks)
    cache = Cache(chosen, layout or Layout(), forward.total) if chosen else None
    if cache and "restored" in options:
        cache.restore(options.pop("restored"), options["start"], CPU, 2)
    noise = options.pop("noise", tensors["noise"]).to(device)
    watch = options.pop("watch", None)
    latents = denoise(
        forward,
        noise,
        condition_channels(noise, None),
        branches,
        flow_sigmas(STEPS, 5.0),
        Sampling(6.0, layout=layout, cache=cache, start=options.pop("start", 0)),
        on_step=partial(watch, cache) if watch else None,
        **options,
    )
    return latents, cache


@pytest.fixture(scope="module")
def uncached(golden_folder) -> torch.Tensor:
    return run_loop(golden_folder, None)[0]


@pytest.mark.parametrize("kind", CACHE_TYPES)
def test_a_cached_loop_is_near_the_plain_one_and_goes_on_to_the_same_bits(golden_folder, uncached, kind):
    """From the state after every step: as a stopped run does. The state is as large as the plan has it."""
    chosen, states, sizes = settings(kind), {}, {0}

    def watch(cache, step, latents, _):
        sizes.add(
            sum(x.nbytes for branch in cache.branches.values() for name, x in branch.kept.items() if name != "text")
        )
        states[step + 1] = latents.clone(), {n: x.clone() for n, x in cache.tensors(ALONE).items()}

    latents, cache = run_loop(golden_folder, chosen, watch=watch)
    assert cache.counts == (5, 3) and cache.state_bytes == 0
    config = golden_model(golden_folder).config
    activation = cache.total * config.num_attention_heads * config.attention_head_dim * 4
    assert max(sizes) == (chosen.kept(2) - (3 if kind == "firstblock" else 1)) * activation
    assert 1e-6 < distance(latents, uncached) < 0.5
    assert {done for done, (_, state) in states.items() if state} == set(range(chosen.first_kept + 1, 7))
    for done in (3, 4, 6):
        noise, state = states[done]
        again, _ = run_loop(golden_folder, chosen, noise=noise, start=done, restored=state)
        assert torch.equal(again, latents), done


@pytest.mark.parametrize("kind", ["firstblock", "magcache"])
def test_a_threshold_of_0_reuses_nothing(golden_folder, uncached, kind):
    latents, cache = run_loop(golden_folder, settings(kind, threshold=0.0))
    assert torch.equal(latents, uncached) and cache.counts == (STEPS, 0)


@pytest.mark.parametrize("kind", ["deepcache", "firstblock"])
def test_offloaded_blocks_give_the_same_bits(golden_folder, kind):
    """Those that a reused step computes are fetched alone; a block that is still in its slot is not fetched again."""
    resident, streamed = (run_loop(golden_folder, settings(kind), streamed=s)[0] for s in (False, True))
    assert torch.equal(resident, streamed)


@pytest.mark.gpu
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("kind", CACHE_TYPES)
def test_on_a_gpu_a_cached_loop_gives_what_it_gives_on_a_cpu(golden_folder, kind, streamed):
    expected, _ = run_loop(golden_folder, settings(kind))
    latents, cache = run_loop(golden_folder, settings(kind), device=torch.device("cuda"), streamed=streamed)
    assert cache.counts == (5, 3) and distance(latents.cpu(), expected) < 1e-3


def test_a_state_that_does_not_fit_is_refused():
    cache = Cache(settings("teacache"), Layout(), 3)
    fits = {"cache.0.order0": torch.zeros(1, 3, 2), "cache.0.numbers": torch.tensor([2.0], dtype=torch.float64)}
    cache.restore(fits, 4, CPU, 1)
    assert cache.branches[0].numbers == {"step": 2.0}
    for broken in ({}, fits | {"cache.0.order0": torch.zeros(1, 4, 2)}, {"cache.0.order0": torch.zeros(1, 3, 2)}):
        with pytest.raises(InputError, match="the saved state of teacache does not fit this run"):
            Cache(settings("teacache"), Layout(), 3).restore(broken, 4, CPU, 1)


# -- through the script --

CACHED = ["--enable_cache", "--cache_type"]
SMALL = ["--video_length", 5, "--num_inference_steps", STEPS, "--cache_start_step", 2, "--cache_end_step", 7]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, tiny_official):
    found = calibration.flat(STEPS).curves[0]
    content = {"magcache": [{"steps": STEPS, "flow_shift": 5.0, "ratios": found.ratios, "source": "a test"}]}
    own = tmp_path_factory.mktemp("calibrated") / "model"
    shutil.copytree(tiny_official, own, copy_function=os.link)
    for folder in (own / "transformer").iterdir():
        (folder / CALIBRATION_FILE).write_text(json.dumps(content))
    return embed(tmp_path_factory.mktemp("inputs"), own)


@pytest.mark.parametrize("kind", ["deepcache", "magcache"])
def test_a_stopped_run_with_a_cache_goes_on_to_the_same_bits(inputs, tmp_path, kind):
    args = ["--input_dir", inputs, *SMALL, "--cache_step_interval", 4, *CACHED, kind]
    status, said = run_stage(2, *args, "--output_dir", tmp_path / "whole", said=tmp_path / "said")
    assert status == 0, said
    whole, metadata = load_latents(tmp_path / "whole")
    assert json.loads(metadata["cache"])["type"] == kind
    if kind == "deepcache":
        assert "deepcache: 5 steps computed, 3 reused" in said and "5 computed, 3 reused" in said
    args += ["--output_dir", tmp_path / "stopped"]
    moment = Moment("hunyuan_staged.sampling.loop.euler_step", 4, (signal.SIGTERM,))
    status, said = run_stage(2, *args, said=tmp_path / "said", moment=moment)
    assert status == 143, said
    assert any(name.startswith("cache.1.") for name in load_state(tmp_path / "stopped")[0])
    status, said = run_stage(2, *args, "--resume", "--cache_step_interval", 3, said=tmp_path / "said")
    assert status == 2 and "belongs to other settings: cache: was" in said
    status, said = run_stage(2, *args, "--resume", said=tmp_path / "said")
    assert status == 0, said
    assert torch.equal(load_latents(tmp_path / "stopped")[0], whole)
    assert "tolerance" not in said


@pytest.mark.parametrize(("kind", "size", "resumed"), [("taylorcache", 2, 2), ("firstblock", 4, 1), ("magcache", 1, 4)])
def test_any_number_of_processes_saves_and_goes_on(inputs, tmp_path, kind, size, resumed):
    """2: a branch each, the same arithmetic, so the same bits. 4: each branch on two shards, whose sums round otherwise."""
    args = ["--input_dir", inputs, *SMALL, "--cache_step_interval", 4, *CACHED, kind]
    args += ["--cache_threshold", "inf"] if kind != "taylorcache" else []
    status, said = run_stage(2, *args, "--output_dir", tmp_path / "whole", said=tmp_path / "said")
    assert status == 0 and "steps computed" in said, said
    moment, folder = Moment("hunyuan_staged.sampling.loop.euler_step", 4, (signal.SIGTERM,)), tmp_path / "parted"
    args += ["--output_dir", folder]
    ranks = run_stages(2, size, *args, said=tmp_path / "said", moments=dict.fromkeys(range(size), moment))
    assert [rank.status() for rank in ranks] == [143] * size, ranks[0].said()
    state = load_state(folder)[0]
    assert any(name.startswith("cache.0.") for name in state) and any(name.startswith("cache.1.") for name in state)
    ranks = run_stages(2, resumed, *args, "--resume", said=tmp_path / "said")
    assert [rank.status() for rank in ranks] == [0] * resumed, ranks[0].said()
    parted, whole = (load_latents(tmp_path / name)[0] for name in ("parted", "whole"))
    assert torch.equal(parted, whole) if kind == "taylorcache" else distance(parted, whole) < 1e-4


def test_cache_flags_without_a_cache_are_refused(inputs, tmp_path):
    status, said = run_stage(2, "--input_dir", inputs, "--cache_type", "teacache", said=tmp_path / "said")
    assert status == 2 and "error: --cache_type needs --enable_cache" in said
    args = ["--input_dir", inputs, "--enable_cache", "--cache_threshold", 0.1]
    status, said = run_stage(2, *args, said=tmp_path / "said")
    assert (
        status == 2
        and "--cache_threshold belongs to --cache_type teacache, firstblock, magcache, not to deepcache" in said
    )
