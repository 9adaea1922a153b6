"""Which attention packages and GPUs there are."""

from importlib.util import find_spec

import torch

FLASH4_PACKAGE = "flash_attn.cute"
FLASH4_HEAD_WIDTHS = (64, 96, 128)
HOPPER = (9, 0)
HALF = (torch.float16, torch.bfloat16)


def output_alone(result: torch.Tensor | tuple) -> torch.Tensor:
    """The output alone, of kernels that in some versions also return the log-sum-exp."""
    return result[0] if isinstance(result, tuple) else result


def installed(package: str) -> bool:
    """Whether a package, or one inside another, can be imported; the parent may be absent, too."""
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:
        return False


AMPERE = (8, 0)
