"""Loading the transformer and the VAE, from either layout, onto a device without a second copy.

Modules are our own, with diffusers' names; official weights are renamed on the way.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hunyuan_staged.errors import InputError
from hunyuan_staged.models.modulations import is_modulation
from hunyuan_staged.models.modules import TransformerConfig, TransformerModules
from hunyuan_staged.models.vae_modules import VaeConfig, VaeDecoder, VaeEncoder
from hunyuan_staged.runtime.progress import quiet
from hunyuan_staged.weights.boundary import describing, on_meta, read_json
from hunyuan_staged.weights.configs import (
    diffusers_transformer_config,
    diffusers_vae_config,
    official_transformer_config,
    official_vae_config,
)
from hunyuan_staged.weights.encoder_configs import glyph_config
from hunyuan_staged.weights.folder import ModelFolder
from hunyuan_staged.weights.hub import remote_shape
from hunyuan_staged.weights.key_maps import TRANSFORMER_MAP, VAE_MAP, Named, Rule, diffusers_names, diffusers_tensors
from hunyuan_staged.weights.loading import (
    NO_DESTINATIONS,
    Adapt,
    Destinations,
    Progress,
    assign_weights,
    has_weights,
    read_tensors,
    sharded_file,
    tensor_shape,
)
from hunyuan_staged.weights.packing import block_memory
from hunyuan_staged.weights.part_files import PartsFolder
from hunyuan_staged.weights.part_tensors import part_content, part_tensors, vae_file_config, vae_file_names
from hunyuan_staged.weights.published import PublishedModel
from hunyuan_staged.weights.quantization import fp8_rows
from hunyuan_staged.weights.quantization.formats import GGUF
from hunyuan_staged.weights.quantization.fp8_rows import Float8Linear
from hunyuan_staged.weights.quantization.stored import KEPT, StoredLinear, replace_linears
from hunyuan_staged.weights.schema import VAE_DTYPE, picked
from hunyuan_staged.weights.single_file import TransformerFile
from hunyuan_staged.weights.stream import Place, nowhere

GLYPH_IN = "byt5_in.fc1.weight"


def transformer_config(folder: ModelFolder, version: str) -> dict[str, Any]:
    """diffusers' arguments of a version; InputError where the folder lacks it or this suite does not run it."""
    if isinstance(folder, PartsFolder) and folder.transformer is not None:
        folder = folder.transformer
    if isinstance(folder, TransformerFile):
        return folder.config()
    if isinstance(folder, PublishedModel):
        return folder.transformer_config(version)
    path = folder.transformer_folder(version) / "config.json"
    config = read_json(path)
    if not folder.official:
        return diffusers_transformer_config(config, path) | {"task_type": folder.task(config)}
    width = _glyph_width(folder, version)
    with describing(path):
        return official_transformer_config(config, width, path)


def _glyph_width(folder: ModelFolder, version: str) -> int:
    """The width of the glyph encoder, which no official config names; of a hub's weights that are not here yet it is read
    from the header alone. Where there is a transformer's config alone, the glyph encoder's own tells."""
    inside = folder.transformer_folder(version)
    if folder.config_alone(version) and folder.has("glyph"):
        return int(glyph_config(*part_content(folder, "glyph")).d_model)
    if folder.planned and folder.config_alone(version):
        return TransformerConfig().text_embed_2_dim
    if folder.repo and not has_weights(inside):
        name = sharded_file(inside, GLYPH_IN)
        shape = remote_shape(folder.repo, inside.relative_to(folder.path) / name, folder.path.name, GLYPH_IN)
    else:
        shapes = (tensor_shape(path, GLYPH_IN) for path in folder.transformer_files(version))
        shape = next((shape for shape in shapes if shape), None)
    if not shape:
        raise InputError(f"{inside} lacks {GLYPH_IN}, from which the glyph encoder's width is read")
    return shape[-1]


