"""The little world that the demo checkpoint knows: plain shapes that move, and cards with a word on them.

A Scene says what is to be seen; `describe` puts it into words, `render` into pixels. Scenes and wordings that training
never sees are told apart by a hash, so that no list of them has to ship.

Letters: B scenes, K objects of a scene (2, the second may be absent), T frames, H x W pixels.
"""

import random
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

HEIGHT, WIDTH, FRAMES = 96, 160, 33

SHAPES = ("circle", "square", "triangle", "star")
COLORS = {
    "red": (220, 35, 35),
    "green": (40, 185, 60),
    "blue": (45, 85, 235),
    "yellow": (245, 225, 50),
    "orange": (245, 135, 25),
    "purple": (150, 55, 200),
    "cyan": (40, 205, 220),
    "white": (245, 245, 245),
}
BACKGROUNDS = {
    "black": (10, 10, 12),
    "dark blue": (15, 25, 85),
    "dark green": (15, 65, 30),
    "dark red": (90, 15, 25),
    "grey": (120, 120, 120),
    "brown": (100, 65, 35),
    "light blue": (165, 205, 245),
    "pink": (245, 175, 195),
}
CARDS = ("white", "yellow", "cyan", "orange")
INK = (20, 20, 24)
CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
CELL_HEIGHT, CELL_WIDTH = 40, 32  # of one character on a card

DIRECTIONS = {
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
    "up left": (-1, -1),
    "up right": (1, -1),
    "down left": (-1, 1),
    "down right": (1, 1),
}
MOTIONS = (*DIRECTIONS, "circle", "grow", "shrink")
PAIR_MOTIONS = ("apart", "together", "left", "right", "up", "down")

LENGTHS = (40, 25, 20, 15)  # how often a card has 1, 2, 3 and 4 characters

# A shape that is hard to see on its background would teach nothing: so far apart must their colours be, in RGB.
MIN_CONTRAST = 110.0
HELD_OUT_SHARE = 8  # one scene in so many is never trained on


@dataclass(frozen=True)
class Thing:
    """A moving shape: where it is and how large, by frame. centers [T, 2] (x, y) and radii [T], in pixels."""

    shape: str
    color: str
    centers: np.ndarray
    radii: np.ndarray


@dataclass(frozen=True)
class Scene:
    """What a clip shows: things that move, or a card with a word; above a background whose halves may differ."""

    things: tuple[Thing, ...]
    motion: str
    background: tuple[str, str]  # of the upper and of the lower half
    card: str = ""
    word: str = ""

    @property
    def key(self) -> str:
        """What makes two scenes the same combination: all that can be said in words, without the exact places."""
        things = " ".join(f"{thing.color} {thing.shape}" for thing in self.things)
        return f"{things}|{self.motion}|{'/'.join(self.background)}|{self.card}|{self.word}"

    @property
    def held_out(self) -> bool:
        return zlib.crc32(self.key.encode()) % HELD_OUT_SHARE == 0


def contrast(a: Sequence[int] | np.ndarray, b: Sequence[int] | np.ndarray) -> float:
    """The distance of two colours in RGB."""
    return float(np.linalg.norm(np.subtract(a, b, dtype=float)))


def _background(draw: random.Random, colors: Sequence[str]) -> tuple[str, str]:
    fitting = [
        name for name, rgb in BACKGROUNDS.items() if all(contrast(rgb, COLORS[c]) > MIN_CONTRAST for c in colors)
    ]
    upper = draw.choice(fitting)
    if draw.random() < 0.7:
        return upper, upper
    return upper, draw.choice([name for name in fitting if name != upper])


def _line(start: tuple[float, float], end: tuple[float, float]) -> np.ndarray:
    return np.linspace(start, end, FRAMES)


