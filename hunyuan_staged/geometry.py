"""Pixels, latents and tokens: size buckets, lengths of 4n + 1 frames.

Shapes: T frames, H x W pixels; a latent has (T-1)/4+1 frames of H/16 x W/16.
"""

import itertools
import math
from collections.abc import Sequence
from functools import cache

from hunyuan_staged.errors import InputError

MAX_VIDEO_LENGTH = 2401  # 100 s at 24 frames per second
MAX_SIDE = 4096  # px, of a size that is given; the largest bucket is 2880 wide

LATENT_CHANNELS = 32
SPATIAL_RATIO = 16
TEMPORAL_RATIO = 4

# The side of the square whose area a resolution keeps at every aspect ratio (official code: target_size_config).
BUCKET_BASE = {"demo": 128, "360p": 480, "480p": 640, "720p": 960, "1080p": 1440, "demo_hd": 256}
MAX_RATIO = 4.0


@cache
def size_buckets(base: int, max_ratio: float = MAX_RATIO) -> tuple[tuple[int, int], ...]:
    """All (height, width) in pixels whose area comes nearest to base x base from below, in patches of 16.

    The order and the walk are the official code's (generate_crop_size_list), so ties fall as they do there.
    """
    patches = round((base / SPATIAL_RATIO) ** 2)
    sizes = []
    height, width = patches, 1
    while height > 0:
        if max(height, width) / min(height, width) <= max_ratio:
            sizes.append((height * SPATIAL_RATIO, width * SPATIAL_RATIO))
        if height * (width + 1) <= patches:
            width += 1
        else:
            height -= 1
    return tuple(sizes)


def nearest_size(resolution: str, ratio: float) -> tuple[int, int]:
    """The (height, width) bucket of a resolution whose height / width, to five digits as in the official code, is nearest
    to ratio."""
    if resolution not in BUCKET_BASE:
        raise InputError(f"resolution {resolution!r} is unknown; known: {', '.join(BUCKET_BASE)}")
    return min(size_buckets(BUCKET_BASE[resolution]), key=lambda size: abs(round(size[0] / size[1], 5) - ratio))


def size_for_ratio(resolution: str, aspect_ratio: str) -> tuple[int, int]:
    """(height, width) in pixels for an aspect ratio given as width:height, e.g. 16:9. InputError if it is neither."""
    parts = aspect_ratio.split(":")
    try:
        width, height = (float(part) for part in parts)
    except ValueError:
        width = height = 0.0
    if not (0 < width < math.inf and 0 < height < math.inf):
        raise InputError(f"--aspect_ratio {aspect_ratio!r} is not width:height with two positive numbers, e.g. 16:9")
    return nearest_size(resolution, height / width)


def resolution_of(height: int, width: int) -> str | None:
    """The resolution that has this size among its buckets; no size is in those of two. None where it is in none."""
    return next((name for name, base in BUCKET_BASE.items() if (height, width) in size_buckets(base)), None)


def enlarged_size(base: str, resolution: str, height: int, width: int) -> tuple[int, int]:
    """The (height, width) in pixels that super resolution gives a base run's height x width.

    The bucket of the resolution whose width / height is nearest, the first of equally near ones in the order of the
    official list, whose first number is the width here. (By height / width
    4 of the 181 sizes of 720p would become others.) Raises InputError for a size that is no bucket of the base.
    """
    if (height, width) not in size_buckets(BUCKET_BASE[base]):
        raise InputError(f"{width}x{height} is no size of {base}, from which super resolution to {resolution} starts")
    sizes = ((rows, columns) for columns, rows in size_buckets(BUCKET_BASE[resolution]))
    return min(sizes, key=lambda size: abs(size[1] / size[0] - width / height))


def check_aspect_ratio(aspect_ratio: str) -> str:
    """A ratio itself where it is width:height and no more oblong than the buckets are, else InputError.

    size_for_ratio takes any, as the official code does, and gives the most oblong bucket.
    """
    size_for_ratio("720p", aspect_ratio)  # every resolution refuses the same
    width, height = (float(part) for part in aspect_ratio.split(":"))
    if not 1 / MAX_RATIO <= width / height <= MAX_RATIO:
        raise InputError(f"--aspect_ratio {aspect_ratio} is outside 1:{MAX_RATIO:g} to {MAX_RATIO:g}:1")
    return aspect_ratio


def check_video_length(num_frames: int) -> int:
    """The frame count itself where it is 4n + 1 with n >= 0 and not too large, else InputError with what is allowed."""
    if num_frames < 1 or (num_frames - 1) % TEMPORAL_RATIO:
        below = max(1, (num_frames - 1) // TEMPORAL_RATIO * TEMPORAL_RATIO + 1)
        raise InputError(
            f"--video_length {num_frames} is not 4n+1; the nearest are {below} and {below + TEMPORAL_RATIO}"
        )
    if num_frames > MAX_VIDEO_LENGTH:
        raise InputError(f"--video_length {num_frames} is more than {MAX_VIDEO_LENGTH}")
    return num_frames


def check_size(width: int | None, height: int | None, aspect_ratio: str | None = None) -> tuple[int, int] | None:
    """(height, width) in pixels where both are given; InputError for one alone, with a ratio, or sizes that no latents
    have."""
    if width is None and height is None:
        return None
    given = {"width": width, "height": height}
    for name, value in given.items():
        if value is None:
            other = "height" if name == "width" else "width"
            raise InputError(f"{given[other]} needs --{name} beside it", option=other)
        if value % SPATIAL_RATIO or not 0 < value <= MAX_SIDE:
            raise InputError(f"{value} is not a multiple of {SPATIAL_RATIO} up to {MAX_SIDE}", option=name)
    if aspect_ratio is not None:
        raise InputError(f"{aspect_ratio} and --width, --height are two ways to say the size; give one", "aspect_ratio")
    assert width is not None and height is not None
    return height, width


def size_warning(resolution: str, height: int, width: int) -> str | None:
    """What to tell a user whose size is none of those that a resolution was trained at; None where it is one."""
    if (height, width) in size_buckets(BUCKET_BASE[resolution]):
        return None
    near = nearest_size(resolution, height / width)
    return f"{width}x{height} is no size that {resolution} was trained at; the nearest is {near[1]}x{near[0]}"


def latent_shape(num_frames: int, height: int, width: int, channels: int) -> tuple[int, int, int, int, int]:
    """[1, C, (T-1)/4+1, H/16, W/16], the shape of a video's latents."""
    return (1, channels, (num_frames - 1) // TEMPORAL_RATIO + 1, height // SPATIAL_RATIO, width // SPATIAL_RATIO)


def video_tokens(num_frames: int, height: int, width: int, patch: Sequence[int] = (1, 1, 1)) -> int:
    """How many tokens a video of T frames of H x W px is; patch (t, h, w) in latents."""
    _, _, *grid = latent_shape(num_frames, height, width, 1)
    total = 1
    for length, side in zip(grid, patch, strict=True):
        total *= length // side
    return total


def chunk_spans(latent_frames: int, latent_frames_per_chunk: int, temporal_ratio: int) -> list[slice]:
    """The frames of each chunk: the first latent frame is one frame, any other temporal_ratio of them."""
    stops = [*range(latent_frames_per_chunk, latent_frames, latent_frames_per_chunk), latent_frames]
    edges = [0, *((stop - 1) * temporal_ratio + 1 for stop in stops)]
    return [slice(start, stop) for start, stop in itertools.pairwise(edges)]
