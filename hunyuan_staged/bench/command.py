"""`python -m hunyuan_staged.bench stage2 …`, `… stage3 …`: a stage at any size, with random weights built straight on the
device; `… encoding …`: the VAE's encoding of a video; `… memory CLAIM`: what is said about memory (memory.py);
`… checkpoint FOLDER`, `… file FILE`: weights to time runs on; `… run FLAGS`: run_staged.sh by part.

Warm-up is apart, both sides of every timing are synchronised, the median is printed, and the last line is JSON.
"""

import argparse
import json
import os
import sys
from typing import Any

from hunyuan_staged import geometry, options, versions
from hunyuan_staged.attention import modes
from hunyuan_staged.bench import checkpoint, memory, single_file, step
from hunyuan_staged.bench import run as whole_run
from hunyuan_staged.bench.stage2 import bench_stage2
from hunyuan_staged.bench.stage3 import bench_encoding, bench_stage3
from hunyuan_staged.decoding import tiling
from hunyuan_staged.errors import InputError, run_tool
from hunyuan_staged.parsing import OpenParser, Parser, add_debug, tool_parser
from hunyuan_staged.sampling import cache_settings


def add_stage2(stages: Any) -> None:
    stage2 = stages.add_parser("stage2", help="a denoising step of the full-size transformer")
    stage2.add_argument(
        "--resolution", choices=tuple(geometry.BUCKET_BASE), help=f"(default: {versions.DEFAULT_RESOLUTION})"
    )
    stage2.add_argument(
        "--super_resolution",
        choices=tuple(versions.SUPER_RESOLUTION),
        help="a pass of the transformer that enlarges to this, the latent upsampler, and seconds of the whole",
    )
    stage2.add_argument("--aspect_ratio", default=options.DEFAULT_ASPECT_RATIO)
    stage2.add_argument("--video_length", type=int, default=121)
    stage2.add_argument(
        "--guidance_scale",
        type=float,
        help=f"(default: {step.DEFAULT_GUIDANCE_SCALE:g}, of super resolution its own)",
    )
    stage2.add_argument("--attn_mode", default=modes.DEFAULT_ATTN_MODE, choices=modes.ATTN_MODES)
    stage2.add_argument("--sage_blocks_range", default=options.DEFAULT_SAGE_BLOCKS)
    stage2.add_argument(
        "--cfg_parallel",
        default=options.DEFAULT_CFG_PARALLEL,
        choices=options.CFG_PARALLEL,
        help="guidance branches apart",
    )
    stage2.add_argument(
        "--cache_type", choices=tuple(cache_settings.CACHE_TYPES), help="also time a cache, over a run of 50 steps"
    )
    for flag in cache_settings.CACHE_FLAGS:
        stage2.add_argument(f"--{flag}", type=int, help="as in stage 2")
    stage2.add_argument("--no_cache_block_id", help="as in stage 2")
    stage2.add_argument(
        "--against",
        choices=modes.ATTN_MODES,
        help="also how far a step's velocity is from this mode's: ||difference|| / ||velocity||",
    )
    stage2.add_argument("--gpus", type=int, default=1, help="processes, one a GPU (default: %(default)s)")
    stage2.add_argument(
        "--share_of",
        type=int,
        help="also time one rank's share of a step on so many GPUs, on this one; exchanges are copies on the device",
    )
    stage2.add_argument("--transformer", help="a file as in stage 2, read as there, in place of random weights")
    stage2.add_argument("--no_parts", action="store_true", help="without the step that is taken apart")
    stage2.add_argument("--layers", type=int, help="fewer blocks than the full 54, for a quick look")
    stage2.add_argument("--compile", action="store_true", help="let torch.compile fuse the blocks, as in stage 2")
    offload = stage2.add_mutually_exclusive_group()
    offload.add_argument("--enable_offloading", action="store_true", help="stream all blocks from host memory")
    offload.add_argument("--disable_offloading", action="store_true", help="all weights on the device (default)")
    offload.add_argument("--offload_blocks", type=int, help="stream so many blocks from host memory")
    stage2.add_argument("--weights_dtype", choices=options.WEIGHTS_DTYPES, help="store the blocks' weights so")
    stage2.add_argument(
        "--fp8_matmul", action="store_true", help="with --weights_dtype fp8: as in stage 2; also how far that is off"
    )
    stage2.add_argument("--steps", type=int, default=3, help="timed steps (default: %(default)s)")
    stage2.add_argument("--warmup", type=int, default=1, help="steps before them (default: %(default)s)")
    stage2.set_defaults(run=bench_stage2)


