"""`python -m hunyuan_staged.bench memory CLAIM`: what is said about memory, measured, each claim by one command.

Weights are random, or zero where only their size matters. `table`: see cards.py.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hunyuan_staged.bench import cards
from hunyuan_staged.bench.cards import language_skeleton, skeleton
from hunyuan_staged.decoding import tiling
from hunyuan_staged.errors import InputError
from hunyuan_staged.memory import budget, estimates
from hunyuan_staged.memory.budget import GIB

LANGUAGE_TOKENS = 1108  # the longest prompt: 1,000, and the 108 of the template


def bench(*words: str) -> dict[str, Any]:
    """What `bench` gives with these words, in a process of its own, so that nothing of another run is there."""
    command = [sys.executable, "-m", "hunyuan_staged.bench", *words]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def stage2(*flags: str) -> dict[str, Any]:
    return bench("stage2", "--no_parts", "--steps", "2", *flags)


def offload_720p(args: argparse.Namespace) -> dict[str, float]:
    resident, offloaded = stage2("--disable_offloading"), stage2("--enable_offloading")
    return {
        "resident_step_seconds": resident["step_seconds"],
        "offloaded_step_seconds": offloaded["step_seconds"],
        "slowdown": offloaded["step_seconds"] / resident["step_seconds"],
        "peak_gib": offloaded["peak_gib"],
        "planned_gib": offloaded["planned_gib"],
    }


def offload_480p(args: argparse.Namespace) -> dict[str, float]:
    result = stage2("--resolution", "480p", "--enable_offloading")
    return {name: result[name] for name in ("step_seconds", "peak_gib", "planned_gib")}


def float8(args: argparse.Namespace) -> dict[str, float]:
    whole, halved = stage2(), stage2("--weights_dtype", "fp8")
    return {
        "weights_gib": halved["weights_gib"],
        "weights_share": halved["weights_gib"] / whole["weights_gib"],
        "slowdown": halved["step_seconds"] / whole["step_seconds"],
        "peak_gib": halved["peak_gib"],
        "planned_gib": halved["planned_gib"],
    }


def resident_bytes(kind: str = "Pss") -> int:
    """This process's share of host memory: what it shares with others is divided among them. Linux."""
    found = re.search(rf"^{kind}:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def host_rank(args: argparse.Namespace) -> dict[str, float]:
    """One process of `host`: every block offloaded, what all processes then hold beyond what they held before."""
    import torch

    from hunyuan_staged.memory.host import HostBlocks
    from hunyuan_staged.parallel.world import start_world, stop_world

    world = start_world()
    blocks = skeleton(args.layers).transformer_blocks
    before = resident_bytes()
    host_blocks = HostBlocks(blocks, range(len(blocks)), world.device, world, torch.bfloat16)
    if host_blocks.leader:
        host_blocks.memory.fill_(1)
    host_blocks.ready()
    # What a process has touched counts for it, and each touches all: blocks are copied from there to its device.
    total = int(host_blocks.memory.view(-1, 4096)[:, 0].sum(dtype=torch.int64))
    assert total == host_blocks.memory.nbytes // 4096
    world.barrier("touched")
    taken = world.all_gather_text("taken", str(resident_bytes() - before))
    world.barrier("measured")
    stop_world(world)
    size = host_blocks.memory.nbytes
    host = sum(map(int, taken))
    return {"ranks": world.size, "weights_gib": size / GIB, "host_gib": host / GIB, "host_share": host / size}


def host(args: argparse.Namespace) -> dict[str, float]:
    words = ["--standalone", "--nproc-per-node", "2", "-m", "hunyuan_staged.bench", "memory", "host-rank"]
    words += ["--layers", str(args.layers)] if args.layers else []
    command = [sys.executable, "-m", "torch.distributed.run", *words]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])["measured"]


def stage1(args: argparse.Namespace) -> dict[str, float]:
    import torch

    from hunyuan_staged.memory import offloading
    from hunyuan_staged.parallel.world import lone_world

    world = lone_world()
    device, dtype = world.device, torch.bfloat16
    model = language_skeleton()
    weights = offloading.weights_of(model, model.layers, dtype)

    def load(destinations: Any) -> None:
        model.rotary_emb = type(model.rotary_emb)(model.config).to(device)
        for name, tensor in model.state_dict().items():
            value = destinations.tensors.get(name)
            value = torch.zeros(tensor.shape, dtype=dtype, device=device) if value is None else value
            path, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(path), leaf, torch.nn.Parameter(value, requires_grad=False))

    _, layers = offloading.load_offloaded(model, "layers", weights.count, load, device=device, dtype=dtype, world=world)
    assert layers is not None
    layers.hook()
    tokens = torch.zeros(1, LANGUAGE_TOKENS, dtype=torch.int64, device=device)
    seconds = []
    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        for _ in range(3):
            started = time.perf_counter()
            model.eval()(tokens)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
    planned = sum(budget.device_parts(weights, estimates.LANGUAGE_WORKING, weights.count).values())
    peak = torch.cuda.max_memory_allocated()
    return {"peak_gib": peak / GIB, "planned_gib": planned / GIB, "prompt_seconds": min(seconds)}