def transformer_skeleton(
    folder: ModelFolder,
    version: str,
    *,
    weights_dtype: str | None = None,
    keep: bool = True,
    adapted: Collection[str] = (),
) -> Any:
    """TransformerModules for a version, on the meta device: shapes without memory.

    weights_dtype "fp8": the linear weights of its blocks are to be stored in float8 (fp8_rows). keep: those that a file
    has in float8 or GGUF stay as they are, but for those that adapters change, by diffusers' names: these are stored in
    float8 anew.
    """
    config = transformer_config(folder, version)
    origin = folder.transformer_folder(version) / "config.json"
    model = on_meta(lambda: TransformerModules(TransformerConfig(**config)), origin)
    if isinstance(folder, TransformerFile) and keep:
        kept = folder.keeping() if weights_dtype is None or folder.kind.name != GGUF else {}
        adapt_anew = dict.fromkeys(kept.keys() & set(adapted), Float8Linear)
        replace_linears(model, kept | adapt_anew)
    if weights_dtype == "fp8":
        fp8_rows.quantise_linears(model.transformer_blocks)
    return model


def transformer_shapes(folder: ModelFolder, version: str) -> dict[str, tuple[int, ...]]:
    """The shapes of a version's weights by diffusers' names; from its config, no weight is read."""
    return {name: tuple(x.shape) for name, x in transformer_skeleton(folder, version, keep=False).state_dict().items()}


def load_transformer(
    folder: ModelFolder,
    version: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress = quiet,
    skeleton: nn.Module | None = None,
    destinations: Destinations = NO_DESTINATIONS,
    adapt: Adapt | None = None,
) -> nn.Module:
    """TransformerModules with a version's weights, in eval mode, without gradients.

    Args:
        skeleton: what transformer_skeleton gave, by default in `dtype` throughout.
        destinations: where some tensors go; those that another process fills are not read.
        adapt: what the tensors, under diffusers' names and in the file's dtype, go through; None: no adapter changes any.
    """
    model = transformer_skeleton(folder, version, keep=False) if skeleton is None else skeleton
    state = model.state_dict()

    def has_destination(name: str) -> bool:
        return fp8_rows.stored_name(name, state) in destinations.tensors

    def stays_on_host(name: str) -> bool:
        return has_destination(name) and not keeps_stored  # which the device quantises, far faster

    keeps_stored = any(tensor.dtype in KEPT for tensor in state.values())
    # Modulations apart: who loads a model with them may remove them later.
    together = {
        name: tensor.shape
        for name, tensor in state.items()
        if name not in destinations.tensors and tensor.dtype not in KEPT and not is_modulation(name)
    }
    destinations = replace(destinations, memory=block_memory(together, dtype, device))
    kept = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, StoredLinear) and not isinstance(module, Float8Linear)
    }
    tensors = transformer_tensors(
        folder,
        version,
        device=device,
        wanted=lambda name: destinations.fill or not has_destination(name),
        stays_on_host=stays_on_host,
        progress=progress,
        kept=kept,
        # What adapters change comes in the file's dtype.
        place=nowhere if adapt else destinations.memory.get,
    )
    quantised = fp8_rows.quantised(adapt(tensors) if adapt else tensors, state, dtype)
    return assign_weights(model, quantised, dtype, device, folder.transformer_folder(version), destinations)


def transformer_tensors(
    folder: ModelFolder,
    version: str,
    *,
    device: torch.device,
    wanted: Callable[[str], bool],
    stays_on_host: Callable[[str], bool] = lambda _: False,
    progress: Progress = quiet,
    kept: Collection[str] = (),
    place: Place = nowhere,
) -> Iterator[Named]:
    """A version's tensors under diffusers' names, in the file's dtype, or where they have a place in that; wanted,
    stays_on_host and place as in read_tensors, of these names. A tensor that holds several others comes whole if one of
    them is wanted. kept: of one file, the weights that come as their stored layers hold them.
    """
    origin = folder.transformer_folder(version)
    if isinstance(folder, TransformerFile):
        return folder.tensors(device=device, wanted=wanted, stays_on_host=stays_on_host, progress=progress, kept=kept)

    @cache
    def targets(name: str) -> tuple[bool, list[str]]:
        """Whether the tensor is as diffusers' is, and all those that it holds."""
        found = diffusers_names(name, TRANSFORMER_MAP) if folder.official else None
        return (len(found[1]) == 1 and not found[0].swap, found[1]) if found else (True, [name])

    def place_of(name: str) -> torch.Tensor | None:
        as_it_is, (first, *_) = targets(name)
        return place(first) if as_it_is else None

    tensors = read_tensors(
        folder.transformer_files(version),
        lambda name: any(map(wanted, targets(name)[1])),
        device,
        lambda name: all(map(stays_on_host, targets(name)[1])),
        progress=partial(progress, desc="loading transformer", unit="shard"),
        place=place_of,
    )
    return _renamed(tensors, TRANSFORMER_MAP, folder, origin)


