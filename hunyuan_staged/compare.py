"""`python -m hunyuan_staged.compare A B`: how far two runs are apart, in their latents and in their videos.

A and B are output folders. Whatever both hold is compared: stage2_latents.safetensors, and stage3_frames.safetensors (as
decoded) or else output_video.mp4 (with what H.264 did to it). The last line on stdout is JSON. Frames count from 0.

Letters: T frames, H x W px; C channels and t frames of h x w of the latents.
"""

import argparse
import json
import math
import signal
import sys
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from hunyuan_staged import BAD_INPUT, InputError, check_output_dir, one_line, quiet, tiles, versions
from hunyuan_staged.interrupt import SIGNALLED

if TYPE_CHECKING:
    import torch

SIDE_BY_SIDE_FILE = "side_by_side.mp4"
PLOT_FILE = "quality.png"
LIBRARIES = "pip install scikit-image matplotlib"

# Half of one of 255 levels: less does not show, and a flat picture must not divide by nothing.
INVISIBLE = 0.5 / 255


# -- latents --


def latent_errors(a: "torch.Tensor", b: "torch.Tensor") -> tuple[float, list[float]]:
    """‖A-B‖/‖A‖ in float32 of latents [1, C, t, h, w]: of the whole, and of each latent frame.

    0 where both are zero, infinite where only A is.
    """
    reference = a.float()
    difference = reference - b.float()
    # [1, C, t, h, w] → [t], the norm of each frame
    above, below = (x.square().sum(dim=(0, 1, 3, 4), dtype=x.dtype).sqrt() for x in (difference, reference))
    return _share(float(above.norm()), float(below.norm())), list(map(_share, above.tolist(), below.tolist()))


def _share(part: float, whole: float) -> float:
    if whole:
        return part / whole
    return math.inf if part else 0.0