def _single(draw: random.Random, shape: str, color: str, motion: str) -> Thing:
    radius = draw.uniform(13, 19)
    radii = np.full(FRAMES, radius)
    margin = radius + 3
    center = (WIDTH / 2, HEIGHT / 2)
    if motion in DIRECTIONS:
        dx, dy = DIRECTIONS[motion]
        # Half the way, so far that the direction is plain and the shape stays in the picture.
        reach_x = dx * draw.uniform(30, 45) * (0.75 if dy else 1)
        reach_y = dy * draw.uniform(20, HEIGHT / 2 - margin - 1)
        free_x, free_y = WIDTH / 2 - margin - abs(reach_x), HEIGHT / 2 - margin - abs(reach_y)
        x = center[0] + draw.uniform(-1, 1) * max(0.0, min(free_x, 20))
        y = center[1] + draw.uniform(-1, 1) * max(0.0, min(free_y, 20))
        centers = _line((x - reach_x, y - reach_y), (x + reach_x, y + reach_y))
    elif motion == "circle":
        orbit = draw.uniform(20, HEIGHT / 2 - margin)
        angles = draw.uniform(0, 2 * np.pi) + np.linspace(0, 2 * np.pi, FRAMES)
        x = center[0] + draw.uniform(-20, 20)
        centers = np.stack([x + orbit * np.cos(angles), center[1] + orbit * np.sin(angles)], axis=1)
    else:
        small, large = draw.uniform(8, 10), draw.uniform(25, 32)
        radii = np.linspace(small, large, FRAMES)
        if motion == "shrink":
            radii = radii[::-1].copy()
        place = (center[0] + draw.uniform(-25, 25), center[1] + draw.uniform(-6, 6))
        centers = _line(place, place)
    return Thing(shape, color, centers, radii)


def _pair(draw: random.Random, shapes: Sequence[str], colors: Sequence[str], motion: str) -> tuple[Thing, ...]:
    radius = draw.uniform(11, 15)
    near, far = draw.uniform(18, 24), draw.uniform(46, 56)
    y = HEIGHT / 2 + draw.uniform(-12, 12)
    things = []
    for side, shape, color in zip((-1, 1), shapes, colors, strict=True):
        place = WIDTH / 2 + side * (near + far) / 2
        start, end = (place, y), (place, y)
        if motion == "apart":
            start, end = (WIDTH / 2 + side * near, y), (WIDTH / 2 + side * far, y)
        elif motion == "together":
            start, end = (WIDTH / 2 + side * far, y), (WIDTH / 2 + side * near, y)
        else:
            dx, dy = DIRECTIONS[motion]
            reach = 18.0
            y_mid = HEIGHT / 2 if dy else y
            start, end = (place - dx * reach, y_mid - dy * reach), (place + dx * reach, y_mid + dy * reach)
        things.append(Thing(shape, color, _line(start, end), np.full(FRAMES, radius)))
    return tuple(things)


def draw_scene(
    draw: random.Random, kind: str | None = None, *, held_out: bool = False, lengths: Sequence[int] = LENGTHS
) -> Scene:
    """A random scene of a kind ("single", "pair", "card"; by default 60, 12 and 28 %), trained on or held out.

    lengths: how often a card's word has 1, 2, 3 and 4 characters.
    """
    while True:
        picked = kind or draw.choices(("single", "pair", "card"), (60, 12, 28))[0]
        if picked == "single":
            color, motion = draw.choice(list(COLORS)), draw.choice(MOTIONS)
            thing = _single(draw, draw.choice(SHAPES), color, motion)
            scene = Scene((thing,), motion, _background(draw, [color]))
        elif picked == "pair":
            colors = draw.sample(list(COLORS), 2)
            shapes = [draw.choice(SHAPES)] * 2 if draw.random() < 0.5 else draw.sample(SHAPES, 2)
            motion = draw.choice(PAIR_MOTIONS)
            scene = Scene(_pair(draw, shapes, colors, motion), motion, _background(draw, colors))
        else:
            card = draw.choice(CARDS)
            word = "".join(draw.choice(CHARACTERS) for _ in range(draw.choices((1, 2, 3, 4), lengths)[0]))
            scene = Scene((), "still", (_background(draw, [card])[0],) * 2, card, word)
        if scene.held_out == held_out:
            return scene


# -- words --

_VERBS = {
    "left": ("moves left", "moves to the left", "slides left", "drifts to the left", "goes left"),
    "right": ("moves right", "moves to the right", "slides right", "drifts to the right", "goes right"),
    "up": ("moves up", "moves upwards", "rises", "floats up", "goes up"),
    "down": ("moves down", "moves downwards", "sinks", "falls slowly", "goes down"),
    "circle": ("moves round in a circle", "goes round in a circle", "circles around", "runs in a circle"),
    "grow": ("grows", "gets bigger", "becomes larger", "slowly grows"),
    "shrink": ("shrinks", "gets smaller", "becomes smaller", "slowly shrinks"),
    "apart": ("drift apart", "move apart", "move away from each other"),
    "together": ("move together", "come together", "move towards each other"),
}
_VERBS |= {
    f"{vertical} {side}": (
        f"moves diagonally {vertical} and to the {side}",
        f"moves {vertical} and to the {side}",
        f"slides diagonally to the {vertical}per {side}"
        if vertical == "up"
        else f"slides diagonally to the lower {side}",
    )
    for vertical in ("up", "down")
    for side in ("left", "right")
}
_PLURAL = {"moves": "move", "slides": "slide", "drifts": "drift", "goes": "go", "rises": "rise", "floats": "float"}
_PLURAL |= {
    "sinks": "sink",
    "falls": "fall",
    "travels": "travel",
    "glides": "glide",
    "heads": "head",
    "shifts": "shift",
}
_PLURAL |= {"climbs": "climb", "drops": "drop"}

