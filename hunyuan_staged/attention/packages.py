"""Which attention packages and GPUs there are."""

from functools import cache
from importlib import import_module

import torch

FLASH4_PACKAGE = "flash_attn.cute"
FLASH4_HEAD_WIDTHS = (64, 96, 128)
AMPERE = (8, 0)
HOPPER = (9, 0)
HALF = (torch.float16, torch.bfloat16)


def output_alone(result: torch.Tensor | tuple) -> torch.Tensor:
    """The output alone, of kernels that in some versions also return the log-sum-exp."""
    return result[0] if isinstance(result, tuple) else result


@cache
def obstacle(package: str) -> str | None:
    """Why a package, or one inside another, cannot be imported, in a line that follows its name; None where it can.

    It is tried: a wheel that was built for another torch is found, and raises on import whatever it likes.
    """
    try:
        import_module(package)
    except ModuleNotFoundError as error:
        if error.name and (package == error.name or package.startswith(f"{error.name}.")):
            return "is not installed"
        return f"does not load ({reason_of(error)})"
    except Exception as error:
        return f"does not load ({reason_of(error)})"
    return None


def installed(package: str) -> bool:
    """Whether a package, or one inside another, can be imported."""
    return obstacle(package) is None


def reason_of(error: BaseException) -> str:
    """An exception as a short line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
