"""Whether two checkouts of the suite give the same bits: `python tests/support/compare_checkouts.py OLD NEW`.

Runs the scripts of both on the demo weights and compares latents and frames: text and image to video on 1, 2 and 3
processes, with a LoRA, with each feature cache, with fp8 weights, stopped and resumed. A table, and status 1 where a bit
differs. For a change that is to change nothing; about ten minutes on two cores.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file

STEPS = 8
DENOISE = ["--video_length", "9", "--num_inference_steps", str(STEPS), "--seed", "3"]
CACHE = ["--enable_cache", "--cache_start_step", "2", "--cache_end_step", str(STEPS), "--cache_type"]
CACHES = ("deepcache", "teacache", "taylorcache", "firstblock", "magcache")
ADAPTER = "hunyuan_staged/demo/adapters/bounce.safetensors"


@dataclass(frozen=True)
class Case:
    """A run of stage 2. frames: whether stage 3 follows. stopped: it gets SIGTERM on the way and goes on with --resume."""

    name: str
    flags: tuple[str, ...] = ()
    image: bool = False
    processes: int = 1
    frames: bool = False
    stopped: bool = False


def cases() -> list[Case]:
    """All that is compared; ADAPTER stands for the checkout's own file."""
    return [
        *(Case(f"t2v on {n}", processes=n, frames=True) for n in (1, 2, 3)),
        *(Case(f"i2v on {n}", image=True, processes=n, frames=True) for n in (1, 2, 3)),
        *(Case(f"LoRA on {n}", ("--lora", ADAPTER), processes=n) for n in (1, 2)),
        *(Case(kind, (*CACHE, kind)) for kind in CACHES),
        Case("taylorcache on 2", (*CACHE, "taylorcache"), processes=2),
        Case("fp8", ("--weights_dtype", "fp8")),
        Case("stopped and resumed", stopped=True),
    ]


def run(checkout: Path, script: str, *args: object, processes: int = 1, stop: bool = False) -> None:
    """A stage of a checkout; stop: with SIGTERM once its state is there."""
    words = [str(arg) for arg in args]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else ()), str(checkout / script), *words]
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=checkout, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as it:
        if stop:
            state = Path(words[words.index("--input_dir") + 1]) / "stage2_state.safetensors"
            while it.poll() is None and not state.exists():
                time.sleep(0.02)
            it.send_signal(signal.SIGTERM)
        said = it.communicate()[0].decode()
    if it.returncode not in ((0, 143) if stop else (0,)):
        raise SystemExit(f"{' '.join(command)} ended with status {it.returncode}:\n{said}")


def result(checkout: Path, case: Case, embeddings: Path, folder: Path) -> dict[str, torch.Tensor]:
    """The tensors that a case gives."""
    folder.mkdir(parents=True)
    for file in embeddings.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    flags = [str(checkout / flag) if flag == ADAPTER else flag for flag in case.flags]
    words = ["--input_dir", folder, *DENOISE, *flags]
    if case.stopped:
        run(checkout, "stage2_transformer.py", *words, "--checkpoint_every", 1, stop=True)
        words.append("--resume")
    run(checkout, "stage2_transformer.py", *words, processes=case.processes)
    found = {"latents": load_file(folder / "stage2_latents.safetensors")["latents"]}
    if case.frames:
        words = ["--input_dir", folder, "--save_frames", "--tile_size", 64]
        run(checkout, "stage3_vae_decoder.py", *words, processes=case.processes)
        found["frames"] = load_file(folder / "stage3_frames.safetensors")["frames"]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    args = parser.parse_args()
    different = 0
    with tempfile.TemporaryDirectory() as place:
        base = Path(place)
        image = base / "image.png"
        Image.linear_gradient("L").resize((160, 96)).convert("RGB").save(image)
        checkouts = {"old": args.old.resolve(), "new": args.new.resolve()}
        for name, checkout in checkouts.items():
            for kind, extra in (("t2v", []), ("i2v", ["--image_path", image])):
                run(checkout, "stage1_text_encoder.py", "--output_dir", base / name / kind, *extra)
        for case in cases():
            kind = "i2v" if case.image else "t2v"
            old, new = (
                result(checkout, case, base / name / kind, base / name / case.name)
                for name, checkout in checkouts.items()
            )
            for what, tensor in old.items():
                same = torch.equal(tensor, new[what])
                different += not same
                far = float((new[what] - tensor).float().norm() / tensor.float().norm())
                print(f"{case.name:20} {what:8} {'equal' if same else f'differ by {far:.2g}'}", flush=True)
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
