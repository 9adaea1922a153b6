"""The published model as its configs describe it, for plans on a machine that has nothing of it.

Source: the configs of tencent/HunyuanVideo-1.5 and Qwen/Qwen2.5-VL-7B-Instruct. The transformer's and the VAE's numbers
are the defaults of their classes.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from hunyuan_staged.errors import InputError
from hunyuan_staged.geometry import BUCKET_BASE, LATENT_CHANNELS
from hunyuan_staged.models.language import LanguageConfig
from hunyuan_staged.models.modules import TransformerConfig
from hunyuan_staged.models.vae_modules import VaeConfig
from hunyuan_staged.versions import (
    SKIPPED_LAYERS,
    TASKS,
    SuperResolutionVersion,
    parse_version,
    super_resolution_named,
)
from hunyuan_staged.weights.folder import ModelFolder, is_version, layout_of
from hunyuan_staged.weights.hub import PARTS, PUBLISHED_RESOLUTIONS, PUBLISHED_SUPER_RESOLUTION

# Qwen2.5-VL-7B-Instruct's language part.
QWEN_7B: dict[str, Any] = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
}

# Of the latent upsamplers, by kind; inferred: docs/super_resolution.md says from what.
UPSAMPLERS: dict[str, dict[str, Any]] = {
    "720p": {"in_channels": 32, "out_channels": 32, "hidden_channels": 128, "num_blocks": 16},
    "1080p": {"z_channels": 32, "out_channels": 32, "block_out_channels": [256, 512], "num_res_blocks": 2},
}


def super_resolution_config(version: SuperResolutionVersion) -> dict[str, Any]:
    """diffusers' arguments of a super-resolution transformer."""
    size, channels = BUCKET_BASE[version.resolution], 3 * LATENT_CHANNELS + 2
    return asdict(TransformerConfig(channels, target_size=size, task_type=None, use_meanflow=version.use_meanflow))


def published_versions() -> list[str]:
    """The transformer versions of the official repository by name, and those that it may come to hold."""
    kinds = ("", "_distilled", "_distilled_sparse", "_step_distilled")
    return [f"{resolution}_{task}{kind}" for resolution, task, kind in product(PUBLISHED_RESOLUTIONS, TASKS, kinds)]


@dataclass(frozen=True)
class PublishedModel(ModelFolder):
    """A model of which only the published numbers are known: nothing of it can be loaded.

    path: where its files are not. offered: the versions there are to choose from. missing: what is not there.
    """

    offered: tuple[str, ...] = field(kw_only=True)
    missing: str = field(kw_only=True)

    def require(self, part: str) -> list[Path]:
        """The folders that a part would have."""
        return self.folders(part)

    def versions(self) -> list[str]:
        return list(self.offered)

    def lacks(self, version: str) -> str:
        """What to say where a version is none of those that are published, or that the repository's name says."""
        return f"no transformer {version} to plan for ({self.missing}); allowed: {', '.join(self.offered)}"

    def transformer_folder(self, version: str) -> Path:
        if version not in self.offered:
            raise InputError(self.lacks(version))
        return self.path / "transformer" / version

    def flow_shift(self, version: str) -> float | None:
        """None: the version's own holds."""
        return None

    def transformer_config(self, version: str) -> dict[str, Any]:
        """diffusers' arguments of a version."""
        self.transformer_folder(version)
        larger = super_resolution_named(version)
        if larger:
            return super_resolution_config(larger)
        chosen = parse_version(version)
        size, meanflow = BUCKET_BASE[chosen.resolution], chosen.use_meanflow
        return asdict(TransformerConfig(target_size=size, task_type=chosen.task, use_meanflow=meanflow))

    def vae_config(self) -> dict[str, Any]:
        """diffusers' arguments of the VAE."""
        return asdict(VaeConfig())


def model_for_plan(model_path: str | None, parts: Sequence[str], version: str | None = None) -> ModelFolder:
    """What a plan can go by: the configs on disk, of a hub id those in the hub's cache, else the published numbers.

    parts: keys of PARTS that must be there. version: of super resolution, None for any other. Asks no hub. InputError where
    a config is broken.
    """
    local = None if model_path is None else _local(model_path)
    lacking = [part for part in parts if local is None or not _has_config(local, part, version)]
    larger = super_resolution_named(version) if version else None
    unpublished = larger is not None and larger.resolution not in PUBLISHED_SUPER_RESOLUTION
    if local is not None and (unpublished or not lacking):
        return replace(local, planned=True)  # which says itself what it lacks
    offered = [version] if version else published_versions()
    named = (model_path or "").rpartition("-")[2]
    if is_version(named) and not version:  # a repository in diffusers' layout holds one, and ends with its name
        offered = [named]
    missing = f"nothing of {model_path} is here" if model_path else "no --model_path"
    if local is not None:
        missing = (
            f"{model_path} has no {', '.join(PARTS[part].title for part in lacking)}{f' {version}' * bool(version)}"
        )
        offered = local.versions() if "transformer" not in lacking else offered
    return PublishedModel(Path(model_path or "."), "official", offered=tuple(offered), missing=missing)


def _local(model_path: str) -> ModelFolder | None:
    """The model folder at a path or, of a hub id, in the hub's cache; None where neither is there."""
    path = Path(model_path).expanduser()
    if not path.exists():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            path = Path(snapshot_download(model_path, local_files_only=True))
        except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError, OSError):
            return None
    layout = layout_of(path)
    return None if layout is None else ModelFolder(path, layout)


def _has_config(model: ModelFolder, part: str, version: str | None) -> bool:
    folder = model.folders(part)[0]
    if version:
        return model.official and (folder / version / "config.json").is_file()
    if part == "transformer" and model.official:
        return bool(folder.is_dir() and model.versions())
    return folder.is_dir() and (part == "scheduler" or (folder / "config.json").is_file())


def published_language_config(layers: int | None = None) -> LanguageConfig:
    """The config of the language model, of the layers that stage 1 runs or of so many."""
    kept = QWEN_7B["num_hidden_layers"] - SKIPPED_LAYERS if layers is None else layers
    return LanguageConfig(**QWEN_7B | {"num_hidden_layers": kept})
