"""`python -m hunyuan_staged.cluster --jobs FILE --output_dir SHARED`: many videos on many machines, by Ray.

Each actor keeps one stage loaded and makes one job after the other; what one leaves behind when it dies, another goes on
with. On this machine, or on the cluster that RAY_ADDRESS names, all of whose nodes have this folder, the model and SHARED
at the same place. All other flags are those of run_staged.sh. The same command, given again, goes on.
"""

import argparse
import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from hunyuan_staged import launch
from hunyuan_staged.cluster.actor import StageCommand
from hunyuan_staged.cluster.driver import Driver, Pool, connected, say
from hunyuan_staged.cluster.queues import Queues
from hunyuan_staged.errors import InputError, print_error, run_tool
from hunyuan_staged.jobs.outcomes import closing_lines, status_of
from hunyuan_staged.jobs.reading import Jobs
from hunyuan_staged.launch_jobs import conclude, jobs_of_run, written_queue
from hunyuan_staged.parsing import OpenParser, Parser, add_debug
from hunyuan_staged.pipeline.job_folders import ordered
from hunyuan_staged.runtime.environment import check_working_folder
from hunyuan_staged.runtime.signals import Interrupted, Interrupts
from hunyuan_staged.stage_flags import STAGES, WholeRun, read_whole_run

LOG_DIR = ".cluster"  # in the folder of the run: what the processes of each actor say
RAY_LOG = "ray.log"  # there, too: what Ray says
MAX_ACTORS = 1000
EXAMPLE = """\
examples:
  python -m hunyuan_staged.cluster --jobs jobs.jsonl --output_dir runs --denoisers 4 --gpus_per_denoiser 2
  RAY_ADDRESS=head:6379 python -m hunyuan_staged.cluster --prompt 'a red circle grows' --seeds 1-64 --output_dir /shared
"""


def build_parser() -> Parser:
    """The cluster's own flags; the others are the stages'."""
    raw = argparse.RawDescriptionHelpFormatter
    name = "python -m hunyuan_staged.cluster"
    parser = OpenParser(name, description=__doc__, epilog=EXAMPLE, formatter_class=raw, allow_abbrev=False)
    for kind, what in (
        ("encoders", "encode prompts (stage 1)"),
        ("denoisers", "denoise (stage 2)"),
        ("enlargers", "enlarge, with --super_resolution, with as many GPUs as a denoiser"),
        ("decoders", "decode videos (stage 3)"),
    ):
        parser.add_argument(f"--{kind}", type=int, default=1, metavar="N", help=f"actors that {what} (default: 1)")
    parser.add_argument(
        "--gpus_per_denoiser",
        type=float,
        default=1,
        metavar="N",
        help="GPUs of one node that make a video together, or a part of one, as 0.5; 0: all stages on the CPU (default: 1)",
    )
    for kind in ("encoder", "decoder"):
        parser.add_argument(
            f"--gpus_per_{kind}",
            type=float,
            metavar="N",
            help=f"GPUs of each {kind}: 1, or a part of one, as 0.5 (default: 1; 0 where denoisers have none)",
        )
    parser.add_argument(
        "--processes_per_denoiser",
        type=int,
        metavar="N",
        help="without GPUs: processes that make a video together (default: 1)",
    )
    parser.add_argument("--dashboard", action="store_true", help="with a Ray of this run's own: its dashboard, too")
    add_debug(parser)
    return parser


def check(args: argparse.Namespace) -> None:
    """InputError for a number of actors, processes or GPUs that cannot be."""
    for name in ("encoders", "denoisers", "enlargers", "decoders", "processes_per_denoiser"):
        given = getattr(args, name)
        if given is not None and not 1 <= given <= MAX_ACTORS:
            raise InputError(f"{given} is outside 1 to {MAX_ACTORS}", option=name)
    gpus = args.gpus_per_denoiser
    if not 0 <= gpus <= launch.MAX_PROCESSES:
        raise InputError(f"{gpus:g} is outside 0 to {launch.MAX_PROCESSES}", option="gpus_per_denoiser")
    if gpus > 1 and gpus != int(gpus):
        raise InputError(f"{gpus:g} is neither a whole number nor a part of one GPU", option="gpus_per_denoiser")
    if args.processes_per_denoiser is not None and gpus:
        raise InputError("goes with --gpus_per_denoiser 0; else a process has a GPU", option="processes_per_denoiser")
    for name in ("gpus_per_encoder", "gpus_per_decoder"):
        given = getattr(args, name)
        if given is None:
            setattr(args, name, float(gpus > 0))
        elif not 0 <= given <= 1:
            raise InputError(f"{given} is outside 0 to 1", option=name)


