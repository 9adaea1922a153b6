"""`python -m hunyuan_staged.demo.evaluate --model_path DIR`: what the demo checkpoint gets right.

Prompts are held out: neither their combination nor their wording was trained on. Each is encoded, denoised, decoded and
written as an mp4 by the suite's own stages; the mp4 is read back and judged, by no network: colours by the nearest named
one, shapes by overlap with drawn ones, directions by the path of the centre, characters by correlation with the font.
"""

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hunyuan_staged import geometry, versions
from hunyuan_staged.decoding import tiling
from hunyuan_staged.demo import scenes
from hunyuan_staged.errors import InputError, run_tool
from hunyuan_staged.options import DEFAULT_ASPECT_RATIO, DEFAULT_FPS, DenoiseOptions
from hunyuan_staged.parsing import Parser, tool_parser
from hunyuan_staged.runtime.progress import quiet
from hunyuan_staged.sampling import cache_settings
from hunyuan_staged.sampling.cache_settings import CacheSettings
from hunyuan_staged.sampling.calibration import noise_levels

SEED = 4242
ABLATIONS = ("none", "guidance_1", "no_mask", "no_glyphs", "timesteps_off_by_one")
FOREGROUND = 70.0  # RGB distance from the background at which a pixel belongs to something
ENDS = 3  # frames at each end of a clip whose mean place counts
GROWTH = 1.6  # of the area, from which a shape counts as growing
SWEEP = 1.5 * np.pi  # of the angle around the path's middle, from which a path counts as a circle


# -- judging --


def _nearest(color: np.ndarray, named: dict[str, tuple[int, int, int]]) -> str:
    return min(named, key=lambda name: scenes.contrast(color, named[name]))


