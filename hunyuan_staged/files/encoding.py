"""How frames are encoded: encoders, presets, quality. Knows no frames."""

from dataclasses import dataclass

from hunyuan_staged.errors import InputError

CRF = 17  # visually lossless for x264, about a fifth of the size of truly lossless
MAX_CRF = 51
SUFFIXES = (".mp4", ".gif")
# What an encoder calls its presets, the slowest first, of x264 with the frames of 1280x720 that one core encodes in a
# second (x264 of imageio-ffmpeg 0.6, CRF 17, a moving test picture with grain, 2026-11-28).
X264_SPEEDS = {
    "veryslow": 1.5,
    "slower": 2.5,
    "slow": 6.0,
    "medium": 9.3,
    "fast": 13.4,
    "faster": 19.0,
    "veryfast": 28.0,
}
X264_SPEEDS |= {"superfast": 36.0, "ultrafast": 100.0}
PRESETS = {"libx264": tuple(X264_SPEEDS), "h264_nvenc": ("p7", "p6", "p5", "p4", "p3", "p2", "p1")}
ENCODERS = tuple(PRESETS)
GIF = "gif"  # the encoder of that name
DECODED_A_SECOND = 25.0  # frames of 1280x720 on an H100
X264_CORES = 16  # more make x264 hardly faster


@dataclass(frozen=True)
class Encoding:
    """How frames become a file.

    encoder: one of ENCODERS; preset: one of PRESETS[encoder], None for the encoder's own default; crf: 0 is lossless;
    comment: what an mp4's comment tag says. A gif has none of them.
    """

    encoder: str = ENCODERS[0]
    preset: str | None = None
    crf: int = CRF
    comment: str = ""


DEFAULT_ENCODING = Encoding()


def default_preset(cores: int, gpus: int) -> str:
    """x264's slowest preset from medium on that keeps up with decoding on so many GPUs; each of them keeps a core busy.

    A CPU (gpus 0) decodes so slowly that medium always does.
    """
    usable = min(max(1, cores - gpus), X264_CORES)
    names = PRESETS["libx264"][PRESETS["libx264"].index("medium") : -1]  # ultrafast has no use: twice the size
    return next((name for name in names if usable * X264_SPEEDS[name] >= gpus * DECODED_A_SECOND), names[-1])


def check_encoding(encoding: Encoding) -> None:
    """Refuse, with the allowed values, what no encoder takes."""
    if encoding.encoder not in ENCODERS:
        raise InputError(f"{encoding.encoder} is none of {', '.join(ENCODERS)}", option="encoder")
    presets = PRESETS[encoding.encoder]
    if encoding.preset is not None and encoding.preset not in presets:
        allowed = ", ".join(reversed(presets))
        raise InputError(f"{encoding.preset} is none of {encoding.encoder}'s: {allowed}", option="encoder_preset")
    if not 0 <= encoding.crf <= MAX_CRF:
        raise InputError(f"{encoding.crf} is outside 0 to {MAX_CRF}", option="crf")