# How `describe` may put a scene: as the checkpoint that ships was trained, in more ways that training now also uses, or in
# sentences that nothing is trained on.
FIRST, MORE, UNSEEN = "first", "more", "unseen"

_FIRST = {
    "single": (
        "a {thing} {verb} over a {background} background",
        "a {thing} {verb} on a {background} background",
        "a {thing} that {verb}, {background} background",
        "{background} background, a {thing} {verb}",
        "on a {background} background a {thing} {verb}",
        "the {thing} {verb} over a {background} background",
        "a video of a {thing} that {verb} over a {background} background",
        "in front of a {background} background, a {thing} {verb}",
    ),
    "pair": (
        "{things} {verb} over a {background} background",
        "{things} {verb} on a {background} background",
        "{background} background, {things} {verb}",
        "on a {background} background {things} {verb}",
    ),
    "card": (
        'a {card} card with the text "{word}" on a {background} background',
        'a {card} sign that says "{word}", {background} background',
        'a {card} card that reads "{word}" over a {background} background',
        'on a {background} background a {card} sign with "{word}"',
        'a {card} sign showing "{word}" in front of a {background} background',
    ),
}
_MORE = {
    "single": (
        "a {thing} {verb} against a {background} backdrop",
        "before a {background} background a {thing} {verb}",
        "before a {background} wall, the {thing} {verb}",
        "{background} backdrop, a {thing} {verb}",
        "on a {background} backdrop a {thing} that {verb}",
        "the background is {background} and a {thing} {verb}",
        "a {thing} {verb}. The background is {background}.",
        "there is a {thing} that {verb} before a {background} background",
        "an animation of a {thing} that {verb} across a {background} background",
        "we see a {thing}; it {verb} above a {background} ground",
        "a {background} backdrop with a {thing} in front of it that {verb}",
        "{thing} {verb}, {background} background",
        "a clip in which the {thing} {verb}, everything behind it is {background}",
        "over a {background} backdrop there is a {thing}; it {verb}",
        "over a {background} wall we see a {thing} that {verb}",
        "above a {background} backdrop, a {thing} {verb}",
        "with a {background} background, the {thing} {verb}",
        "the {thing}, which {verb}, is before a {background} wall",
        "a {thing} on a {background} backdrop {verb}",
        "this {thing} {verb} before a background that is {background}",
        "behind the {thing} that {verb} is a {background} backdrop",
    ),
    "pair": (
        "{things} {verb} on a {background} backdrop",
        "in front of a {background} wall there are {things} that {verb}",
        "before a {background} background, {things} {verb}",
        "over a {background} backdrop we see {things} that {verb}",
        "against a {background} backdrop, {things} {verb}",
        "{things} {verb}. The background is {background}.",
        "there are {things} that {verb} across a {background} background",
    ),
    "card": (
        'a {card} card with "{word}" on it before a {background} backdrop',
        'a {card} card on a {background} background reads "{word}"',
        '"{word}" is written on a {card} card, the background is {background}',
        'the word "{word}" on a {card} sign against a {background} wall',
        '{background} backdrop, a {card} sign with the letters "{word}"',
        'the text "{word}" is written on a {card} sign in front of a {background} backdrop',
        'a {card} card before a {background} wall says "{word}"',
        'over a {background} background, the {card} card with the text "{word}"',
    ),
}
_MORE_VERBS = {
    "left": ("travels left", "glides to the left", "heads left", "shifts left", "moves from right to left"),
    "right": ("travels right", "glides to the right", "heads right", "shifts right", "moves from left to right"),
    "up": ("travels up", "climbs", "heads upwards", "moves from the bottom to the top"),
    "down": ("travels down", "drops", "heads downwards", "moves from the top to the bottom"),
    "circle": ("orbits", "moves in circles", "follows a circular path", "turns round in a circle"),
    "grow": ("expands", "is growing", "swells", "gets larger and larger"),
    "shrink": ("contracts", "is shrinking", "gets smaller and smaller", "dwindles"),
    "apart": ("part", "separate", "go away from each other"),
    "together": ("approach each other", "meet", "go towards each other"),
}
_MORE_VERBS |= {
    f"{vertical} {side}": (
        f"heads diagonally {vertical} {side}",
        f"glides {vertical} and {side}",
        f"moves towards the {'top' if vertical == 'up' else 'bottom'} {side} corner",
    )
    for vertical in ("up", "down")
    for side in ("left", "right")
}
# What the checkpoint cannot read, since no scene that `draw_scene` draws has this motion: adapter.py teaches it.
_VERBS["bounce"] = _MORE_VERBS["bounce"] = ("bounces", "bounces up and down")
# Sentences that nothing is trained on, of words that are.
_UNSEEN = {
    "single": ("a {thing} {verb} before a {background} backdrop", "over a {background} background, the {thing} {verb}"),
    "pair": ("in front of a {background} background {things} {verb}",),
    "card": (
        'the text "{word}" on a {card} card, on a {background} background',
        'a {card} card says "{word}", {background} background',
    ),
}


