"""`python -m hunyuan_staged.demo.adapter --model_path DIR --out FILE`: a LoRA adapter that teaches the demo to bounce.

A shape that falls and comes back within the clip is a motion that the checkpoint has no word for. The adapter learns it
as the checkpoint learned the others, by flow matching on the frozen VAE's latents, with the encoders frozen; a part of
the clips shows what the checkpoint knows, so that it stays. With --judge, held-out prompts are judged without and with
the adapter, as evaluate.py judges.

Letters: r the rank; T, H, W frames, rows and columns of a clip.
"""

import argparse
import copy
import json
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrize

from hunyuan_staged.demo import evaluate, scenes, train
from hunyuan_staged.errors import InputError, run_tool
from hunyuan_staged.files import atomic
from hunyuan_staged.files.atomic import check_output_dir
from hunyuan_staged.parsing import Parser, tool_parser
from hunyuan_staged.runtime.progress import quiet
from hunyuan_staged.weights import components, encoder_components, lora
from hunyuan_staged.weights.folder import open_model

MOTION = "bounce"
NEW_SHARE = 0.65  # of the clips that are trained on; the others show what the checkpoint knows
WAY = (26.0, 34.0)  # pixels that a shape falls and comes back
DIP = 12.0  # pixels of it that must be seen
WEIGHTS = (0.0, 0.5, 1.0)  # that --judge compares


# -- what is taught --


def draw_scene(draw: random.Random, *, held_out: bool = False) -> scenes.Scene:
    """A random scene of one shape that falls and comes back, trained on or held out."""
    share = 1 - np.abs(np.linspace(-1, 1, scenes.FRAMES))  # of the way down: 0 at both ends, 1 in the middle
    while True:
        shape, color = draw.choice(scenes.SHAPES), draw.choice(list(scenes.COLORS))
        thing = scenes._single(draw, shape, color, "down")
        # Both ways in the time of one: no faster than the VAE has seen things move.
        (x, y), way = thing.centers.mean(axis=0), draw.uniform(*WAY)
        thing = replace(thing, centers=np.stack([np.full(scenes.FRAMES, x), y + way * (share - 0.5)], axis=1))
        scene = scenes.Scene((thing,), MOTION, scenes._background(draw, [color]))
        if scene.held_out == held_out:
            return scene


def held_out_prompts(count: int, seed: int = evaluate.SEED) -> list[tuple[scenes.Scene, str]]:
    """(scene, prompt) pairs of combinations that training never saw, in sentences that the checkpoint knows."""
    draw = random.Random(f"{seed}/{MOTION}")
    held_out = [draw_scene(draw, held_out=True) for _ in range(count)]
    return [(scene, scenes.describe(scene, draw, scenes.FIRST)) for scene in held_out]


def _path(frames: np.ndarray) -> np.ndarray:
    """The centre (x, y) of what is to be seen in each frame of a clip uint8 [T, H, W, 3]; zeros if it is not in all."""
    mask = evaluate._foreground(frames)
    areas = mask.sum(axis=(1, 2))
    if areas.min() < 20:
        return np.zeros((len(frames), 2))
    rows, columns = np.mgrid[: mask.shape[1], : mask.shape[2]]
    return np.stack([(mask * columns).sum((1, 2)) / areas, (mask * rows).sum((1, 2)) / areas], axis=1)


def dip(frames: np.ndarray) -> float:
    """How many pixels lower a shape is in the middle of a clip uint8 [T, H, W, 3] than at the lower of its two ends.

    0 where some frame shows no shape; below 0 for one that moves only up or only down.
    """
    y, middle, ends = _path(frames)[:, 1], len(frames) // 2, evaluate.ENDS
    return float(y[middle - 1 : middle + 2].mean() - max(y[:ends].mean(), y[-ends:].mean()))


def bounces(frames: np.ndarray) -> bool:
    """Whether a shape falls and comes back, and moves sideways by less."""
    return dip(frames) > DIP > float(np.ptp(_path(frames)[:, 0]))


def judge(frames: np.ndarray, scene: scenes.Scene) -> dict[str, float]:
    """evaluate's verdict, where the direction of a shape that should bounce is right if it does."""
    seen = evaluate.judge(frames, scene)
    if scene.motion != MOTION:
        return seen
    seen["direction"] = bounces(frames)
    return seen | {"all four": all(seen[name] for name in ("color", "background", "direction", "shape"))}