def see_background(frames: np.ndarray) -> tuple[str, str]:
    """The named colours of the upper and the lower half, from the rim of all frames [T, H, W, 3]."""
    rim = 4
    names = []
    for rows in (slice(0, scenes.HEIGHT // 2 - rim), slice(scenes.HEIGHT // 2 + rim, scenes.HEIGHT)):
        half = frames[:, rows]
        edge = np.concatenate([half[:, :, :rim].reshape(-1, 3), half[:, :, -rim:].reshape(-1, 3)])
        names.append(_nearest(np.median(edge, axis=0), scenes.BACKGROUNDS))
    return names[0], names[1]


def _foreground(frames: np.ndarray) -> np.ndarray:
    """[T, H, W] bool: pixels far from the median colour of their half's rim."""
    mask = np.zeros(frames.shape[:3], dtype=bool)
    middle = scenes.HEIGHT // 2
    for rows in (slice(0, middle), slice(middle, scenes.HEIGHT)):
        half = frames[:, rows].astype(np.float32)
        edge = np.concatenate([half[:, :, :4].reshape(-1, 3), half[:, :, -4:].reshape(-1, 3)])
        mask[:, rows] = np.linalg.norm(half - np.median(edge, axis=0), axis=-1) > FOREGROUND
    mask[:, middle - 1 : middle + 1] &= mask[:, middle - 3 : middle - 2] | mask[:, middle + 2 : middle + 3]
    return mask


def see_motion(mask: np.ndarray) -> str:
    """Which of MOTIONS the foreground [T, H, W] makes; "" where there is none."""
    areas = mask.sum(axis=(1, 2)).astype(float)
    if areas.min() < 20:
        return ""
    rows, columns = np.mgrid[: mask.shape[1], : mask.shape[2]]
    path = np.stack([(mask * columns).sum((1, 2)) / areas, (mask * rows).sum((1, 2)) / areas], axis=1)
    growth = areas[-ENDS:].mean() / areas[:ENDS].mean()
    offset = path - (path.max(axis=0) + path.min(axis=0)) / 2
    steps = np.diff(np.unwrap(np.arctan2(offset[:, 1], offset[:, 0])))
    radius = np.linalg.norm(offset, axis=1)
    if abs(steps.sum()) > SWEEP and radius.min() > 0.5 * radius.max() and radius.max() > 10:
        return "circle"
    dx, dy = path[-ENDS:].mean(axis=0) - path[:ENDS].mean(axis=0)
    if np.hypot(dx, dy) < 14:
        return "grow" if growth > GROWTH else "shrink" if growth < 1 / GROWTH else ""
    # Eight sectors; the picture is wider than high, and so are the diagonals that the world draws.
    vertical = "" if abs(dy) < 0.3 * abs(dx) else "down" if dy > 0 else "up"
    side = "" if abs(dx) < 0.3 * abs(dy) else "right" if dx > 0 else "left"
    return f"{vertical} {side}".strip()


def see_shape(mask: np.ndarray) -> str:
    """The shape with the largest overlap, over the frames that show most of it; "" where there is none."""
    areas = mask.sum(axis=(1, 2))
    votes: dict[str, float] = dict.fromkeys(scenes.SHAPES, 0.0)
    rows, columns = torch.meshgrid(torch.arange(mask.shape[1]) + 0.5, torch.arange(mask.shape[2]) + 0.5, indexing="ij")
    for frame in np.argsort(areas)[-8:]:
        seen = torch.from_numpy(mask[frame])
        if not seen.any():
            continue
        top, bottom = rows[seen].min(), rows[seen].max()
        left, right = columns[seen].min(), columns[seen].max()
        for shape in scenes.SHAPES:
            best = 0.0
            # Fitted to the box that it fills, with a little play in size and place.
            for scale in (0.94, 1.0, 1.06):
                unit = scenes._distance(shape, (columns - 80) * 1.0, (rows - 48) * 1.0, torch.tensor(20.0)) < 0
                height = rows[unit].max() - rows[unit].min()
                radius = 20.0 * (bottom - top + 1) / (height + 1) * scale
                y = (top + bottom) / 2 - ((rows[unit].max() + rows[unit].min()) / 2 - 48) * radius / 20
                drawn = scenes._distance(shape, columns - (left + right) / 2, rows - y, radius) < 0
                best = max(best, float((drawn & seen).sum() / (drawn | seen).sum()))
            votes[shape] += best
    return max(votes, key=lambda shape: votes[shape]) if any(votes.values()) else ""


def see_word(frames: np.ndarray, length: int) -> str:
    """The characters on the card, read off its `length` cells in the mean frame."""
    grey = frames.astype(np.float32).mean(axis=(0, 3))
    _, _, left, _ = scenes.card_box("0" * length)
    top = (scenes.HEIGHT - scenes.CELL_HEIGHT) // 2
    letters = scenes.atlas().numpy()
    letters = letters - letters.mean(axis=(1, 2), keepdims=True)
    letters /= np.linalg.norm(letters, axis=(1, 2), keepdims=True)
    word = ""
    for slot in range(length):
        scores = np.zeros(len(scenes.CHARACTERS))
        for dy in range(-3, 4):
            for dx in range(-3, 4):
                x = left + 6 + slot * scenes.CELL_WIDTH + dx
                cell = -grey[top + dy : top + dy + scenes.CELL_HEIGHT, x : x + scenes.CELL_WIDTH]
                cell = cell - cell.mean()
                scores = np.maximum(scores, (letters * cell).sum(axis=(1, 2)) / (np.linalg.norm(cell) + 1e-6))
        word += scenes.CHARACTERS[int(scores.argmax())]
    return word


def judge(frames: np.ndarray, scene: scenes.Scene) -> dict[str, float]:
    """What of a scene the frames uint8 [T, H, W, 3] show, 0 or 1 each: of a card, its colour, background and word.

    Of a card's characters it is the share that is right; "single character" is there only where the word is one, and
    "several characters", the whole word again, only where it is not.
    """
    background = see_background(frames)
    if scene.word:
        top, _, left, right = scenes.card_box(scene.word)
        rim = np.concatenate([frames[:, top + 1 : top + 5, left + 1 : right - 1].reshape(-1, 3)])
        color = _nearest(np.median(rim, axis=0), scenes.COLORS)
        read = see_word(frames, len(scene.word))
        same = [a == b for a, b in zip(read, scene.word, strict=True)]
        seen: dict[str, float] = {
            "color": color == scene.card,
            "background": background == scene.background,
            "characters": sum(same) / len(same),
            "word": all(same),
        }
        return seen | {"single character" if len(same) == 1 else "several characters": all(same)}
    (thing,) = scene.things
    mask = _foreground(frames)
    color = _nearest(np.median(frames[mask], axis=0), scenes.COLORS) if mask.any() else ""
    seen = {
        "color": color == thing.color,
        "background": background == scene.background,
        "direction": see_motion(mask) == scene.motion,
        "shape": see_shape(mask) == thing.shape,
    }
    return seen | {"all four": all(seen.values())}


# -- generating --


@dataclass(frozen=True)
class Setting:
    """How to sample, and which part of the conditioning to break (one of ABLATIONS)."""

    steps: int
    guidance_scale: float
    flow_shift: float
    ablation: str = "none"


class CountedBlocks:
    """A transformer's blocks, which count how many have run."""

    def __init__(self, model: Any) -> None:
        self._blocks, self.run = list(model.transformer_blocks), 0
        self.total = len(self._blocks)

    def __getitem__(self, part: slice) -> list[Any]:
        found = self._blocks[part]
        self.run += len(found)
        return found


class DemoPipeline:
    """The three stages in one process: all parts of the demo checkpoint loaded once.

    The transformer computes in `dtype`, all else in float32. Raises InputError where attn_mode cannot run.
    """

    def __init__(
        self,
        model_path: str | Path,
        device: torch.device,
        version: str = "demo_t2v",
        *,
        attn_mode: str = "torch",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        from hunyuan_staged.attention.choose import choose_attention
        from hunyuan_staged.pipeline import calibrations
        from hunyuan_staged.weights import components, encoder_components
        from hunyuan_staged.weights.folder import open_model

        folder = open_model(model_path, ("transformer", "vae", "text", "glyph"))
        self.device, self.version, self.dtype = device, versions.parse_version(version), dtype
        options: dict[str, Any] = {"device": device, "dtype": torch.float32}
        self.language = encoder_components.load_language_model(folder, **options)
        self.glyph = encoder_components.load_glyph_encoder(folder, **options)
        model: Any = components.load_transformer(folder, version, device=device, dtype=dtype)
        head_width = model.config.attention_head_dim
        self.transformer = model
        self.attention = choose_attention(attn_mode, device, dtype, head_width=head_width)
        self.decoder, self.vae_config = components.load_vae_decoder(folder, **options)
        self.folder, self.calibration = folder, calibrations.find(folder, version)

    def setting(self, ablation: str = "none", steps: int | None = None) -> Setting:
        """The version's own, or of so many steps; with something broken where asked."""
        version = self.version
        chosen = Setting(steps or version.num_inference_steps, version.guidance_scale, version.flow_shift, ablation)
        return replace(chosen, guidance_scale=1.0) if ablation == "guidance_1" else chosen

    def caching(self, cache_type: str, given: Mapping[str, Any]) -> CacheSettings:
        """A cache for the version's own number of steps, with stage 2's flags."""
        setting, layers = self.setting(), len(self.transformer.transformer_blocks)
        return cache_settings.resolve(
            cache_type, given, setting.steps, layers, self.calibration, noise_levels(setting.steps, setting.flow_shift)
        )

    def embed(self, prompt: str, ablation: str = "none") -> dict[str, torch.Tensor]:
        """Stage 1's eight tensors."""
        from hunyuan_staged.encoders import text

        width = self.transformer.config.text_embed_2_dim
        tensors = text.language_embeddings(*self.language, prompt)
        tensors |= text.language_embeddings(*self.language, "", negative=True)
        tensors |= text.glyph_embeddings(*self.glyph, prompt, width=width, dtype=torch.float32)
        if ablation == "no_glyphs":
            tensors["prompt_embeds_mask_2"] = torch.zeros_like(tensors["prompt_embeds_mask_2"])
        if ablation == "no_mask":
            tensors = {n: torch.ones_like(x) if "mask" in n else x for n, x in tensors.items()}
        return tensors

    def latents(
        self, prompt: str, seed: int, setting: Setting, caching: CacheSettings | None = None
    ) -> tuple[torch.Tensor, tuple[int, int]]:
        """(latents [1, 32, t, h, w] on the CPU, (steps computed, steps reused from a cache))."""
        from hunyuan_staged.parallel.layout import Layout
        from hunyuan_staged.pipeline.denoiser import Denoiser, Inputs
        from hunyuan_staged.sampling import conditions, schedule
        from hunyuan_staged.sampling.cache import Cache
        from hunyuan_staged.sampling.guidance import guidance_branches

        embeddings, scale = self.embed(prompt, setting.ablation), setting.guidance_scale
        height, width = geometry.size_for_ratio(self.version.resolution, DEFAULT_ASPECT_RATIO)
        shape = geometry.latent_shape(self.version.video_length, height, width, geometry.LATENT_CHANNELS)
        denoiser, layout = Denoiser(self.transformer), Layout()
        forward: Any = denoiser.forward(self.attention, shape[2:], layout)
        if setting.ablation == "timesteps_off_by_one":
            forward = _off_by_one(forward, setting)
        branches = guidance_branches(embeddings, scale, device=self.device, dtype=self.dtype)
        start = conditions.noise_and_condition(shape, seed, device=self.device, dtype=torch.float32)
        inputs = Inputs(*start, branches, schedule.flow_sigmas(setting.steps, setting.flow_shift), scale)
        cache = Cache(caching, layout, forward.total) if caching else None
        latents = denoiser.denoise(forward, inputs, layout, cache)
        return latents.cpu(), cache.counts if cache else (setting.steps, 0)

    def denoise(self, prompt: str, options: DenoiseOptions) -> tuple[torch.Tensor, float]:
        """(latents [1, 32, t, h, w] on the CPU, evaluations of the whole transformer) with stage 2's options.

        An evaluation of some of the blocks counts by their share. InputError for options that cannot be used together.
        """
        from hunyuan_staged.attention.by_step import choose_by_step
        from hunyuan_staged.attention.choose import choose_attention
        from hunyuan_staged.parallel.layout import Layout
        from hunyuan_staged.pipeline import settings as resolving
        from hunyuan_staged.pipeline.denoiser import Denoiser, Inputs
        from hunyuan_staged.sampling import conditions, schedule
        from hunyuan_staged.sampling.cache import Cache
        from hunyuan_staged.sampling.guidance import Guidance, guidance_branches

        options.check()
        options = resolving.apply_preset(options, self.version)
        chosen = resolving.resolve_settings(options, {}, self.version, self.version.flow_shift, None)
        blocks, scale, steps = CountedBlocks(self.transformer), chosen.guidance_scale, chosen.num_inference_steps
        caching = resolving.resolve_cache(options, chosen, blocks.total, self.folder, lambda text: None)
        plan = resolving.resolve_guidance(options, chosen, caching)
        attention = partial(
            choose_attention,
            device=self.device,
            dtype=self.dtype,
            head_width=self.transformer.config.attention_head_dim,
        )
        by_step = choose_by_step(options.attention_schedule(), steps, attention(options.attention_mode()), attention)
        shape = geometry.latent_shape(chosen.video_length, chosen.height, chosen.width, geometry.LATENT_CHANNELS)
        denoiser, layout = Denoiser(self.transformer, blocks=blocks), Layout()
        forward = denoiser.forward(by_step.modes[0], shape[2:], layout)
        start = conditions.noise_and_condition(shape, options.seed, device=self.device, dtype=torch.float32)
        inputs = Inputs(
            *start,
            guidance_branches(self.embed(prompt), scale, device=self.device, dtype=self.dtype),
            schedule.flow_sigmas(steps, chosen.flow_shift),
            scale,
            Guidance(plan) if plan else None,
            lambda step: forward.use(by_step.modes[step]),
        )
        cache = Cache(caching, layout, forward.total) if caching else None
        latents = denoiser.denoise(forward, inputs, layout, cache)
        return latents.cpu(), blocks.run / blocks.total

    def frames(self, prompt: str, seed: int, setting: Setting, path: Path | None = None) -> np.ndarray:
        """uint8 [T, H, W, 3], read back from the mp4 that was written to path (or to a temporary file)."""
        return self.decode(self.latents(prompt, seed, setting)[0], path)

    def decode(self, latents: torch.Tensor, path: Path | None = None) -> np.ndarray:
        """The same of latents."""
        from hunyuan_staged.decoding import tiled
        from hunyuan_staged.decoding.frames import DecodeContext
        from hunyuan_staged.files import video
        from hunyuan_staged.parallel.world import World

        height, width = (size * geometry.SPATIAL_RATIO for size in latents.shape[-2:])
        context = DecodeContext(World(0, 1, self.device))
        blocks = tiled.decode_frames(self.decoder, latents, self.vae_config, tiling.Tiling(), context)
        with tempfile.TemporaryDirectory() as scratch:
            target = path or Path(scratch) / "clip.mp4"
            frames = (frame for block in blocks for frame in block.frames.numpy())
            video.write_video(target, frames, DEFAULT_FPS, height, width)
            return video.read_video(target)[0]


def _off_by_one(forward: Any, setting: Setting) -> Any:
    """The forward, told the timestep of the step before the one it is at."""
    from hunyuan_staged.sampling import schedule

    times = schedule.timesteps_of(schedule.flow_sigmas(setting.steps, setting.flow_shift))

    def told(hidden_states: torch.Tensor, timestep: torch.Tensor, *rest: Any) -> torch.Tensor:
        index = max(0, int((times - timestep.cpu()).abs().argmin()) - 1)
        return forward(hidden_states, times[index : index + 1].to(timestep), *rest)

    return told


def held_out_prompts(
    kind: str, count: int, seed: int = SEED, *, new_wording: bool = True
) -> list[tuple[scenes.Scene, str]]:
    """(scene, prompt) pairs that training never saw: not the combination, and with new_wording not the sentence.

    The scenes are the same in either wording.
    """
    draw = random.Random(f"{seed}/{kind}")
    held_out = [scenes.draw_scene(draw, kind, held_out=True) for _ in range(count)]
    return [(scene, scenes.describe(scene, draw, scenes.UNSEEN if new_wording else scenes.FIRST)) for scene in held_out]


def shares(verdicts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The share in percent of which each thing is right; of those verdicts that judge it."""
    found: dict[str, list[float]] = {}
    for verdict in verdicts:
        for name, right in verdict.items():
            found.setdefault(name, []).append(right)
    return {name: round(100 * float(np.mean(rights)), 1) for name, rights in found.items()}


def score(
    pipeline: DemoPipeline, prompts: Sequence[tuple[scenes.Scene, str]], setting: Setting, progress: Any = quiet
) -> dict[str, float]:
    """The shares of these prompts' clips."""
    return shares(
        judge(pipeline.frames(prompt, SEED + number, setting), scene)
        for number, (scene, prompt) in enumerate(progress(prompts, desc="judging", unit="clip"))
    )


# -- the contact sheet --

SHEET = (
    "a red circle moves left over a dark blue background",
    "the yellow star goes round in a circle over a dark green background",
    "a green square grows on a black background",
    "on a light blue background a purple triangle moves diagonally down and to the right",
    "a white circle rises over a two-tone dark red and grey background",
    "a blue circle and an orange square drift apart on a black background",
    'a white card with the text "HI" on a dark green background',
    'a yellow sign that says "2026", dark blue background',
)


def contact_sheet(pipeline: DemoPipeline, path: Path, progress: Any = quiet) -> None:
    """A PNG with a row for each prompt of SHEET: five frames of its clip under its words."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(13)
    shown, gap, line = (0, 8, 16, 24, 32), 4, 20
    columns, rows = 2, len(SHEET) // 2
    cell_width = len(shown) * (scenes.WIDTH // 2 + gap)
    sheet = Image.new("RGB", (columns * (cell_width + 12), rows * (scenes.HEIGHT // 2 + line + 8)), "white")
    pen = ImageDraw.Draw(sheet)
    for number, prompt in enumerate(progress(SHEET, desc="contact sheet", unit="clip")):
        frames = pipeline.frames(prompt, DenoiseOptions.seed, pipeline.setting())
        x0 = (number % columns) * (cell_width + 12) + 4
        y0 = (number // columns) * (scenes.HEIGHT // 2 + line + 8) + 2
        pen.text((x0, y0), prompt, fill="black", font=font)
        for slot, frame in enumerate(shown):
            small = Image.fromarray(frames[frame]).resize(
                (scenes.WIDTH // 2, scenes.HEIGHT // 2), Image.Resampling.LANCZOS
            )
            sheet.paste(small, (x0 + slot * (scenes.WIDTH // 2 + gap), y0 + line))
    sheet.save(path)


def build_parser() -> Parser:
    parser = tool_parser("hunyuan_staged.demo.evaluate", __doc__)
    parser.add_argument("--model_path", type=Path, required=True, help="the demo checkpoint")
    parser.add_argument(
        "--shapes", type=int, default=100, help="clips of one shape in each wording (default: %(default)s)"
    )
    parser.add_argument("--cards", type=int, default=50, help="clips of a card in each wording (default: %(default)s)")
    parser.add_argument("--ablation", choices=ABLATIONS, default="none", help="break something, to see the score fall")
    parser.add_argument("--steps", type=int, help="of each clip (default: the version's)")
    parser.add_argument("--contact_sheet", type=Path, help="also write this PNG")
    return parser


def main() -> int:
    """Generate, judge, print, and return the exit status: 0, or 2 after a line on what was refused."""
    return run_tool(build_parser(), run)


def run(args: argparse.Namespace) -> None:
    """What the flags ask for. Raises InputError on what cannot be used."""
    from tqdm import tqdm

    if args.steps is not None and args.steps < 1:
        raise InputError(f"--steps {args.steps} is not a positive number")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipeline = DemoPipeline(args.model_path, device)
    setting = pipeline.setting(args.ablation, args.steps)
    results: dict[str, Any] = {
        "ablation": args.ablation,
        "steps": setting.steps,
        "shapes": args.shapes,
        "cards": args.cards,
    }
    for name, kind, count in (("shape clips", "single", args.shapes), ("card clips", "card", args.cards)):
        for wording in ("known", "new") if count else ():
            prompts = held_out_prompts(kind, count, new_wording=wording == "new")
            title = f"{name}, {wording} wording"
            results[title] = score(pipeline, prompts, setting, tqdm)
            for what, share in results[title].items():
                print(f"{title:25} {what:12} {share:5.1f} %")
    if args.contact_sheet:
        contact_sheet(pipeline, args.contact_sheet, tqdm)
    print(json.dumps(results))


if __name__ == "__main__":
    sys.exit(main())
