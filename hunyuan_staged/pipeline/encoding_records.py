"""What embeddings are known by, and what their file and the config say of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hunyuan_staged.files import contract, provenance
from hunyuan_staged.files.config import CONFIG_KEYS, LARGER_KEY, read_config, update_config
from hunyuan_staged.files.tensors import read_made_from, save_embeddings
from hunyuan_staged.options import EncodeOptions
from hunyuan_staged.pipeline.encoding import EncodeSetup
from hunyuan_staged.run_options import LARGER_FILES, PART_FILES

WHAT_FOLLOWS = (LARGER_KEY, *LARGER_FILES)


def outdated(options: EncodeOptions) -> str | None:
    """What of an earlier run in the folder belongs to another prompt once this one has written; None: nothing.

    InputError where the folder's config is broken, to which `write` adds.
    """
    folder = Path(options.output_dir)
    if not (folder / contract.CONFIG_FILE).is_file():
        return None
    former = read_config(folder).get("prompt")
    left = [name for name in (contract.LATENTS_FILE, contract.VIDEO_FILE) if (folder / name).is_file()]
    if not left or former is None or former == options.prompt:
        return None
    return f"{' and '.join(str(folder / name) for name in left)}: of the former prompt {former[:60]!a}, until made anew"


def about(setup: EncodeSetup) -> dict[str, str]:
    """What embeddings and config both say of the prompt."""
    options = setup.options
    said = {"prompt": options.prompt, "negative_prompt": options.negative_prompt, "task_type": setup.version.task}
    return said | (setup.rewritten.record if setup.rewritten else {})


def recorded_model(setup: EncodeSetup) -> str:
    """The model's folder, absolute, or its hub id."""
    path = Path(setup.model_path)
    return str(path.resolve()) if path.exists() else setup.model_path


def recorded_files(options: EncodeOptions) -> dict[str, str]:
    """The files that were given in the place of parts, absolute, by option: stage 3 takes its VAE from here."""
    return _absolute(options, PART_FILES)


def _absolute(options: EncodeOptions, names: Sequence[str]) -> dict[str, str]:
    given = {name: getattr(options, name) for name in names}
    return {name: str(Path(file).resolve()) for name, file in given.items() if file}


def what_follows(options: EncodeOptions) -> dict[str, str]:
    """The super resolution that is to follow on the base run, if any, and the files that it is to be made with."""
    larger = {LARGER_KEY: options.super_resolution} if options.super_resolution else {}
    return larger | _absolute(options, LARGER_FILES)


def made_from(setup: EncodeSetup) -> str:
    """The hash of all that determines the embeddings. Reads samples of the weights."""
    options = setup.options
    source = {
        "version": setup.version.name,
        "dtype": str(setup.dtypes),
        "weights": setup.folder.fingerprint(setup.parts),
        "image": provenance.sha256(options.image_path) if options.image_path else None,
    }
    if options.image_path:  # what decides its sizes
        sizes = {name: getattr(options, name) for name in ("width", "height", "super_resolution")}
        source |= {name: value for name, value in sizes.items() if value is not None}
    return provenance.digest({**about(setup), **source})


def config_entries(setup: EncodeSetup) -> dict[str, Any]:
    """What the config is to say, but for the hash of the embeddings."""
    options, version = setup.options, setup.version
    return about(setup) | {
        "model_path": recorded_model(setup),
        **recorded_files(options),
        "resolution": version.resolution,
        "transformer_version": version.name,
        "image_path": options.image_path,
        "dtype": options.dtype,
        **what_follows(options),
    }


def is_written(setup: EncodeSetup) -> bool:
    """Whether the embeddings are there, made from all that determines them, and the config says so."""
    folder = Path(setup.options.output_dir)
    path = folder / contract.EMBEDDINGS_FILE
    found = read_made_from(path)
    # What a server writes is another text each time: an embedding of the same prompt will do.
    if found is None or not (setup.rewriter or found == made_from(setup)):
        return False
    if not (folder / contract.CONFIG_FILE).is_file():
        return False
    config, wanted = read_config(folder), config_entries(setup) | {contract.EMBEDDINGS_HASH: provenance.sha256(path)}
    # What is to follow update_super_resolution has it say.
    return all(config.get(name) == wanted[name] for name in wanted if name not in WHAT_FOLLOWS)


def update_super_resolution(setup: EncodeSetup) -> None:
    """Have the config of embeddings that are there already say which super resolution is to follow now, if any."""
    folder, wanted = setup.options.output_dir, what_follows(setup.options)
    config = read_config(folder)
    if any(config.get(name) != wanted.get(name) for name in WHAT_FOLLOWS):
        own = {name: config[name] for name in CONFIG_KEYS[1] if name in config and name not in WHAT_FOLLOWS}
        update_config(folder, own | wanted)


def write(setup: EncodeSetup, tensors: dict[str, torch.Tensor]) -> list[tuple[Path, str]]:
    """Write the embeddings and the config; each file with a few words."""
    folder, entries = setup.options.output_dir, config_entries(setup)
    metadata = about(setup) | {"model": entries["model_path"], "version": setup.version.name}
    path = save_embeddings(folder, tensors, metadata | {contract.MADE_FROM: made_from(setup)})
    config = update_config(folder, entries | {contract.EMBEDDINGS_HASH: provenance.sha256(path)})
    shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items() if "negative" not in name)
    return [(path, shapes), (config, "the settings of the run")]
