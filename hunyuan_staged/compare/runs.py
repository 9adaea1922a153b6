"""Comparing the files of two runs."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from hunyuan_staged import geometry
from hunyuan_staged.compare.clips import Clip, _pairs, open_pair
from hunyuan_staged.compare.measures import Flicker, Quality, Seams, latent_errors, psnr, ssim
from hunyuan_staged.compare.perceptual import open_lpips
from hunyuan_staged.compare.pictures import write_plot, write_side_by_side
from hunyuan_staged.decoding import tiling
from hunyuan_staged.errors import InputError
from hunyuan_staged.files.atomic import check_output_dir
from hunyuan_staged.runtime.progress import quiet

SIDE_BY_SIDE_FILE = "side_by_side.mp4"
PLOT_FILE = "quality.png"
LIBRARIES = "pip install scikit-image matplotlib"


def measure_frames(a: Clip, b: Clip, *, tile_size: int, tile_overlap: float, progress: Any = quiet) -> Quality:
    """Go through both clips once. tile_size is in px; InputError as tiling.tile_plan."""
    ratio = geometry.SPATIAL_RATIO
    plan = tiling.tile_plan(
        a.height // ratio, a.width // ratio, tile_size=tile_size, tile_overlap=tile_overlap, spatial_ratio=ratio
    )
    psnrs, ssims, distances, lpips = [], [], [], open_lpips()
    seams = {run: Seams(plan) for run in "ab"}
    flicker = {run: Flicker() for run in "ab"}
    for frame_a, frame_b in _pairs(a, b, progress, "measuring"):
        psnrs.append(psnr(frame_a, frame_b))
        ssims.append(ssim(frame_a, frame_b))
        if lpips:
            distances.append(lpips(frame_a, frame_b))
        for run, frame in (("a", frame_a), ("b", frame_b)):
            seams[run].add(frame)
            flicker[run].add(frame)
    return Quality(
        psnrs,
        ssims,
        distances,
        {run: seams[run].result() for run in seams},
        {run: flicker[run].result() for run in flicker},
    )


# -- the command --


def check(args: argparse.Namespace) -> None:
    """Refuse whatever can be judged without reading a file."""
    tiling.check_tiling(args.tile_size, args.tile_overlap, geometry.SPATIAL_RATIO)
    if not 0 < args.amplify < math.inf:
        raise InputError(f"--amplify {args.amplify:g} is not a positive number")
    for folder in (args.a, args.b):
        if not folder.is_dir():
            raise InputError(f"{folder} is not a folder of a run")
    if args.a.samefile(args.b):
        raise InputError(f"A and B are the same folder, {args.a}; give two runs")
    check_output_dir("--output_dir", args.output_dir)
    if args.json:
        check_output_dir("--json", args.json.parent)
        if args.json.is_dir():
            raise InputError(f"--json {args.json} is a folder")
    for name in (SIDE_BY_SIDE_FILE, PLOT_FILE):
        if (args.output_dir / name).is_dir():
            raise InputError(f"--output_dir {args.output_dir}: {name} in it is a folder")


def choose_files(a: Path, b: Path) -> tuple[bool, str | None, list[str]]:
    """(whether both have latents, the file of frames to compare or None, what only one of them has, as a line each).

    Frames as decoded are preferred to the mp4. InputError where there is nothing that both have.
    """
    from hunyuan_staged.files import contract

    names = (contract.LATENTS_FILE, contract.FRAMES_FILE, contract.VIDEO_FILE)
    here, there = ({name for name in names if (folder / name).is_file()} for folder in (a, b))
    both = here & there
    if not both:
        held = [f"{folder} has {', '.join(sorted(own)) or 'none'}" for folder, own in ((a, here), (b, there))]
        raise InputError(f"the two have none of {', '.join(names)} in common: {'; '.join(held)}")
    alone = [f"{name} is only in {a if name in here else b}: not compared" for name in names if name in here ^ there]
    frames = next((name for name in names[1:] if name in both), None)
    return contract.LATENTS_FILE in both, frames, alone


def require_libraries(plot: bool) -> None:
    """InputError with the pip command where scikit-image, or for a plot matplotlib, cannot be imported."""
    try:
        import skimage.metrics  # noqa: F401

        if plot:
            import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise InputError(f"comparing frames needs a library that is not here ({error}); {LIBRARIES}") from error


def compare_latents(a: Path, b: Path) -> dict[str, Any]:
    """The "latents" of the JSON line; InputError where the two differ in shape."""
    from hunyuan_staged.files import contract, tensors

    latents = [tensors.load_latents(folder)[0] for folder in (a, b)]
    if latents[0].shape != latents[1].shape:
        shapes = [f"{list(x.shape)} in {folder}" for x, folder in zip(latents, (a, b), strict=True)]
        raise InputError(f"{contract.LATENTS_FILE} differs in shape: {', '.join(shapes)}")
    overall, errors = latent_errors(*latents)
    worst = int(np.argmax(errors))
    return {
        "shape": list(latents[0].shape),
        "relative_error": overall,
        "worst": errors[worst],
        "worst_frame": worst,
        "per_frame": errors,
    }


def summary(values: list[float], worst: Callable[[list[float]], Any] = np.argmin) -> dict[str, Any]:
    """Mean, worst value, worst frame and all values of a measure; worst finds its worst value's place.

    The mean is over the finite ones, since one equal frame would hide the others in an infinite mean.
    """
    place = int(worst(values))
    finite = [value for value in values if math.isfinite(value)]
    mean = float(np.mean(finite)) if finite else math.inf
    return {"mean": mean, "worst": values[place], "worst_frame": place, "per_frame": values}


def compare(args: argparse.Namespace, progress: Any = quiet) -> dict[str, Any]:
    """All that the JSON line says. Files are written after everything has been read and measured."""
    check(args)
    latents, frames, notes = choose_files(args.a, args.b)
    if frames:
        require_libraries(plot=not args.no_plot)
    result: dict[str, Any] = {"compare": [str(args.a), str(args.b)], "latents": None, "frames": None}
    written = []
    if latents:
        result["latents"] = compare_latents(args.a, args.b)
    if frames:
        a, b = open_pair(args.a, args.b, frames)
        if a.fps != b.fps:
            notes.append(f"A plays at {a.fps:g} frames per second and B at {b.fps:g}: compared frame by frame")
        quality = measure_frames(a, b, tile_size=args.tile_size, tile_overlap=args.tile_overlap, progress=progress)
        result["frames"] = {
            "file": frames,
            "num_frames": a.num_frames,
            "height": a.height,
            "width": a.width,
            "equal_frames": sum(map(math.isinf, quality.psnr)),
            "psnr": summary(quality.psnr),
            "ssim": summary(quality.ssim),
            "lpips": summary(quality.lpips, worst=np.argmax) if quality.lpips else None,
            "seams": quality.seams,
            "flicker": quality.flicker,
        }
        if not args.no_video:
            written.append(args.output_dir / SIDE_BY_SIDE_FILE)
            write_side_by_side(written[-1], a, b, args.amplify, progress)
        if not args.no_plot:
            written.append(args.output_dir / PLOT_FILE)
            write_plot(written[-1], quality)
    return result | {"notes": notes, "written": list(map(str, written))}
