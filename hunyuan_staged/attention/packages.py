"""Which attention packages and GPUs there are."""

import warnings
from collections.abc import Callable
from functools import cache
from importlib import import_module

import torch

FLASH4_PACKAGE = "flash_attn.cute"
FLASH4_HEAD_WIDTHS = (64, 96, 128)
AMPERE = (8, 0)
HOPPER = (9, 0)
ABSENT = "is not installed"
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
            return ABSENT
        return f"does not load ({reason_of(error)})"
    except Exception as error:
        return f"does not load ({reason_of(error)})"
    return None


def installed(package: str) -> bool:
    """Whether a package, or one inside another, can be imported."""
    return obstacle(package) is None


def silence_flash4() -> None:
    """Keep flash-attn-4 4.0.0b36 quiet, which warns of an argument that it hands on itself, with cutlass-dsl 4.8.1."""
    warnings.filterwarnings("ignore", message="Argument aux_data .*JitArgument", category=UserWarning)


def failure(call: Callable[[], torch.Tensor], right: torch.Tensor) -> str | None:
    """Why a kernel's short call does not give what is right, in a phrase; None where it does."""
    try:
        same = torch.allclose(call(), right, atol=0.05)
    except Exception as error:  # packages, compilers and drivers raise whatever they like
        return f"its kernel fails here ({reason_of(error)})"
    return None if same else "its kernel gives wrong numbers here"


def trial_tokens(device: torch.device, dtype: torch.dtype, count: int, head_width: int) -> torch.Tensor:
    """[1, count, 2, D], all alike, so that attention over them is they themselves."""
    return torch.full((1, count, 2, head_width), 0.5, device=device, dtype=dtype)


def reason_of(error: BaseException) -> str:
    """An exception as a short line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
