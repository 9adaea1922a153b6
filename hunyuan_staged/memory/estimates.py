"""Working memory of denoising, computed from measured figures, which stand here with their sources. In bytes."""

from dataclasses import dataclass, replace

from hunyuan_staged.attention.modes import SPARSE_ATTN_MODE
from hunyuan_staged.geometry import TEMPORAL_RATIO
from hunyuan_staged.memory.budget import GIB

# Stage 2's working memory, in activations (one value of the run's dtype for each token and channel). H100, 720p, bf16,
# fused, flash4 or cuDNN alike: 2.79 GiB at 121 frames and 1.22 at 49 (README, "Measured").
ACTIVATIONS = 6.8
# An odd number of tokens takes no more: 480p, offloaded, 2.16 GiB in all.
ACTIVATIONS_SPARSE = 12.5  # SSTA, before the feed-forward was taken apart from attention's output
ACTIVATIONS_EAGER = 20.6  # not fused: 3.7 GiB at 49 frames, before attention's inputs and output were freed early
# Of several sequence shards: q, k and v packed, sent and received. Not measured.
ACTIVATIONS_EXCHANGE = 6.0

# Stage 1's: 1,108 tokens through a layer of the language model, and the hidden states. H100: 0.2 GiB.
LANGUAGE_WORKING = GIB // 2
# The other encoders, where many jobs have all of them loaded: the glyph encoder 0.9 GiB in float32, SigLIP 0.8 and the
# VAE's encoder 0.4 in float16, and their working memory. Not measured.
KEPT_ENCODERS = 3 * GIB


# -- stage 2 --


@dataclass(frozen=True)
class DenoisingSize:
    """What decides the working memory of a denoising step. channels: the width of the blocks; itemsize: of the dtype.

    kernel: the attention mode that runs. fused: whether a compiler or kernels of our own fuse the blocks. shards: processes
    that a guidance branch's tokens are split over. block: bytes of one block in the run's dtype where it is stored in
    another one, else 0. modulations: bytes of those computed beforehand. kept: activations that a cache keeps on this rank,
    of all guidance branches (CacheSettings.kept). left: the share of heads whose k and v go to all shards (HeadSplit.left).
    """

    video_tokens: int
    text_tokens: int
    channels: int
    itemsize: int
    kernel: str
    fused: bool
    shards: int = 1
    block: int = 0
    modulations: int = 0
    kept: int = 0
    left: float = 0.0

    @property
    def working(self) -> int:
        """Bytes, by the measured activations a token; linear in the tokens, as both measured lengths are."""
        shard = -(-self.video_tokens // self.shards)
        activations = ACTIVATIONS
        if self.kernel == SPARSE_ATTN_MODE:
            activations = ACTIVATIONS_SPARSE
        if not self.fused:
            activations = ACTIVATIONS_EAGER
        if self.shards > 1:
            # Of left heads k and v are sent to all, and come from all; their q stays.
            activations += ACTIVATIONS_EXCHANGE + self.left * (4 * self.shards + 1 - ACTIVATIONS_EXCHANGE)
        tokens = shard + self.text_tokens
        activations += self.kept
        return int(activations * tokens * self.channels * self.itemsize) + self.block + self.modulations


def longest_video(room: int, tokens_a_frame: int, denoising: DenoisingSize) -> int | None:
    """The most frames (4n + 1) whose working memory is at most `room`; None where not even one frame's is."""

    def fits(latent_frames: int) -> bool:
        return replace(denoising, video_tokens=latent_frames * tokens_a_frame).working <= room

    if not fits(1):
        return None
    low, high = 1, 1
    while fits(high * 2):
        low = high = high * 2
    high *= 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return (low - 1) * TEMPORAL_RATIO + 1
