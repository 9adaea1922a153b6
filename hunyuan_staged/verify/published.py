"""Whether the files of a part are those that were published: its numbers, and the dtypes of its weights."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from hunyuan_staged.errors import InputError
from hunyuan_staged.models.vae_constants import PUBLISHED_VAE
from hunyuan_staged.verify.checks import Check
from hunyuan_staged.versions import LAYERS, parse_version
from hunyuan_staged.weights import components
from hunyuan_staged.weights.boundary import read_json
from hunyuan_staged.weights.folder import ModelFolder
from hunyuan_staged.weights.loading import weight_files

# Source: the configs of tencent/HunyuanVideo-1.5 and of the encoders that it names.
TRANSFORMER: dict[str, Any] = {
    "num_layers": LAYERS,
    "num_attention_heads": 16,
    "attention_head_dim": 128,
    "in_channels": 65,
    "out_channels": 32,
    "patch_size": 1,
    "patch_size_t": 1,
    "rope_axes_dim": (16, 56, 56),
    "rope_theta": 256,
    "text_embed_dim": 3584,
    "text_embed_2_dim": 1472,
    "image_embed_dim": 1152,
}
LANGUAGE: dict[str, Any] = {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28}
GLYPH: dict[str, Any] = {"d_model": 1472}
IMAGE: dict[str, Any] = {"hidden_size": 1152, "image_size": 384, "patch_size": 14}
FLOATS = ("F32", "BF16", "F16")


def _same(found: Any, expected: Any) -> bool:
    return tuple(found) == expected if isinstance(found, (list, tuple)) else found == expected


def numbers(part: str, config: Mapping[str, Any], expected: Mapping[str, Any]) -> Check:
    """Whether a config has the published model's numbers."""
    wrong = [
        f"{key} is {config.get(key)!r}, not {value!r}"
        for key, value in expected.items()
        if not _same(config.get(key), value)
    ]
    right = ", ".join(f"{key} {value}" for key, value in expected.items())
    return Check(part, "published config", not wrong, "; ".join(wrong) or right)


def dtypes(part: str, files: list[Path]) -> Check:
    """Of which dtypes the tensors in safetensors files are; anything but F32, BF16 and F16 fails."""
    found: Counter[str] = Counter()
    for path in files:
        try:
            with safe_open(path, "pt") as file:
                found.update(file.get_slice(name).get_dtype() for name in file.keys())  # noqa: SIM118 (no iterator)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path} is not a whole safetensors file ({error})") from error
    note = ", ".join(f"{count} tensors {name}" for name, count in sorted(found.items()))
    return Check(part, "dtypes", bool(found) and set(found) <= set(FLOATS), note)


def _flat(config: Mapping[str, Any], inner: str) -> dict[str, Any]:
    """A config whose numbers may lie one level deeper."""
    return {**config, **config.get(inner, {})}


def files_of(folder: ModelFolder, part: str, version: str) -> list[Check]:
    """The checks of one part that need no weight to be read; part: a key of PARTS."""
    folders = folder.require(part)
    demo = parse_version(version).resolution.startswith("demo")
    found = []
    if part == "transformer":
        expected = {**TRANSFORMER, "use_meanflow": parse_version(version).use_meanflow}
        config = components.transformer_config(folder, version)
        config.setdefault("use_meanflow", False)
        place = folders[0] / version if folder.official else folders[0]
    elif part == "vae":
        config, expected, place = components.vae_config(folder), PUBLISHED_VAE, folders[0]
    else:
        expected = {"text": LANGUAGE, "glyph": GLYPH, "image": IMAGE}[part]
        inner = {"text": "text_config", "glyph": "", "image": "vision_config"}[part]
        config, place = _flat(read_json(folders[0] / "config.json"), inner), folders[0]
    if not demo:
        found.append(numbers(part, config, expected))
    if part == "glyph" and folder.official:
        return found  # its weights are a pickle, whose dtypes are seen when it is loaded
    return [*found, dtypes(part, weight_files(place))]
