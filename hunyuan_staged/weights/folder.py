"""Find a model's parts in either published layout, map its keys, and load it onto a device without a second copy.

The official layout is that of tencent/HunyuanVideo-1.5 on the hub, one transformer version per folder; the diffusers
layout that of hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-*. Modules are our own, with diffusers' names, and
transformers'; official weights are renamed on the way. A map is data, serves both ways, and is closed: a tensor that no
rule names, that a module lacks, or that is missing for a module is an error.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hunyuan_staged.errors import InputError
from hunyuan_staged.geometry import BUCKET_BASE
from hunyuan_staged.models.modules import TransformerConfig, TransformerModules
from hunyuan_staged.models.vae_modules import VaeConfig, VaeDecoder, VaeEncoder
from hunyuan_staged.runtime.progress import quiet
from hunyuan_staged.versions import (
    DEFAULT_RESOLUTION,
    TransformerVersion,
    make_version,
    parse_version,
    super_resolution_named,
)
from hunyuan_staged.weights.components import (
    BYTES,
    GLYPH_IN,
    GLYPH_SHARED,
    VOCABULARY,
    glyph_tokens,
    glyph_weights,
    language_key,
    load_tokenizer,
)
from hunyuan_staged.weights.configs import (
    VAE_NUMBERS,
    describing,
    glyph_config,
    language_config,
    official_transformer_config,
    official_vae_config,
    on_meta,
    read_json,
    without_bookkeeping,
)
from hunyuan_staged.weights.hub import DIFFUSERS_FETCH, PARTS, download, official_fetch, snapshot
from hunyuan_staged.weights.key_maps import TRANSFORMER_MAP, VAE_MAP, Named, Rule, diffusers_names, diffusers_tensors
from hunyuan_staged.weights.loading import (
    NO_DESTINATIONS,
    Destinations,
    Progress,
    assign_weights,
    read_tensors,
    tensor_shape,
    weight_files,
)
from hunyuan_staged.weights.quantization import fp8_rows

# Of each file a fingerprint reads so many pieces of so many bytes.
SAMPLES, SAMPLE_BYTES = 16, 2**16


def is_version(name: str) -> bool:
    """Whether a folder's name is that of a transformer version, which 720p_sr_distilled and the like are not."""
    try:
        parse_version(name)
    except InputError:
        return False
    return True


