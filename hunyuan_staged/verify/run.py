"""All checks of a model folder, one part after the other, so that only one is in memory."""

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from hunyuan_staged.errors import InputError, one_line
from hunyuan_staged.verify import encoders, published, transformer, vae
from hunyuan_staged.verify.checks import Check
from hunyuan_staged.verify.hashes import check_hashes
from hunyuan_staged.versions import TransformerVersion, parse_version
from hunyuan_staged.weights import components
from hunyuan_staged.weights.folder import ModelFolder


@dataclass
class Verification:
    """A run over some versions of a folder. hashes: whether to read all of each file for its hash. embeddings: what the
    encoders have given so far, for the transformers."""

    folder: ModelFolder
    versions: list[TransformerVersion]
    device: torch.device
    dtype: torch.dtype
    hashes: bool = True
    embeddings: dict[str, torch.Tensor] = field(default_factory=dict)

    def checks(self) -> Iterator[Check]:
        """Every check, as soon as it is done. What cannot be read fails its part, and the others go on."""
        first = self.versions[0].name
        tasks = {version.task for version in self.versions}
        for part in ("text", "glyph", *(["image"] if "i2v" in tasks else []), "vae"):
            files = partial(published.files_of, self.folder, part, first)
            yield from self._guarded(part, files, partial(self._hashes, part), partial(self._part, part))
        for version in self.versions:
            files = partial(published.files_of, self.folder, "transformer", version.name)
            hashed = partial(self._hashes, "transformer", version.name)
            yield from self._guarded(f"transformer {version.name}", files, hashed, partial(self._transformer, version))
        yield from self._guarded("attention", self._attention)

    def _hashes(self, part: str, version: str | None = None) -> list[Check]:
        if not self.hashes:
            return []
        folders = [self.folder.transformer_folder(version)] if version else self.folder.folders(part)
        return check_hashes(part, folders, self.folder.path)

    def _part(self, part: str) -> list[Check]:
        if part == "vae":
            return vae.check_vae(self.folder, self.device)
        if part == "glyph":
            width = self._transformer_config()["text_embed_2_dim"]
            checks, found = encoders.check_glyphs(self.folder, self.device, self.dtype, width)
        else:
            check = {"text": encoders.check_text, "image": encoders.check_image}[part]
            checks, found = check(self.folder, self.device, self.dtype)
        self.embeddings |= found
        return checks

    def _transformer_config(self) -> dict[str, Any]:
        return components.transformer_config(self.folder, self.versions[0].name)

    def _transformer(self, version: TransformerVersion) -> list[Check]:
        needed = {"prompt_embeds": "text", "prompt_embeds_2": "glyph"}
        needed |= {"image_embeds": "image"} if version.task == "i2v" else {}
        absent = [part for name, part in needed.items() if name not in self.embeddings]
        if absent:
            raise InputError(f"not run: it needs what {' and '.join(absent)} would have given")
        return transformer.check_transformer(self.folder, version, self.device, self.dtype, self.embeddings)

    def _attention(self) -> list[Check]:
        config = self._transformer_config()
        heads, width = config["num_attention_heads"], config["attention_head_dim"]
        return [transformer.check_attention(self.device, self.dtype, heads, width)]

    def _guarded(self, part: str, *works: Callable[[], list[Check]]) -> Iterator[Check]:
        """What the works give, up to the first that cannot read its files."""
        try:
            for work in works:
                yield from (replace(check, part=part) if check.part == "transformer" else check for check in work())
        except InputError as error:
            yield Check(part, "can be read", False, one_line(error))
        finally:
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()


def chosen_versions(folder: ModelFolder, name: str | None) -> list[TransformerVersion]:
    """The version that is named, else all that the folder holds; InputError where there is none."""
    offered = folder.versions()
    if name is not None and name not in offered:
        raise InputError(f"{name} is not in {folder.path}; it holds {', '.join(offered) or 'none'}", option="version")
    if not offered:
        raise InputError(f"{folder.path} holds no transformer version")
    return [parse_version(one) for one in ([name] if name else offered)]
