"""The encoder of a whole run's video, which stage 2 tries before it makes the latents, rather than stage 3 after them."""

from hunyuan_staged.files import video
from hunyuan_staged.options import DecodeOptions
from hunyuan_staged.parsing import options_of_run
from hunyuan_staged.runtime.environment import run_flags
from hunyuan_staged.runtime.failure import is_first


def encoder_to_come() -> str | None:
    """The encoder of the stage 3 that follows this process in a whole run; None where none does, and on other ranks."""
    told = run_flags() if is_first() else None
    last = options_of_run(told[1])[-1] if told else None
    return last.video_encoder if isinstance(last, DecodeOptions) else None


def begin_trial() -> None:
    """Have a thread try it."""
    if encoder := encoder_to_come():
        video.begin_trial(encoder)


def require_encoder() -> None:
    """InputError where it cannot encode on this machine."""
    if encoder := encoder_to_come():
        video.require_encoder(encoder)
