"""Two jobs of one process, from Python: the second reads nothing of the first's."""

import pytest
import torch
from folders import embed
from ranks import run_ranks

from hunyuan_staged.files.tensors import load_latents
from hunyuan_staged.options import DenoiseOptions
from hunyuan_staged.parallel.world import World
from hunyuan_staged.pipeline import denoising, denoising_records, jobs
from hunyuan_staged.pipeline.common import free_memory
from hunyuan_staged.runtime.signals import Interrupts
from hunyuan_staged.sampling import callbacks
from hunyuan_staged.sampling.state import StateSaver

SEEDS = (3, 4)


def two_jobs(world: World, folder: str, outputs: list[str], cfg_parallel: str = "auto") -> list[torch.Tensor]:
    """Denoise with two seeds, each as the script does it, on one loaded transformer, saving a state on the way."""
    found = []
    denoiser = None
    for seed, output in zip(SEEDS, outputs, strict=True):
        options = DenoiseOptions(
            input_dir=folder,
            output_dir=output,
            seed=seed,
            video_length=5,
            num_inference_steps=3,
            checkpoint_every=1,
            cfg_parallel=cfg_parallel,
        )
        setup = denoising.resolve(options, jobs.read(options), world)
        identity = denoising_records.identity(setup)
        saver = StateSaver(output, identity, steps=3, every=1, world=world)
        start = saver.load(setup.shape, resume=True)
        denoiser = denoiser or setup.load(setup.plan(free_memory(world)))
        with Interrupts() as interrupts:
            denoised = denoiser.run(setup, start, callbacks.watching(saver, interrupts))
        assert denoised.steps == (3, 0)
        if world.is_main:
            denoising_records.write(setup, denoised, identity.digest())
        world.barrier("written")
        found.append(denoised.latents)
    return found


@pytest.mark.parametrize(("size", "cfg_parallel"), [(2, "on"), (2, "off"), (3, "auto")])
def test_two_jobs_on_several_processes_give_what_one_gives(tmp_path, tiny_official, ranks, size, cfg_parallel):
    """The model has 3 heads: over 2 shards one is left, which each attends with for its own tokens."""
    folder = str(embed(tmp_path / "in", tiny_official))
    alone = two_jobs(ranks.alone(), folder, [str(tmp_path / "a"), str(tmp_path / "b")])
    assert (alone[0] - alone[1]).abs().max() > 0.1
    outputs = [str(tmp_path / "c"), str(tmp_path / "d")]
    alone = [latents.cpu() for latents in alone]
    for rank in ranks.run(size, two_jobs, folder, outputs, cfg_parallel):
        for latents, reference in zip(rank, alone, strict=True):
            # Sums over shards are in another order.
            torch.testing.assert_close(latents, reference, rtol=1e-3, atol=1e-3)
    for output, reference in zip(outputs, alone, strict=True):
        torch.testing.assert_close(load_latents(output)[0], reference, rtol=1e-3, atol=1e-3)


def words(world: World) -> list[list[str]]:
    said = [world.all_gather_text("word", f"{time} {world.rank}") for time in range(3)]
    world.barrier("word")
    return said


def test_a_name_serves_as_often_as_one_likes():
    """The second use of a name once got the first one's words, and waited for nobody."""
    wanted = [[f"{time} {rank}" for rank in range(3)] for time in range(3)]
    assert run_ranks(3, words) == [wanted] * 3
