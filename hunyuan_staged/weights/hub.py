"""What each part of a model is called in each layout, and how it is downloaded."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hunyuan_staged.errors import InputError


@dataclass(frozen=True)
class Part:
    """Where a part of the model lies in each layout; for the official one, the command that fetches each folder.

    In a command {path} is the model folder.
    """

    title: str
    official: dict[str, str]
    diffusers: tuple[str, ...]


def official_fetch(folder: str) -> str:
    """The command that downloads a folder of the official repository; {path} in it is the model folder."""
    return f'hf download tencent/HunyuanVideo-1.5 --include "{folder}/*" --local-dir {{path}}'


def _tencent(folder: str) -> dict[str, str]:
    return {folder: official_fetch(folder)}


_SIGLIP = "hf download black-forest-labs/FLUX.1-Redux-dev --local-dir {path}/vision_encoder/siglip"

PARTS = {
    "transformer": Part("transformer", _tencent("transformer"), ("transformer",)),
    "upsampler": Part("latent upsampler", _tencent("upsampler"), ()),
    "scheduler": Part("scheduler", _tencent("scheduler"), ("scheduler",)),
    "vae": Part("VAE", _tencent("vae"), ("vae",)),
    "text": Part(
        "text encoder",
        {"text_encoder/llm": "hf download Qwen/Qwen2.5-VL-7B-Instruct --local-dir {path}/text_encoder/llm"},
        ("text_encoder", "tokenizer"),
    ),
    "glyph": Part(
        "glyph encoder",
        {
            "text_encoder/byt5-small": "hf download google/byt5-small --local-dir {path}/text_encoder/byt5-small",
            "text_encoder/Glyph-SDXL-v2": "modelscope download --model AI-ModelScope/Glyph-SDXL-v2 "
            "--local_dir {path}/text_encoder/Glyph-SDXL-v2",
        },
        ("text_encoder_2", "tokenizer_2"),
    ),
    "image": Part(
        "image encoder",
        {f"vision_encoder/siglip/{folder}": _SIGLIP for folder in ("image_encoder", "feature_extractor")},
        ("image_encoder", "feature_extractor"),
    ),
}
DIFFUSERS_FETCH = (
    'hf download hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-{version} --include "{folder}/*" --local-dir {path}'
)


def download(repo: str, parts: Sequence[str]) -> Path:
    """The snapshot of a hub repository: all configs, and the files of the parts but for the transformers' weights."""
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo):
        raise InputError(f"{repo} does not exist, and it is no hub id (owner/name) either")
    folders = {
        name for part in parts if part != "transformer" for name in (*PARTS[part].official, *PARTS[part].diffusers)
    }
    # Configs tell which layout and which versions there are; they are small, so all of them come.
    return snapshot(repo, ["*.json", *(f"{folder}/*" for folder in sorted(folders))])


def snapshot(repo: str, patterns: list[str], revision: str | None = None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, allow_patterns=patterns, revision=revision))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(f"{repo} is no folder here, and the hub did not give it ({reason})") from error
