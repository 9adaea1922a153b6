"""`python -m hunyuan_staged.demo.super_resolution --model_path DIR --out OUT`: trains the demo's super resolution.

A latent upsampler and a transformer learn to give the latents of a clip drawn SCALE times as large from those of the
clip itself. They are trained as one, through all steps of the sampling loop that stage 2 runs: noise, condition
channels, shift and timesteps are its own. First against the larger clip's latents; then the decoder learns with them,
against pixels, from latents of small clips and of large ones, too; or stays (--freeze_decoder), as it did for the parts
that ship. The VAE's encoder stays, and with it all latents.
OUT gets the three parts that are new, in the official layout. With --judge, nothing is trained: see `measure`.

Letters: B clips of a batch; t h w of the small clip's latents, t H W of the larger one's.
"""

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from hunyuan_staged import geometry
from hunyuan_staged.demo import checkpoint_writer, evaluate, scenes, tiny, train
from hunyuan_staged.errors import InputError, run_tool
from hunyuan_staged.files import atomic
from hunyuan_staged.models.embeddings import rope_table
from hunyuan_staged.models.vae_modules import Vae, VaeConfig
from hunyuan_staged.parsing import Parser, tool_parser
from hunyuan_staged.pipeline.low_resolution import load_upsampler
from hunyuan_staged.sampling.conditions import LAST_TIMESTEP, NOISE_STRENGTH
from hunyuan_staged.sampling.schedule import flow_sigmas, super_resolution_noise, timesteps_of
from hunyuan_staged.versions import super_resolution_version
from hunyuan_staged.weights import components, encoder_components
from hunyuan_staged.weights.folder import open_model
from hunyuan_staged.weights.upsampler import open_upsampler

RESOLUTION = "demo_hd"
SCALE = 2
# Most of the transformer's bytes are its glyph projection, 2048 wide by design; so the rest is small.
SIZES = replace(train.DEMO, transformer_heads=2, transformer_layers=3, upsampler_channels=64, upsampler_blocks=2)
# The upsampler begins with so large an output that the noise mixed into it, made for latents, hides little of it.
GAIN = 64.0
SHORT = 5  # latent frames of a clip's beginning, which most steps are trained on; the others on all
CROP = 6  # latents on a side of what is decoded in most steps
HELD_OUT = 20  # clips that measure
SHOWN = 6  # of them in a sheet
SCORES = Path(__file__).parent / "super_resolution_scores.json"  # what `measure` found for the checkpoint that ships
EXACT = 2e-4  # a squared error of pixels, in [-1, 1], that needs no further learning: 43 dB

Clips = dict[str, torch.Tensor]


# -- what is learned --


