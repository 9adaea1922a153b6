"""The options of stage 3: see options.py. Knows no torch."""

from dataclasses import dataclass
from pathlib import Path

from hunyuan_staged import geometry
from hunyuan_staged.decoding import tiling
from hunyuan_staged.errors import InputError
from hunyuan_staged.files import contract, encoding
from hunyuan_staged.files.atomic import check_output_dir
from hunyuan_staged.flags import flag
from hunyuan_staged.run_options import (
    DEFAULT_FPS,
    DEFAULT_OUTPUT_DIR,
    FILES,
    MAX_FPS,
    MAX_NAME_BYTES,
    STRICT,
    TILES,
    VIDEO,
    GroupOptions,
    check_part_files,
)
from hunyuan_staged.versions import SUPER_RESOLUTION


@dataclass(frozen=True, kw_only=True)
class DecodeOptions(GroupOptions):
    """Stage 3: video latents → mp4, by the VAE's decoder."""

    input_dir: str = flag("folder that stage 2 wrote (default: %(default)s)", group=FILES, default=DEFAULT_OUTPUT_DIR)
    model_path: str | None = flag("model folder or hub id (default: the one that stage 1 recorded)", group=FILES)
    vae: str | None = flag(
        "one safetensors file instead of the model's VAE (default: the one that stage 1 recorded, if any)",
        group=FILES,
        metavar="FILE",
    )
    latents: str | None = flag(
        "which to decode, the run's own or those of super resolution (default: the largest in --input_dir)",
        group=FILES,
        choices=(contract.BASE, *SUPER_RESOLUTION),
    )
    output_video: str | None = flag(
        "the .mp4 or .gif to write (default: in --input_dir output_video.mp4, output_video_720p.mp4 and so on)",
        group=FILES,
    )
    save_frames: bool = flag("also write stage3_frames.safetensors to --input_dir", group=FILES, default=False)
    strict: bool = flag(STRICT, group=FILES, default=False)
    fps: float | None = flag(f"frames per second (default: --input_video's, else {DEFAULT_FPS})", group=VIDEO)
    encoder: str = flag(
        "H.264 encoder of ffmpeg; h264_nvenc needs a GPU with one (default: %(default)s)",
        group=VIDEO,
        default=encoding.ENCODERS[0],
        choices=encoding.ENCODERS,
    )
    encoder_preset: str | None = flag(
        "the encoder's preset (default: x264's slowest from medium on that keeps up with decoding)", group=VIDEO
    )
    crf: int = flag(
        f"loss of the mp4, 0 (none) to {encoding.MAX_CRF} (default: %(default)s)", group=VIDEO, default=encoding.CRF
    )
    tile_size: int | None = flag(
        "decode in tiles with sides of so many px (default: whole frames; "
        f"{tiling.DEFAULT_TILE_SIZE} or {tiling.SMALL_TILE_SIZE} where they do not fit)",
        group=TILES,
    )
    tile_overlap: float = flag(
        f"share of a tile that blends with its neighbour, 0 to {tiling.MAX_OVERLAP} (default: %(default)s)",
        group=TILES,
        default=tiling.DEFAULT_TILE_OVERLAP,
    )
    disable_tiling: bool = flag(
        "refuse what does not fit in whole frames, rather than decode it in tiles", group=TILES, default=False
    )
    disable_tile_parallelism: bool = flag(
        "the first process decodes alone, the others wait", group=TILES, default=False
    )

    @property
    def video_encoder(self) -> str:
        """The encoder that the video's file goes through."""
        return encoding.GIF if Path(self.output_video or "").suffix == f".{encoding.GIF}" else self.encoder

    def check(self) -> None:
        super().check()
        check_part_files(self)
        if self.fps is not None and not 1 <= self.fps <= MAX_FPS:
            raise InputError(f"{self.fps:g} is outside 1 to {MAX_FPS}", option="fps")
        encoding.check_encoding(encoding.Encoding(self.encoder, self.encoder_preset, self.crf))
        if self.disable_tiling and self.tile_size is not None:
            raise InputError("and --tile_size contradict each other; give one of them", option="disable_tiling")
        if not self.disable_tiling:
            size = tiling.DEFAULT_TILE_SIZE if self.tile_size is None else self.tile_size
            tiling.check_tiling(size, self.tile_overlap, geometry.SPATIAL_RATIO)
        if self.output_video is not None:
            self._check_output_video(self.output_video)
            for name in ("jobs", "seeds", "watch"):
                if getattr(self, name) is not None:
                    raise InputError(f"names one video, and --{name} makes many", option="output_video")

    def _check_output_video(self, name: str) -> None:
        target = Path(name)
        if target.suffix not in encoding.SUFFIXES or target.is_dir():
            raise InputError(f"{name} is not the name of an .mp4 file or a .gif", option="output_video")
        if len(target.name.encode()) > MAX_NAME_BYTES:
            raise InputError(f"{name} is a name of more than {MAX_NAME_BYTES} bytes", option="output_video")
        check_output_dir("--output_video", target.parent)
        # The run makes its own folder.
        if not target.parent.exists() and target.parent.resolve() != Path(self.input_dir).resolve():
            raise InputError(f"{name}: {target.parent} does not exist", option="output_video")
