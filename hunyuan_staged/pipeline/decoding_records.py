"""What a video is known by: all that determines it."""

from pathlib import Path

from hunyuan_staged.files import contract, provenance
from hunyuan_staged.pipeline.decode_jobs import video_path
from hunyuan_staged.pipeline.decoding import DecodeSetup

OPTIONS = ("encoder", "encoder_preset", "crf", "tile_size", "tile_overlap", "disable_tiling")


def made_from(setup: DecodeSetup) -> str:
    """The hash of all that determines the video. Reads samples of the weights."""
    about = {name: getattr(setup.options, name) for name in OPTIONS}
    about["fps"] = setup.job.fps
    source = {contract.LATENTS_HASH: setup.job.latents_hash, "weights": setup.model.fingerprint(["vae"])}
    return provenance.digest({**about, **source, "dtype": str(setup.dtype)})


def is_written(setup: DecodeSetup, made_from: str) -> bool:
    """Whether the video of this hash is there, as the config says, with the frames where they are asked for."""
    resolution = setup.job.resolution
    path = video_path(setup.options, resolution)
    frames = Path(setup.options.input_dir) / contract.at_resolution(contract.FRAMES_FILE, resolution)
    there = path.is_file() and (frames.is_file() or not setup.options.save_frames)
    return there and setup.job.config.get(contract.VIDEO_MADE_FROM) == made_from