def _background_words(draw: random.Random, scene: Scene) -> str:
    upper, lower = scene.background
    if upper == lower:
        return draw.choice((upper, f"plain {upper}")) if draw.random() < 0.2 else upper
    return f"two-tone {upper} and {lower}"


def describe(scene: Scene, draw: random.Random, wording: str = FIRST) -> str:
    """The scene in words, in a random sentence of a wording: FIRST, MORE or UNSEEN."""
    sentence = re.sub(r"\b([Aa]) (?=orange)", r"\1n ", _describe(scene, draw, wording))
    if wording == MORE and draw.random() < 0.3:  # as people write
        sentence = sentence[0].upper() + sentence[1:]
        sentence = sentence if sentence.endswith((".", '"')) else f"{sentence}."
    return sentence


def _describe(scene: Scene, draw: random.Random, wording: str) -> str:
    background = _background_words(draw, scene)
    kind = "card" if scene.word else "single" if len(scene.things) == 1 else "pair"
    pattern = draw.choice({FIRST: _FIRST, MORE: _MORE, UNSEEN: _UNSEEN}[wording][kind])
    if kind == "card":
        return pattern.format(card=scene.card, word=scene.word, background=background)
    more = wording == MORE and draw.random() < 0.5
    verb = draw.choice((_MORE_VERBS if more else _VERBS)[scene.motion])
    if kind == "single":
        thing = f"{scene.things[0].color} {scene.things[0].shape}"
        return pattern.format(thing=thing, verb=verb, background=background)
    first, second = scene.things
    if first.shape == second.shape and draw.random() < 0.5:
        things = f"two {first.shape}s, one {first.color}, one {second.color},"
    else:
        things = f"a {first.color} {first.shape} and a {second.color} {second.shape}"
    word, _, rest = verb.partition(" ")
    verb = f"{_PLURAL.get(word, word)} {rest}".strip()
    return pattern.format(things=things, verb=verb, background=background)


# -- pixels --


@cache
def atlas(scale: int = 1) -> torch.Tensor:
    """The ink of each of CHARACTERS, [36, CELL_HEIGHT, CELL_WIDTH] x scale in [0, 1], from the font that Pillow brings."""
    from PIL import Image, ImageDraw, ImageFont

    width, height = CELL_WIDTH * scale, CELL_HEIGHT * scale
    font = ImageFont.load_default(34 * scale)
    cells = []
    for character in CHARACTERS:
        cell = Image.new("L", (width, height))
        ImageDraw.Draw(cell).text(
            (width / 2, height / 2), character, fill=255, font=font, anchor="mm", stroke_width=scale
        )
        cells.append(torch.from_numpy(np.asarray(cell).copy()).float() / 255)
    return torch.stack(cells)


def card_box(word: str) -> tuple[int, int, int, int]:
    """The card behind a word: top, bottom, left, right in pixels; its characters fill it but for a rim of 6."""
    width = len(word) * CELL_WIDTH
    top, left = (HEIGHT - CELL_HEIGHT) // 2, (WIDTH - width) // 2
    return top - 6, top + CELL_HEIGHT + 6, left - 6, left + width + 6


