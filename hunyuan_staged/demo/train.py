"""`python -m hunyuan_staged.demo.train --out DIR`: trains the demo checkpoint, every part of it, on one GPU.

First the VAE, on rendered clips; then language model, glyph encoder, image encoder and transformer together, by flow
matching on the VAE's latents, with the text dropped now and then so that guidance works. What is saved are averages of
the weights, in bfloat16, in the official layout. Stops and goes on: `--stop_after` ends a call early, the next one goes
on from DIR/state.pt. `--start_from CHECKPOINT` trains all but the VAE of a finished checkpoint further.

Letters: B clips of a batch; L language tokens, G glyph tokens, N image tokens; t h w of the latents.
"""

import argparse
import functools
import itertools
import json
import math
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from hunyuan_staged import geometry
from hunyuan_staged.demo import checkpoint_writer, scenes, tiny
from hunyuan_staged.encoders import text
from hunyuan_staged.errors import InputError, run_tool
from hunyuan_staged.models.blocks import modulate, project_qkv
from hunyuan_staged.models.embeddings import GLYPH, IMAGE, LANGUAGE, apply_rope, rope_table
from hunyuan_staged.models.modulations import modulation
from hunyuan_staged.models.vae_modules import ChannelNorm
from hunyuan_staged.parsing import tool_parser
from hunyuan_staged.versions import SKIPPED_LAYERS
from hunyuan_staged.weights import components, encoder_components
from hunyuan_staged.weights.folder import open_model

# All weights together stay under 32 MB in bfloat16. Much of that is the glyph projection, 2048 wide by design.
DEMO = tiny.Sizes(
    vocab=640,
    text_width=128,
    text_layers=5,
    text_heads=4,
    text_kv_heads=2,
    text_mlp=256,
    glyph_width=64,
    glyph_layers=2,
    glyph_heads=4,
    glyph_mlp=128,
    image_width=64,
    image_layers=2,
    image_heads=2,
    image_size=32,
    image_patch=8,
    transformer_heads=5,
    transformer_head_dim=32,
    transformer_layers=5,
    transformer_rope=(8, 12, 12),
    vae_channels=(16, 32, 32, 64, 64),
)
VERSION = "demo_t2v"
SHARD_BYTES = 15_000_000  # files of the repository stay under 16 MB
PROMPT_TOKENS, GLYPH_TOKENS = 64, 24  # behind the crop; longer prompts do not occur in the world
WORDINGS = 4  # of each clip in the pool
LATENT_GRID = geometry.latent_shape(scenes.FRAMES, scenes.HEIGHT, scenes.WIDTH, geometry.LATENT_CHANNELS)[2:]
TEXT_DROPPED, IMAGE_GIVEN = 0.1, 0.2
SPELLING_LENGTHS = (15, 30, 30, 25)  # of the words on cards where spelling is trained
NEIGHBOURS = (-1, -2, 1, 2)  # characters from its own that each head of the glyph encoder begins by looking at
LOOKING = 6.0  # what such a character's score has more than others'
TRAINING_SHIFT = 3.0  # of the noise levels: nearer to noise than uniform, as sampling with shift 5 dwells there
LATENT_NOISE, LATENT_PULL = 0.05, 1e-3


@dataclass
class Budget:
    """Wall-clock seconds of a phase, over all calls, and what they say about the learning rate."""

    seconds: float
    spent: float = 0.0
    warmup: int = 100

    def share(self, step: int) -> float:
        """Of the peak learning rate: linear warm-up, then a cosine to zero by the share of the time that is spent."""
        done = min(1.0, self.spent / self.seconds)
        return min(1.0, (step + 1) / self.warmup) * 0.5 * (1 + math.cos(math.pi * done))


