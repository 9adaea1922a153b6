"""`python -m hunyuan_staged.fit_preview RUN [RUN …]`: the colours that previews give to the latents of another VAE.

RUN is a folder that all three stages have been through. One run will do; several, of other colours, do better. The
factors are kept in the user's cache for that VAE, and --preview_every finds them there.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hunyuan_staged.errors import InputError, run_tool
from hunyuan_staged.files import contract
from hunyuan_staged.parsing import Parser, tool_parser


def build_parser() -> Parser:
    """All flags, with their defaults."""
    parser = tool_parser("hunyuan_staged.fit_preview", __doc__)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="folder of a finished run")
    parser.add_argument("--model_path", help="model folder (default: the one that the runs record)")
    parser.add_argument("--output", metavar="FILE", type=Path, help="write the factors here, not into the user's cache")
    return parser


def fit(args: argparse.Namespace) -> None:
    """Read the runs, fit, write, and say how well it fits."""
    from hunyuan_staged.files import tensors
    from hunyuan_staged.files.config import read_config
    from hunyuan_staged.files.video import open_video
    from hunyuan_staged.geometry import SPATIAL_RATIO
    from hunyuan_staged.pipeline.common import chosen_model
    from hunyuan_staged.pipeline.previews import cached_factors
    from hunyuan_staged.sampling import preview, preview_factors
    from hunyuan_staged.weights.folder import open_model

    models = {run: chosen_model(args.model_path, str(run), read_config(run)) for run in args.runs}
    first, model = next(iter(models.items()))
    other = next((run for run in models if models[run] != model), None)
    if other:
        raise InputError(f"{first} is of {model}, {other} of {models[other]}; give runs of one model, or --model_path")
    folder = open_model(model, ("vae",))
    folder.require("vae")
    clips = []
    for run in args.runs:
        latents, _ = tensors.load_latents(run)
        info, frames = open_video(run / contract.VIDEO_FILE)
        height, width = (side * SPATIAL_RATIO for side in latents.shape[3:])
        if (info.height, info.width) != (height, width):
            raise InputError(f"{run}: the video is {info.width}x{info.height}, its latents are of {width}x{height}")
        try:
            clips.append(preview.moments(latents, frames))
        except ValueError as error:
            raise InputError(f"{run}: {error}") from error
    factors, explained = preview.fit_factors(clips)
    vae = folder.fingerprint(["vae"])
    path = args.output or cached_factors(vae)
    preview_factors.save(path, preview_factors.FittedFactors(vae, explained, factors))
    few = "" if explained >= preview.ENOUGH else "; more runs, of other colours, would do better"
    print(f"wrote {path}: {explained:.1%} of the variance of latent frames left out of the fit{few}")


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0, or 2 after one line that says what was refused."""
    return run_tool(build_parser(), fit, argv)


if __name__ == "__main__":
    sys.exit(main())