def _distance(shape: str, x: torch.Tensor, y: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """The signed distance in pixels from the edge of a shape of radius r at the origin; negative inside."""
    if shape == "circle":
        return torch.hypot(x, y) - r
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.88 * r
    if shape == "triangle":  # three half-planes; y points down, so the tip is up
        side = 0.5 * r
        return torch.maximum(y - side * 1.1, x.abs() * 0.8660254 - y * 0.5 - side * 1.1)
    # A five-pointed star: fold the plane onto one half point, then one edge from its tip to its notch.
    angle = torch.atan2(x, -y)
    fold = 2 * np.pi / 5
    angle = (torch.remainder(angle + fold / 2, fold) - fold / 2).abs()
    radius = torch.hypot(x, y)
    px, py = radius * torch.sin(angle), radius * torch.cos(angle)
    outer, inner = 1.2 * r, 0.5 * r
    notch_x, notch_y = inner * np.sin(fold / 2), inner * np.cos(fold / 2)
    edge_x, edge_y = notch_x, notch_y - outer
    length = torch.hypot(edge_x, edge_y)
    return -(px * edge_y - (py - outer) * edge_x) / length


@torch.no_grad()
def render(scenes: Sequence[Scene], *, device: torch.device | str = "cpu", scale: int = 1) -> torch.Tensor:
    """Clips [B, 3, T, H, W] in [-1, 1], edges smoothed over one pixel; the same scenes at scale x HEIGHT x WIDTH."""
    y = (torch.arange(HEIGHT * scale, device=device, dtype=torch.float32)[:, None] + 0.5) / scale
    x = (torch.arange(WIDTH * scale, device=device, dtype=torch.float32)[None, :] + 0.5) / scale
    # [B, 2, 3] → halves of the picture → [B, 3, T, H, W]
    halves = torch.tensor([[BACKGROUNDS[name] for name in scene.background] for scene in scenes], device=device).float()
    lower = (y >= HEIGHT / 2).float()
    picture = halves[:, 0, :, None, None] * (1 - lower) + halves[:, 1, :, None, None] * lower
    clips = picture[:, :, None].expand(-1, -1, FRAMES, -1, WIDTH * scale).clone()
    for shape in SHAPES:
        for slot in (0, 1):
            index = [i for i, s in enumerate(scenes) if len(s.things) > slot and s.things[slot].shape == shape]
            if not index:
                continue
            things = [scenes[i].things[slot] for i in index]
            centers = torch.from_numpy(np.stack([t.centers for t in things])).to(device, torch.float32)
            radii = torch.from_numpy(np.stack([t.radii for t in things])).to(device, torch.float32)
            dx = x - centers[..., 0, None, None]
            dy = y - centers[..., 1, None, None]
            cover = (0.5 - _distance(shape, dx, dy, radii[..., None, None]) * scale).clamp(0, 1)[:, None]
            color = torch.tensor([COLORS[t.color] for t in things], device=device).float()[:, :, None, None, None]
            clips[index] = clips[index] * (1 - cover) + color * cover
    ink, paper = torch.tensor(INK, device=device).float(), atlas(scale).to(device)
    for i, scene in enumerate(scenes):
        if scene.word:
            clips[i] = _card(scene, picture[i].expand(-1, -1, WIDTH * scale), paper, ink)[:, None]
    return clips / 127.5 - 1


def to_8bit(clips: torch.Tensor) -> torch.Tensor:
    """Pixels in [-1, 1] → uint8."""
    return ((clips + 1) * 127.5).round().clamp(0, 255).byte()


def _card(scene: Scene, still: torch.Tensor, letters: torch.Tensor, ink: torch.Tensor) -> torch.Tensor:
    """A still picture [3, H, W] with the scene's card and word laid over it."""
    card, word = torch.zeros(2, *still.shape[1:], device=still.device)
    scale = still.shape[1] // HEIGHT
    rim, width = 6 * scale, CELL_WIDTH * scale
    top, bottom, left, right = (side * scale for side in card_box(scene.word))
    card[top:bottom, left:right] = 1
    for slot, character in enumerate(scene.word):
        x = left + rim + slot * width
        word[top + rim : bottom - rim, x : x + width] = letters[CHARACTERS.index(character)]
    color = torch.tensor(COLORS[scene.card], device=still.device).float()[:, None, None]
    still = still * (1 - card) + color * card
    return still * (1 - word) + ink[:, None, None] * word
