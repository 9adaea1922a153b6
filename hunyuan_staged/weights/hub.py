"""What each part of a model is called in each layout, and how it is downloaded."""

import contextlib
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath
from queue import Empty, SimpleQueue
from typing import Any, TypeVar, cast

from hunyuan_staged.errors import InputError
from hunyuan_staged.versions import DEFAULT_RESOLUTION

PUBLISHED_RESOLUTIONS = ("480p", "720p")  # of the transformers in the official repository, super resolution apart
PUBLISHED_SUPER_RESOLUTION = ("720p", "1080p")
ANSWER_SECONDS = 5  # how long the hub may be silent when it is asked a question
WHOLE_ANSWER_SECONDS = 30  # how long all of its answer may take
Given = TypeVar("Given")


@dataclass(frozen=True)
class Part:
    """Where a part of the model lies in each layout; for the official one, the command that fetches each folder.

    In a command {path} is the model folder. option: that names one file in its place.
    """

    title: str
    official: dict[str, str]
    diffusers: tuple[str, ...]
    option: str = ""


HF, MODELSCOPE = "hf", "modelscope"
# Where huggingface_hub, below a local folder, notes the revision and ETag of each file.
NOTES = Path(".cache") / "huggingface" / "download"


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


def model_fetch(version: str, path: object) -> str:
    """The command that downloads what one version needs of the official repository, which in all has 338 GB."""
    parts = " ".join(f'"{name}/*"' for name in (f"transformer/{version}", "vae", "scheduler"))
    return f"hf download tencent/HunyuanVideo-1.5 --include {parts} --local-dir {path}"


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
FOUR_STEPS_FILE = "hy1.5_t2v_480p_lightx2v_4step.safetensors"
FOUR_STEPS_SOURCE = Source("lightx2v/Hy1.5-Distill-Models", (FOUR_STEPS_FILE,), "four_steps")

PARTS = {
    # One version of ten, of 33 GB each.
    "transformer": Part(
        "transformer", {"transformer": official_fetch(f"transformer/{DEFAULT_RESOLUTION}_t2v")}, ("transformer",)
    ),
    "upsampler": Part("latent upsampler", _tencent("upsampler"), ()),
    "scheduler": Part("scheduler", _tencent("scheduler"), ("scheduler",)),
    "vae": Part("VAE", _tencent("vae"), ("vae",), "vae"),
    "text": Part(
        "text encoder",
        {LANGUAGE_SOURCE.into: LANGUAGE_SOURCE.command()},
        ("text_encoder", "tokenizer"),
        "text_encoder",
    ),
    "glyph": Part(
        "glyph encoder",
        {source.into: source.command() for source in (BYTES_SOURCE, GLYPH_SOURCE)},
        ("text_encoder_2", "tokenizer_2"),
        "glyph_encoder",
    ),
    "image": Part(
        "image encoder",
        {f"{_IMAGE_FOLDER}/{folder}": IMAGE_SOURCE.command() for folder in ("image_encoder", "feature_extractor")},
        ("image_encoder", "feature_extractor"),
        "vision_encoder",
    ),
}
# The parts that one file may replace, beside the transformer.
FILE_PARTS = tuple(name for name, part in PARTS.items() if part.option)
TOKENIZER_FETCH = (
    'hf download Qwen/Qwen2.5-VL-7B-Instruct --include "*token*" "vocab.json" "merges.txt" --local-dir {folder}'
)
DIFFUSERS_REPOSITORY = "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-{version}"
DIFFUSERS_FETCH = f'hf download {DIFFUSERS_REPOSITORY} --include "{{folder}}/*" --local-dir {{path}}'


def diffusers_repository(version: str) -> str:
    """The hub id of a version in diffusers' layout."""
    return DIFFUSERS_REPOSITORY.format(version=version)


def download(repo: str, parts: Sequence[str]) -> Path:
    """The snapshot of a hub repository: all configs, and the files of the parts but for the transformers' weights."""
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo):
        raise InputError(
            f"{repo} does not exist, and it is no hub id (owner/name) either; to get it: "
            f"{model_fetch(f'{DEFAULT_RESOLUTION}_t2v', repo)}"
        )
    folders = {
        name for part in parts if part != "transformer" for name in (*PARTS[part].official, *PARTS[part].diffusers)
    }
    # Configs tell which layout and which versions there are; they are small, so all of them come.
    return snapshot(repo, ["*.json", *(f"{folder}/*" for folder in sorted(folders))])


def snapshot(repo: str, patterns: list[str], revision: str | None = None) -> Path:
    """The files of a repository whose names match, in the hub's cache; InputError where the hub does not give them."""
    from huggingface_hub import snapshot_download

    with _asking(repo):
        return Path(snapshot_download(repo, allow_patterns=patterns, revision=revision, etag_timeout=ANSWER_SECONDS))


def remote_shape(repo: str, file: PurePath, revision: str, tensor: str) -> list[int] | None:
    """The shape of a tensor in a repository's safetensors file, whose header alone is read; None where it has none."""
    from huggingface_hub import parse_safetensors_file_metadata

    with _asking(repo):
        found = parse_safetensors_file_metadata(repo, file.as_posix(), revision=revision).tensors.get(tensor)
        return None if found is None else list(found.shape)


@contextlib.contextmanager
def _asking(repo: str) -> Iterator[None]:
    """Whatever a hub that is absent, slow, or something else altogether makes its client raise becomes an InputError."""
    try:
        _limit_patience()
        yield
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "")[:200] or type(error).__name__
        raise InputError(
            f"{repo} is no folder here, and the hub did not give it ({reason}); to have it in a folder: "
            f"{model_fetch(f'{DEFAULT_RESOLUTION}_t2v', 'DIR')}"
        ) from error


def _limit_patience() -> None:
    """Have the hub's client give up on what never answers or never ends: for most requests it would wait for ever."""
    from huggingface_hub import get_session

    session: Any = get_session()
    if "send" not in vars(session):
        session.send = partial(_send, session.send)


def _send(send: Callable[..., Any], request: Any, **options: Any) -> Any:
    """A request of the client, an httpx.Request: its whole answer in time, or, of a file to be streamed, the header."""
    given = request.extensions.get("timeout", {})
    waits = ("connect", "read", "write", "pool")
    limits = {wait: ANSWER_SECONDS if given.get(wait) is None else given[wait] for wait in waits}
    request.extensions = {**request.extensions, "timeout": limits}
    return within(WHOLE_ANSWER_SECONDS, lambda: send(request, **options))


def within(seconds: float, call: Callable[[], Given]) -> Given:
    """What a call gives; TimeoutError where it takes longer, and is then left to itself on a thread of its own.

    For servers: a time-out for each read bounds nothing where a byte comes now and then.
    """
    results: SimpleQueue[tuple[Given | None, BaseException | None]] = SimpleQueue()

    def work() -> None:
        try:
            results.put((call(), None))
        except BaseException as error:
            results.put((None, error))

    threading.Thread(target=work, name="asking a server", daemon=True).start()
    try:
        given, error = results.get(timeout=seconds)
    except Empty:
        raise TimeoutError(f"timed out: its answer did not end within {seconds:g} s") from None
    if error is not None:
        raise error
    return cast(Given, given)
