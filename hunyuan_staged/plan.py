"""What a stage needs in memory, held against what is free, before anything is loaded. Knows no tensors.

Weights are counted from the config, to the byte. Working memory is computed from a few measured figures, which stand
here with their sources; what was never measured says so. All sizes are in bytes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hunyuan_staged import InputError, tiles
from hunyuan_staged.versions import (
    CHUNK_SIZES,
    DEFAULT_TILE_OVERLAP,
    DEFAULT_TILE_SIZE,
    LAYERS,
    SCORES_AT_ONCE,
    SMALL_TILE_SIZE,
    SPARSE_ATTN_MODE,
    TEMPORAL_RATIO,
    latent_shape,
)

GIB = 2**30
SLOTS = 2  # blocks in flight: one computes while the next one's weights arrive
# Beside what is counted: fragments of the allocator, cuBLAS's workspaces, kernels that load late. Not measured.
RESERVE = 3 * GIB // 4

# Stage 2's working memory, in activations (one value of the run's dtype for each token and channel). H100, 720p, bf16,
# compiled, flash4 or cuDNN alike: 2.79 GiB at 121 frames and 1.22 at 49 (README, "Measured").
ACTIVATIONS = 6.8
# 480p, whose number of tokens is odd: 2.25 GiB, before the compiler was told not to pad products.
ACTIVATIONS_ODD = 11.9
ACTIVATIONS_SPARSE = 12.5  # SSTA, before the feed-forward was taken apart from attention's output
ACTIVATIONS_EAGER = 20.6  # not compiled: 3.7 GiB at 49 frames, before attention's inputs and output were freed early
ACTIVATIONS_EXCHANGE = 6.0  # of several sequence shards: q, k and v packed, sent and received. Not measured

# Stage 1's: 1,108 tokens through a layer of the language model, and the hidden states. H100: 0.2 GiB.
LANGUAGE_WORKING = GIB // 2
# Stage 3's, in tensors of a level's width: behind the mid block, for each px of the last level and each frame of a chunk
# (what goes on, the padded input of a convolution, its product), and in it, for each position. Counted, see
# `bench memory stage3` for the peak.
DECODER_TENSORS = 3
MID_BLOCK_TENSORS = 8
SCORE_BYTES = 4 + 4 + 2  # of the mid block's attention: in float32, after the softmax, and rounded
# Of the published VAE, where a config does not say.
VAE_CHANNELS = (128, 256, 512, 1024, 1024)
VAE_LAYERS = 2


def gib(size: float) -> str:
    """Bytes for a reader, e.g. "4.9 GiB"; less than one as MiB."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.0f} MiB"


@dataclass(frozen=True)
class Free:
    """Bytes that are free: on the GPU (None where the stage computes on the host), and in host memory."""

    device: int | None
    host: int

    def describe(self) -> str:
        """One phrase for the plan."""
        return f"host {gib(self.host)}" if self.device is None else f"GPU {gib(self.device)}, host {gib(self.host)}"


@dataclass(frozen=True)
class BlockWeights:
    """The weights of a model of equal blocks: how many blocks, the bytes of one of them, and of everything else."""

    count: int
    each: int
    rest: int

    @property
    def total(self) -> int:
        return self.count * self.each + self.rest


@dataclass(frozen=True)
class Fit:
    """How a model is laid out: how many of its blocks are offloaded, why, and what that takes, by part.

    tight: it fits only without the reserve.
    """

    offloaded: int
    reason: str
    device: Mapping[str, int]
    host: int
    tight: bool = False

    @property
    def total(self) -> int:
        return sum(self.device.values())

    def describe(self, count: int, what: str = "blocks") -> str:
        """One line on how many of `count` blocks are offloaded, and why."""
        chosen = f"{self.offloaded} of {count}" if self.offloaded else "none"
        tight = "; that leaves little room" if self.tight else ""
        return f"offloaded {what}: {chosen} ({self.reason}{tight})"

    def rows(self, count: int, free: Free, what: str = "blocks") -> dict[str, object]:
        """The rows of a plan about memory."""
        name, _, chosen = self.describe(count, what).partition(": ")
        parts = ", ".join(f"{part} {gib(size)}" for part, size in self.device.items() if size)
        host = f"; host: offloaded weights {gib(self.host)}" if self.host else ""
        return {name: chosen, "memory": f"{gib(self.total)}: {parts}{host}", "free": free.describe()}