# -- frames --


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two frames float32 [H, W, 3] in [0, 1]: -10 log10 of the mean squared error.

    Infinite for equal frames.
    """
    from skimage.metrics import peak_signal_noise_ratio

    with np.errstate(divide="ignore"):
        return float(peak_signal_noise_ratio(a, b, data_range=1.0))


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Structural similarity of two frames float32 [H, W, 3] in [0, 1], mean over the channels; 1 for equal frames.

    With the window and the constants of Wang et al. 2004, "Image Quality Assessment: From Error Visibility to Structural
    Similarity": a Gaussian of sigma 1.5 px, cut to 11 x 11.
    """
    from skimage.metrics import structural_similarity

    return float(
        structural_similarity(
            a, b, data_range=1.0, channel_axis=-1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
    )


class Seams:
    """Whether the borders of a plan's tiles show in a video whose frames are added one by one.

    Energy is the mean absolute second difference across a line, at the two px that meet there: a step and a kink have it,
    a slope does not. It is averaged over 16 px along the line before its sign goes: texture evens out there, and a seam,
    which is what it is over a stretch, stays. Lines are compared with lines of the same kind: the borders lie on the
    grid of the latents, where decoder and H.264 leave traces of their own, so "elsewhere" is every other line of that
    grid, of the same direction.
    """

    def __init__(self, plan: tiles.TilePlan) -> None:
        self._ratio = plan.spatial_ratio
        # By axis of a frame [H, W, 3]; the name is that of the coordinate in which a border has a place.
        self._axes = {"y": plan.rows, "x": plan.columns}
        self._borders = {name: plan.borders_px(spans) for name, spans in self._axes.items()}
        self._energy = {name: np.zeros(len(self._lines(name))) for name in self._axes}
        self._count = 0

    def _lines(self, name: str) -> np.ndarray:
        return np.arange(self._ratio, self._axes[name][-1].stop * self._ratio, self._ratio)

    def add(self, frame: np.ndarray) -> None:
        """The next frame, float32 [H, W, 3] in [0, 1]."""
        self._count += 1
        for axis, name in enumerate(self._axes):
            lines = self._lines(name)
            # Four px, two on each side of every line: [lines, H or W, 3] each
            p0, p1, p2, p3 = (np.moveaxis(frame.take(lines + i, axis), axis, 0) for i in (-2, -1, 0, 1))
            for curvature in (p0 - 2 * p1 + p2, p1 - 2 * p2 + p3):
                stretches = curvature.reshape(len(lines), -1, self._ratio, 3).mean(axis=2)
                self._energy[name] += np.abs(stretches).mean(axis=(1, 2)) / 2

    def result(self) -> dict[str, Any] | None:
        """ratio: energy at all borders against elsewhere, about 1 where no seam shows; worst: the same of the worst border,
        and worst_at its place, e.g. "x=192". None where there is no border, or no line that is none.
        """
        found: dict[str, float] = {}
        for name, borders in self._borders.items():
            at_border = np.isin(self._lines(name), borders)
            if at_border.any() and not at_border.all():
                energy = self._energy[name] / self._count + INVISIBLE
                shares = energy[at_border] / energy[~at_border].mean()
                found |= {f"{name}={px}": float(share) for px, share in zip(borders, shares, strict=True)}
        if not found:
            return None
        worst = max(found, key=lambda place: found[place])
        return {"ratio": float(np.mean(list(found.values()))), "worst": found[worst], "worst_at": worst}


@dataclass(frozen=True)
class Clip:
    """A run's frames, to be gone through as often as needed, never whole in memory."""

    path: Path
    num_frames: int
    height: int
    width: int
    fps: float
    frames: Callable[[], Generator[np.ndarray]]  # float32 [H, W, 3] in [0, 1] each, from the first

    @property
    def shape(self) -> str:
        return f"{self.num_frames} frames of {self.width}x{self.height}"


def open_clip(folder: Path, name: str) -> Clip:
    """The clip in a run's FRAMES_FILE or VIDEO_FILE; InputError where it cannot be read."""
    from hunyuan_staged import artifacts, video

    path = folder / name
    if name == artifacts.FRAMES_FILE:
        (count, height, width), metadata, _ = artifacts.open_frames(folder)
        try:
            fps = float(metadata.get("fps", versions.DEFAULT_FPS))
        except ValueError as error:
            raise InputError(f"{path}: its fps {metadata['fps']!r} is not a number") from error

        def exact() -> Generator[np.ndarray]:
            for frame in artifacts.open_frames(folder)[2]:
                yield frame.float().permute(1, 2, 0).contiguous().numpy()  # [3, H, W] → [H, W, 3]

        return Clip(path, count, height, width, fps, exact)

    def decoded() -> Generator[np.ndarray]:
        for frame in video.open_video(path)[1]:
            yield frame / np.float32(255)

    info, frames = video.open_video(path)
    # A video file does not say reliably how many frames it holds.
    return Clip(path, sum(1 for _ in frames), info.height, info.width, info.fps, decoded)


def open_pair(a: Path, b: Path, name: str) -> tuple[Clip, Clip]:
    """Both runs' clips; InputError where they cannot be laid on each other, or are of no size that the decoder makes."""
    clips = open_clip(a, name), open_clip(b, name)
    if clips[0].shape != clips[1].shape:
        raise InputError(f"{name} differs in shape: {clips[0].shape} px in {a}, {clips[1].shape} px in {b}")
    ratio = versions.SPATIAL_RATIO
    if clips[0].height % ratio or clips[0].width % ratio:
        raise InputError(f"{clips[0].path} has {clips[0].shape} px; allowed are multiples of {ratio} px")
    return clips


def _pairs(a: Clip, b: Clip, progress: Any, desc: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    with closing(a.frames()) as first, closing(b.frames()) as second:
        yield from progress(zip(first, second, strict=True), desc=desc, total=a.num_frames, unit="frame")


@dataclass(frozen=True)
class Quality:
    """PSNR (dB) and SSIM of each frame, and the seams of both videos as Seams.result gives them."""

    psnr: list[float]
    ssim: list[float]
    seams: dict[str, dict[str, Any] | None]


def measure_frames(a: Clip, b: Clip, *, tile_size: int, tile_overlap: float, progress: Any = quiet) -> Quality:
    """Go through both clips once. tile_size is in px; InputError as tiles.tile_plan."""
    ratio = versions.SPATIAL_RATIO
    plan = tiles.tile_plan(
        a.height // ratio, a.width // ratio, tile_size=tile_size, tile_overlap=tile_overlap, spatial_ratio=ratio
    )
    psnrs, ssims = [], []
    seams = {"a": Seams(plan), "b": Seams(plan)}
    for frame_a, frame_b in _pairs(a, b, progress, "measuring"):
        psnrs.append(psnr(frame_a, frame_b))
        ssims.append(ssim(frame_a, frame_b))
        seams["a"].add(frame_a)
        seams["b"].add(frame_b)
    return Quality(psnrs, ssims, {run: found.result() for run, found in seams.items()})


# -- what is written --


def write_side_by_side(path: Path, a: Clip, b: Clip, amplify: float, progress: Any = quiet) -> None:
    """An mp4 of A | B | abs(A - B) times amplify, at A's frames per second. InputError as video.write_video."""
    import torch

    from hunyuan_staged import video
    from hunyuan_staged.vae import to_8bit

    def frames() -> Iterable[np.ndarray]:
        for frame_a, frame_b in _pairs(a, b, progress, "writing"):
            difference = np.minimum(np.abs(frame_a - frame_b) * np.float32(amplify), 1)
            # three of [H, W, 3] → [H, 3 W, 3]
            yield to_8bit(torch.from_numpy(np.concatenate([frame_a, frame_b, difference], axis=1))).numpy()

    video.write_video(path, frames(), a.fps, a.height, 3 * a.width)


def write_plot(path: Path, quality: Quality) -> None:
    """A PNG of PSNR and SSIM over the frames. Equal frames, whose PSNR is infinite, are gaps in it, and counted."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    from hunyuan_staged import artifacts

    figure = Figure(figsize=(9, 5), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True)
    equal = sum(map(math.isinf, quality.psnr))
    upper.plot([value if math.isfinite(value) else math.nan for value in quality.psnr], marker=".")
    upper.set_ylabel("PSNR, dB")
    if equal:
        upper.set_title(f"{equal} of {len(quality.psnr)} frames are equal: their PSNR is infinite", fontsize="medium")
    lower.plot(quality.ssim, marker=".", color="tab:orange")
    lower.set(ylabel="SSIM", xlabel="frame")
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    with artifacts.replacing(path) as temporary:
        canvas.print_png(str(temporary))


# -- the command --


def check(args: argparse.Namespace) -> None:
    """Refuse whatever can be judged without reading a file."""
    tiles.check_tiling(args.tile_size, args.tile_overlap, versions.SPATIAL_RATIO)
    if not 0 < args.amplify < math.inf:
        raise InputError(f"--amplify {args.amplify:g} is not a positive number")
    for folder in (args.a, args.b):
        if not folder.is_dir():
            raise InputError(f"{folder} is not a folder of a run")
    if args.a.samefile(args.b):
        raise InputError(f"A and B are the same folder, {args.a}; give two runs")
    check_output_dir("--output_dir", args.output_dir)
    for name in (SIDE_BY_SIDE_FILE, PLOT_FILE):
        if (args.output_dir / name).is_dir():
            raise InputError(f"--output_dir {args.output_dir}: {name} in it is a folder")


def choose_files(a: Path, b: Path) -> tuple[bool, str | None, list[str]]:
    """(whether both have latents, the file of frames to compare or None, what only one of them has, as a line each).

    Frames as decoded are preferred to the mp4. InputError where there is nothing that both have.
    """
    from hunyuan_staged import artifacts

    names = (artifacts.LATENTS_FILE, artifacts.FRAMES_FILE, artifacts.VIDEO_FILE)
    here, there = ({name for name in names if (folder / name).is_file()} for folder in (a, b))
    both = here & there
    if not both:
        held = [f"{folder} has {', '.join(sorted(own)) or 'none'}" for folder, own in ((a, here), (b, there))]
        raise InputError(f"the two have none of {', '.join(names)} in common: {'; '.join(held)}")
    alone = [f"{name} is only in {a if name in here else b}: not compared" for name in names if name in here ^ there]
    frames = next((name for name in names[1:] if name in both), None)
    return artifacts.LATENTS_FILE in both, frames, alone


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
    from hunyuan_staged import artifacts

    latents = [artifacts.load_latents(folder)[0] for folder in (a, b)]
    if latents[0].shape != latents[1].shape:
        shapes = [f"{list(x.shape)} in {folder}" for x, folder in zip(latents, (a, b), strict=True)]
        raise InputError(f"{artifacts.LATENTS_FILE} differs in shape: {', '.join(shapes)}")
    overall, errors = latent_errors(*latents)
    worst = int(np.argmax(errors))
    return {
        "shape": list(latents[0].shape),
        "relative_error": overall,
        "worst": errors[worst],
        "worst_frame": worst,
        "per_frame": errors,
    }


def summary(values: list[float]) -> dict[str, Any]:
    """Mean, worst value, worst frame and all values of a measure that is the larger the better.

    The mean is over the finite ones, since one equal frame would hide the others in an infinite mean.
    """
    worst = int(np.argmin(values))
    finite = [value for value in values if math.isfinite(value)]
    mean = float(np.mean(finite)) if finite else math.inf
    return {"mean": mean, "worst": values[worst], "worst_frame": worst, "per_frame": values}


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
            "seams": quality.seams,
        }
        if not args.no_video:
            written.append(args.output_dir / SIDE_BY_SIDE_FILE)
            write_side_by_side(written[-1], a, b, args.amplify, progress)
        if not args.no_plot:
            written.append(args.output_dir / PLOT_FILE)
            write_plot(written[-1], quality)
    return result | {"notes": notes, "written": list(map(str, written))}


def report(result: dict[str, Any]) -> list[str]:
    """The result as lines for people."""
    lines = []
    if latents := result["latents"]:
        place = f"latent frame {latents['worst_frame']} of {len(latents['per_frame'])}"
        lines.append(
            f"latents     relative error {latents['relative_error']:.3g}, largest {latents['worst']:.3g} in {place}"
        )
    if frames := result["frames"]:
        equal = f", {frames['equal_frames']} of them equal" if frames["equal_frames"] else ""
        size = f"{frames['num_frames']} frames of {frames['width']}x{frames['height']}{equal}"
        lines.append(f"frames      {frames['file']}: {size}")
        for name, form, unit in (("psnr", ".2f", " dB"), ("ssim", ".4f", "")):
            mean, worst = (f"{frames[name][key]:{form}}{unit}" for key in ("mean", "worst"))
            lines.append(f"{name.upper()}        mean {mean}, worst {worst} in frame {frames[name]['worst_frame']}")
        for run, seams in frames["seams"].items():
            told = "no tile border that could be told from other lines"
            if seams:
                told = f"{seams['ratio']:.2f} at tile borders against elsewhere, most {seams['worst']:.2f} at "
                told += f"{seams['worst_at']} px"
            lines.append(f"seams of {run.upper()}  {told}")
    return lines + [f"note        {one_line(note)}" for note in result["notes"]]


def as_json(value: Any) -> Any:
    """The value with "inf" for an infinite number, which JSON has none for (and which float() reads)."""
    if isinstance(value, dict):
        return {name: as_json(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [as_json(inner) for inner in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    return value


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are InputError, so that they are said like all others."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


def build_parser() -> argparse.ArgumentParser:
    """All flags, with their defaults."""
    parser = Parser(
        "python -m hunyuan_staged.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("a", metavar="A", type=Path, help="output folder of a run: the reference")
    parser.add_argument("b", metavar="B", type=Path, help="output folder of the run to compare with it")
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path(versions.DEFAULT_COMPARISON_DIR),
        help=f"where {SIDE_BY_SIDE_FILE} and {PLOT_FILE} go (default: {versions.DEFAULT_COMPARISON_DIR})",
    )
    parser.add_argument(
        "--tile_size",
        type=int,
        default=versions.DEFAULT_TILE_SIZE,
        help="side of the tiles in px that stage 3 was run with (default: %(default)s)",
    )
    parser.add_argument(
        "--tile_overlap",
        type=float,
        default=versions.DEFAULT_TILE_OVERLAP,
        help=f"their overlap, 0 to {tiles.MAX_OVERLAP} (default: %(default)s)",
    )
    parser.add_argument(
        "--amplify",
        type=float,
        default=versions.DEFAULT_AMPLIFY,
        help="factor of the difference in the video (default: %(default)g)",
    )
    parser.add_argument("--no_video", action="store_true", help=f"do not write {SIDE_BY_SIDE_FILE}")
    parser.add_argument("--no_plot", action="store_true", help=f"do not write {PLOT_FILE}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Compare, print, and return the exit status: 0, or 2 after one line that says what was refused."""
    args = None
    try:
        args = build_parser().parse_args(argv)
        from tqdm import tqdm

        result = compare(args, lambda iterable, **options: tqdm(iterable, dynamic_ncols=True, **options))
    except InputError as error:
        if args and args.debug:
            traceback.print_exc()
        print(f"error: {one_line(error)}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("error: the comparison was interrupted", file=sys.stderr)
        return SIGNALLED + signal.SIGINT
    for line in report(result):
        print(line)
    for path in result["written"]:
        print(f"wrote {one_line(path)}", file=sys.stderr)
    print(json.dumps(as_json(result), allow_nan=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
