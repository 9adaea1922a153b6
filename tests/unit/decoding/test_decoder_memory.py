"""What the full-size decoder and encoder hold at most, counted on tensors without data, against what is planned."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hunyuan_staged.decoding import planning
from hunyuan_staged.errors import InputError
from hunyuan_staged.memory.budget import FreeMemory
from hunyuan_staged.models import vae_decoder, vae_encoder
from hunyuan_staged.models.vae_modules import VaeConfig, VaeDecoder, VaeEncoder
from hunyuan_staged.pipeline import vae_encoding

GIB = 2**30
CONFIG = {"latent_channels": 32, "spatial_compression_ratio": 16, "temporal_compression_ratio": 4}


class Held(TorchDispatchMode):
    """Counts the bytes of the storages that live, and the most that ever lived at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: weakref.WeakSet = weakref.WeakSet()

    def freed(self, size: int) -> None:
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self.known:
                storage = tensor.untyped_storage()
                self.known.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.freed, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result


def norm_silu_pad(x, gamma, before, *, keep=True, roll=False):
    """What the kernel allocates."""
    product = x.take()[0] if isinstance(x, vae_decoder.PendingSum) else x
    frames, height, width, channels = product.shape
    return product.new_empty(frames + 2, height + 2, width + 2, channels), product if keep else None


def spread(product, bias, x, *, time, group, repeats):
    frames, height, width, _ = product.shape
    return product.new_empty(frames * time, 2 * height, 2 * width, x.shape[-1] * repeats // (time * 4))


def convolve(inputs, weight):
    frames, height, width, _ = inputs.shape
    return inputs.new_empty(frames - 2, height - 2, width - 2, weight.shape[0])


def peak(height: int, width: int, latent_frames: int, chunk: int, piece: int | None) -> int:
    with torch.device("meta"):
        decoder = vae_decoder.Decoder(VaeDecoder(VaeConfig()).half().requires_grad_(False))
        held = Held()
        with held:
            values = torch.empty(latent_frames, height, width, 1024, dtype=torch.float16)
            for _ in decoder.chunks(values, chunk, frames_per_piece=piece):
                pass
    return held.peak


def encoder_peak(size: tuple[int, int, int], chunk: int) -> int:
    with torch.device("meta"):
        encoder = vae_encoder.Encoder(VaeEncoder(VaeConfig()).half().requires_grad_(False))
        video = torch.empty(1, 3, *size, dtype=torch.float16)
        held = Held()
        with held:
            encoder(video, chunk)
    return held.peak


@pytest.fixture(autouse=True)
def allocations(monkeypatch):
    for name, instead in (("norm_silu_pad", norm_silu_pad), ("spread", spread), ("_convolve", convolve)):
        monkeypatch.setattr(vae_decoder, name, instead)
    monkeypatch.setattr(vae_decoder, "frame_causal_attention", lambda query, *_, **__: torch.empty_like(query))


@pytest.mark.parametrize(
    ("height", "width", "chunk", "piece"),
    [(45, 80, 1, None), (45, 80, 2, None), (45, 80, 2, 4), (45, 80, 1, 2), (45, 80, 4, 4), (67, 119, 1, 2)],
)
def test_the_plan_is_what_the_decoder_holds(height, width, chunk, piece):
    latent_frames = 3 * chunk
    held = peak(height, width, latent_frames, chunk, piece)
    size = (4 * (latent_frames - 1) + 1, 16 * height, 16 * width)
    assert planning.whole_working(chunk, 1, 1, size, CONFIG, 2, piece) == pytest.approx(held, rel=0.002)


def test_pieces_bring_720p_down_to_12_gib():
    """Beside 1.6 GiB of weights."""
    whole, pieces = (peak(45, 80, 6, 2, piece) / GIB for piece in (None, 4))
    assert (whole, pieces) == pytest.approx((11.71, 10.39), abs=0.01)


@pytest.mark.parametrize("size", [(121, 720, 1280), (121, 480, 848), (25, 1072, 1904)])
def test_the_plan_is_what_the_encoder_holds(size):
    held = encoder_peak(size, vae_encoding.LATENT_FRAMES_PER_CHUNK)
    planned = vae_encoding.encoder_working(size, CONFIG, 2)
    assert held <= planned <= 1.1 * held


def test_a_video_of_720p_is_encoded_in_12_gib():
    weights = 2 * sum(parameter.numel() for parameter in VaeEncoder(VaeConfig()).parameters())
    plan = vae_encoding.plan_encoding((121, 720, 1280), CONFIG, weights, 2, FreeMemory(12 * GIB, GIB))
    assert plan.total / GIB == pytest.approx(9.1, abs=0.1)
    message = (
        r"^--input_video encoding 121 frames of 1280x720 needs 9\.\d GiB of GPU memory "
        r"\(weights 743 MiB, working memory 8\.\d GiB\); free: GPU 8\.0 GiB, host 1\.0 GiB\. "
        r"What would help: a GPU with more memory, a --super_resolution"
    )
    with pytest.raises(InputError, match=message):
        vae_encoding.plan_encoding((121, 720, 1280), CONFIG, weights, 2, FreeMemory(8 * GIB, GIB))
    assert vae_encoding.plan_encoding((121, 720, 1280), CONFIG, weights, 2, FreeMemory(None, GIB)) == plan