def _sampled(path: Path) -> bytes:
    """The hash of a file's size and of SAMPLES pieces of it, evenly spread, its beginning and its end among them."""
    size = path.stat().st_size
    found = hashlib.sha256(str(size).encode())
    try:
        with path.open("rb") as file:
            for index in range(SAMPLES):
                file.seek(max(0, size - SAMPLE_BYTES) * index // (SAMPLES - 1))
                found.update(file.read(SAMPLE_BYTES))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from error
    return found.digest()


@dataclass(frozen=True)
class ModelFolder:
    """A model on disk, in the official or the diffusers layout; each load_… reads its own part and nothing else.

    repo: the hub id that the folder is a snapshot of. Of its transformers a version's weights are downloaded when they
    are first read: the official repository holds ten of 33 GB each.
    """

    path: Path
    layout: str  # "official" or "diffusers"
    repo: str | None = None

    @property
    def official(self) -> bool:
        return self.layout == "official"

    def folders(self, part: str) -> list[Path]:
        """The folders of a part, which may be absent."""
        return [self.path / name for name in (PARTS[part].official if self.official else PARTS[part].diffusers)]

    def has(self, part: str) -> bool:
        return all(folder.is_dir() for folder in self.folders(part))

    def require(self, part: str) -> list[Path]:
        """The folders of a part; where one is absent, InputError names it and the command that downloads it."""
        folders = self.folders(part)
        for folder in folders:
            if not folder.is_dir():
                name = folder.relative_to(self.path).as_posix()
                raise InputError(
                    f"{self.path} has no {PARTS[part].title} ({name}); get it: {self._fetch_command(part, name)}"
                )
        return folders

    def _fetch_command(self, part: str, folder: str) -> str:
        if self.official:
            return PARTS[part].official[folder].format(path=self.path)
        known = part != "transformer" and self.has("transformer")
        version = self.versions()[0] if known else f"{DEFAULT_RESOLUTION}_t2v"
        return DIFFUSERS_FETCH.format(version=version, folder=folder, path=self.path)

    # -- transformer --

    def versions(self) -> list[str]:
        """The transformer versions in the folder, by name; the super-resolution ones beside them are not counted."""
        (folder,) = self.require("transformer")
        if self.official:
            names = sorted(path.parent.name for path in folder.glob("*/config.json"))
            return [name for name in names if is_version(name)]
        return [self._diffusers_version(folder).name]

    def _diffusers_version(self, folder: Path) -> TransformerVersion:
        path = folder / "config.json"
        config = read_json(path)
        bases = {base: name for name, base in BUCKET_BASE.items()}
        base, task = config.get("target_size"), config.get("task_type")
        if base not in bases:
            raise InputError(f"{path}: target_size is {base!r}; known: {', '.join(map(str, bases))}")
        guider = self.path / "guider" / "guider_config.json"
        guidance = read_json(guider).get("guidance_scale") if guider.is_file() else None
        meanflow = bool(config.get("use_meanflow"))
        return make_version(
            bases[base], str(task), step_distilled=meanflow, cfg_distilled=guidance == 1 and not meanflow
        )

    def fingerprint(self, parts: Sequence[str], version: str | None = None) -> str:
        """A hash that tells these weights from others: names, sizes and samples of all files of the parts.

        parts: keys of PARTS; of "transformer" and "upsampler" only the version's folder counts. Where the folder lies and
        when it was written do not count. It reads about a megabyte of each file.
        """
        files = []
        for part in parts:
            folders = [folder for folder in self.folders(part) if folder.is_dir()]
            if part == "transformer":
                assert version is not None
                self._transformer_files(version)  # a hub repository's are downloaded now
                folders = [self._transformer_folder(version)]
            elif part == "upsampler":
                assert version is not None
                folders = [self.super_resolution_folder(part, version)]
            # hf download keeps its own notes in hidden folders.
            files += [
                (f"{part}/{path.relative_to(folder).as_posix()}", path)
                for folder in folders
                for path in sorted(folder.rglob("*"))
                if path.is_file() and not any(name.startswith(".") for name in path.relative_to(folder).parts)
            ]
        total = hashlib.sha256()
        for name, path in sorted(files):
            total.update(f"{name}\0".encode())
            total.update(_sampled(path))
        return total.hexdigest()

    def resolutions(self) -> list[str]:
        """The resolutions of the versions in the folder."""
        return sorted({parse_version(name).resolution for name in self.versions()})

    def super_resolution_folder(self, part: str, version: str) -> Path:
        """transformer/ or upsampler/<version of super resolution>; InputError where it is absent names the command.

        Of a hub repository the folder is downloaded now.
        """
        name = f"{part}/{version}"
        if not self.official:
            raise InputError(f"{self.path} is in diffusers' layout, which has no super resolution ({name})")
        if self.repo:
            snapshot(self.repo, [f"{name}/*"], revision=self.path.name)
        folder = self.path / name
        if not folder.is_dir():
            raise InputError(f"{self.path} has no {name}; get it: {official_fetch(name).format(path=self.path)}")
        return folder

    def _transformer_folder(self, version: str) -> Path:
        if super_resolution_named(version):
            return self.super_resolution_folder("transformer", version)
        (folder,) = self.require("transformer")
        offered = self.versions()
        if version not in offered:
            raise InputError(f"{self.path} has no transformer {version}; it holds {', '.join(offered) or 'none'}")
        return folder / version if self.official else folder

    def _transformer_files(self, version: str) -> list[Path]:
        """A version's weights; of a hub repository they are downloaded now, if they are not in its cache."""
        folder = self._transformer_folder(version)
        if self.repo:
            snapshot(self.repo, [f"{folder.relative_to(self.path).as_posix()}/*"], revision=self.path.name)
        return weight_files(folder)

    def transformer_config(self, version: str) -> dict[str, Any]:
        """diffusers' arguments of a version; InputError where the folder lacks it or this suite does not run it."""
        folder = self._transformer_folder(version)
        config = read_json(folder / "config.json")
        if not self.official:
            return without_bookkeeping(config)
        shapes = (tensor_shape(path, GLYPH_IN) for path in self._transformer_files(version))
        shape = next((shape for shape in shapes if shape), None)
        if shape is None:
            raise InputError(f"{folder} lacks {GLYPH_IN}, from which the glyph encoder's width is read")
        with describing(folder / "config.json"):
            return official_transformer_config(config, shape[-1], folder / "config.json")

    def transformer_skeleton(self, version: str, *, weights_dtype: str | None = None) -> Any:
        """TransformerModules for a version, on the meta device: shapes without memory.

        weights_dtype "fp8": the linear weights of its blocks are to be stored in float8 (float8.py).
        """
        config = self.transformer_config(version)
        origin = self._transformer_folder(version) / "config.json"
        model = on_meta(lambda: TransformerModules(TransformerConfig(**config)), origin)
        if weights_dtype == "fp8":
            fp8_rows.quantise_linears(model.transformer_blocks)
        return model

    def transformer_shapes(self, version: str) -> dict[str, tuple[int, ...]]:
        """The shapes of a version's weights by diffusers' names; from its config, no weight is read."""
        return {name: tuple(x.shape) for name, x in self.transformer_skeleton(version).state_dict().items()}

    def load_transformer(
        self,
        version: str,
        *,
        device: torch.device,
        dtype: torch.dtype,
        progress: Progress = quiet,
        skeleton: nn.Module | None = None,
        places: Destinations = NO_DESTINATIONS,
        adapt: Callable[[Iterable[Named]], Iterable[Named]] = iter,
    ) -> nn.Module:
        """TransformerModules with a version's weights, in eval mode, without gradients.

        skeleton: what transformer_skeleton gave, by default in `dtype` throughout. places: where some tensors go; those
        that another process fills are not read. adapt: what the tensors, under diffusers' names and in the file's dtype,
        go through on their way.
        """
        model = self.transformer_skeleton(version) if skeleton is None else skeleton
        state = model.state_dict()

        def has_place(name: str) -> bool:
            return fp8_rows.stored_name(name, state) in places.tensors

        def at_home(name: str) -> bool:
            return has_place(name) and not float8_blocks  # which the device quantises, far faster

        float8_blocks = any(tensor.dtype == fp8_rows.STORED for tensor in state.values())
        tensors = self.transformer_tensors(
            version,
            device=device,
            wanted=lambda name: places.fill or not has_place(name),
            at_home=at_home,
            progress=progress,
        )
        quantised = fp8_rows.quantised(adapt(tensors), state, dtype)
        return assign_weights(model, quantised, dtype, device, self._transformer_folder(version), places)

    def transformer_tensors(
        self,
        version: str,
        *,
        device: torch.device,
        wanted: Callable[[str], bool],
        at_home: Callable[[str], bool] = lambda _: False,
        progress: Progress = quiet,
    ) -> Iterator[Named]:
        """A version's tensors under diffusers' names, in the file's dtype; wanted and at_home as in read_tensors, of these
        names. A tensor that holds several others comes whole if one of them is wanted.
        """
        folder = self._transformer_folder(version)

        def names(name: str) -> list[str]:
            found = diffusers_names(name, TRANSFORMER_MAP) if self.official else None
            return found[1] if found else [name]

        files = progress(self._transformer_files(version), desc="loading transformer", unit="shard")
        tensors = read_tensors(
            files, lambda name: any(map(wanted, names(name))), device, lambda name: all(map(at_home, names(name)))
        )
        return self._renamed(tensors, TRANSFORMER_MAP, folder)

    def _renamed(self, tensors: Iterable[Named], rules: Sequence[Rule], origin: Path) -> Iterator[Named]:
        if not self.official:
            yield from tensors
            return
        for name, tensor in tensors:
            pairs = diffusers_tensors(name, tensor, rules)
            if pairs is None:
                raise InputError(f"{origin} holds {name}, which the official layout does not have")
            yield from pairs

    def flow_shift(self, version: str) -> float | None:
        """The schedule's shift where the folder records it for its version (diffusers layout), else None."""
        if self.official or not self.has("scheduler"):
            return None
        assert version in self.versions()
        shift = read_json(self.folders("scheduler")[0] / "scheduler_config.json").get("shift")
        return None if shift is None else float(shift)

    # -- VAE --

    def vae_config(self) -> dict[str, Any]:
        """diffusers' arguments of the VAE: scaling_factor, latent_channels, the compression ratios, and the widths."""
        (folder,) = self.require("vae")
        config = read_json(folder / "config.json")
        arguments = (
            official_vae_config(config, folder / "config.json") if self.official else without_bookkeeping(config)
        )
        for name in VAE_NUMBERS:
            if not isinstance(arguments.get(name), (int, float)) or not arguments[name] > 0:
                raise InputError(
                    f"{folder / 'config.json'}: {name} is {arguments.get(name)!r}; allowed is a number above 0"
                )
        return arguments

    def vae_skeleton(self, coder: str) -> nn.Module:
        """The VAE's "encoder" or "decoder" on the meta device: shapes without memory."""
        (folder,) = self.require("vae")
        config = self.vae_config()
        build = {"encoder": VaeEncoder, "decoder": VaeDecoder}[coder]
        return on_meta(lambda: build(VaeConfig(**config)), folder / "config.json")

    def _load_coder(self, coder: str, device: torch.device, dtype: torch.dtype, progress: Progress) -> nn.Module:
        (folder,) = self.require("vae")
        model = self.vae_skeleton(coder)
        files = progress(weight_files(folder), desc=f"loading VAE {coder}", unit="shard")
        other = {"encoder": "decoder.", "decoder": "encoder."}[coder]
        tensors = read_tensors(files, lambda name: not name.startswith(other), device)
        renamed = self._renamed(tensors, VAE_MAP, folder)
        own = ((name.removeprefix(f"{coder}."), tensor) for name, tensor in renamed)
        return assign_weights(model, own, dtype, device, folder)

    def load_vae_decoder(
        self, *, device: torch.device, dtype: torch.dtype, progress: Progress = quiet
    ) -> tuple[nn.Module, dict[str, Any]]:
        """(VaeDecoder, the VAE's config); the encoder is not read."""
        return self._load_coder("decoder", device, dtype, progress), self.vae_config()

    def load_vae_encoder(
        self, *, device: torch.device, dtype: torch.dtype, progress: Progress = quiet
    ) -> tuple[nn.Module, dict[str, Any]]:
        """(VaeEncoder, the VAE's config); the decoder is not read."""
        return self._load_coder("encoder", device, dtype, progress), self.vae_config()

    # -- encoders --

    def language_skeleton(self) -> Any:
        """The language model that load_language_model loads, on the meta device: shapes without memory."""
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

        origin = self.require("text")[0] / "config.json"
        config, _ = language_config(origin)
        model = on_meta(lambda: Qwen2_5_VLTextModel(config), origin)
        model.norm = nn.Identity()
        return model

    def load_language_model(
        self,
        *,
        device: torch.device,
        dtype: torch.dtype,
        progress: Progress = quiet,
        skeleton: Any = None,
        places: Destinations = NO_DESTINATIONS,
    ) -> tuple[Any, nn.Module]:
        """(tokenizer, Qwen2.5-VL's language model, whose last_hidden_state is the whole model's hidden_states[-3]).

        The vision tower, lm_head, the last two layers and the final norm are never read. skeleton: what language_skeleton
        gave. places: where some tensors go. Raises InputError where a file is absent or broken, and where weights and
        config do not fit.
        """
        folders = self.require("text")
        config, kept = language_config(folders[0] / "config.json")
        model = self.language_skeleton() if skeleton is None else skeleton
        # Its frequencies are computed, not stored.
        model.rotary_emb = type(model.rotary_emb)(config).to(device)
        files = progress(weight_files(folders[0]), desc="loading text encoder", unit="shard")
        tensors = read_tensors(
            files,
            lambda name: language_key(name, kept) is not None,
            device,
            lambda name: language_key(name, kept) in places.tensors,
        )
        renamed = ((language_key(name, kept) or "", tensor) for name, tensor in tensors)
        tokenizer = load_tokenizer(folders[-1], *VOCABULARY)
        return tokenizer, assign_weights(model, renamed, dtype, device, folders[0], places)

    def load_glyph_encoder(self, *, device: torch.device, dtype: torch.dtype) -> tuple[Any, nn.Module]:
        """(ByT5 tokenizer, T5 encoder stack whose last_hidden_state is [1, L, 1472] in the published model)."""
        from transformers import T5EncoderModel

        folders = self.require("glyph")
        config = glyph_config(folders[0] / "config.json")
        if self.official:
            tokenizer = load_tokenizer(folders[0], BYTES)
            assets = folders[1] / "assets"
            colors, fonts = (read_json(assets / name) for name in ("color_idx.json", "multilingual_10-lang_idx.json"))
            tokenizer.add_tokens(glyph_tokens(colors, fonts), special_tokens=True)
            config.vocab_size = len(tokenizer)
            origin = folders[1] / "checkpoints" / "byt5_model.pt"
            tensors = glyph_weights(origin)
        else:
            tokenizer = load_tokenizer(folders[1], BYTES)
            origin = folders[0]
            tensors = (
                (GLYPH_SHARED if name == "shared.weight" else name.removeprefix("encoder."), tensor)
                for name, tensor in read_tensors(weight_files(origin), lambda _: True, device)
            )
        model = on_meta(lambda: T5EncoderModel(config).encoder, folders[0] / "config.json")
        return tokenizer, assign_weights(model, tensors, dtype, device, origin)

    def load_image_encoder(self, *, device: torch.device, dtype: torch.dtype) -> tuple[Any, nn.Module]:
        """(SigLIP's image processor in its Pillow form, SiglipVisionModel)."""
        from transformers import SiglipVisionModel
        from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

        encoder, processor = self.require("image")
        read_json(encoder / "config.json")
        read_json(processor / "preprocessor_config.json")
        weight_files(encoder)
        model: Any = SiglipVisionModel.from_pretrained(encoder, dtype=dtype, use_safetensors=True).to(device)
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()  # out of the file's map, as in assign_weights
        return SiglipImageProcessorPil.from_pretrained(processor), model.eval().requires_grad_(False)


def open_model(model_path: str | Path, parts: Sequence[str], progress: Progress = quiet) -> ModelFolder:
    """The model folder at a path, or of a hub id, of which only these parts are downloaded (into the hub's own cache).

    parts: keys of PARTS. The hub shows its own progress bars, so `progress` has nothing to do. Raises InputError where
    the path is neither a folder in one of the two layouts nor a hub id, and where the hub cannot be reached.
    """
    assert all(part in PARTS for part in parts), parts
    try:
        path, repo = Path(model_path).expanduser(), None
        present = path.exists()
    except RuntimeError as error:
        raise InputError(f"{model_path}: there is no such user") from error
    except OSError as error:
        raise InputError(f"{model_path}: {error.strerror}") from error
    if not present:
        repo = str(model_path)
        path = download(repo, parts)
    layout = _layout(path)
    if layout is None:
        raise InputError(
            f"{model_path} is no model folder: it has neither the official layout (transformer/<version>/config.json, "
            "vae/, …) nor diffusers' (model_index.json)"
        )
    return ModelFolder(path, layout, repo)


def _layout(path: Path) -> str | None:
    """Which layout a folder has, if any. The transformers tell; without them it is judged by what else there is."""
    if (path / "transformer" / "config.json").is_file():
        return "diffusers"
    if any(path.glob("transformer/*/config.json")):
        return "official"
    if (path / "model_index.json").is_file():
        return "diffusers"
    return "official" if any((path / name).is_dir() for part in PARTS.values() for name in part.official) else None