def _renamed(tensors: Iterable[Named], rules: tuple[Rule, ...], folder: ModelFolder, origin: Path) -> Iterator[Named]:
    """The tensors under diffusers' names."""
    if not folder.official:
        yield from tensors
        return
    for name, tensor in tensors:
        pairs = diffusers_tensors(name, tensor, rules)
        if pairs is None:
            raise InputError(f"{origin} holds {name}, which the official layout does not have")
        yield from pairs


def vae_config(folder: ModelFolder) -> dict[str, Any]:
    """diffusers' arguments of the VAE: scaling_factor, latent_channels, the compression ratios, and the widths."""
    if "vae" in folder.files:
        return vae_file_config(folder)
    if isinstance(folder, PublishedModel):
        return folder.vae_config()
    path = folder.require("vae")[0] / "config.json"
    return (official_vae_config if folder.official else diffusers_vae_config)(read_json(path), path)


def vae_decoder_dtype(folder: ModelFolder, device: torch.device) -> torch.dtype:
    """What frames are decoded in: float32 on a CPU, float16 on a GPU, unless the VAE's config.json has force_upcast, as
    diffusers' AutoencoderKL has it: its values are too large for float16. InputError where that is not true or false."""
    upcast = False
    if "vae" not in folder.files and not isinstance(folder, PublishedModel):
        path = folder.require("vae")[0] / "config.json"
        upcast = picked(read_json(path), VAE_DTYPE, path).get("force_upcast", False)
    return torch.float16 if device.type == "cuda" and not upcast else torch.float32


def vae_skeleton(folder: ModelFolder, coder: str) -> nn.Module:
    """The VAE's "encoder" or "decoder" on the meta device: shapes without memory."""
    config = vae_config(folder)
    build = {"encoder": VaeEncoder, "decoder": VaeDecoder}[coder]
    return on_meta(lambda: build(VaeConfig(**config)), folder.origin("vae"))


def _load_coder(
    folder: ModelFolder, coder: str, device: torch.device, dtype: torch.dtype, progress: Progress
) -> nn.Module:
    origin = folder.origin("vae")
    model = vae_skeleton(folder, coder)
    other = {"encoder": "decoder.", "decoder": "encoder."}[coder]
    tensors = part_tensors(
        folder, "vae", device, lambda name: other not in name, progress=progress, what=f"VAE {coder}"
    )
    renamed = vae_file_names(tensors) if "vae" in folder.files else _renamed(tensors, VAE_MAP, folder, origin)
    own = ((name.removeprefix(f"{coder}."), tensor) for name, tensor in renamed)
    return assign_weights(model, own, dtype, device, origin)


def load_vae_decoder(
    folder: ModelFolder, *, device: torch.device, dtype: torch.dtype, progress: Progress = quiet
) -> tuple[nn.Module, dict[str, Any]]:
    """(VaeDecoder, the VAE's config); the encoder is not read."""
    return _load_coder(folder, "decoder", device, dtype, progress), vae_config(folder)


def load_vae_encoder(
    folder: ModelFolder, *, device: torch.device, dtype: torch.dtype, progress: Progress = quiet
) -> tuple[nn.Module, dict[str, Any]]:
    """(VaeEncoder, the VAE's config); the decoder is not read."""
    return _load_coder(folder, "encoder", device, dtype, progress), vae_config(folder)
