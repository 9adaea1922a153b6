"""How long the denoising loop takes on a card: as just such a step was measured, else estimated."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hunyuan_staged.attention import ssta
from hunyuan_staged.attention.modes import SPARSE_ATTN_MODE
from hunyuan_staged.memory import expected as times
from hunyuan_staged.memory import operations, timings
from hunyuan_staged.memory.budget import BlockPlan
from hunyuan_staged.memory.cards import Card
from hunyuan_staged.memory.expected import Expected
from hunyuan_staged.parallel.layout import plan_layout
from hunyuan_staged.sampling.cache_settings import CacheSettings

if TYPE_CHECKING:
    from hunyuan_staged.pipeline.denoising import DenoiseSetup


def denoising_time(setup: "DenoiseSetup", plan: BlockPlan, card: Card, done: int = 0) -> Expected | None:
    """Seconds of the denoising loop on a card: as just such a step was measured, else estimated.

    done: steps that a stopped run has done.
    """
    settings, size, caching = setup.settings, setup.size, setup.caching
    side_by_side, shards = plan_layout(setup.world.size, settings.branches, setup.cfg_parallel)
    # Of a draft the first steps alone; what is done takes no time, and stands in its place for the cache's plan.
    shares = [0.0] * done + setup.step_shares[done : setup.options.stop_after]
    if not any(shares):
        return times.measured(0)
    least, most = computed_steps(shares, caching)
    found = timings.expected_seconds(
        card.name,
        size,
        plan.offloaded,
        layers=setup.weights.count,
        branches=settings.branches,
        ranks=setup.world.size,
        steps=most if least == most and not setup.by_step and not setup.options.fp8_matmul else None,
        float8=bool(setup.options.weights_dtype),
    )
    if found is not None:
        return times.measured(found)
    config = setup.skeleton.config
    least, most = (steps * settings.branches / side_by_side for steps in (least, most))  # from now on passes
    one = operations.step_flops(
        size.video_tokens,
        size.text_tokens,
        layers=setup.weights.count,
        heads=config.num_attention_heads,
        width=config.attention_head_dim,
        mlp_ratio=config.mlp_ratio,
        shards=shards,
        attended=attended_share(setup),
    )
    computed = times.estimated(least * one, most * one, card)
    if computed is None or setup.world.device.type != "cuda":
        return computed
    # Blocks arrive while others are computed: with all offloaded, steps of 49 and 121 frames were as fast as resident.
    arrival = timings.transfer_seconds(plan.offloaded * setup.weights.each)
    return Expected(max(computed.least, least * arrival), max(computed.most, most * arrival + computed.least))


def computed_steps(shares: Sequence[float], caching: CacheSettings | None) -> tuple[float, float]:
    """How many guided steps a run takes as long as, at least and at most: a cache may decide as it goes.

    shares: of a guided step, one for each step.
    """
    if caching is None:
        return sum(shares), sum(shares)
    worth = timings.steps_worth(shares, caching.type, None if caching.adapts else caching.planned)
    if worth is not None:
        return worth, worth
    return sum(share for step, share in enumerate(shares) if not caching.may_reuse(step)), sum(shares)


def attended_share(setup: "DenoiseSetup") -> float:
    """Which share of all pairs of tokens attention takes, in mean over steps and blocks."""
    sparse = ssta.attended_share(setup.shape[2:])
    found, layers = [], setup.weights.count
    for step in range(setup.settings.num_inference_steps):
        mode = setup.attention_at(step)
        blocks = layers if mode.blocks is None else len(mode.blocks)
        found.append(1 - (1 - sparse) * blocks / layers if mode.name == SPARSE_ATTN_MODE else 1.0)
    return sum(found) / len(found)
