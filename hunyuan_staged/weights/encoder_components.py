"""Loading the encoders: the language model, the glyph encoder, the image encoder, and their tokenizers."""

import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hunyuan_staged.errors import InputError
from hunyuan_staged.models.language import LanguageModel
from hunyuan_staged.runtime.progress import quiet
from hunyuan_staged.weights.boundary import on_meta, read_json, refusing, require_regular
from hunyuan_staged.weights.derived_configs import SIGLIP_PROCESSOR
from hunyuan_staged.weights.encoder_configs import glyph_config, image_config, image_processor_config, language_config
from hunyuan_staged.weights.folder import ModelFolder
from hunyuan_staged.weights.hub import TOKENIZER_FETCH
from hunyuan_staged.weights.key_maps import Named
from hunyuan_staged.weights.loading import (
    FLOATS,
    NO_DESTINATIONS,
    Destinations,
    Progress,
    assign_weights,
)
from hunyuan_staged.weights.packing import block_memory
from hunyuan_staged.weights.part_tensors import part_content, part_tensors
from hunyuan_staged.weights.published import PublishedModel, published_language_config
from hunyuan_staged.weights.schema import GLYPH_TABLE, GLYPH_TOKENIZER, LANGUAGE_TOKENIZER, Schema, check, quoted

VOCABULARY = ("tokenizer.json", "vocab.json")
TOKENIZER_CONFIG = "tokenizer_config.json"  # all that a byte tokenizer has
# What transformers reads of a tokenizer's folder.
TOKENIZER_FILES = (
    *VOCABULARY,
    TOKENIZER_CONFIG,
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "config.json",
    "chat_template.jinja",
    "chat_template.json",
)
MAX_TOKENIZER_BYTES = 2**26  # Qwen's have 11 MB


def load_tokenizer(folder: Path, schema: Schema, *files: str) -> Any:
    """The tokenizer of a folder that holds one of these files. schema: of its tokenizer_config.json.

    Without the files transformers would make an empty tokenizer and say nothing. Raises InputError where there are none,
    or where transformers cannot read them.
    """
    from transformers import AutoTokenizer

    if not any((folder / name).exists() for name in files):
        raise InputError(f"{folder} holds no tokenizer: {' or '.join(files)}")
    if (folder / TOKENIZER_CONFIG).exists():
        check(read_json(folder / TOKENIZER_CONFIG), schema, folder / TOKENIZER_CONFIG)
    for path in sorted(folder.glob("*")):
        if path.name in TOKENIZER_FILES:
            require_regular(path, MAX_TOKENIZER_BYTES)
    with refusing(f"{folder} holds no tokenizer that transformers can read"):
        # Said outright: left to itself transformers asks the user whether to run code that the folder brings.
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def language_tokenizer(folder: ModelFolder) -> tuple[Any, Path]:
    """(the language model's tokenizer, its folder): of a text encoder in one file that beside it, else the model's."""
    file = folder.files.get("text")
    if file is None:
        place = folder.require("text")[-1]
    else:
        own = folder.folders("text")[-1]
        places = [p for p in (file.path.parent, own) if any((p / name).exists() for name in VOCABULARY)]
        place = places[0] if places else own
        if not places:
            get = TOKENIZER_FETCH.format(folder=own)
            raise InputError(f"neither {file.path.parent} nor {own} holds the text encoder's tokenizer; get it: {get}")
    return load_tokenizer(place, LANGUAGE_TOKENIZER, *VOCABULARY), place


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


MAX_GLYPH_BYTES = 2**32  # five times what the published encoder's weights take in float32
_GLYPH_PREFIX = "module.text_tower.encoder."
GLYPH_SHARED = "embed_tokens.weight"


def glyph_weights(path: Path) -> Iterator[Named]:
    """The encoder's tensors of Glyph-SDXL-v2's byt5_model.pt; the one pickle that is read, and as bare tensors only."""
    require_regular(path, MAX_GLYPH_BYTES)
    with refusing(f"{path} is not a whole file of tensors"):
        unpacked = _unpacked_bytes(path)
        if unpacked > MAX_GLYPH_BYTES:
            raise InputError(f"{path} has {unpacked} bytes unpacked; at most {MAX_GLYPH_BYTES} are allowed")
        content = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = {
            name.removeprefix(_GLYPH_PREFIX): tensor
            for name, tensor in content["state_dict"].items()
            if isinstance(name, str) and name.startswith(_GLYPH_PREFIX)
        }
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in content.items()
    ):
        raise InputError(f"{path} does not hold named tensors, alone or under state_dict")
    for name, tensor in content.items():
        if tensor.dtype not in FLOATS.values() or tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise InputError(
                f"{path}: {name} is {tensor.dtype}, {tensor.layout}; allowed are {', '.join(FLOATS)}, strided"
            )
        yield name, tensor


def _unpacked_bytes(path: Path) -> int:
    """What a pickle's archive holds: torch writes it as it is, and reads it compressed, too."""
    if not zipfile.is_zipfile(path):
        return 0
    with zipfile.ZipFile(path) as archive:
        return sum(entry.file_size for entry in archive.infolist())


def language_skeleton(folder: ModelFolder) -> Any:
    """The language model that load_language_model loads, on the meta device: shapes without memory."""
    published = isinstance(folder, PublishedModel) and "text" not in folder.files
    content, origin = ({}, folder.path) if published else part_content(folder, "text")
    config = published_language_config() if published else language_config(content, origin)[0]
    return on_meta(lambda: LanguageModel(config), origin)