def pools_of(args: argparse.Namespace, whole: WholeRun, jobs: int, folder: Path) -> list[Pool]:
    """The actors of the stages of a run, no more than there are jobs. folder: of the logs."""
    gpus = args.gpus_per_denoiser
    processes = max(1, int(gpus)) if gpus else args.processes_per_denoiser or 1
    kinds = {
        "encoder": (args.encoders, args.gpus_per_encoder, 1),
        "denoiser": (args.denoisers, gpus, processes),
        "enlarger": (args.enlargers, gpus, processes),
        "decoder": (args.decoders, args.gpus_per_decoder, 1),
    }
    names = [kind for kind in kinds if kind != "enlarger" or len(whole.lists) > len(STAGES)]
    pools = []
    for number, kind, words in zip(whole.numbers, names, whole.lists, strict=False):
        count, share, size = kinds[kind]
        script = str(launch.ROOT / f"{STAGES[number - 1]}.py")
        threads = os.environ.get("OMP_NUM_THREADS")
        command = StageCommand(script, tuple(words), size, str(Path.cwd()), str(folder), share > 0, threads)
        pools.append(Pool(kind, number, min(count, jobs), share, command))
    return pools


def make(args: argparse.Namespace, jobs: Jobs, whole: WholeRun) -> int:
    """Make all jobs; the exit status."""
    options = whole.options
    folder = Path(options[0].output_dir).absolute() / LOG_DIR
    pools = pools_of(args, whole, len(jobs.good), folder)
    queues = Queues(ordered(jobs.good, options[0], 1), [pool.count for pool in pools])
    with contextlib.ExitStack() as stack:
        ray = stack.enter_context(connected(pools, dashboard=args.dashboard))
        folder.mkdir(parents=True, exist_ok=True)
        stack.enter_context(written_queue(jobs, options[0]))
        # What Ray has to say of an actor that dies it prints.
        log = stack.enter_context((folder / RAY_LOG).open("a", encoding="utf-8"))
        stack.enter_context(contextlib.redirect_stdout(log))
        interrupts = stack.enter_context(Interrupts())
        stack.enter_context(interrupts.deferred())
        Driver(ray, pools, queues, folder.parent, interrupts).run()
    outcomes = list(queues.outcomes.values())
    for warns, line in closing_lines(jobs, outcomes):
        say(f"{'warning: ' * warns}{line}")
    conclude(Jobs(jobs.good), options)
    return status_of(jobs, outcomes)


def flags_of_stages(args: argparse.Namespace) -> list[str]:
    """What the stages get."""
    return [*args.flags, *(["--debug"] if args.debug else [])]


def run(args: argparse.Namespace) -> int:
    """What the flags ask for; the exit status."""
    check_working_folder()
    check(args)
    whole = read_whole_run(flags_of_stages(args))
    options = whole.options
    if whole.request is None:
        raise InputError("give --jobs FILE, --seeds, or --prompt several times: what is there to make?")
    if any(one.dry_run for one in options):
        raise InputError("is for run_staged.sh, which plans for the machine that it runs on", option="dry_run")
    if options[1].gpus_per_job is not None:
        raise InputError("is for run_staged.sh; here it is --gpus_per_denoiser", option="gpus_per_job")
    jobs = jobs_of_run(whole.request, options, 1)
    try:
        return make(args, jobs, whole)
    except Interrupted as signalled:
        print_error(f"the run {signalled}")
        return signalled.status


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0; 3 where a job has failed, 2 after one line that says what was refused."""
    return run_tool(build_parser(), run, argv)