class Lessons(train.Pool):
    """A pool of clips of which NEW_SHARE bounce."""

    def draw(self) -> scenes.Scene:
        return draw_scene(self.scenes) if self.scenes.random() < NEW_SHARE else super().draw()


# -- the adapter --


class LowRank(nn.Module):
    """A linear layer's weight [out, in] with up [out, r] @ down [r, in] added: what lora.py fuses, while it is learned."""

    def __init__(self, weight: torch.Tensor, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, weight.shape[1]) * weight.shape[1] ** -0.5)
        self.up = nn.Parameter(torch.zeros(weight.shape[0], rank))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.up @ self.down


def adapted_linears(model: Any) -> Iterator[tuple[str, nn.Linear]]:
    """(name, layer) of what the adapter changes: the linear layers of the blocks and of the refiner.

    Not what the last block does to the text, which no output depends on.
    """
    last = f"transformer_blocks.{len(model.transformer_blocks) - 1}"
    unused = (f"{last}.attn.to_add_out", f"{last}.ff_context")
    for name, module in model.named_modules():
        inside = name.startswith(("transformer_blocks.", "context_embedder.")) and not name.startswith(unused)
        if isinstance(module, nn.Linear) and inside:
            yield name, module


def attach(model: Any, rank: int) -> dict[str, LowRank]:
    """Give each of adapted_linears a LowRank, by its name."""
    found = {}
    for name, linear in list(adapted_linears(model)):
        found[name] = LowRank(linear.weight, rank).to(linear.weight.device)
        parametrize.register_parametrization(linear, "weight", found[name])
    return found


def save(path: Path, added: Mapping[str, LowRank]) -> int:
    """Write an adapter in bfloat16 with diffusers' names and peft's leaves; returns its size in bytes."""
    tensors = {}
    for name, pair in added.items():
        for leaf, tensor in (("lora_A", pair.down), ("lora_B", pair.up)):
            tensors[f"transformer.{name}.{leaf}.weight"] = tensor.detach().to("cpu", torch.bfloat16).contiguous()
    with atomic.replacing(path) as temporary:
        save_file(tensors, temporary)
    return path.stat().st_size


class Lesson:
    """The demo checkpoint, loaded to learn an adapter."""

    def __init__(self, model_path: str | Path, device: torch.device) -> None:
        folder = open_model(model_path, ("transformer", "vae", "text", "glyph", "image"))
        options: dict[str, Any] = {"device": device, "dtype": torch.float32}
        transformer: Any = components.load_transformer(folder, train.VERSION, **options)
        tokenizer, language = encoder_components.load_language_model(folder, **options)
        glyph_tokenizer, glyph = encoder_components.load_glyph_encoder(folder, **options)
        image: Any = encoder_components.load_image_encoder(folder, **options)[1]
        encoder, config = components.load_vae_encoder(folder, **options)
        size = image.config.image_size
        if size != train.DEMO.image_size:
            raise InputError(
                f"--model_path {model_path} is not the demo checkpoint: its image encoder takes {size} pixels, "
                f"the demo's {train.DEMO.image_size}"
            )
        self.device = device
        self.words = train.Words(tokenizer, glyph_tokenizer)
        self.vae = SimpleNamespace(encoder=encoder, config=SimpleNamespace(**config))
        self.learner = train.Learner(language, glyph, image, transformer, self.words.crop).requires_grad_(False)
        self.learner.rope = tuple(table.to(device) for table in self.learner.rope)


def draw_lessons(lesson: Lesson, clips: int, seed: int, progress: Any = quiet) -> Lessons:
    """A pool of so many encoded clips."""
    pool = Lessons(clips, lesson.words, lesson.vae, lesson.device, seed)
    for _ in progress(range(clips), desc="clips", unit="clip"):
        pool.renew(1)
    return pool