def device_parts(weights: BlockWeights, working: int, offloaded: int) -> dict[str, int]:
    """What a device holds with so many blocks offloaded, by part: up to SLOTS of those are there at a time."""
    in_flight = min(SLOTS, offloaded) * weights.each
    resident = weights.rest + (weights.count - offloaded) * weights.each
    return {"weights": resident, "blocks in flight": in_flight, "working memory": working}


def fit(
    what: str,
    weights: BlockWeights,
    working: int,
    free: Free,
    *,
    asked: int | None = None,
    ranks: int = 1,
    remedies: Sequence[str] = (),
) -> Fit:
    """The layout of a model on one device. asked: how many blocks are to be offloaded; None chooses.

    Chosen is the smallest number with which everything and RESERVE fit. ranks: processes of this host, which share one
    copy of the offloaded blocks, and on a CPU have the rest each for itself. Raises InputError, with the numbers and the
    remedies (flags that would help), where that does not fit; what fits but for the reserve is not refused.
    """

    def needed(offloaded: int) -> int:
        return sum(device_parts(weights, working, offloaded).values())

    everything = weights.count
    if asked is not None and asked > everything:
        raise InputError(f"--offload_blocks {asked} is more than the {everything} blocks of {what}")
    if free.device is None:
        # Working memory on a CPU was never measured, so that only what is certain counts.
        offloaded = asked or 0
        parts = device_parts(weights, 0, offloaded)
        host = ranks * sum(parts.values()) + offloaded * weights.each
        if host > free.host:
            raise InputError(_refusal(what, f"{gib(host)} of host memory", parts, free, remedies))
        return Fit(offloaded, "as asked" if asked is not None else "no GPU", parts, offloaded * weights.each)
    chosen, reason = asked, "as asked"
    if chosen is None:
        room = free.device - RESERVE
        chosen = next((n for n in range(everything + 1) if needed(n) <= room), everything)
        reason = f"all of them resident need {gib(needed(0))}, {gib(free.device)} are free"
    parts = device_parts(weights, working, chosen)
    if needed(chosen) > free.device:
        asked_for = f" with {chosen} of {everything} blocks offloaded" if chosen else ""
        raise InputError(_refusal(what + asked_for, f"{gib(needed(chosen))} of GPU memory", parts, free, remedies))
    host = chosen * weights.each
    if host > free.host:
        raise InputError(
            _refusal(f"{what} with {chosen} of {everything} blocks offloaded", f"{gib(host)} of host memory", {}, free)
        )
    return Fit(chosen, reason, parts, host, needed(chosen) > free.device - RESERVE)


def _refusal(
    what: str, needs: str, parts: Mapping[str, int], free: Free, remedies: Sequence[str] = ("more memory",)
) -> str:
    held = ", ".join(f"{name} {gib(size)}" for name, size in parts.items() if size)
    return (
        f"{what} needs {needs}{f' ({held})' if held else ''}; free: {free.describe()}. "
        f"What would help: {', '.join(remedies) or 'more memory'}"
    )


# -- stage 2 --