class Enlarger(nn.Module):
    """Latent upsampler and transformer as one module: a clip's latents to those of the larger clip."""

    def __init__(self, upsampler: Any, transformer: Any, grid: Sequence[int]) -> None:
        super().__init__()
        self.upsampler, self.transformer, self.grid = upsampler, transformer, tuple(grid)
        version = super_resolution_version(RESOLUTION)
        self.sigmas = flow_sigmas(version.num_inference_steps, version.flow_shift)
        self.rope: tuple[torch.Tensor, ...] = rope_table(transformer, *self.grid)

    def forward(
        self,
        low: torch.Tensor,
        texts: Mapping[str, torch.Tensor],
        noise: tuple[torch.Tensor, torch.Tensor],
        image: torch.Tensor,
        image_given: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(latents [B, 32, t, H, W], what the upsampler alone takes them to be) from the small clips' [B, 32, t, h, w].

        noise: the starting one and the one of the condition, as the result; image: condition channels [B, 33, t, H, W],
        zeros but where image_given [B] says so. The loop of stage 2 (docs/super_resolution.md, The steps) over a batch.
        """
        model, (x, second) = self.transformer, noise
        frames, height, width = x.shape[2:]
        large = F.interpolate(low.transpose(1, 2).flatten(0, 1), (height, width), mode="bilinear", align_corners=False)
        large = self.upsampler(large.unflatten(0, (len(low), frames)).transpose(1, 2), {}).float()
        seen = torch.cat([(1 - NOISE_STRENGTH) * large + NOISE_STRENGTH * second, torch.ones_like(x[:, :1])], dim=1)
        unseen = torch.zeros_like(seen)
        rope = tuple(table[: frames * height * width] for table in self.rope)
        mask = torch.cat(
            [image_given[:, None].expand(-1, texts["images"].shape[1]), texts["glyph_mask"], texts["language_mask"]],
            dim=1,
        )
        parts = (texts["language"], texts["language_mask"], texts["glyphs"], texts["images"])
        steps = zip(self.sigmas.tolist(), self.sigmas.tolist()[1:], strict=False)
        for sigma, following in steps:
            time_now, time_next = (
                x.new_full((len(x),), float(timesteps_of(torch.tensor(s)))) for s in (sigma, following)
            )
            tokens = train.batched_text(model, time_now, *parts)
            condition = seen if sigma * 1000 >= LAST_TIMESTEP else unseen
            temb = model.time_embed(time_now, time_next)
            inputs = torch.cat([x, image, condition], dim=1)
            velocity = train.batched_velocity(model, inputs, tokens, mask, temb, rope)
            x = x + velocity.float() * (following - sigma)
        return x, large / GAIN


def start_enlarger(enlarger: Enlarger) -> None:
    """Initial weights: blocks begin as the identity, the velocity as the running latents less the enlarged ones."""
    model = enlarger.transformer
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            nn.init.trunc_normal_(parameter, std=min(0.05, parameter[0].numel() ** -0.5))
        else:
            nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)
    train.shut_gates(model)
    channels, width = geometry.LATENT_CHANNELS, model.proj_out.in_features
    if width >= 2 * channels:
        with torch.no_grad():
            embed, out, one = model.x_embedder.proj.weight[:, :, 0, 0, 0], model.proj_out.weight, torch.eye(channels)
            embed[: 2 * channels, : 2 * channels] = 0
            embed[: 2 * channels, 2 * channels + 1 : -1] = 0
            embed[:channels, :channels] = one
            embed[channels : 2 * channels, 2 * channels + 1 : -1] = one / ((1 - NOISE_STRENGTH) * GAIN)
            out[:, :channels], out[:, channels : 2 * channels] = one, -one
    upsampler = enlarger.upsampler
    for module in upsampler.modules():
        if isinstance(module, nn.Conv3d):
            module.reset_parameters()
    for block in upsampler.blocks:
        for parameter in block.block["4"].parameters():
            nn.init.zeros_(parameter)
    with torch.no_grad():
        upsampler.out_conv.conv.weight *= GAIN


class Teacher:
    """The demo checkpoint's own parts: what makes latents and text tokens, without gradients, and the decoder."""

    def __init__(self, model_path: Path, device: torch.device) -> None:
        folder = open_model(model_path, ("transformer", "vae", "text", "glyph", "image"))
        options: dict[str, Any] = {"device": device, "dtype": torch.float32}
        tokenizer, self.language = encoder_components.load_language_model(folder, **options)
        glyph_tokenizer, self.glyph = encoder_components.load_glyph_encoder(folder, **options)
        self.image: Any = encoder_components.load_image_encoder(folder, **options)[1]
        encoder, config = components.load_vae_encoder(folder, **options)
        decoder, _ = components.load_vae_decoder(folder, **options)
        known = {name: config[name] for name in VaeConfig.__dataclass_fields__ if name in config}
        with torch.device("meta"):
            vae: Any = Vae(VaeConfig(**known))
        vae.encoder, vae.decoder = encoder, decoder
        self.vae = vae
        self.words, self.device, self.factor = train.Words(tokenizer, glyph_tokenizer), device, config["scaling_factor"]

    @torch.no_grad()
    def latents(self, clips: torch.Tensor) -> torch.Tensor:
        """Clips [B, 3, T, H, W] in [-1, 1] → latents as the transformer has them."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            return self.vae.encoder(clips).float().chunk(2, dim=1)[0] * self.factor

    @torch.no_grad()
    def texts(self, prompts: Sequence[str], images: torch.Tensor) -> dict[str, torch.Tensor]:
        """What stage 1 makes of prompts, and of first frames [B, 3, H, W] in [-1, 1], as one padded batch."""
        device, crop = self.device, self.words.crop
        (ids, valid), (glyph_ids, glyph_valid) = self.words.language(prompts), self.words.glyphs(prompts)
        ids, valid, glyph_ids, glyph_valid = (part.to(device) for part in (ids, valid, glyph_ids, glyph_valid))
        states = self.language(input_ids=ids, use_cache=False).last_hidden_state[:, crop:]
        glyph_mask = torch.arange(train.GLYPH_TOKENS, device=device) < glyph_valid[:, None]
        readable = glyph_mask.clone()
        readable[:, 0] = True
        side = (train.DEMO.image_size, train.DEMO.image_size)
        shrunk = F.interpolate(images, side, mode="bicubic", antialias=True).clamp(-1, 1)
        return {
            "language": states,
            "language_mask": torch.arange(states.shape[1], device=device) < (valid - crop)[:, None],
            "glyphs": self.glyph(input_ids=glyph_ids, attention_mask=readable.long()).last_hidden_state,
            "glyph_mask": glyph_mask,
            "images": self.image(pixel_values=shrunk).last_hidden_state,
        }


# -- clips in both sizes --


class Pairs:
    """Scenes drawn small and large, in 8 bits, with their latents and text tokens; renewed bit by bit."""

    def __init__(self, size: int, teacher: Teacher, seed: int) -> None:
        self.teacher, self.device, self.size, self.next = teacher, teacher.device, size, 0
        self.scenes = random.Random(seed)
        self.tensors: dict[str, torch.Tensor] = {}

    def renew(self, count: int) -> None:
        """Replace the oldest scenes by new ones."""
        drawn = [scenes.draw_scene(self.scenes) for _ in range(count)]
        found = pair(drawn, self.scenes, self.teacher)
        middle = torch.tensor([scenes.HEIGHT / 2, scenes.WIDTH / 2]).expand(scenes.FRAMES, 2)
        shown = [self.scenes.choice(scene.things).centers if scene.things else None for scene in drawn]
        centers = [middle if c is None else torch.from_numpy(c[:, ::-1].copy()) for c in shown]
        found["focus"] = torch.stack([c.float() for c in centers]).to(self.device)
        slots = torch.arange(self.next, self.next + count, device=self.device) % self.size
        self.next = (self.next + count) % self.size
        for name, values in found.items():
            if name not in self.tensors:
                self.tensors[name] = values.new_zeros(self.size, *values.shape[1:])
            self.tensors[name][slots] = values

    def fill(self, chunk: int) -> None:
        for start in range(0, self.size, chunk):
            self.renew(min(chunk, self.size - start))

    def draw(self, batch: int) -> torch.Tensor:
        """Numbers of scenes [batch]."""
        return torch.randint(self.size, (batch,), device=self.device)

    def texts(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        names = ("language", "language_mask", "glyphs", "glyph_mask", "images")
        return {name: self.tensors[name][rows] for name in names}

    def corners(self, rows: torch.Tensor, frames: int, scale: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Where crops of CROP x CROP latents about what moves begin, in latents (row, column), each [B]."""
        moment = torch.randint(frames, (len(rows),), device=self.device)
        middle = self.tensors["focus"][rows, moment] * scale / geometry.SPATIAL_RATIO
        jitter = (torch.rand(len(rows), 2, device=self.device) * 2 - 1) * CROP / 2
        corner = (middle + jitter - CROP / 2).round().long()
        grid = (scenes.HEIGHT * scale // geometry.SPATIAL_RATIO, scenes.WIDTH * scale // geometry.SPATIAL_RATIO)
        return corner[:, 0].clamp(0, grid[0] - CROP), corner[:, 1].clamp(0, grid[1] - CROP)


def pair(drawn: Sequence[scenes.Scene], choices: random.Random, teacher: Teacher) -> dict[str, torch.Tensor]:
    """Scenes in both sizes: pixels "small" and "large" [B, 3, T, …] in 8 bits, latents "low" and "high", text tokens."""
    prompts = [scenes.describe(scene, choices, choices.choice((scenes.FIRST, scenes.MORE))) for scene in drawn]
    found = {}
    for pixels, latents, scale in (("small", "low", 1), ("large", "high", SCALE)):
        clips = scenes.render(drawn, device=teacher.device, scale=scale)
        found[pixels], found[latents] = scenes.to_8bit(clips), teacher.latents(clips)
        if scale == 1:
            found |= teacher.texts(prompts, clips[:, :, 0])
    return found


def cut(x: torch.Tensor, top: torch.Tensor, left: torch.Tensor, side: int) -> torch.Tensor:
    """The windows [B, C, T, side, side] of x [B, C, T, H, W] that begin at top and left, each [B]."""
    steps = torch.arange(side, device=x.device)
    if x.is_floating_point():  # through gather, whose gradient a recorded step may hold
        rows, columns = ((start[:, None] + steps)[:, None, None] for start in (top, left))
        x = x.gather(3, rows[..., None].expand(-1, *x.shape[1:3], -1, x.shape[4]))
        return x.gather(4, columns[..., None, :].expand(-1, *x.shape[1:4], -1))
    clips = torch.arange(len(x), device=x.device)[:, None, None]
    windows = x.movedim((3, 4), (1, 2))[clips, (top[:, None] + steps)[:, :, None], (left[:, None] + steps)[:, None]]
    return windows.movedim((1, 2), (3, 4))


def inner(top: torch.Tensor, left: torch.Tensor, grid: Sequence[int]) -> torch.Tensor:
    """Weights [B, 1, 1, side, side] of a window's pixels: 0 within a latent of where the picture was cut, else 1."""
    steps, ratio = torch.arange(CROP, device=top.device), geometry.SPATIAL_RATIO
    sides = []
    for start, length in ((top, grid[0]), (left, grid[1])):
        first = (steps[None] > 0) | (start == 0)[:, None]
        last = (steps[None] < CROP - 1) | (start == length - CROP)[:, None]
        sides.append((first & last).float().repeat_interleave(ratio, dim=1))
    return (sides[0][:, :, None] * sides[1][:, None])[:, None, None]


# -- training --


def pixel_loss(
    decoder: Any, latents: torch.Tensor, pixels: torch.Tensor, weights: torch.Tensor, *, logarithm: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, squared error [B]) of decoding latents, as the VAE has them, to pixels in 8 bits, where weights are 1.

    With logarithm the loss is what PSNR counts: half the logarithm of a clip's squared error, in mean over the clips.
    """
    error = decoder(latents).float() - (pixels.float() / 127.5 - 1)
    weights = weights.expand_as(error)
    count = weights.sum(dim=(1, 2, 3, 4))
    squared = (error.square() * weights).sum(dim=(1, 2, 3, 4)) / count
    if logarithm:
        return 0.5 * (squared + EXACT).log().mean(), squared.detach()
    absolute = (error.abs() * weights).sum(dim=(1, 2, 3, 4)) / count
    return (4 * squared + absolute).mean(), squared.detach()


class Lesson:
    """One step of either phase, on clips from a pool."""

    frozen = False  # the decoder, which then needs to see nothing but what is enlarged

    def __init__(self, enlarger: Enlarger, teacher: Teacher, pairs: Pairs) -> None:
        self.enlarger, self.teacher, self.pairs = enlarger, teacher, pairs

    def enlarge(self, rows: torch.Tensor, frames: int) -> tuple[torch.Tensor, ...]:
        """(latents that the enlarger makes, their squared distance from the larger clips', that of the upsampler's)."""
        wanted = self.pairs.tensors["high"][rows, :, :frames]
        noise = torch.randn_like(wanted), torch.randn_like(wanted)
        given = torch.rand(len(rows), device=wanted.device) < train.IMAGE_GIVEN
        image = train.image_condition(wanted, given)
        low = self.pairs.tensors["low"][rows, :, :frames]
        made, upsampled = self.enlarger(low, self.pairs.texts(rows), noise, image, given)
        return made, F.mse_loss(made, wanted), F.mse_loss(upsampled, wanted)

    def latents(self, batch: int, frames: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss, squared errors [2], the second of the upsampler) of latents alone."""
        _, squared, upsampled = self.enlarge(self.pairs.draw(batch), frames)
        return squared + upsampled, torch.stack([squared, upsampled]).detach()

    def pixels(self, batch: int, frames: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss, squared errors [2]: of enlarged clips, of small ones) of windows.

        As many small clips as enlarged ones, and half as many large ones from their own latents.
        """
        length = (frames - 1) * geometry.TEMPORAL_RATIO + 1
        tensors = self.pairs.tensors
        rows = self.pairs.draw(batch)
        made, squared, _ = self.enlarge(rows, frames)
        others, small = self.pairs.draw(max(1, batch // 2)), self.pairs.draw(batch)
        factor = self.teacher.factor
        kinds: tuple[tuple[torch.Tensor, torch.Tensor, str, int], ...] = (
            (made / factor, rows, "large", SCALE),
            (self.calm(tensors["high"][others, :, :frames] / factor), others, "large", SCALE),
            (self.calm(tensors["low"][small, :, :frames] / factor), small, "small", 1),
        )
        windows = []
        for latents, numbers, name, scale in kinds[:1] if self.frozen else kinds:
            top, left = self.pairs.corners(numbers, length, scale)
            ratio = geometry.SPATIAL_RATIO
            pixels = cut(tensors[name][numbers, :, :length], top * ratio, left * ratio, CROP * ratio)
            windows.append((cut(latents, top, left, CROP), pixels, inner(top, left, latents.shape[3:])))
        latents, wanted, weights = (torch.cat(parts) for parts in zip(*windows, strict=True))
        loss, errors = pixel_loss(self.teacher.vae.decoder, latents, wanted, weights, logarithm=self.frozen)
        return loss + 0.05 * squared, torch.stack([errors[:batch].mean(), errors[-batch:].mean()])

    def whole(self, batch: int, frames: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The same of whole pictures: `batch` enlarged clips, and twice as many small ones."""
        length = (frames - 1) * geometry.TEMPORAL_RATIO + 1
        rows, small = self.pairs.draw(batch), self.pairs.draw(2 * batch)
        made, squared, _ = self.enlarge(rows, frames)
        tensors, decoder, factor = self.pairs.tensors, self.teacher.vae.decoder, self.teacher.factor
        one = torch.ones(1, 1, 1, 1, 1, device=made.device)
        wanted = tensors["large"][rows, :, :length]
        loss, error = pixel_loss(decoder, made / factor, wanted, one, logarithm=self.frozen)
        if self.frozen:
            return loss + 0.05 * squared, torch.stack([error.mean(), error.mean()])
        low = self.calm(tensors["low"][small, :, :frames] / factor)
        more, small_error = pixel_loss(decoder, low, tensors["small"][small, :, :length], one)
        return loss + more + 0.05 * squared, torch.stack([error.mean(), small_error.mean()])

    @staticmethod
    def calm(latents: torch.Tensor) -> torch.Tensor:
        """Latents with as much noise as the decoder is trained to bear, or less."""
        level = train.LATENT_NOISE * torch.rand(len(latents), 1, 1, 1, 1, device=latents.device)
        return latents + level * torch.randn_like(latents)


def optimizers(enlarger: Enlarger, decoder: Any, args: argparse.Namespace) -> tuple[train.Optimizer, train.Optimizer]:
    """Of what enlarges, which is new, and of the decoder, which is not."""
    last = f"transformer_blocks.{len(enlarger.transformer.transformer_blocks) - 1}"
    outside = (*train.EDGES, f"{last}.attn.to_add_out", f"{last}.ff_context", "in_conv", "out_conv")
    named = list(enlarger.named_parameters())
    inside = [p for n, p in named if p.ndim in (2, 5) and not any(part in n for part in outside)]
    rest = [p for n, p in named if p.ndim not in (2, 5) or any(part in n for part in outside)]
    made = train.Optimizer(inside, rest, (args.muon_rate, args.rate))
    named = list(decoder.named_parameters())
    inside = [p for n, p in named if p.ndim == 5 and "conv_in" not in n and "conv_out" not in n]
    rest = [p for _, p in named if all(p is not other for other in inside)]
    return made, train.Optimizer(inside, rest, (args.decoder_muon_rate, args.decoder_rate))


def learn(lesson: Lesson, args: argparse.Namespace) -> None:
    """Both phases; enlarger and decoder are left with the averages of their weights."""
    enlarger, decoder, device = lesson.enlarger, lesson.teacher.vae.decoder, lesson.pairs.device
    enlarger.train().requires_grad_(True)
    lesson.frozen = args.freeze_decoder
    decoder.train().requires_grad_(not lesson.frozen)
    if device.type == "cuda":
        torch._dynamo.config.recompile_limit = 64  # of one function in the decoder's many shapes
        train.fuse_norms(decoder)
    made, decoding = optimizers(enlarger, decoder, args)
    average = train.Average([enlarger], 0.998)
    decoder_average = train.Average([decoder], 0.998)

    def step(loss_of: Callable[..., Any], batch: int, frames: int, *, pixels: bool) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            for optimizer in (made, decoding):
                optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss, squared = loss_of(batch, frames)
            loss.backward()
            for module, optimizer in ((enlarger, made), (decoder, decoding))[
                : 2 if pixels and not lesson.frozen else 1
            ]:
                nn.utils.clip_grad_norm_(module.parameters(), 1.0)
                optimizer.step()
            return squared

        return run

    short, full = min(SHORT, train.LATENT_GRID[0]), train.LATENT_GRID[0]
    first = [
        train.Recorded(step(lesson.latents, size, frames, pixels=False), device)
        for size, frames in ((args.batch, short), (max(1, args.batch // 2), full))
    ]
    second = [
        train.Recorded(step(lesson.pixels, args.windows, short, pixels=True), device),
        train.Recorded(step(lesson.pixels, max(1, args.windows // 2), full, pixels=True), device),
        train.Recorded(step(lesson.whole, 1, full, pixels=True), device),
    ]
    both = train.Budget((args.latent_minutes + args.minutes) * 60)
    alone = train.Budget(args.minutes * 60)
    number, in_latents, started = 0, 0, time.time()
    while both.spent < both.seconds:
        made.set_rate(both.share(number))
        in_pixels = both.spent >= args.latent_minutes * 60
        if in_pixels:
            alone.spent = both.spent - args.latent_minutes * 60
            decoding.set_rate(alone.share(number - in_latents))
            late = alone.spent > 0.75 * alone.seconds
            kind = (0, 2, 1, 2)[number % 4] if late else (0, 0, 1, 2)[number % 4]
            squared = second[kind]()
            decoder_average.update()
        else:
            squared = first[number % 3 == 2]()
            in_latents = number
        average.update()
        if number % 16 == 15:
            lesson.pairs.renew(args.refresh)
        if number % 100 in (0, 1, 3) and (number % 400 < 4 or number < 200):
            if in_pixels:
                made_psnr, small_psnr = (10 * math.log10(4 / error) for error in squared.tolist())
                values = {"psnr": made_psnr, "small": small_psnr}
            else:
                train.finite(squared.sum(), number)
                values = dict(zip(("error", "upsampler"), squared.sqrt().tolist(), strict=True))
            train.log("pixels" if in_pixels else "latents", number, seconds=time.time() - started, **values)
        number += 1
        both.spent = time.time() - started
    average.swap()
    decoder_average.swap()
    train.separate_norms(decoder)
    for module in (enlarger, decoder):
        module.eval().requires_grad_(False)
    train.log("done", number, seconds=time.time() - started)


@torch.no_grad()
def round_weights(*modules: nn.Module) -> None:
    """Round weights to what ships."""
    for module in modules:
        for parameter in module.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))


# -- measuring --


def psnr(made: torch.Tensor, wanted: torch.Tensor) -> float:
    """Of pixels in [-1, 1], clamped to that and rounded to 8 bits."""
    difference = scenes.to_8bit(made.clamp(-1, 1)).float() - scenes.to_8bit(wanted).float()
    return 10 * math.log10(255**2 / max(difference.square().mean().item(), 1e-6))


def bicubic(clip: torch.Tensor) -> torch.Tensor:
    """A clip [1, 3, T, H, W], each frame SCALE times as large."""
    frames = clip[0].transpose(0, 1)
    return (
        F.interpolate(frames, scale_factor=SCALE, mode="bicubic", align_corners=False)
        .transpose(0, 1)[None]
        .clamp(-1, 1)
    )


@torch.no_grad()
def compare(enlarger: Enlarger, teacher: Teacher, scene: scenes.Scene, prompt: str, seed: int, frames: int) -> Clips:
    """A scene's first frames by name [1, 3, T, …], in float32: "small" and "large", as they are drawn; "decoded", the small
    clip through the VAE, and "bicubic", that enlarged; "decoded_large", the large clip through the VAE; and
    "super_resolution" of the small clip's latents.
    """
    small, large = (scenes.render([scene], device=teacher.device, scale=scale)[:, :, :frames] for scale in (1, SCALE))
    low, high = (teacher.vae.encoder(clip).chunk(2, dim=1)[0] * teacher.factor for clip in (small, large))
    noise = super_resolution_noise(high.shape, seed, torch.float32)
    none = torch.zeros(1, dtype=torch.bool, device=high.device)
    texts, image = teacher.texts([prompt], small[:, :, 0]), train.image_condition(high, none)
    made, _ = enlarger(low, texts, (noise[0].to(high), noise[1].to(high)), image, none)
    decoded, decoded_large, enlarged = (
        teacher.vae.decoder(latents / teacher.factor).clamp(-1, 1) for latents in (low, high, made)
    )
    return {
        "small": small,
        "large": large,
        "decoded": decoded,
        "bicubic": bicubic(decoded),
        "decoded_large": decoded_large,
        "super_resolution": enlarged,
    }


def measure(
    enlarger: Enlarger, teacher: Teacher, count: int = HELD_OUT, frames: int = scenes.FRAMES, sheet: Path | None = None
) -> dict[str, Any]:
    """PSNR in dB by held-out clip, in mean over all, shapes and cards: see `compare`, against the clip as drawn large.

    "small" is of "decoded" against the small clip, "bicubic_of_true" of that clip itself, enlarged. sheet: an image file
    that shows the middle frame of the first clips enlarged by bicubic interpolation, by super resolution, and drawn.
    """
    choices = random.Random(f"{evaluate.SEED}/{RESOLUTION}")
    rows, shown = [], []
    for number in range(count):
        scene = scenes.draw_scene(choices, held_out=True)
        prompt = scenes.describe(scene, choices, scenes.FIRST)
        clips = compare(enlarger, teacher, scene, prompt, evaluate.SEED + number, frames)
        large = clips["large"]
        row = {name: psnr(clips[name], large) for name in ("bicubic", "decoded_large", "super_resolution")}
        row |= {
            "small": psnr(clips["decoded"], clips["small"]),
            "bicubic_of_true": psnr(bicubic(clips["small"]), large),
        }
        rows.append((bool(scene.word), row))
        shown += [clips[name][0, :, frames // 2].cpu() for name in ("bicubic", "super_resolution", "large")]
        train.log("measure", number, **row)
    if sheet:
        write_sheet(sheet, shown[: 3 * SHOWN])
    means = {}
    for kind, cards in (("all", (False, True)), ("shapes", (False,)), ("cards", (True,))):
        chosen = [row for card, row in rows if card in cards]
        if chosen:
            means[kind] = {name: round(sum(row[name] for row in chosen) / len(chosen), 2) for name in chosen[0]}
    gains = [round(row["super_resolution"] - row["bicubic"], 2) for _, row in rows]
    return {"clips": count, "frames": frames, **means, "gains": gains}


def write_sheet(path: Path, pictures: Sequence[torch.Tensor]) -> None:
    """Pictures [3, H, W] in [-1, 1], three in a row."""
    from PIL import Image

    gap, (height, width) = 6, pictures[0].shape[1:]
    sheet = Image.new("RGB", (3 * (width + gap) - gap, len(pictures) // 3 * (height + gap) - gap), "white")
    for number, picture in enumerate(pictures):
        row, column = divmod(number, 3)
        pixels = scenes.to_8bit(picture).permute(1, 2, 0).numpy()
        sheet.paste(Image.fromarray(pixels), (column * (width + gap), row * (height + gap)))
    with atomic.replacing(path) as temporary:
        sheet.save(temporary, format="PNG", optimize=True)


def build(device: torch.device, seed: int = 0, trained: Path | None = None) -> Enlarger:
    """The enlarger of SIZES, with initial weights or those of a checkpoint."""
    torch.manual_seed(seed)
    version = super_resolution_version(RESOLUTION)
    frames, height, width = train.LATENT_GRID
    upsampler, _ = tiny.build_enlarger(SIZES, version)
    enlarger = Enlarger(upsampler, tiny.build_transformer(SIZES, version), (frames, height * SCALE, width * SCALE))
    if trained:
        folder, host = open_model(trained, ("transformer",)), torch.device("cpu")
        found = components.load_transformer(folder, version.name, device=host, dtype=torch.float32)
        enlarger.transformer.load_state_dict(found.state_dict())
        opened = open_upsampler(folder.super_resolution_folder("upsampler", version.name))
        enlarger.upsampler.load_state_dict(load_upsampler(opened, host).state_dict())
    else:
        start_enlarger(enlarger)
    enlarger.rope = tuple(table.to(device) for table in enlarger.rope)
    return enlarger.to(device)


def save(out: Path, enlarger: Enlarger, teacher: Teacher) -> int:
    """Write transformer, upsampler and VAE below a folder, in bfloat16; returns how many bytes the first two have."""
    version = super_resolution_version(RESOLUTION)
    _, config = tiny.build_enlarger(SIZES, version)
    checkpoint_writer.save_super_resolution(
        out, version, (enlarger.transformer, enlarger.upsampler, config), torch.bfloat16
    )
    checkpoint_writer.save_official_vae(out / "vae", teacher.vae, torch.bfloat16, force_upcast=True)
    return sum(path.stat().st_size for path in out.glob(f"*/{version.name}/*"))


def build_parser() -> Parser:
    parser = tool_parser("hunyuan_staged.demo.super_resolution", __doc__)
    parser.add_argument("--model_path", type=Path, required=True, help="the demo checkpoint")
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--out", type=Path, help="the folder that gets the new parts")
    task.add_argument("--judge", action="store_true", help="train nothing, and measure what the checkpoint has")
    parser.add_argument("--latent_minutes", type=float, default=1.5, help="of the first phase (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=4.0, help="of the second, with pixels (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="clips of a step of the first (default: %(default)s)")
    parser.add_argument(
        "--windows", type=int, default=6, help="enlarged clips of one of the second (default: %(default)s)"
    )
    parser.add_argument("--pool", type=int, default=1024, help="pairs of clips at hand (default: %(default)s)")
    parser.add_argument("--refresh", type=int, default=4, help="pairs renewed every 16 steps (default: %(default)s)")
    parser.add_argument("--muon_rate", type=float, default=0.01, help="peak for matrices (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=1.5e-3, help="peak for all else (default: %(default)s)")
    parser.add_argument(
        "--decoder_muon_rate", type=float, default=0.005, help="the same of the decoder (default: %(default)s)"
    )
    parser.add_argument("--decoder_rate", type=float, default=4e-4, help="likewise (default: %(default)s)")
    parser.add_argument("--freeze_decoder", action="store_true", help="leave it, and train what enlarges alone")
    parser.add_argument(
        "--further", action="store_true", help="go on from the checkpoint's own super resolution (default: begin anew)"
    )
    parser.add_argument("--clips", type=int, default=HELD_OUT, help="held out, that measure (default: %(default)s)")
    parser.add_argument(
        "--video_length", type=int, default=scenes.FRAMES, help="how many of their frames (default: %(default)s)"
    )
    parser.add_argument("--sheet", type=Path, metavar="FILE", help="a PNG that shows the first of them")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Train, measure, and return the exit status: 0, or 2 after a line on what was refused."""
    return run_tool(build_parser(), run, argv)


def run(args: argparse.Namespace) -> None:
    """What the flags ask for. Raises InputError on what cannot be used."""
    for name in ("batch", "windows", "pool", "clips"):
        if getattr(args, name) < 1:
            raise InputError(f"{getattr(args, name)} is not a positive number", option=name)
    if not 1 <= args.video_length <= scenes.FRAMES or args.video_length % geometry.TEMPORAL_RATIO != 1:
        raise InputError(f"{args.video_length} is not 4n + 1 from 1 to {scenes.FRAMES}", option="video_length")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trained = args.model_path if args.further or args.judge else None
    enlarger, teacher = build(device, args.seed, trained), Teacher(args.model_path, device)
    if not args.judge:
        teach(enlarger, teacher, args)
    print(json.dumps(measure(enlarger, teacher, args.clips, args.video_length, args.sheet)), flush=True)


def teach(enlarger: Enlarger, teacher: Teacher, args: argparse.Namespace) -> None:
    """Train, and write what comes of it."""
    begun = time.time()
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    count = sum(parameter.numel() for parameter in enlarger.parameters())
    train.log("build", 0, parameters=count, megabytes=2e-6 * count)
    pairs = Pairs(args.pool, teacher, args.seed + 3000)
    pairs.fill(min(16, args.pool))
    train.log("pool", args.pool, seconds=time.time() - begun)
    learn(Lesson(enlarger, teacher, pairs), args)
    round_weights(enlarger, teacher.vae.decoder)
    size = save(args.out, enlarger, teacher)
    torch.backends.cudnn.benchmark = False
    train.log("written", 0, bytes=size, seconds=time.time() - begun)


if __name__ == "__main__":
    sys.exit(main())
