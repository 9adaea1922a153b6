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


HF, MODELSCOPE = "hf", "modelscope"


@dataclass(frozen=True)
class Source:
    """Files of a hub repository. patterns: which of its files; into: the folder below the model's that they go to.

    substitute: a source of the same files that asks for no licence, where this one does.
    """

    repo: str
    patterns: tuple[str, ...]
    into: str = ""
    hub: str = HF
    substitute: "Source | None" = None

    def command(self) -> str:
        """The command that downloads it; {path} in it is the model folder."""
        if self.hub == MODELSCOPE:
            return f"modelscope download --model {self.repo} --local_dir {{path}}/{self.into}"
        if self.into:
            return f"hf download {self.repo} --local-dir {{path}}/{self.into}"
        return f'hf download {self.repo} --include "{self.patterns[0]}" --local-dir {{path}}'


def official_source(folder: str) -> Source:
    """A folder of the official repository."""
    return Source("tencent/HunyuanVideo-1.5", (f"{folder}/*",))


def official_fetch(folder: str) -> str:
    """The command that downloads a folder of the official repository; {path} in it is the model folder."""
    return official_source(folder).command()


def _tencent(folder: str) -> dict[str, str]:
    return {folder: official_fetch(folder)}


LANGUAGE_SOURCE = Source("Qwen/Qwen2.5-VL-7B-Instruct", ("*.json", "*.safetensors", "*.txt"), "text_encoder/llm")
# Config and tokenizer: the weights are Glyph-SDXL-v2's.
BYTES_SOURCE = Source("google/byt5-small", ("*.json",), "text_encoder/byt5-small")
GLYPH_SOURCE = Source(
    "AI-ModelScope/Glyph-SDXL-v2",
    ("assets/color_idx.json", "assets/multilingual_10-lang_idx.json", "checkpoints/byt5_model.pt"),
    "text_encoder/Glyph-SDXL-v2",
    MODELSCOPE,
)
_IMAGE_FILES, _IMAGE_FOLDER = ("image_encoder/*", "feature_extractor/*"), "vision_encoder/siglip"
IMAGE_SOURCE = Source(
    "black-forest-labs/FLUX.1-Redux-dev",
    _IMAGE_FILES,
    _IMAGE_FOLDER,
    substitute=Source("hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_i2v", _IMAGE_FILES, _IMAGE_FOLDER),
)
# LightX2V's transformer for four steps, in one file.
FOUR_STEPS_VERSION = "480p_t2v"
FOUR_STEPS_SOURCE = Source(
    "lightx2v/Hy1.5-Distill-Models", ("hy1.5_t2v_480p_lightx2v_4step.safetensors",), "four_steps"
)

PARTS = {
    "transformer": Part("transformer", _tencent("transformer"), ("transformer",)),
    "upsampler": Part("latent upsampler", _tencent("upsampler"), ()),
    "scheduler": Part("scheduler", _tencent("scheduler"), ("scheduler",)),
    "vae": Part("VAE", _tencent("vae"), ("vae",)),
    "text": Part("text encoder", {LANGUAGE_SOURCE.into: LANGUAGE_SOURCE.command()}, ("text_encoder", "tokenizer")),
    "glyph": Part(
        "glyph encoder",
        {source.into: source.command() for source in (BYTES_SOURCE, GLYPH_SOURCE)},
        ("text_encoder_2", "tokenizer_2"),
    ),
    "image": Part(
        "image encoder",
        {f"{_IMAGE_FOLDER}/{folder}": IMAGE_SOURCE.command() for folder in ("image_encoder", "feature_extractor")},
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
