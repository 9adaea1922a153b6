"""How many of the processes make one video together, where there are many videos to make."""

from collections.abc import Callable, Sequence
from pathlib import Path

from hunyuan_staged.errors import InputError
from hunyuan_staged.files import contract
from hunyuan_staged.options import DecodeOptions, DenoiseOptions
from hunyuan_staged.parallel.world import World
from hunyuan_staged.pipeline import denoising, jobs
from hunyuan_staged.pipeline.common import free_memory
from hunyuan_staged.pipeline.decode_jobs import video_path
from hunyuan_staged.pipeline.denoisers import fits

SCALING = 0.96  # of twice the processes on one video, against twice the videos: decoding on two H200 (benchmarks.md)


def choose_size(processes: int, videos: int, fits: Callable[[int], bool] = lambda _: True) -> int:
    """The size of equal groups that gives the most videos an hour; fits(n): whether a video fits in n processes.

    n processes on one video are slower than n videos side by side, but processes that wait make none.
    """
    sizes = [size for size in range(1, processes + 1) if processes % size == 0]

    def duration(size: int) -> float:
        rounds = -(-videos // (processes // size))
        return rounds / (size * SCALING ** (size.bit_length() - 1))

    return min((size for size in sizes if fits(size)), key=duration, default=processes)


def denoising_size(world: World, videos: Sequence[DenoiseOptions]) -> int:
    """choose_size for stage 2, by the plan of the longest video that is still to be made; every rank calls it."""
    free = free_memory(world)
    size = 1
    if world.is_main and videos:
        left = [own for own in videos if not _latents(own).exists()] or videos
        longest = max(left, key=lambda own: own.video_length or 0)
        if longest.super_resolution:
            return int(world.from_main("group size", str(choose_size(world.size, len(left)))))
        try:
            setup = denoising.resolve(longest, jobs.read(longest), world)
        except InputError:
            size = choose_size(world.size, len(left))  # the job itself will say what is wrong
        else:
            size = choose_size(world.size, len(left), lambda processes: fits(setup, processes, free))
    return int(world.from_main("group size", str(size)))


def _latents(own: DenoiseOptions) -> Path:
    return jobs.output_dir(own) / contract.at_resolution(contract.LATENTS_FILE, own.super_resolution)


def decoding_size(world: World, videos: Sequence[DecodeOptions]) -> int:
    """choose_size for stage 3, which decodes in tiles what does not fit; every rank calls it."""
    left = [own for own in videos if not video_path(own, contract.resolution_asked(own.latents)).exists()] or videos
    return int(world.from_main("group size", str(choose_size(world.size, len(left)) if left else 1)))
