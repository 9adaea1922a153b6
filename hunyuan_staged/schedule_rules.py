"""What stage 2's flags say of steps, guidance and shift, judged before a model is known. Knows no torch.

A whole run would otherwise hear of it from stage 2 alone, when stage 1 has written over what was there.
"""

from typing import Any

from hunyuan_staged import presets
from hunyuan_staged.attention import modes
from hunyuan_staged.errors import InputError
from hunyuan_staged.sampling import cache_settings, guidance_plan

MAX_STEPS = 1000  # far beyond what the models were made for
MAX_SHIFT = 100
# What lightx2v's distilled weights and adapters were made for.
FOUR_STEPS = {"num_inference_steps": 4, "guidance_scale": 1.0, "flow_shift": 5.0}
SOME_GUIDANCE = 6.0  # of a run whose version will say; any but 1


def check(options: Any) -> None:
    """InputError for options of stage 2 (DenoiseOptions) that no version can run so."""
    found = stated(options)
    if options.four_steps and options.preset not in (None, presets.EXACT):
        raise InputError(f"{options.preset} is for weights of many steps, and --four_steps takes few", option="preset")
    scale = found.get("guidance_scale", SOME_GUIDANCE)
    guidance_plan.check_flags(options.guidance_interval, options.guidance_reuse, scale)
    steps = len(options.given_sigmas() or ()) or int(found.get("num_inference_steps", 0))
    if not steps:
        return  # the version says
    modes.check_schedule(options.attention_schedule(), steps)
    guidance_plan.resolve(options.guidance_interval, options.guidance_reuse, steps=steps, guidance_scale=scale)
    filled = presets.fill(options.preset, steps, vars(options)) if options.preset else {}
    if options.enable_cache or filled.get("enable_cache"):
        given = {name: filled.get(name, value) for name, value in options.cache_options().items()}
        kind = options.cache_type or filled.get("cache_type") or cache_settings.DEFAULT_CACHE_TYPE
        cache_settings.check_steps(kind, given, steps)


def stated(options: Any) -> dict[str, float]:
    """The number of steps, the guidance and the shift that the options state, by the options' names.

    InputError for one that is out of its range, or contradicts four_steps.
    """
    given = {name: value for name in FOUR_STEPS if (value := getattr(options, name)) is not None}
    steps, scale, shift = (given.get(name) for name in FOUR_STEPS)
    if steps is not None and steps < 1:
        raise InputError(f"{steps} is not a positive number", option="num_inference_steps")
    if steps is not None and steps > MAX_STEPS:
        raise InputError(f"{steps} is more than {MAX_STEPS}", option="num_inference_steps")
    if scale is not None and not 1 <= scale < 100:
        raise InputError(f"{scale} is outside 1 to 100", option="guidance_scale")
    if shift is not None and not 0 < shift <= MAX_SHIFT:
        raise InputError(f"{shift:g} is not above 0 and up to {MAX_SHIFT}", option="flow_shift")
    if not options.four_steps:
        return given
    other = next((name for name, value in given.items() if value != FOUR_STEPS[name]), None)
    if other:
        raise InputError(f"{given[other]:g} contradicts --four_steps, {FOUR_STEPS[other]:g}", option=other)
    return dict(FOUR_STEPS)