class Optimizer:
    """Muon for the matrices inside, AdamW for all else; rates are tensors, so that a recorded step follows them.

    Muon: momentum, then the nearest orthogonal matrix by five Newton-Schulz steps (Jordan et al. 2024, whose
    coefficients these are). Convolutions count as matrices [out, in * kernel]. Equal shapes are treated as one batch.
    """

    COEFFICIENTS = (3.4445, -4.7750, 2.0315)
    MOMENTUM = 0.95

    def __init__(self, matrices: Sequence[nn.Parameter], rest: Sequence[nn.Parameter], peaks: tuple[float, float]):
        self.device = rest[0].device
        cuda = self.device.type == "cuda"
        self.peaks = peaks
        self.rate = torch.zeros((), device=self.device)
        self.adam_rate = torch.zeros((), device=self.device) if cuda else torch.zeros(())
        self.adam = torch.optim.AdamW(
            rest, lr=self.adam_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=cuda, capturable=cuda
        )
        groups: dict[tuple[int, int], list[nn.Parameter]] = {}
        for parameter in matrices:
            groups.setdefault((len(parameter), parameter[0].numel()), []).append(parameter)
        self.groups = groups
        self.momenta = {
            shape: torch.zeros(len(group), *shape, device=self.device) for shape, group in self.groups.items()
        }

    def set_rate(self, share: float) -> None:
        """The share of the peak rates that the next steps use."""
        self.rate.fill_(self.peaks[0] * share)
        self.adam_rate.fill_(self.peaks[1] * share)

    def zero_grad(self) -> None:
        self.adam.zero_grad(set_to_none=True)
        for parameter in itertools.chain(*self.groups.values()):
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        self.adam.step()
        for shape, group in self.groups.items():
            gradients = torch.stack([self._gradient(parameter).flatten(1) for parameter in group])
            momentum = self.momenta[shape]
            momentum.lerp_(gradients, 1 - self.MOMENTUM)
            update = self._orthogonal(gradients.lerp(momentum, self.MOMENTUM))
            update *= -self.rate * max(1.0, shape[0] / shape[1]) ** 0.5
            torch._foreach_add_([*group], [u.view_as(p) for u, p in zip(update.to(group[0]), group, strict=True)])

    @staticmethod
    def _gradient(parameter: nn.Parameter) -> torch.Tensor:
        assert parameter.grad is not None, "a matrix that the loss does not depend on belongs to the rest"
        return parameter.grad

    def _orthogonal(self, matrices: torch.Tensor) -> torch.Tensor:
        """Each matrix with its singular values drawn to about 1; [n, r, c] → the same."""
        x = matrices.to(torch.bfloat16) if self.device.type == "cuda" else matrices
        x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
        wide = x.shape[1] <= x.shape[2]
        x = x if wide else x.mT
        a, b, c = self.COEFFICIENTS
        for _ in range(5):
            square = x @ x.mT
            x = a * x + (b * square + c * square @ square) @ x
        return x if wide else x.mT

    def state_dict(self) -> dict[str, Any]:
        return {"adam": self.adam.state_dict(), "momenta": list(self.momenta.values())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.adam.load_state_dict(state["adam"])
        for group in self.adam.param_groups:
            group["lr"] = self.adam_rate
        for momentum, kept in zip(self.momenta.values(), state["momenta"], strict=True):
            momentum.copy_(kept)


class Recorded:
    """A training step that, on a GPU, is recorded once as a CUDA graph and then replayed: these steps are so short that
    launching their kernels one by one would take longer than running them."""

    WARM_UP = 3

    def __init__(self, step: Callable[[], torch.Tensor], device: torch.device) -> None:
        self.step, self.device, self.calls = step, device, 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.result = torch.tensor(math.nan)

    def __call__(self) -> torch.Tensor:
        """Run the step; what it returns is overwritten by the next one."""
        self.calls += 1
        if self.device.type != "cuda":
            return self.step()
        if self.graph is not None:
            self.graph.replay()
        elif self.calls <= self.WARM_UP:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self.result = self.step()
            torch.cuda.current_stream().wait_stream(side)
        else:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.result = self.step()
            self.graph.replay()
        return self.result


class Average:
    """An exponential average of a module's weights, faster at the start."""

    def __init__(self, modules: Sequence[nn.Module], decay: float) -> None:
        self.live = [parameter for module in modules for parameter in module.parameters()]
        self.mean = [parameter.detach().clone() for parameter in self.live]
        self.decay, self.count = decay, 0

    @torch.no_grad()
    def update(self) -> None:
        self.count += 1
        torch._foreach_lerp_(
            self.mean, [p.detach() for p in self.live], 1 - min(self.decay, self.count / (self.count + 10))
        )

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the average with the live weights; once more puts them back."""
        for mean, live in zip(self.mean, self.live, strict=True):
            kept = live.detach().clone()
            live.copy_(mean)
            mean.copy_(kept)


def log(phase: str, step: int, **values: float) -> None:
    print(json.dumps({"phase": phase, "step": step} | {k: round(v, 5) for k, v in values.items()}), flush=True)


# -- VAE --


def _rms_norm(x: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    """ChannelNorm of [B, C, T, H, W] in a form that compiles to one kernel."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(dim=1, keepdim=True) + 1e-12)).to(x.dtype) * gamma


def fuse_norms(vae: nn.Module) -> None:
    """Let the norms, most of the VAE's time in training, run as one kernel each; undone by `separate_norms`."""
    fused = torch.compile(_rms_norm, dynamic=True)
    for module in vae.modules():
        if isinstance(module, ChannelNorm):
            module.forward = functools.partial(_call_norm, fused, module)  # type: ignore[method-assign]


def _call_norm(norm: Any, module: Any, x: torch.Tensor) -> torch.Tensor:
    return norm(x, module.gamma.to(x.dtype))


def separate_norms(vae: nn.Module) -> None:
    for module in vae.modules():
        if isinstance(module.__dict__.get("forward"), functools.partial):
            del module.forward


def vae_step(vae: Any, clips: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, squared error) of decoding clips [B, 3, T, H, W] from their latents with a little noise on them.

    The noise is fixed: a learned one starts at deviation 1, and most of the time would go into outgrowing it. It keeps
    the decoder calm about the transformer's small errors; the weak pull on the latents keeps them from growing.
    """
    mean, log_variance = vae.encoder(clips).float().chunk(2, dim=1)
    decoded = vae.decoder(mean + LATENT_NOISE * torch.randn_like(mean)).float()
    squared = F.mse_loss(decoded, clips)
    pull = mean.square().mean() + (log_variance - 2 * math.log(LATENT_NOISE)).square().mean()
    return squared * 4 + F.l1_loss(decoded, clips) + LATENT_PULL * pull, squared


class Clips:
    """Rendered clips in 8 bits on the device, and where in each there is something to see; renewed bit by bit."""

    FRAMES, SIDE, JITTER = 9, 64, 40  # of a window, and how far its middle may be from what it shows

    def __init__(self, size: int, device: torch.device, seed: int) -> None:
        self.scenes, self.size, self.next, self.device = random.Random(seed), size, 0, device
        self.pixels = torch.zeros(size, 3, scenes.FRAMES, scenes.HEIGHT, scenes.WIDTH, dtype=torch.uint8, device=device)
        self.focus = torch.zeros(size, scenes.FRAMES, 2, device=device)  # y, x

    def renew(self, count: int) -> None:
        """Replace the oldest clips by new ones."""
        drawn = [scenes.draw_scene(self.scenes) for _ in range(count)]
        slots = torch.arange(self.next, self.next + count, device=self.device) % self.size
        self.next = (self.next + count) % self.size
        self.pixels[slots] = scenes.to_8bit(scenes.render(drawn, device=self.device))
        middle = np.tile([scenes.WIDTH / 2, scenes.HEIGHT / 2], (scenes.FRAMES, 1))
        shown = [self.scenes.choice(scene.things).centers if scene.things else middle for scene in drawn]
        self.focus[slots] = torch.from_numpy(np.stack(shown)[..., ::-1].copy()).to(self.device, torch.float32)

    def fill(self, chunk: int) -> None:
        for start in range(0, self.size, chunk):
            self.renew(min(chunk, self.size - start))

    def whole(self, batch: int) -> torch.Tensor:
        """[batch, 3, T, H, W] in [-1, 1]."""
        return self.pixels[torch.randint(self.size, (batch,), device=self.device)].float() / 127.5 - 1

    def windows(self, batch: int) -> torch.Tensor:
        """[batch, 3, 9, 64, 64] in [-1, 1], each about something that moves or a card."""
        rows = torch.randint(self.size, (batch,), device=self.device)
        start = 4 * torch.randint((scenes.FRAMES - self.FRAMES) // 4 + 1, (batch,), device=self.device)
        middle = self.focus[rows, start + self.FRAMES // 2]
        corner = middle + (torch.rand(batch, 2, device=self.device) * 2 - 1) * self.JITTER - self.SIDE / 2
        y = corner[:, 0].clamp(0, scenes.HEIGHT - self.SIDE).long()
        x = corner[:, 1].clamp(0, scenes.WIDTH - self.SIDE).long()
        steps, side = torch.arange(self.FRAMES, device=self.device), torch.arange(self.SIDE, device=self.device)
        found = self.pixels[
            rows[:, None, None, None],
            :,
            (start[:, None] + steps)[:, :, None, None],
            (y[:, None] + side)[:, None, :, None],
            (x[:, None] + side)[:, None, None, :],
        ]
        return found.movedim(-1, 1).float() / 127.5 - 1


def start_vae(vae: nn.Module) -> None:
    """Initial weights for training: each residual block begins as the identity."""
    for name, module in vae.named_modules():
        if isinstance(module, nn.Conv3d):
            module.reset_parameters()
            if name.endswith(("conv2.conv", "proj_out")):
                for parameter in module.parameters():
                    nn.init.zeros_(parameter)


def train_vae(
    vae: Any, clips: Clips, budget: Budget, state: dict, deadline: float, batch: int, peaks: tuple[float, float]
) -> bool:
    """Train until the budget or the deadline is over; True when the phase is done."""
    device = clips.device
    vae.train().requires_grad_(True)
    if device.type == "cuda":
        fuse_norms(vae)
    inside = [p for n, p in vae.named_parameters() if p.ndim == 5 and "conv_in" not in n and "conv_out" not in n]
    rest = [p for p in vae.parameters() if all(p is not other for other in inside)]
    optimizer = Optimizer(inside, rest, peaks)
    average = Average([vae], 0.998)
    if "vae_optimizer" in state:
        optimizer.load_state_dict(state["vae_optimizer"])
        for mean, kept in zip(average.mean, state["vae_average"], strict=True):
            mean.copy_(kept)
        average.count = 1000
    step = state.get("vae_step", 0)

    def learn(draw: Callable[[int], torch.Tensor], count: int) -> torch.Tensor:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss, squared = vae_step(vae, draw(count))
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        return squared.detach()

    windows = Recorded(lambda: learn(clips.windows, batch), device)
    whole = Recorded(lambda: learn(clips.whole, max(1, batch // 8)), device)
    started, last = time.time(), budget.spent
    while budget.spent < budget.seconds and time.time() < deadline:
        optimizer.set_rate(budget.share(step))
        # Windows are the cheaper teacher, but attention and the later frames must see whole clips, too: every third step,
        # and the last quarter.
        squared = (whole if step % 3 == 2 or budget.spent > 0.75 * budget.seconds else windows)()
        average.update()
        if step % 8 == 7:
            clips.renew(16)
        budget.spent = last + time.time() - started
        if step % 252 in (0, 2):
            log("vae", step, psnr=10 * math.log10(4 / squared.item()), seconds=budget.spent)
        step += 1
    done = budget.spent >= budget.seconds
    state |= {"vae_step": step, "vae_spent": budget.spent}
    if done:
        average.swap()
        state.pop("vae_optimizer", None)
        state.pop("vae_average", None)
    else:
        state |= {"vae_optimizer": optimizer.state_dict(), "vae_average": average.mean}
    separate_norms(vae)
    vae.eval().requires_grad_(False)
    return done


@torch.no_grad()
def finish_vae(vae: Any, device: torch.device, clips: int) -> dict[str, float]:
    """Round the VAE to what ships, scale latents to unit deviation, and measure it on unseen clips."""
    for parameter in vae.parameters():
        parameter.copy_(parameter.to(torch.bfloat16))
    choices = random.Random(7)
    means, errors = [], []
    for _ in range(clips // 4):
        rendered = scenes.render([scenes.draw_scene(choices, held_out=True) for _ in range(4)], device=device)
        mean = vae.encoder(rendered).chunk(2, dim=1)[0]
        means.append(mean)
        errors.append(F.mse_loss(vae.decoder(mean).clamp(-1, 1), rendered).item())
    scaling_factor = 1 / torch.cat(means).std().item()
    vae.config = replace(vae.config, scaling_factor=scaling_factor)
    return {"psnr": 10 * math.log10(4 / (sum(errors) / len(errors))), "scaling_factor": scaling_factor}


# -- the pool of clips that the transformer learns from --


class Words:
    """Prompts → token ids, exactly as stage 1 makes them, but by the thousand."""

    def __init__(self, tokenizer: Any, glyph_tokenizer: Any) -> None:
        self.tokenizer, self.glyph_tokenizer = tokenizer, glyph_tokenizer
        probe = text.tokenise(tokenizer, "word")
        inner = self._plain(["word"])[0]
        place = next(i for i in range(probe.crop, len(probe.ids)) if probe.ids[i : i + len(inner)] == inner)
        assert place == probe.crop
        self.crop, self.head, self.tail = probe.crop, probe.ids[:place], probe.ids[place + len(inner) :]
        self.pad = tokenizer.pad_token_id or 0

    def _plain(self, prompts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer(list(prompts), add_special_tokens=False)["input_ids"]

    def language(self, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """ids [B, crop + PROMPT_TOKENS] and how many of each row are valid, [B]."""
        rows = [self.head + ids + self.tail for ids in self._plain([prompt or " " for prompt in prompts])]
        return _padded(rows, self.crop + PROMPT_TOKENS, self.pad)

    def glyphs(self, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """ids [B, GLYPH_TOKENS] and how many are valid, [B]; 0 where nothing is quoted."""
        quoted = [text.glyph_text(prompt) for prompt in prompts]
        ids = self.glyph_tokenizer(quoted)["input_ids"]
        return _padded([row if said else [] for row, said in zip(ids, quoted, strict=True)], GLYPH_TOKENS, 0)


def _padded(rows: Sequence[list[int]], length: int, pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, rows))
    assert longest <= length, f"{longest} tokens do not fit {length}"
    ids = torch.full((len(rows), length), pad, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
    return ids, torch.tensor([len(row) for row in rows])


class Pool:
    """Encoded clips with several wordings each, all on the GPU; grows old and is renewed bit by bit."""

    def __init__(
        self, size: int, words: Words, vae: Any, device: torch.device, seed: int, spelling: float = 0.0
    ) -> None:
        self.words, self.vae, self.device, self.spelling = words, vae, device, spelling
        self.scenes = random.Random(seed)
        self.size, self.next = size, 0
        length = words.crop + PROMPT_TOKENS
        dtype = torch.bfloat16 if device.type == "cuda" else None
        self.latents = torch.zeros(size, geometry.LATENT_CHANNELS, *LATENT_GRID, device=device, dtype=dtype)
        self.ids = torch.zeros(size, WORDINGS, length, device=device, dtype=torch.int64)
        self.valid = torch.zeros(size, WORDINGS, device=device, dtype=torch.int64)
        self.glyph_ids = torch.zeros(size, GLYPH_TOKENS, device=device, dtype=torch.int64)
        self.glyph_valid = torch.zeros(size, device=device, dtype=torch.int64)
        self.images = torch.zeros(size, 3, DEMO.image_size, DEMO.image_size, device=device)

    def draw(self) -> scenes.Scene:
        if self.spelling and self.scenes.random() < self.spelling:
            return scenes.draw_scene(self.scenes, "card", lengths=SPELLING_LENGTHS)
        return scenes.draw_scene(self.scenes)

    @torch.no_grad()
    def renew(self, count: int) -> None:
        """Replace the oldest clips by new ones."""
        drawn = [self.draw() for _ in range(count)]
        wordings = [self.scenes.choice((scenes.FIRST, scenes.MORE)) for _ in range(count * WORDINGS)]
        said = [scene for scene in drawn for _ in range(WORDINGS)]
        prompts = [scenes.describe(scene, self.scenes, how) for scene, how in zip(said, wordings, strict=True)]
        ids, valid = self.words.language(prompts)
        glyph_ids, glyph_valid = self.words.glyphs(prompts[::WORDINGS])
        clips = scenes.render(drawn, device=self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            mean = self.vae.encoder(clips).float().chunk(2, dim=1)[0]
        slots = torch.arange(self.next, self.next + count, device=self.device) % self.size
        self.next = (self.next + count) % self.size
        self.latents[slots] = (mean * self.vae.config.scaling_factor).to(self.latents.dtype)
        self.ids[slots] = ids.view(count, WORDINGS, -1).to(self.device)
        self.valid[slots] = valid.view(count, WORDINGS).to(self.device)
        self.glyph_ids[slots], self.glyph_valid[slots] = glyph_ids.to(self.device), glyph_valid.to(self.device)
        side = (DEMO.image_size, DEMO.image_size)
        self.images[slots] = F.interpolate(clips[:, :, 0], side, mode="bicubic", antialias=True).clamp(-1, 1)

    def fill(self, chunk: int) -> None:
        for start in range(0, self.size, chunk):
            self.renew(min(chunk, self.size - start))

    def batch(self, size: int) -> dict[str, torch.Tensor]:
        rows = torch.randint(self.size, (size,), device=self.device)
        wording = torch.randint(WORDINGS, (size,), device=self.device)
        return {
            "latents": self.latents[rows].float(),
            "ids": self.ids[rows, wording],
            "valid": self.valid[rows, wording],
            "glyph_ids": self.glyph_ids[rows],
            "glyph_valid": self.glyph_valid[rows],
            "images": self.images[rows],
        }


# -- the transformer and its encoders --


def joint_block(
    block: Any,
    video: torch.Tensor,
    texts: torch.Tensor,
    temb: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    mask: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One double-stream block over a batch: video [B, S, C], texts [B, L, C], mask [B, 1, 1, S + L] of valid keys.

    The suite's own forward takes one unpadded prompt; this one is its batched twin, for training alone.
    """
    attn, length = block.attn, video.shape[1]
    v = modulation(block.norm1, temb)
    t = modulation(block.norm1_context, temb)
    q, k, value = project_qkv(
        modulate(video, block.norm1.norm, v[0], v[1]),
        (attn.to_q, attn.to_k, attn.to_v),
        (attn.norm_q, attn.norm_k),
        attn.heads,
    )
    text_qkv = project_qkv(
        modulate(texts, block.norm1_context.norm, t[0], t[1]),
        (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj),
        (attn.norm_added_q, attn.norm_added_k),
        attn.heads,
    )
    rope = (cos, sin)
    q, k, value = (
        torch.cat(pair, dim=1).transpose(1, 2)
        for pair in zip((apply_rope(q, rope), apply_rope(k, rope), value), text_qkv, strict=True)
    )
    out = F.scaled_dot_product_attention(q, k, value.to(q.dtype), attn_mask=mask).transpose(1, 2).flatten(2)
    video = video + attn.to_out[0](out[:, :length]) * v[2]
    texts = texts + attn.to_add_out(out[:, length:]) * t[2]
    video = video + block.ff(modulate(video, block.norm2, v[3], v[4])) * v[5]
    texts = texts + block.ff_context(modulate(texts, block.norm2_context, t[3], t[4])) * t[5]
    return video, texts


def refined(embedder: Any, states: torch.Tensor, timestep: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The token refiner over a batch [B, L, C] with a mask [B, L] of tokens.

    Padding may look at tokens, otherwise than in diffusers, where it attends to nothing: that is 0 forwards and NaN
    backwards in cuDNN. What becomes of padding is never read.
    """
    weight = mask[..., None].to(states.dtype)
    pooled = (states * weight).sum(dim=1) / weight.sum(dim=1)
    return embedder(states, timestep, pooled, mask[:, None, None])


def batched_text(
    model: Any,
    timestep: torch.Tensor,
    language: torch.Tensor,
    language_mask: torch.Tensor,
    glyphs: torch.Tensor,
    images: torch.Tensor,
) -> torch.Tensor:
    """Text tokens [B, N + G + L, C] of language [B, L, W1] with its mask of tokens, glyphs [B, G, W2], image [B, N, W3]."""
    kinds = model.cond_type_embed.weight
    return torch.cat(
        [
            model.image_embedder(images) + kinds[IMAGE],
            model.context_embedder_2(glyphs) + kinds[GLYPH],
            refined(model.context_embedder, language, timestep, language_mask) + kinds[LANGUAGE],
        ],
        dim=1,
    )


def image_condition(latents: torch.Tensor, image_given: torch.Tensor) -> torch.Tensor:
    """Condition channels [B, 33, t, h, w]: frame 0 of latents [B, 32, t, h, w] and its mask, where it is given, [B]."""
    shown = image_given[:, None, None, None, None].to(latents.dtype)
    condition, first = torch.zeros_like(latents), torch.zeros_like(latents[:, :1])
    condition[:, :, :1] = latents[:, :, :1] * shown
    first[:, :, :1] = shown
    return torch.cat([condition, first], dim=1)


def batched_velocity(
    model: Any,
    inputs: torch.Tensor,
    texts: torch.Tensor,
    text_mask: torch.Tensor,
    temb: torch.Tensor,
    rope: tuple[torch.Tensor, ...],
    *,
    block: Callable[..., tuple[torch.Tensor, torch.Tensor]] = joint_block,
) -> torch.Tensor:
    """The velocity [B, 32, t, h, w] for the transformer's whole input, text tokens and the mask of those to be seen."""
    video = model.x_embedder(inputs)
    mask = torch.cat([text_mask.new_ones(len(video), video.shape[1]), text_mask], dim=1)[:, None, None]
    for layer in model.transformer_blocks:
        video, texts = block(layer, video, texts, temb, *rope, mask)
    return model.proj_out(model.norm_out(video, temb)).transpose(1, 2).unflatten(2, inputs.shape[2:])


def finite(loss: torch.Tensor, step: int) -> float:
    """The loss as a number. Raises FloatingPointError where it is none: going on would learn nothing."""
    if not loss.isfinite():
        raise FloatingPointError(f"the loss is {loss.item()} after step {step}")
    return loss.item()


def without_unused(language: Any) -> tuple[nn.Module, nn.Module]:
    """Take off the language model, and return, its last layers and its norm: stage 1 reads hidden_states[-3]."""
    unused = (language.layers[-SKIPPED_LAYERS:], language.norm)
    language.layers, language.norm = language.layers[:-SKIPPED_LAYERS], nn.Identity()
    return unused


class Learner(nn.Module):
    """Language model, glyph encoder, image encoder and transformer as one module: conditions and noise to velocity.

    language: without the layers that stage 1 never uses.
    """

    def __init__(
        self,
        language: Any,
        glyph: Any,
        image: Any,
        transformer: Any,
        crop: int,
        *,
        grid: Sequence[int] = LATENT_GRID,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.language, self.glyph, self.image, self.transformer = language, glyph, image, transformer
        self.crop = crop
        self.block = torch.compile(joint_block, dynamic=False) if compile else joint_block
        self.rope: tuple[torch.Tensor, ...] = rope_table(self.transformer, *grid)

    def forward(
        self, noisy: torch.Tensor, timestep: torch.Tensor, batch: dict[str, torch.Tensor], image_given: torch.Tensor
    ) -> torch.Tensor:
        """The velocity [B, 32, t, h, w] for noisy latents; image_given [B] says which rows see their first frame."""
        model = self.transformer
        ids, valid = batch["ids"], batch["valid"]
        states = self.language(input_ids=ids, use_cache=False).last_hidden_state[:, self.crop :]
        language_mask = torch.arange(states.shape[1], device=ids.device) < (valid - self.crop)[:, None]
        glyph_mask = torch.arange(GLYPH_TOKENS, device=ids.device) < batch["glyph_valid"][:, None]
        # A row with nothing to read would give softmax over nothing; let it read one token that nobody looks at.
        readable = glyph_mask.clone()
        readable[:, 0] = True
        glyphs = self.glyph(input_ids=batch["glyph_ids"], attention_mask=readable.long()).last_hidden_state
        images = self.image(pixel_values=batch["images"]).last_hidden_state

        texts = batched_text(model, timestep, states, language_mask, glyphs, images)
        image_mask = image_given[:, None].expand(-1, images.shape[1])
        text_mask = torch.cat([image_mask, glyph_mask, language_mask], dim=1)
        inputs = torch.cat([noisy, image_condition(batch["latents"], image_given)], dim=1)
        return batched_velocity(
            model, inputs, texts, text_mask, model.time_embed(timestep), self.rope, block=self.block
        )


def flow_loss(learner: Learner, batch: dict[str, torch.Tensor], empty: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean squared error of the velocity noise - latents at random noise levels; some rows lose their text."""
    latents = batch["latents"]
    count, device = len(latents), latents.device
    dropped = torch.rand(count, device=device) < TEXT_DROPPED
    batch = batch | {
        "ids": torch.where(dropped[:, None], empty["ids"], batch["ids"]),
        "valid": torch.where(dropped, empty["valid"], batch["valid"]),
        "glyph_valid": torch.where(dropped, 0, batch["glyph_valid"]),
    }
    image_given = torch.rand(count, device=device) < IMAGE_GIVEN
    uniform = torch.rand(count, device=device)
    sigma = TRAINING_SHIFT * uniform / (1 + (TRAINING_SHIFT - 1) * uniform)
    noise = torch.randn_like(latents)
    level = sigma[:, None, None, None, None]
    velocity = learner(latents + level * (noise - latents), sigma * 1000, batch, image_given)
    return F.mse_loss(velocity.float(), noise - latents)


def start_learning(learner: Learner) -> None:
    """Initial weights for training: small matrices, and gates that are shut, so that a block begins as the identity."""
    for name, parameter in learner.named_parameters():
        if parameter.ndim > 1 and "embed_tokens" not in name:
            nn.init.trunc_normal_(parameter, std=min(0.05, parameter[0].numel() ** -0.5))
        elif parameter.ndim == 1 and name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif parameter.ndim == 1:
            nn.init.ones_(parameter)
    shut_gates(learner.transformer)
    nn.init.normal_(learner.language.embed_tokens.weight, std=0.1)
    start_glyphs(learner.glyph)


def shut_gates(model: Any) -> None:
    """Zero what opens a transformer's blocks and what makes its velocity."""
    gates = [m.linear for block in model.transformer_blocks for m in (block.norm1, block.norm1_context)]
    gates += [block.norm_out.linear for block in model.context_embedder.token_refiner.refiner_blocks]
    for linear in (*gates, model.norm_out.linear, model.proj_out):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)


@torch.no_grad()
def start_glyphs(glyph: Any) -> None:
    """Initial weights of the glyph encoder, whose heads begin by looking where NEIGHBOURS says, and nowhere else.

    T5 tells places by distance alone (Raffel et al. 2020, section 2.1; buckets 1 to 7 are so many characters back, 17 to
    23 ahead), and a letter's place in its word is how far the quotation marks are. Its scores are not divided by the
    square root of the width: trained by Muon they grew to +-70, next to which no distance counted, and the letters of a
    word came out in any order. So queries begin at zero, and AdamW trains what makes the scores.
    """
    for name, parameter in glyph.named_parameters():
        if parameter.ndim == 1:
            nn.init.ones_(parameter)
        elif name.startswith("shared"):
            nn.init.normal_(parameter, std=0.2)  # as large as what attention adds
        elif name.endswith("SelfAttention.q.weight"):
            nn.init.zeros_(parameter)
        else:
            nn.init.trunc_normal_(parameter, std=0.05)
    bias = glyph.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight  # [buckets, heads]
    bias.zero_()
    for head, distance in enumerate(NEIGHBOURS):
        bias[abs(distance) + (len(bias) // 2 if distance > 0 else 0), head] = LOOKING


# Outside Muon: what reads or writes the model's edges, and the modulation, whose gates begin shut.
EDGES: tuple[str, ...] = ("embed_tokens", "shared", "position_embedding", "patch_embedding", "x_embedder")
EDGES += (
    "cond_type_embed",
    "proj_out",
    "norm1.linear",
    "norm1_context.linear",
    "norm_out.linear",
    "relative_attention_bias",
    "SelfAttention.q",
    "SelfAttention.k",
)


def train_transformer(
    learner: Learner,
    pool: Pool,
    budget: Budget,
    state: dict,
    deadline: float,
    *,
    batch: int,
    refresh: int,
    peaks: tuple[float, float],
    decay: float,
    save: Any,
) -> bool:
    """Train until the budget or the deadline is over; True when the phase is done."""
    device = pool.device
    learner.train().requires_grad_(True)
    learner.glyph.eval()  # T5's dropout has nothing to add here
    last = f"transformer_blocks.{len(learner.transformer.transformer_blocks) - 1}"
    # The pooling head and what the last block does to the text never reach the loss: AdamW passes over such weights.
    outside = (*EDGES, "image.head", f"{last}.attn.to_add_out", f"{last}.ff_context")
    named = list(learner.named_parameters())
    inside = [p for n, p in named if p.ndim == 2 and not any(part in n for part in outside)]
    rest = [p for n, p in named if p.ndim != 2 or any(part in n for part in outside)]
    optimizer = Optimizer(inside, rest, peaks)
    average = Average([learner], decay)
    if "optimizer" in state:
        optimizer.load_state_dict(state["optimizer"])
        for mean, kept in zip(average.mean, state["average"], strict=True):
            mean.copy_(kept)
    step = average.count = state.get("step", 0)
    ids, valid = pool.words.language([""])
    empty = {"ids": ids.to(device), "valid": valid.to(device)}
    torch.manual_seed(step + 1)
    started, before, saved = time.time(), budget.spent, time.time()
    loss, first = torch.zeros(()), step

    def learn() -> torch.Tensor:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = flow_loss(learner, pool.batch(batch), empty)
        loss.backward()
        nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        optimizer.step()
        return loss.detach()

    recorded = Recorded(learn, device)

    def keep() -> None:
        state.update(
            step=step,
            spent=budget.spent,
            optimizer=optimizer.state_dict(),
            average=average.mean,
            learner=learner.state_dict(),
        )
        save(state)

    while budget.spent < budget.seconds and time.time() < deadline:
        optimizer.set_rate(budget.share(step))
        loss = recorded()
        average.update()
        if refresh and step % 16 == 15:
            pool.renew(refresh)
        if step == first + 20:
            finite(loss, step)
        if step % 200 == 0:
            log("transformer", step, loss=finite(loss, step), share=budget.share(step), seconds=budget.spent)
        budget.spent = before + time.time() - started
        step += 1
        if time.time() - saved > 120:
            saved = time.time()
            keep()
    done = budget.spent >= budget.seconds
    log("transformer", step, loss=finite(loss, step), seconds=budget.spent)
    keep()
    if done:
        average.swap()
    learner.eval().requires_grad_(False)
    return done


# -- the whole --


def corpus() -> list[str]:
    """What the tokenizer is trained on: the template's own text, often enough to become few tokens, and the world's."""
    choices = random.Random(5)
    sentences = [scenes.describe(scenes.draw_scene(choices), choices, how) for how in (scenes.FIRST, scenes.MORE) * 300]
    return [*tiny.CORPUS] * 20 + sentences


def build(seed: int = 0) -> checkpoint_writer.Modules:
    """All modules of the demo checkpoint, untrained."""
    return tiny.build_modules(DEMO, seed, (VERSION,), corpus())


def load_trained(path: Path, seed: int = 0) -> checkpoint_writer.Modules:
    """All modules of a finished checkpoint of DEMO's sizes, in float32, with its own tokenizer.

    The language model's last layers, which stage 1 never reads, are drawn as `build` draws them. Raises InputError where
    the folder is none, lacks a part, or holds another size.
    """
    options: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32}
    folder = open_model(path, ("transformer", "vae", "text", "glyph", "image"))
    modules = build(seed)
    modules.tokenizer, language = encoder_components.load_language_model(folder, **options)
    for option in ("is_local", "local_files_only"):  # how it was read, not what it is
        modules.tokenizer.init_kwargs.pop(option, None)
    modules.glyph_tokenizer, glyph = encoder_components.load_glyph_encoder(folder, **options)
    encoder, config = components.load_vae_encoder(folder, **options)
    pairs = (
        (modules.language_model, language),
        (modules.glyph_encoder.encoder, glyph),
        (modules.image_encoder, encoder_components.load_image_encoder(folder, **options)[1]),
        (modules.transformers[VERSION], components.load_transformer(folder, VERSION, **options)),
        (modules.vae.encoder, encoder),
        (modules.vae.decoder, components.load_vae_decoder(folder, **options)[0]),
    )
    for module, trained in pairs:
        weights, own = trained.state_dict(), module.state_dict()
        for name, tensor in weights.items():
            if name not in own or own[name].shape != tensor.shape:
                wanted = list(own[name].shape) if name in own else "no such weight"
                raise InputError(f"{path}: {name} is {list(tensor.shape)}; the demo's sizes have {wanted}")
        module.load_state_dict(weights, strict=module is not modules.language_model)
    modules.vae.config = replace(modules.vae.config, scaling_factor=config["scaling_factor"])
    return modules


def parameters(modules: checkpoint_writer.Modules) -> Iterator[nn.Parameter]:
    parts = (
        modules.language_model,
        modules.glyph_encoder,
        modules.image_encoder,
        modules.vae,
        *modules.transformers.values(),
    )
    for module in parts:
        yield from module.parameters()


def write_checkpoint(modules: checkpoint_writer.Modules, folder: Path) -> Path:
    """The official layout in bfloat16. Image to video is the same transformer: its folder links to the weights."""
    shutil.rmtree(folder, ignore_errors=True)
    checkpoint_writer.save_official(
        folder, modules, versions=(VERSION,), dtype=torch.bfloat16, shard_bytes=SHARD_BYTES, force_upcast=True
    )
    trained, twin = folder / "transformer" / VERSION, folder / "transformer" / VERSION.replace("t2v", "i2v")
    twin.mkdir()
    config = json.loads((trained / "config.json").read_text())
    (twin / "config.json").write_text(json.dumps(config | {"ideal_task": "i2v"}, indent=2) + "\n")
    for path in trained.glob("diffusion_pytorch_model*"):
        (twin / path.name).symlink_to(Path("..") / VERSION / path.name)
    return folder


def main() -> int:
    """Train, and return the exit status: 0, or 2 after a line on what was refused."""
    parser = tool_parser("hunyuan_staged.demo.train", __doc__)
    parser.add_argument("--out", type=Path, required=True, help="state.pt, the pool and the checkpoint go here")
    parser.add_argument("--vae_minutes", type=float, default=4.0, help="over all calls (default: %(default)s)")
    parser.add_argument(
        "--minutes", type=float, default=14.0, help="of the transformer, over all calls (default: %(default)s)"
    )
    parser.add_argument(
        "--stop_after", type=float, default=math.inf, help="seconds after which this call saves and ends"
    )
    parser.add_argument("--start_from", type=Path, help="a finished checkpoint to train further; its VAE stays")
    parser.add_argument(
        "--finish_after", type=float, help="seconds that this call may take: the transformer's minutes are what is left"
    )
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--vae_batch", type=int, default=24)
    parser.add_argument("--clips", type=int, default=6144, help="rendered clips for the VAE (default: %(default)s)")
    parser.add_argument("--pool", type=int, default=16384, help="encoded clips at hand (default: %(default)s)")
    parser.add_argument("--refresh", type=int, default=32, help="clips renewed every 16 steps (default: %(default)s)")
    parser.add_argument("--unseen", type=int, default=48, help="clips that measure the VAE (default: %(default)s)")
    parser.add_argument(
        "--spelling",
        type=float,
        default=0.0,
        help="this share of the clips are cards besides, mostly of several characters; with --start_from the glyph "
        "encoder begins anew (default: none)",
    )
    parser.add_argument("--muon_rate", type=float, help="peak for matrices (default: 0.02, or 0.008 with --start_from)")
    parser.add_argument("--rate", type=float, help="peak for all else (default: 1.5e-3, or 6e-4 with --start_from)")
    parser.add_argument(
        "--decay", type=float, default=0.9995, help="of the average of weights, a step (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    return run_tool(parser, train)


def train(args: argparse.Namespace) -> None:
    """What the flags ask for; InputError where --start_from cannot be gone on from."""
    begun = time.time()
    if not 0 <= args.spelling < 1:
        raise InputError(f"--spelling {args.spelling} is not a share from 0 to less than 1")
    deadline = begun + args.stop_after
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    state_file, pool_file = args.out / "state.pt", args.out / "pool.pt"

    def save(content: dict) -> None:
        temporary = state_file.with_suffix(".tmp")
        torch.save(content, temporary)
        temporary.replace(state_file)

    state: dict = torch.load(state_file, map_location=device, weights_only=True) if state_file.exists() else {}
    if state and ("start_from" in state) != bool(args.start_from):
        raise InputError(f"{state_file} was begun {'with' if 'start_from' in state else 'without'} --start_from")
    modules = load_trained(args.start_from, args.seed) if args.start_from else build(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    count = sum(parameter.numel() for parameter in parameters(modules))
    log("build", 0, parameters=count, megabytes=2e-6 * count)
    vae: Any = modules.vae.to(device)
    if "vae" in state:
        vae.load_state_dict(state["vae"])
    elif args.start_from:
        measured = {"scaling_factor": vae.config.scaling_factor}
        state |= {"start_from": True, "vae": vae.state_dict(), "vae_done": True, "vae_measured": measured}
    else:
        start_vae(vae)
    scale = 0.4 if args.start_from else 1.0  # of the peaks: enough to learn new words, and not to forget the old ones
    peaks = (args.muon_rate or 0.02 * scale, args.rate or 1.5e-3 * scale)
    if not state.get("vae_done"):
        budget = Budget(args.vae_minutes * 60, state.get("vae_spent", 0.0))
        clips = Clips(args.clips, device, seed=1000 + state.get("vae_step", 0))
        clips.fill(48)
        log("clips", args.clips, seconds=time.time() - begun)
        state["vae_done"] = train_vae(vae, clips, budget, state, deadline, args.vae_batch, peaks)
        del clips
        if state["vae_done"]:
            measured = finish_vae(vae, device, args.unseen)
            state["vae_measured"] = measured
            log("vae", state["vae_step"], **measured)
        state["vae"] = vae.state_dict()
        save(state)
    if not state["vae_done"]:
        return
    vae.config = replace(vae.config, scaling_factor=state["vae_measured"]["scaling_factor"])
    vae.eval().requires_grad_(False)

    words = Words(modules.tokenizer, modules.glyph_tokenizer)
    language, unused = modules.language_model, without_unused(modules.language_model)
    parts = (language, modules.glyph_encoder, modules.image_encoder, modules.transformers[VERSION])
    learner = Learner(*parts, words.crop, compile=device.type == "cuda")
    if not args.start_from:
        start_learning(learner)
    elif args.spelling:
        start_glyphs(learner.glyph)
    learner.to(device)
    learner.rope = tuple(table.to(device) for table in learner.rope)
    if "learner" in state:
        learner.load_state_dict(state["learner"])
    pool = Pool(args.pool, words, vae, device, seed=2000 + state.get("step", 0), spelling=args.spelling)
    tensors = ("latents", "ids", "valid", "glyph_ids", "glyph_valid", "images")
    if pool_file.exists():
        for name, tensor in torch.load(pool_file, map_location=device, weights_only=True).items():
            getattr(pool, name).copy_(tensor)
    else:
        pool.fill(48)
        torch.save({name: getattr(pool, name) for name in tensors}, pool_file)
    log("pool", args.pool, seconds=time.time() - begun)

    budget = Budget(args.minutes * 60, state.get("spent", 0.0), warmup=300)
    if args.finish_after:
        budget.seconds = budget.spent + max(0.0, begun + args.finish_after - time.time())
    done = train_transformer(
        learner,
        pool,
        budget,
        state,
        deadline,
        batch=args.batch,
        refresh=args.refresh,
        peaks=peaks,
        decay=args.decay,
        save=save,
    )
    language.layers.extend(unused[0])
    language.norm = unused[1]
    learner.cpu()
    vae.cpu()
    write_checkpoint(modules, args.out / "checkpoint")
    log("done" if done else "paused", state["step"], seconds=time.time() - begun)


if __name__ == "__main__":
    sys.exit(main())