def stage3(args: argparse.Namespace) -> dict[str, float]:
    result = bench("stage3", "--tile_size", str(args.tile_size), "--steps", "1")
    return {name: result[name] for name in ("peak_gib", "planned_gib", "host_peak_gib", "seconds")}


def load(args: argparse.Namespace) -> dict[str, float]:
    """Loading from a warm page cache against copying as many bytes from pinned memory; writes 17 GB the first time."""
    import torch

    from hunyuan_staged.bench.step import random_model
    from hunyuan_staged.parallel.world import lone_world
    from hunyuan_staged.weights import components
    from hunyuan_staged.weights.folder import open_model

    device, folder = lone_world().device, Path(args.folder)
    if not (folder / "transformer").is_dir():
        random_model({"target_size": 960, "task_type": "t2v"}, device, torch.bfloat16).save_pretrained(
            folder / "transformer"
        )
        torch.cuda.empty_cache()
    seconds = []
    for _ in range(4):  # from the second time on from the page cache
        torch.cuda.empty_cache()
        opened = open_model(folder, ["transformer"])
        skeleton = components.transformer_skeleton(opened, "720p_t2v")  # which stage 2 has from planning
        started = time.perf_counter()
        model = components.load_transformer(opened, "720p_t2v", device=device, dtype=torch.bfloat16, skeleton=skeleton)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        size = sum(tensor.nbytes for tensor in model.parameters())
        del model
    block = torch.empty(2**30, dtype=torch.uint8, pin_memory=True)
    target = block.to(device)
    started = time.perf_counter()
    for _ in range(8):
        target.copy_(block, non_blocking=True)
    torch.cuda.synchronize()
    copying = size / (8 * block.nbytes / (time.perf_counter() - started))
    return {
        "first_seconds": seconds[0],
        "load_seconds": statistics.median(seconds[1:]),
        "copy_seconds": copying,
        "times": statistics.median(seconds[1:]) / copying,
    }


@dataclass(frozen=True)
class Claim:
    """What is said, how it is measured, and the most that each of the measured numbers may be."""

    text: str
    measure: Callable[[argparse.Namespace], dict[str, float]]
    most: dict[str, float]


CLAIMS = {
    "offload-720p": Claim("720p, 121 frames, all blocks offloaded", offload_720p, {"slowdown": 1.02, "peak_gib": 6.5}),
    "offload-480p": Claim("480p, 121 frames, all blocks offloaded", offload_480p, {"peak_gib": 4.5}),
    "host": Claim("two processes of a host, all blocks offloaded (2 GPUs, or a CPU)", host, {"host_share": 1.2}),
    "stage1": Claim("stage 1, all layers offloaded", stage1, {"peak_gib": 4.0}),
    "stage3": Claim("stage 3, 720p, 121 frames, at --tile_size", stage3, {"peak_gib": 6.0}),
    "load": Claim("stage 2 from a warm page cache, times what copying takes", load, {"times": 1.5}),
    "fp8": Claim("720p, 121 frames, --weights_dtype fp8", float8, {"weights_share": 0.55}),
}


def verdict(claim: Claim, measured: dict[str, float]) -> dict[str, Any]:
    """The measured numbers beside what they may be, and whether they all are."""
    holds = all(measured[name] <= most for name, most in claim.most.items())
    rounded = {name: round(number, 4) for name, number in measured.items()}
    return {"bench": "memory", "claim": claim.text, "measured": rounded, "most": claim.most, "holds": holds}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure a claim, or compute the table."""
    if args.claim == "table":
        for row in cards.table():
            print(f"| {' | '.join(row)} |")
        return {}
    if args.claim == "host-rank":
        measured = host_rank(args)
        return {"measured": measured} if os.environ["RANK"] == "0" else {}
    if args.claim != "host":
        import torch

        if not torch.cuda.is_available():
            raise InputError(f"{args.claim} is measured on a GPU, and there is none")
    return verdict(CLAIMS[args.claim], CLAIMS[args.claim].measure(args))


def add_parser(stages: Any) -> None:
    """The subcommand of bench."""
    parser = stages.add_parser("memory", help="a claim about memory, measured; table: what fits which card, computed")
    parser.add_argument("claim", choices=(*CLAIMS, "host-rank", "table"))
    parser.add_argument("--layers", type=int, help="host: of fewer blocks than the full 54")
    parser.add_argument(
        "--tile_size", type=int, default=tiling.SMALL_TILE_SIZE, help="stage3: in px (default: %(default)s)"
    )
    parser.add_argument(
        "--folder", default="./bench_checkpoint", help="load: a folder for 17 GB (default: %(default)s)"
    )
    parser.set_defaults(run=run, gpus=1)