def add_stage3(stages: Any) -> None:
    stage3 = stages.add_parser("stage3", help="the full-size VAE's decoding of a video")
    stage3.add_argument("--resolution", default=versions.DEFAULT_RESOLUTION, choices=tuple(geometry.BUCKET_BASE))
    stage3.add_argument("--aspect_ratio", default=options.DEFAULT_ASPECT_RATIO)
    stage3.add_argument("--video_length", type=int, default=121)
    stage3.add_argument("--tile_size", type=int, help="as in stage 3")
    stage3.add_argument("--tile_overlap", type=float, default=tiling.DEFAULT_TILE_OVERLAP)
    stage3.add_argument("--disable_tiling", action="store_true", help="as in stage 3")
    stage3.add_argument("--at_once", type=int, help="latent frames of a chunk (default: what fits)")
    stage3.add_argument(
        "--frames_per_piece",
        type=int,
        help="of whole frames, that go through the last level at once (default: what fits)",
    )
    stage3.add_argument("--bands", type=int, help="bands of rows of whole frames (default: as few as fit)")
    stage3.add_argument("--share_of", type=int, help="one rank's share of so many, exchanges replaced by copies")
    stage3.add_argument("--channels", type=int, nargs=5, help="narrower levels than the real ones, for a quick look")
    stage3.add_argument("--output_video", help="also encode the frames, to this mp4")
    stage3.add_argument("--gpus", type=int, default=1, help="processes, one a GPU (default: %(default)s)")
    stage3.add_argument("--steps", type=int, default=2, help="timed decodings (default: %(default)s)")
    stage3.set_defaults(run=bench_stage3)


def add_encoding(stages: Any) -> None:
    encoding = stages.add_parser("encoding", help="the full-size VAE's encoding of a video")
    encoding.add_argument("--resolution", default=versions.DEFAULT_RESOLUTION, choices=tuple(geometry.BUCKET_BASE))
    encoding.add_argument("--aspect_ratio", default=options.DEFAULT_ASPECT_RATIO)
    encoding.add_argument("--video_length", type=int, default=121)
    encoding.add_argument("--at_once", type=int, help="latent frames of a chunk (default: as --input_video)")
    encoding.add_argument("--one_piece", action="store_true", help="also how far that is from encoding in one piece")
    encoding.add_argument("--channels", type=int, nargs=5, help="narrower levels than the real ones, for a quick look")
    encoding.add_argument("--steps", type=int, default=2, help="timed encodings (default: %(default)s)")
    encoding.set_defaults(run=bench_encoding)


def build_parser() -> Parser:
    parser = tool_parser("hunyuan_staged.bench", __doc__, OpenParser)
    parser.set_defaults(takes_flags=False)
    stages = parser.add_subparsers(dest="stage", required=True)
    add_stage2(stages)
    add_stage3(stages)
    add_encoding(stages)
    memory.add_parser(stages)
    checkpoint.add_parser(stages)
    single_file.add_parser(stages)
    whole_run.add_parser(stages)
    for stage in stages.choices.values():
        add_debug(stage, argparse.SUPPRESS)
    return parser


def check_device(args: argparse.Namespace) -> None:
    """InputError where the full-size model would be measured without a GPU."""
    import torch

    fewer = {"stage2": "layers", "stage3": "channels", "encoding": "channels"}.get(args.stage)
    chosen = fewer and (getattr(args, fewer) or getattr(args, "transformer", None))
    if fewer and not chosen and not torch.cuda.is_available():
        raise InputError(
            f"bench {args.stage} measures the full-size model and needs a GPU; --{fewer} makes a smaller one"
        )


def run(args: argparse.Namespace) -> None:
    """Measure, on as many processes as asked for, and print."""
    if getattr(args, "gpus", 1) > 1 and "RANK" not in os.environ:
        from torch.distributed.run import main as torchrun

        words = ["--standalone", "--nproc-per-node", str(args.gpus), "-m", "hunyuan_staged.bench", *sys.argv[1:]]
        torchrun(words)
        return
    check_device(args)
    result = args.run(args)
    if result:
        width = max(map(len, result))
        for name, value in result.items():
            print(f"{name:{width}}  {value}")
        print(json.dumps(result))


def main() -> int:
    """The exit status: 0, or 2 after one line that says what was refused."""
    return run_tool(build_parser(), run)
