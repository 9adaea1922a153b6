"""Which transformer a denoising takes: a version in a model folder, or one file."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hunyuan_staged import versions
from hunyuan_staged.errors import InputError
from hunyuan_staged.models.modulations import remove_linears
from hunyuan_staged.options import DenoiseOptions
from hunyuan_staged.pipeline.common import capability_for, chosen_model
from hunyuan_staged.pipeline.opening import expanded, look_at, open_for, version_of_file
from hunyuan_staged.pipeline.settings import pick_version
from hunyuan_staged.runtime.progress import Reporter
from hunyuan_staged.versions import TransformerVersion
from hunyuan_staged.weights import components, lora
from hunyuan_staged.weights.folder import ModelFolder
from hunyuan_staged.weights.hub import diffusers_repository
from hunyuan_staged.weights.part_files import PartFile
from hunyuan_staged.weights.quantization import fp8_matmul
from hunyuan_staged.weights.single_file import open_transformer


def choose_transformer(
    options: DenoiseOptions, config: Mapping[str, Any], report: Reporter
) -> tuple[ModelFolder, str, TransformerVersion]:
    """(what holds the transformer, its path or hub id, the version). Says what a file was taken for."""
    found = _transformer_file(options, config, report)
    if found is None:
        if options.transformer_version:
            if not options.dry_run:
                raise InputError("belongs to a file as --transformer, or to --dry_run", option="transformer_version")
            name = versions.parse_version(options.transformer_version).name
            config = {**config, "transformer_version": name, "model_path": diffusers_repository(name)}
        path = chosen_model(options.model_path, options.input_dir, config)
        folder = open_for(options, path, ("transformer", "scheduler"), report)
        return folder, path, pick_version(config, folder.versions(), sparse=options.sparse_attn)
    file, seen = found
    choose = partial(version_of_file, options.transformer_version, config, report, file)
    opened = open_transformer(file, choose, seen=seen)
    report.info(opened.describe())
    return opened, str(file), versions.parse_version(opened.version.name)


def _transformer_file(
    options: DenoiseOptions, config: Mapping[str, Any], report: Reporter
) -> tuple[Path, PartFile | None] | None:
    """A transformer's file, and what has been seen of it; None where it is in a model folder."""
    if options.transformer:
        return Path(options.transformer), None
    path = options.model_path or (None if options.transformer_version and options.dry_run else config.get("model_path"))
    files = look_at(expanded(path)) if path else None
    if files is None:
        return None
    files.warn(report)
    return files.transformer()


def planned_skeleton(
    options: DenoiseOptions,
    folder: ModelFolder,
    version: str,
    adapters: lora.Adapters,
    computed: tuple[torch.device, torch.dtype],
) -> tuple[Any, dict[str, torch.Size]]:
    """(the transformer on the meta device without the linear maps of its modulations, the shapes of these).

    computed: where and in what. InputError where that does not compute in float8, and the options ask for it.
    """
    if options.fp8_matmul:
        fp8_matmul.check(capability_for(options, computed[0]), computed[1])
    model = components.transformer_skeleton(
        folder, version, weights_dtype=options.weights_dtype, adapted=adapters.additions
    )
    linears = remove_linears(model)
    if options.fp8_matmul:
        fp8_matmul.compute_in_float8(model.transformer_blocks)
    return model, linears
