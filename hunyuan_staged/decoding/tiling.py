"""Where the decoder's tiles lie, how far they overlap, and which rank decodes which. Knows no tensors.

Lengths are in latents unless they say px.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from hunyuan_staged.errors import InputError

DEFAULT_TILE_SIZE = 256
SMALL_TILE_SIZE = 128  # where the default one does not fit
DEFAULT_TILE_OVERLAP = 0.25
# Latent frames of a chunk in the VAE decoder: the first by default, less where memory asks for it. Changes the rounding.
CHUNK_SIZES = (8, 4, 2, 1)
MAX_TILE_SIZE = 8192

MAX_OVERLAP = 0.5


def check_tiling(tile_size: int, tile_overlap: float, spatial_ratio: int) -> tuple[int, int]:
    """(tile, step): the side of a tile and the distance between the starts of two, in latents.

    tile_size is in px, tile_overlap a share of it. Raises InputError where the two make no tiling.
    """
    if tile_size < spatial_ratio or tile_size % spatial_ratio:
        raise InputError(f"--tile_size {tile_size} is not a positive multiple of {spatial_ratio} px")
    if tile_size > MAX_TILE_SIZE:
        raise InputError(
            f"--tile_size {tile_size} is more than {MAX_TILE_SIZE} px; --disable_tiling decodes whole frames"
        )
    if not 0 <= tile_overlap <= MAX_OVERLAP:
        raise InputError(f"--tile_overlap {tile_overlap} is outside 0 to {MAX_OVERLAP}")
    tile = tile_size // spatial_ratio
    step = int(tile * (1 - tile_overlap))
    if step < 1:
        raise InputError(
            f"--tile_overlap {tile_overlap} of --tile_size {tile_size} leaves no step between tiles; "
            f"allowed: an overlap of 0, or a tile of at least {2 * spatial_ratio} px"
        )
    return tile, step


@dataclass(frozen=True)
class Tiling:
    """How latents are cut: the side of a tile in px (None: whole frames), the share of it that blends with the next one,
    and how many latent frames are decoded at once."""

    tile_size: int | None = DEFAULT_TILE_SIZE
    tile_overlap: float = DEFAULT_TILE_OVERLAP
    latent_frames_per_chunk: int = CHUNK_SIZES[0]


@dataclass(frozen=True)
class Span:
    """A tile's extent along one axis: it decodes [start, start + size) and shows the first `kept` of that."""

    start: int
    size: int
    kept: int

    @property
    def stop(self) -> int:
        return self.start + self.size


@dataclass(frozen=True)
class Tile:
    """One tile: its place in the raster of tiles, and what it covers."""

    row: int
    column: int
    y: Span
    x: Span

    @property
    def cost(self) -> int:
        """What decoding takes, up to a factor: the area."""
        return self.y.size * self.x.size


@dataclass(frozen=True)
class TilePlan:
    """All tiles of a video. Two neighbours blend over blend_px, or less where one of them is smaller than that."""

    rows: tuple[Span, ...]
    columns: tuple[Span, ...]
    spatial_ratio: int
    blend_px: int

    @property
    def tiles(self) -> list[Tile]:
        """The tiles row by row, the order in which they are blended."""
        return [Tile(i, j, y, x) for i, y in enumerate(self.rows) for j, x in enumerate(self.columns)]

    def borders_px(self, spans: Sequence[Span]) -> list[int]:
        """Where a seam can show along the axis of `spans` (rows or columns): the px just behind each border.

        A tile begins to fade in where it starts, and stands alone where its blend ends; without overlap the two are one.
        """
        starts = [(span.start * self.spatial_ratio, span.size * self.spatial_ratio) for span in spans[1:]]
        borders = {px for start, size in starts for px in (start, start + min(self.blend_px, size))}
        return sorted(borders - {spans[-1].stop * self.spatial_ratio})


def _spans(length: int, tile: int, step: int) -> tuple[Span, ...]:
    sizes = [(start, min(tile, length - start)) for start in range(0, length, step)]
    return tuple(Span(start, size, min(step, size)) for start, size in sizes)


def whole_plan(latent_height: int, latent_width: int, *, spatial_ratio: int) -> TilePlan:
    """The plan without tiling: one tile that is the whole frame."""
    return TilePlan(
        (Span(0, latent_height, latent_height),), (Span(0, latent_width, latent_width),), spatial_ratio, blend_px=0
    )


def tile_plan(
    latent_height: int, latent_width: int, *, tile_size: int, tile_overlap: float, spatial_ratio: int
) -> TilePlan:
    """The tiles of the official code and of diffusers' tiled_decode: a start every int(tile * (1 - overlap)) latents.

    A frame no larger than one tile is not cut. Neighbours blend over what their starts leave of a tile: tile_size *
    tile_overlap px where that is a whole number of latents, else rounded up to one, because the reference would then
    write rows of another height than it steps by. Raises InputError as check_tiling does.
    """
    tile, step = check_tiling(tile_size, tile_overlap, spatial_ratio)
    if latent_height <= tile and latent_width <= tile:
        return whole_plan(latent_height, latent_width, spatial_ratio=spatial_ratio)
    return TilePlan(
        _spans(latent_height, tile, step),
        _spans(latent_width, tile, step),
        spatial_ratio,
        (tile - step) * spatial_ratio,
    )


def assign_by_cost(costs: Sequence[int], ranks: int) -> list[int]:
    """The rank of each piece of work: the costliest first, each to the rank with the least so far.

    Ties go to the earlier piece and the lower rank, so every process deals alike and rank 0 always has work.
    """
    loads = [0] * ranks
    owners = [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = loads.index(min(loads))
        owners[index] = rank
        loads[rank] += costs[index]
    return owners
