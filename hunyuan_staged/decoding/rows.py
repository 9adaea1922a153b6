"""Which rows of a picture each rank or band owns, and which it needs. Knows no tensors."""

from collections.abc import Sequence

# In how many bands of rows one process decodes at most: more would compute more rows for others than of their own.
BAND_COUNTS = (1, 2, 3, 4, 6, 8)


def row_slices(counts: Sequence[int]) -> list[slice]:
    """The rows of each owner, top to bottom, from how many each owns."""
    stops = [sum(counts[: i + 1]) for i in range(len(counts))]
    return [slice(stop - count, stop) for stop, count in zip(stops, counts, strict=True)]


def row_ranks(height: int, processes: int) -> int:
    """How many of the processes, the first ones, get rows of frames of `height` latents. The others need no decoder."""
    return min(height, processes)


def needed_rows(own: slice, height: int, scales: Sequence[int], reaches: Sequence[int]) -> list[slice]:
    """The rows that a band of `own` rows of `height` latents needs: of each level's input, and last its pixels.

    scales: rows that a latent is on each level, and in px. reaches: how many rows a level's output sees to either side.
    """
    start, stop = own.start * scales[-1], own.stop * scales[-1]
    needed = [slice(start, stop)]
    for level in reversed(range(len(reaches))):
        step = scales[level + 1] // scales[level]
        start, stop = start // step - reaches[level], -(-stop // step) + reaches[level]
        needed.insert(0, slice(max(0, start), min(height * scales[level], stop)))
    return needed
