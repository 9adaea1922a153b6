"""docs/clips.png, docs/failures.png and docs/demo.gif anew, from the demo checkpoint: `python docs/pictures.py FOLDER`.

FOLDER takes the videos; those that it has already are not made again. Some four minutes on two CPU cores.
"""

import json
import subprocess
import sys
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
from PIL import Image, ImageDraw, ImageFont

DOCS = Path(__file__).parent
FONT = ImageFont.load_default(11)
WIDTH, HEIGHT = 160, 96  # of the demo's videos
FRAMES = (0, 8, 16, 24, 32)  # of 33, in the sheet

CLIPS = (
    "a red circle moves left over a dark blue background",
    "a green square grows on a black background",
    "a white circle rises over a two-tone dark red and grey background",
    "a blue circle and an orange square drift apart on a black background",
    "a yellow star falls slowly over a black background",
    "on a light blue background a purple triangle moves diagonally down and to the right",
    "a cyan square moves to the right over a brown background",
    'a yellow sign that says "2026", dark blue background',
    'a white card with the text "CAT" on a dark green background',
    "a red triangle shrinks on a grey background",
    "a yellow star slides right on a dark green background",
    'a cyan sign that says "GO", black background',
)
FAILURES = (
    "a purple star goes round in a circle over a grey background",
    "a green triangle goes round in a circle over a two-tone brown and black background",
    "a white star shrinks on a pink background",
)
MOVING = (0, 1, 2, 3, 4, 5, 7, 8)  # clips that the animation shows, four in a row


def make(folder: Path) -> dict[str, np.ndarray]:
    """The video of each prompt as [33, 96, 160, 3], by one command."""
    folder.mkdir(parents=True, exist_ok=True)
    jobs = folder / "jobs.jsonl"
    named = {f"clip{number}": prompt for number, prompt in enumerate(CLIPS + FAILURES)}
    jobs.write_text("".join(json.dumps({"name": name, "prompt": prompt}) + "\n" for name, prompt in named.items()))
    script = ["bash", str(DOCS.parent / "run_staged.sh"), "--jobs", str(jobs), "--output_dir", str(folder)]
    subprocess.run(script, check=True)
    return {prompt: np.asarray(imageio.imread(folder / name / "output_video.mp4")) for name, prompt in named.items()}


def sheet(videos: dict[str, np.ndarray], path: Path, columns: int = 2) -> None:
    """Five frames of each clip at half size, under its words."""
    step, line, row = WIDTH // 2 + 4, 16, HEIGHT // 2 + 18
    cell = len(FRAMES) * step + 10
    image = Image.new("RGB", (columns * cell - 10, -(-len(videos) // columns) * row), "white")
    pen = ImageDraw.Draw(image)
    for number, (words, video) in enumerate(videos.items()):
        x, y = number % columns * cell, number // columns * row
        pen.text((x, y + 1), words, fill="black", font=FONT)
        for slot, frame in enumerate(FRAMES):
            small = Image.fromarray(video[frame]).resize((WIDTH // 2, HEIGHT // 2), Image.Resampling.LANCZOS)
            image.paste(small, (x + slot * step, y + line))
    few = image.quantize(128, method=Image.Quantize.FASTOCTREE, kmeans=2, dither=Image.Dither.NONE)
    few.save(path, optimize=True)


def animation(videos: list[np.ndarray], path: Path, columns: int = 4) -> None:
    """The clips side by side, every other frame."""
    gap = 4
    size = columns * (WIDTH + gap) - gap, -(-len(videos) // columns) * (HEIGHT + gap) - gap
    frames = []
    for index in range(0, len(videos[0]), 2):
        image = Image.new("RGB", size, "white")
        for number, video in enumerate(videos):
            at = number % columns * (WIDTH + gap), number // columns * (HEIGHT + gap)
            image.paste(Image.fromarray(video[index]), at)
        frames.append(image.quantize(64, method=Image.Quantize.FASTOCTREE, kmeans=1, dither=Image.Dither.NONE))
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=125, loop=0, optimize=True)


if __name__ == "__main__":
    made = make(Path(sys.argv[1]))
    sheet({prompt: made[prompt] for prompt in CLIPS}, DOCS / "clips.png")
    sheet({prompt: made[prompt] for prompt in FAILURES}, DOCS / "failures.png")
    animation([made[CLIPS[i]] for i in MOVING], DOCS / "demo.gif")
