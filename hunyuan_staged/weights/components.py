"""Tokenizers and the encoders' weights."""

import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from hunyuan_staged.errors import InputError
from hunyuan_staged.weights.key_maps import Named

VOCABULARY = ("tokenizer.json", "vocab.json")
BYTES = "tokenizer_config.json"  # a byte tokenizer has no vocabulary


def load_tokenizer(folder: Path, *files: str) -> Any:
    """The tokenizer of a folder that holds one of these files.

    Without them transformers would make an empty tokenizer and say nothing. Raises InputError where there are none, or
    where transformers cannot read them.
    """
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in files):
        raise InputError(f"{folder} holds no tokenizer: {' or '.join(files)}")
    try:
        # Said outright: left to itself transformers asks the user whether to run code that the folder brings.
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{folder} holds no tokenizer that transformers can read ({reason})") from error


def language_key(name: str, kept: int) -> str | None:
    """The language model's own name of a tensor of Qwen2.5-VL, whichever its prefix; None if it is not used."""
    for prefix in ("model.language_model.", "language_model.model.", "language_model.", "model."):
        if name.startswith(prefix):
            name = name.removeprefix(prefix)
            break
    if name.startswith(("visual.", "lm_head.")):
        return None
    layer = re.match(r"layers\.(\d+)\.", name)
    if name == "norm.weight" or (layer and int(layer[1]) >= kept):
        return None
    return name


def glyph_tokens(colors: Mapping[str, Any], fonts: Mapping[str, int]) -> list[str]:
    """Glyph-SDXL-v2's special tokens: <color-i> for each colour, <xx-font-i> for each font (language and number)."""
    return [f"<color-{i}>" for i in range(len(colors))] + [f"<{code[:2]}-font-{i}>" for code, i in fonts.items()]


_GLYPH_PREFIX = "module.text_tower.encoder."
GLYPH_SHARED = "embed_tokens.weight"
GLYPH_IN = "byt5_in.fc1.weight"


def glyph_weights(path: Path) -> Iterator[Named]:
    """The encoder's tensors of Glyph-SDXL-v2's byt5_model.pt; the one pickle that is read, and as bare tensors only."""
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = next(iter(str(error).splitlines()), "it is cut short")
        raise InputError(f"{path} is not a whole file of tensors ({reason})") from error
    if isinstance(content, dict) and "state_dict" in content:
        content = {
            name.removeprefix(_GLYPH_PREFIX): tensor
            for name, tensor in content["state_dict"].items()
            if name.startswith(_GLYPH_PREFIX)
        }
    if not isinstance(content, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in content.values()):
        raise InputError(f"{path} does not hold named tensors, alone or under state_dict")
    yield from content.items()