def learn(
    lesson: Lesson, pool: Lessons, *, rank: int, steps: int, batch: int, rate: float, seed: int, progress: Any = quiet
) -> dict[str, LowRank]:
    """The adapter after so many steps on batches from a pool of clips; the transformer keeps it attached."""
    torch.manual_seed(seed)
    added = attach(lesson.learner.transformer, rank)
    ids, valid = lesson.words.language([""])
    empty = {"ids": ids.to(lesson.device), "valid": valid.to(lesson.device)}
    parameters = [parameter for pair in added.values() for parameter in pair.parameters()]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.0)
    # Linear warm-up over a tenth of the steps, then a cosine to zero.
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    device = lesson.device.type
    for step in progress(range(steps), desc="adapter", unit="step"):
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = train.flow_loss(lesson.learner, pool.batch(batch), empty)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0 or step == steps - 1:
            train.log("adapter", step, loss=train.finite(loss.detach(), step))
    return added


# -- what it does --


def measure(
    model_path: str | Path, file: Path, count: int, device: torch.device, progress: Any = quiet
) -> list[dict[str, Any]]:
    """A row for each of WEIGHTS: the shares of evaluate over `count` held-out prompts of the new motion, with the mean
    of `dip` in pixels, and over as many of those that the checkpoint knows."""
    pipeline = evaluate.DemoPipeline(model_path, device)
    setting = pipeline.setting()
    known = evaluate.held_out_prompts("single", count, new_wording=False)
    rows = []
    for weight in progress(WEIGHTS, desc="weights", unit="weight"):
        taught = with_adapter(pipeline, model_path, file, weight)
        row: dict[str, Any] = {"weight": weight, "clips": count}
        for name, prompts in (("new", held_out_prompts(count)), ("known", known)):
            clips = [
                (taught.frames(prompt, evaluate.SEED + number, setting), scene)
                for number, (scene, prompt) in enumerate(progress(prompts, desc=f"{name}, {weight:g}", unit="clip"))
            ]
            row[name] = evaluate.shares(judge(frames, scene) for frames, scene in clips)
            if name == "new":
                row["dip"] = round(float(np.mean([dip(frames) for frames, _ in clips])), 1)
        rows.append(row)
    return rows


def with_adapter(
    pipeline: evaluate.DemoPipeline, model_path: str | Path, file: Path, weight: float
) -> evaluate.DemoPipeline:
    """The same pipeline, its transformer with an adapter at a weight."""
    folder, version = open_model(model_path, ("transformer",)), pipeline.version.name
    adapters = lora.load([(file, weight)], components.transformer_shapes(folder, version))
    taught = copy.copy(pipeline)
    taught.transformer = components.load_transformer(
        folder, version, device=pipeline.device, dtype=torch.float32, adapt=adapters.fused
    )
    return taught


def build_parser() -> Parser:
    parser = tool_parser("hunyuan_staged.demo.adapter", __doc__)
    parser.add_argument("--model_path", type=Path, required=True, help="the demo checkpoint")
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--out", type=Path, help="the safetensors file that gets the adapter")
    task.add_argument("--judge", type=Path, metavar="FILE", help="train nothing, and judge this adapter")
    parser.add_argument("--rank", type=int, default=8, help="of the added matrices (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="(default: %(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="clips in a step (default: %(default)s)")
    parser.add_argument("--clips", type=int, default=80, help="encoded for training (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=6e-3, help="the highest learning rate (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of clips, weights and batches (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=8, help="--judge: of each kind (default: %(default)s)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Train or judge, print a line of JSON, and return the exit status: 0, or 2 after a line on what was refused."""
    return run_tool(build_parser(), run, argv)


def run(args: argparse.Namespace) -> None:
    """What the flags ask for. Raises InputError on what cannot be used."""
    from tqdm import tqdm

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    begun = time.time()
    for name in ("rank", "steps", "batch", "clips", "prompts"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} {getattr(args, name)} is not a positive number")
    if args.judge:
        print(json.dumps(measure(args.model_path, args.judge, args.prompts, device, tqdm)))
        return
    check_output_dir("--out", args.out.parent)
    lesson = Lesson(args.model_path, device)
    pool = draw_lessons(lesson, args.clips, args.seed, tqdm)
    added = learn(
        lesson,
        pool,
        rank=args.rank,
        steps=args.steps,
        batch=args.batch,
        rate=args.rate,
        seed=args.seed,
        progress=tqdm,
    )
    size = save(args.out, added)
    print(json.dumps({"out": str(args.out), "bytes": size, "seconds": round(time.time() - begun, 1)}))


if __name__ == "__main__":
    sys.exit(main())