@dataclass(frozen=True)
class Denoising:
    """What decides the working memory of a denoising step. channels: the width of the blocks; itemsize: of the dtype.

    kernel: the attention mode that runs. shards: processes that a guidance row's tokens are split over. block: bytes of
    one block in the run's dtype where it is stored in another one, else 0.
    """

    video_tokens: int
    text_tokens: int
    channels: int
    itemsize: int
    kernel: str
    compiled: bool
    shards: int = 1
    block: int = 0

    @property
    def working(self) -> int:
        """Bytes, by the measured activations a token; linear in the tokens, as both measured lengths are."""
        shard = -(-self.video_tokens // self.shards)
        activations = ACTIVATIONS if shard % 8 == 0 else ACTIVATIONS_ODD
        if self.kernel == SPARSE_ATTN_MODE:
            activations = ACTIVATIONS_SPARSE
        if not self.compiled:
            activations = ACTIVATIONS_EAGER
        if self.shards > 1:
            activations += ACTIVATIONS_EXCHANGE
        tokens = shard + self.text_tokens
        return int(activations * tokens * self.channels * self.itemsize) + self.block


def video_tokens(num_frames: int, height: int, width: int, patch: Sequence[int] = (1, 1, 1)) -> int:
    """How many tokens a video of T frames of H x W px is; patch (t, h, w) in latents."""
    _, _, *grid = latent_shape(num_frames, height, width, 1)
    total = 1
    for length, side in zip(grid, patch, strict=True):
        total *= length // side
    return total


def longest_video(room: int, tokens_a_frame: int, denoising: Denoising) -> int | None:
    """The most frames (4n + 1) whose working memory is at most `room`; None where not even one frame's is."""

    def fits(latent_frames: int) -> bool:
        return replace(denoising, video_tokens=latent_frames * tokens_a_frame).working <= room

    if not fits(1):
        return None
    low, high = 1, 1
    while fits(high * 2):
        low = high = high * 2
    high *= 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return (low - 1) * TEMPORAL_RATIO + 1


def denoising_remedies(
    weights: BlockWeights,
    denoising: Denoising,
    free: Free,
    *,
    asked: int | None,
    num_frames: int,
    float8: bool,
    resolution: str,
) -> list[str]:
    """The flags that would make a denoising fit that does not: only those that would, alone or with the ones before."""
    remedies = []
    if free.device is not None:
        least = sum(device_parts(weights, denoising.working, weights.count).values())
        if asked is not None and asked < weights.count:
            if least <= free.device:
                return ["--enable_offloading, or no flag about offloading"]
            remedies.append("--enable_offloading")
        latent_frames = (num_frames - 1) // TEMPORAL_RATIO + 1
        room = free.device - (least - denoising.working)
        shorter = longest_video(room, max(1, denoising.video_tokens // latent_frames), denoising)
        if shorter:
            remedies.append(f"--video_length {shorter} or less")
        if resolution != "480p":
            remedies.append("--resolution 480p in stage 1")
    elif not float8:
        remedies.append("--weights_dtype fp8")
    return [*remedies, "more GPUs" if free.device is not None else "a GPU"]


@dataclass(frozen=True)
class MeasuredStep:
    """Seconds of a guided step (two rows) on one GPU, as README's table "Measured" has it; extra: of the first step."""

    gpu: str
    tokens: int
    kernel: str
    compiled: bool
    offloaded: int
    seconds: float
    extra: float = 0.0


H100 = "NVIDIA H100 80GB HBM3"
MEASURED_STEPS = (
    MeasuredStep(H100, 111_600, "flash4", True, 0, 17.94, 17.7),
    MeasuredStep(H100, 46_800, "flash4", True, 0, 3.72, 17.8),
    MeasuredStep(H100, 49_290, "flash4", True, 0, 4.19, 15.5),
    MeasuredStep(H100, 111_600, "cudnn", True, 0, 21.69, 14.4),
    MeasuredStep(H100, 111_600, "cudnn", True, LAYERS, 21.54, 11.9),
    MeasuredStep(H100, 46_800, "cudnn", True, 0, 4.35, 14.4),
    MeasuredStep(H100, 46_800, "cudnn", True, LAYERS, 4.38, 14.4),
    MeasuredStep(H100, 46_800, "cudnn", False, 0, 5.33),
)


def expected_seconds(
    gpu: str | None,
    denoising: Denoising,
    offloaded: int,
    *,
    layers: int,
    rows: int,
    ranks: int,
    steps: int,
    float8: bool = False,
) -> float | None:
    """Seconds of the denoising loop where a step just like this one has been measured, else None: nothing is guessed."""
    # All blocks and both guidance rows, in bf16, on one GPU: all that has been measured.
    if layers != LAYERS or rows != 2 or ranks != 1 or denoising.itemsize != 2 or float8:
        return None
    asked = (gpu, denoising.video_tokens, denoising.kernel, denoising.compiled, offloaded)
    for row in MEASURED_STEPS:
        if asked == (row.gpu, row.tokens, row.kernel, row.compiled, row.offloaded):
            return steps * row.seconds + row.extra
    return None


# -- stage 3 --


def _remembered(channels: Sequence[int], layers: int, ratio: int) -> float:
    """Values that a decoder's causal convolutions remember for each px: two frames of the input of each.

    channels: of the levels from the smallest to the largest frames, each twice as high and wide as the one before.
    """
    convolutions = 2 * (layers + 1) + 1  # of a level: its resnets', and the upsampler's or conv_out
    return sum(2 * convolutions * width * (min(2**level, ratio) / ratio) ** 2 for level, width in enumerate(channels))


def decoder_working(
    at_once: int, tile: tuple[int, int, int], open_px: int, config: Mapping[str, Any], itemsize: int
) -> int:
    """Bytes beside the weights while a tile (T, H, W) is decoded in chunks of at_once latent frames.

    open_px: of all tiles that are begun and not finished, which remember frames.
    """
    frames, height, width = tile
    ratio, temporal = int(config["spatial_compression_ratio"]), int(config["temporal_compression_ratio"])
    channels = list(config.get("block_out_channels") or VAE_CHANNELS)[::-1]
    latent_frames = (frames - 1) // temporal + 1
    chunk = min(frames, at_once * temporal) + 2
    positions = height * width // ratio**2
    behind = DECODER_TENSORS * channels[-1] * chunk * height * width
    if chunk - 2 < frames:
        behind += int(_remembered(channels, int(config.get("layers_per_block") or VAE_LAYERS), ratio) * open_px)
    scores = min(SCORES_AT_ONCE, positions * positions * latent_frames) * SCORE_BYTES
    inside = MID_BLOCK_TENSORS * channels[0] * latent_frames * positions * itemsize + scores
    return max(behind * itemsize, inside) + channels[0] * latent_frames * open_px // ratio**2 * itemsize


@dataclass(frozen=True)
class Decoding:
    """How a video is decoded: the side of its tiles in px (None: whole frames), latent frames at once, why, and what
    that takes, by part."""

    tile_size: int | None
    at_once: int
    reason: str
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def fit_decoding(
    config: Mapping[str, Any],
    weights: int,
    itemsize: int,
    size: tuple[int, int, int],
    free: Free,
    *,
    asked: int | None,
    whole: bool = False,
    overlap: float = DEFAULT_TILE_OVERLAP,
) -> Decoding:
    """Tiles and chunks for a video of size (T, H, W). asked: --tile_size; whole: --disable_tiling; else the default
    size, or the small one where less is free. Before tiles get smaller, chunks get shorter: that costs little.

    Raises InputError where the tiles do not fit, with the flags that would help.
    """
    frames, height, width = size
    ratio = int(config["spatial_compression_ratio"])
    room = free.host if free.device is None else free.device

    def decoding(tile: int | None, at_once: int, reason: str) -> Decoding:
        if tile is None:
            sides, open_px = (height, width), height * width
        else:
            cut = tiles.tile_plan(
                height // ratio, width // ratio, tile_size=tile, tile_overlap=overlap, spatial_ratio=ratio
            )
            sides = (cut.rows[0].size * ratio, cut.columns[0].size * ratio)
            last_row = cut.rows[-1].size * sum(span.size for span in cut.columns) * ratio**2
            open_px = max(sides[0] * sides[1], last_row)
        working = decoder_working(at_once, (frames, *sides), open_px, config, itemsize)
        parts = {"weights": weights, "frames": 3 * frames * height * width, "working memory": working}
        return Decoding(tile, at_once, reason, parts)

    # Of each size the longest chunk that fits with the reserve, or else the shortest.
    wanted: list[tuple[int | None, str]] = [(None if whole else asked, "as asked")]
    if not whole and asked is None:
        first = decoding(DEFAULT_TILE_SIZE, 1, "")
        small = f"{DEFAULT_TILE_SIZE} px would need {gib(first.total)}, {gib(room)} are free"
        wanted = [(DEFAULT_TILE_SIZE, "the default"), (SMALL_TILE_SIZE, small)]
    tried = [decoding(tile, at_once, reason) for tile, reason in wanted for at_once in CHUNK_SIZES]
    chosen = next((one for one in tried if one.total + RESERVE <= room), tried[-1])
    if chosen.total > room:
        what = "whole frames" if chosen.tile_size is None else f"a tile of {chosen.tile_size} px"
        fits = decoding(SMALL_TILE_SIZE, 1, "").total <= room
        remedies = [f"--tile_size {SMALL_TILE_SIZE}" if fits else "fewer frames"]
        raise InputError(_refusal(f"{what}, {frames} frames,", gib(chosen.total), chosen.parts, free, remedies))
    return chosen


# Seconds of decoding with the published VAE in float16 at an overlap of 0.25, on one GPU, as README's "Measured" has it:
# (GPU, (T, H, W), side of a tile, latent frames at once).
MEASURED_DECODINGS: dict[tuple[str, tuple[int, int, int], int | None, int], float] = {
    (H100, (121, 720, 1280), 256, 8): 8.61,
    (H100, (49, 720, 1280), 256, 8): 3.49,
    (H100, (121, 720, 1280), None, 8): 5.04,
    (H100, (121, 720, 1280), None, 1): 5.22,
    (H100, (121, 720, 1280), 128, 8): 9.99,
}


def decoding_seconds(
    gpu: str | None,
    config: Mapping[str, Any],
    size: tuple[int, int, int],
    decoding: Decoding,
    overlap: float,
    ranks: int,
) -> float | None:
    """Seconds of a decoding where one just like it has been measured, else None: nothing is guessed."""
    published = list(config.get("block_out_channels") or VAE_CHANNELS) == list(VAE_CHANNELS)
    if gpu is None or not published or overlap != DEFAULT_TILE_OVERLAP or ranks != 1:
        return None
    return MEASURED_DECODINGS.get((gpu, size, decoding.tile_size, decoding.at_once))


# -- what is free --


def free_memory(device: Any) -> Free:
    """What is free on a torch device and its host; memory that torch holds without using it counts as free."""
    host = host_available()
    if device.type != "cuda":
        return Free(None, host)
    import torch

    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return Free(torch.cuda.mem_get_info(device)[0] + held, host)


def host_available(root: Path = Path("/")) -> int:
    """Bytes of host memory that this process can still get without swapping: the kernel's MemAvailable, or less where a
    cgroup (version 1 or 2) of a container sets a limit. root: where proc and sys are mounted."""
    available = _field(root / "proc/meminfo", "MemAvailable:") * 1024
    for folder, limit, usage, cache in _cgroups(root):
        try:
            allowed = int((folder / limit).read_text())
            used = int((folder / usage).read_text())
        except (OSError, ValueError):  # no such file, or "max"
            continue
        # The page cache counts as used, and is given back when needed.
        kept = sum(_field(folder / "memory.stat", f"{cache}{name}_file") for name in ("active", "inactive"))
        available = min(available, max(0, allowed - used + kept))
    return available


def _field(path: Path, name: str) -> int:
    for line in path.read_text().splitlines() if path.is_file() else ():
        words = line.split()
        if words[:1] == [name]:
            return int(words[1])
    return 0


def _cgroups(root: Path) -> list[tuple[Path, str, str, str]]:
    """(folder, file of the limit, file of the use, prefix in memory.stat) of this process's cgroups and their parents."""
    found = []
    path = root / "proc/self/cgroup"
    for line in path.read_text().splitlines() if path.is_file() else ():
        _, controllers, name = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        files = files if controllers else ("memory.max", "memory.current", "")
        # Seen from inside a container the path may be the host's, and then is not there: its own is the mount itself.
        parents = [base, *(base / part for part in _prefixes(name))]
        found += [(folder, *files) for folder in parents if folder.is_dir()]
    return found


def _prefixes(name: str) -> list[str]:
    parts = [part for part in name.split("/") if part]
    return ["/".join(parts[: i + 1]) for i in range(len(parts))]


# -- cards, computed --

CARDS = (8, 12, 16, 24, 48, 80)  # GB as they are sold
CARD_OVERHEAD = 3 * GIB // 4  # what CUDA itself and a desktop take of a card. Not measured


def card(size: int) -> Free:
    """What is free on an otherwise idle card of `size` GB, in a host with enough memory."""
    return Free(size * GIB - CARD_OVERHEAD, 64 * GIB)