def load_language_model(
    folder: ModelFolder,
    *,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress = quiet,
    skeleton: Any = None,
    destinations: Destinations = NO_DESTINATIONS,
) -> tuple[Any, nn.Module]:
    """(tokenizer, Qwen2.5-VL's language model, whose last_hidden_state is the whole model's hidden_states[-3]).

    The vision tower, lm_head, the last two layers and the final norm are never read.

    Args:
        skeleton: what language_skeleton gave.
        destinations: where some tensors go.

    Raises InputError where a file is absent or broken, and where weights and config do not fit.
    """
    config, kept = language_config(*part_content(folder, "text"))
    model = language_skeleton(folder) if skeleton is None else skeleton
    # Its frequencies are computed, not stored.
    model.rotary_emb = type(model.rotary_emb)(config).to(device)
    tokenizer, place = language_tokenizer(folder)
    if len(tokenizer) > config.vocab_size:
        raise InputError(
            f"{place} holds a tokenizer of {len(tokenizer)} tokens; the language model knows {config.vocab_size}"
        )
    together = {name: x.shape for name, x in model.state_dict().items() if name not in destinations.tensors}
    destinations = replace(destinations, memory=block_memory(together, dtype, device))
    tensors = part_tensors(
        folder,
        "text",
        device,
        lambda name: language_key(name, kept) is not None,
        lambda name: language_key(name, kept) in destinations.tensors,
        progress,
        place=lambda name: destinations.memory.get(language_key(name, kept) or ""),
    )
    renamed = ((language_key(name, kept) or "", tensor) for name, tensor in tensors)
    return tokenizer, assign_weights(model, renamed, dtype, device, folder.origin("text"), destinations)


def load_glyph_encoder(folder: ModelFolder, *, device: torch.device, dtype: torch.dtype) -> tuple[Any, nn.Module]:
    """(ByT5 tokenizer, T5 encoder stack whose last_hidden_state is [1, L, 1472] in the published model)."""
    from transformers import T5EncoderModel

    file = folder.files.get("glyph")
    folders = folder.folders("glyph") if file and not folder.official else folder.require("glyph")
    content, config_origin = part_content(folder, "glyph")
    config, own = glyph_config(content, config_origin), 0 if folder.official else 1
    if file or not folder.official:
        tensors = _glyph_names(part_tensors(folder, "glyph", device))
        origin = folder.origin("glyph")
    else:
        origin = folders[1] / "checkpoints" / "byt5_model.pt"
        tensors = glyph_weights(origin)
    tokenizer = load_tokenizer(folders[own], GLYPH_TOKENIZER, TOKENIZER_CONFIG)
    if folder.official:
        assets = folders[1] / "assets"
        colors, fonts = (_glyph_table(assets / name) for name in ("color_idx.json", "multilingual_10-lang_idx.json"))
        tokenizer.add_tokens(glyph_tokens(colors, fonts), special_tokens=True)
        if not file:
            config.vocab_size = len(tokenizer)
    if len(tokenizer) > config.vocab_size:
        raise InputError(
            f"{folders[-1]} holds a tokenizer of {len(tokenizer)} tokens; the glyph encoder knows {config.vocab_size}"
        )
    model = on_meta(lambda: T5EncoderModel(config).encoder, config_origin)
    return tokenizer, assign_weights(model, tensors, dtype, device, origin)


def _glyph_names(tensors: Iterable[Named]) -> Iterator[Named]:
    """The encoder's own names, whatever is before them; the decoder of a whole T5 is left out."""
    for name, tensor in tensors:
        plain = name.removeprefix("module.text_tower.").removeprefix("text_tower.").removeprefix("byt5.")
        if plain.startswith(("decoder.", "lm_head.")):
            continue
        yield (GLYPH_SHARED if plain == "shared.weight" else plain.removeprefix("encoder.")), tensor


def _glyph_table(path: Path) -> dict[str, int]:
    content = read_json(path)
    if not GLYPH_TABLE.holds(content):
        raise InputError(f"{path} holds {quoted(content)}; allowed is {GLYPH_TABLE.allowed}")
    return content


_IMAGE_PREFIX = "vision_model."  # in the files; whether the class has it depends on the version of transformers


def load_image_encoder(folder: ModelFolder, *, device: torch.device, dtype: torch.dtype) -> tuple[Any, nn.Module]:
    """(SigLIP's image processor in its Pillow form, SiglipVisionModel)."""
    from transformers import SiglipVisionModel
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    content, origin = part_content(folder, "image")
    config = image_config(content, origin)
    place = folder.folders("image")[1] / "preprocessor_config.json"
    described: Mapping[str, Any] = SIGLIP_PROCESSOR | {
        "size": {"height": config.image_size, "width": config.image_size}
    }
    if "image" not in folder.files or place.is_file():
        described = read_json(place)
    settings = image_processor_config(described, place, config.image_size)
    with refusing(f"{place} describes no image processor"):
        prepare = SiglipImageProcessorPil(**settings)
    model: Any = on_meta(lambda: SiglipVisionModel(config), origin)
    prefix = _IMAGE_PREFIX if next(iter(model.state_dict())).startswith(_IMAGE_PREFIX) else ""
    embeddings = model.get_submodule(f"{prefix}embeddings")
    # Positions are counted, not stored.
    embeddings.position_ids = torch.arange(embeddings.num_positions, device=device)[None]
    tensors = (
        (prefix + name.removeprefix(_IMAGE_PREFIX), tensor) for name, tensor in part_tensors(folder, "image", device)
    )
    return prepare, assign_weights(model, tensors, dtype, device, folder.origin("image"))
