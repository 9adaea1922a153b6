"""A whole video through the VAE's encoder by rows over ranks: the bits of one process, in the file that stage 2 reads."""

import numpy as np
import torch
from small_vae import rough_encoder

from hunyuan_staged.files import contract, tensors
from hunyuan_staged.files.video import write_video
from hunyuan_staged.models.vae_encoder import Encoder
from hunyuan_staged.options import DenoiseOptions
from hunyuan_staged.parallel.world import World
from hunyuan_staged.pipeline import input_video, vae_encoding
from hunyuan_staged.pipeline.opening import open_recorded
from hunyuan_staged.run_options import DEMO_CHECKPOINT
from hunyuan_staged.runtime.progress import Reporter


def draw_video(size: tuple[int, int, int]) -> torch.Tensor:
    return torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(3)) * 2 - 1


# Rows of latents, frames, latent frames of a chunk. Four latents wide: a product of no more than three rows, which no size
# that is published comes to, goes another way on a CPU, with another rounding.
CASES = ((11, 13, 2), (5, 5, 1), (3, 1, 1))


def encode_as(world: World, sizes: tuple[int, ...]) -> dict[tuple[int, int], torch.Tensor]:
    """Encode each case as the first n of these processes would, for each n; rank 0 returns what it got."""
    results = {}
    for rows, frames, chunk in CASES:
        size = (frames, 16 * rows, 64)
        for count in sizes:
            if world.rank < count:
                part = World(world.rank, count, world.device)
                video = draw_video(size) if world.is_main else None
                found = vae_encoding.encode_video(rough_encoder().to(world.device), video, size, part, chunk)
                assert (found is None) == (world.rank > 0)
                if found is not None:
                    results[rows, count] = found
    return results


def test_any_number_of_ranks_gives_the_same_bits(ranks):
    """Rows that do not divide, one row each, more ranks than rows, and a picture."""
    sizes = ranks.up_to((1, 2, 3, 4, 8))
    results = ranks.run(sizes[-1], encode_as, sizes)[0]
    assert list(results) == [(rows, count) for rows, *_ in CASES for count in sizes]
    for rows, frames, chunk in CASES:
        video = draw_video((frames, 16 * rows, 64))
        wanted = Encoder(rough_encoder().to(ranks.device))(video, chunk).chunk(2, dim=1)[0]
        assert wanted.shape == (1, 32, (frames - 1) // 4 + 1, rows, 4) and wanted.std() > 0.01
        for count in sizes:
            assert ranks.same(results[rows, count], wanted), f"{rows} rows, {count} ranks"


class Log(Reporter):
    """Keeps what is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def info(self, text: str) -> None:
        self.lines.append(text)


def write(world: World, folder: str, clip: str) -> list[str]:
    """Write a clip's latents as stage 2 does; what the log says."""
    report = Log()
    options = DenoiseOptions(input_dir=folder, input_video=clip, super_resolution="demo_hd")
    video = input_video.look_at(options, report)
    for _ in range(2):
        input_video.write_latents(
            video, options, lambda: open_recorded(str(DEMO_CHECKPOINT), {}, report), world, report
        )
    return report.lines


def test_stage_2_encodes_a_video_by_rows(tmp_path, ranks):
    clip, found, lines = tmp_path / "clip.mp4", {}, {}
    frames = np.random.default_rng(0).integers(0, 255, (9, 80, 160, 3), np.uint8)
    write_video(clip, frames, 12, 80, 160)
    for count in (1, 2):
        folder = tmp_path / str(count)
        folder.mkdir()
        lines[count] = ranks.run(count, write, str(folder), str(clip))[0]
        found[count] = tensors.load_latents(folder, contract.INPUT)
    one, two = (found[count][0].float() for count in (1, 2))
    # On GPUs in bf16, by kernels that are chosen for other heights.
    assert torch.equal(one, two) if ranks.most is None else (one - two).norm() < 0.02 * one.norm()
    assert found[1][1] == found[2][1]
    assert found[2][0].shape == (1, 32, 3, 5, 10)
    how = [next(line for line in told if "is encoded" in line) for told in lines.values()]
    assert how[0].startswith(f"{clip} is encoded 4 frames at a time: ")
    assert how[1].startswith(f"{clip} is encoded 4 frames at a time, rows over 2 processes: ")
    assert how[1].endswith(" MiB each")
    for told in lines.values():
        assert told[-1].endswith("is there, made from the same: taken as it is")
