"""Whole frames: the same bits by rows over ranks, in bands, and in one piece; what is sent, and what is refused."""

import pytest
import torch
from ranks import run_ranks
from small_vae import ALONE, CONFIG, decode, draw_latents, rough_decoder, tiny_decoder

from hunyuan_staged.decoding import frames, whole
from hunyuan_staged.decoding.frames import DecodeContext
from hunyuan_staged.decoding.planning import Decoding
from hunyuan_staged.errors import InputError
from hunyuan_staged.models.vae_decoder import Decoder
from hunyuan_staged.parallel.world import World


@pytest.mark.parametrize("latent_frames_per_chunk", [1, 3])
def test_one_piece_is_the_decoder(latent_frames_per_chunk):
    latents = draw_latents(3, 5, 7)
    video = decode(latents, latent_frames_per_chunk=latent_frames_per_chunk)
    wanted = torch.cat(list(Decoder(rough_decoder())(latents / CONFIG["scaling_factor"], latent_frames_per_chunk)))
    assert torch.equal(video.floats, (wanted / 2 + 0.5).clamp(0, 1))
    assert torch.equal(video.frames, (video.floats * 255 + 0.5).to(torch.uint8))
    assert video.frames.float().std() > 1


@pytest.mark.parametrize("latent_frames_per_chunk", [1, 2])
@pytest.mark.parametrize("bands", [2, 3, 7])
def test_bands_give_the_bits_of_one_piece(bands, latent_frames_per_chunk):
    """High enough that the middle bands of three see neither border, and see them crop."""
    latents = draw_latents(3, 41, 2)
    one, cut = (
        decode(latents, latent_frames_per_chunk=latent_frames_per_chunk, bands=n, decoder=rough_decoder(layers=0))
        for n in (1, bands)
    )
    assert torch.equal(cut.floats, one.floats)
    assert torch.equal(cut.frames, one.frames)


@pytest.mark.parametrize("bands", [1, 2])
@pytest.mark.parametrize("frames_per_piece", [1, 3])
def test_pieces_give_the_bits_of_whole_chunks(bands, frames_per_piece):
    """Also where the first chunk, of 5 frames, and the others, of 8, do not divide."""
    latents, decoder = draw_latents(5, 6, 3), rough_decoder()
    one, cut = (
        decode(latents, latent_frames_per_chunk=2, bands=bands, frames_per_piece=n, decoder=decoder)
        for n in (None, frames_per_piece)
    )
    assert torch.equal(cut.floats, one.floats)


def test_frames_leave_while_the_next_are_decoded(monkeypatch):
    made, chunk = [], Decoder._chunk
    monkeypatch.setattr(Decoder, "_chunk", lambda *args: made.append(0) or chunk(*args))
    how = Decoding(None, 1, "", {}, 2)
    seen = [
        (len(batch.frames), len(made))
        for batch in whole.decode_whole(tiny_decoder(), draw_latents(3, 6, 3), CONFIG, how, DecodeContext(ALONE))
    ]
    # The last band, one chunk behind the decoder.
    assert seen == [(1, 3 + 2), (4, 3 + 3), (4, 3 + 3)]


def test_frames_that_come_whole_do_not_stay_on_the_device(monkeypatch):
    """A long video's frames took more there than its latents."""
    buffers, init = [], whole.FrameBuffer.__init__
    monkeypatch.setattr(whole.FrameBuffer, "__init__", lambda self, *args: buffers.append(self) or init(self, *args))
    for bands in (1, 2):
        decode(draw_latents(3, 6, 3), latent_frames_per_chunk=1, bands=bands)
    one, cut = buffers
    assert "frames" not in vars(one) and not one._whole
    assert vars(cut)["frames"].shape == (9, 96, 48, 3)


# What is refused


@pytest.mark.parametrize("bands", [1, 2])
def test_nan_is_not_a_black_video(bands):
    latents = draw_latents(3, 5, 4)
    latents[0, 0, 1, 4, 3] = float("nan")
    with pytest.raises(FloatingPointError, match=r"^frames 1 to 4 decoded to NaN or Inf in torch\.float32$"):
        decode(latents, latent_frames_per_chunk=1, bands=bands)


def test_what_helps_against_float16_is_said():
    checks = frames.FiniteChecks(torch.float16)
    checks.add("frames 0 to 4", torch.tensor(False))
    told = (
        r'^frames 0 to 4 decoded to NaN or Inf in torch\.float16; "force_upcast": true in the config\.json of the VAE'
    )
    with pytest.raises(FloatingPointError, match=told):
        checks.read()


def refused(world: World) -> str:
    latents = draw_latents(2, 5, 4)
    latents[0, 0, 0, 4, 3] = float("nan")  # the last rank's; its NaN stays away from rank 0's pixels by attention alone
    try:
        decode(latents, world=world, latent_frames_per_chunk=2)
    except FloatingPointError as error:
        return str(error)
    return ""


def test_rank_0_hears_of_another_ranks_nan(monkeypatch):
    assert run_ranks(2, refused) == ["frames 0 to 4 decoded to NaN or Inf in torch.float32", ""]


def test_latents_of_another_vae():
    with pytest.raises(InputError, match=r"latents \[1, 16, 2, 4, 4\] do not fit this VAE"):
        decode(torch.zeros(1, 16, 2, 4, 4))


# Out of memory


def failing_at(monkeypatch, rows: int, after: int) -> None:
    """A device that holds pictures of more than `rows` rows of px only for the first `after` chunks."""
    made, chunk = [], Decoder._chunk

    def call(self, *args):
        frames = chunk(self, *args)
        made.append(frames.shape[1] > rows)
        if sum(made) > after and made[-1]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
        return frames

    monkeypatch.setattr(Decoder, "_chunk", call)


@pytest.mark.parametrize("after", [0, 2])
def test_frames_that_do_not_fit_are_decoded_in_bands(monkeypatch, after):
    latents, said = draw_latents(4, 8, 2), []
    wanted = decode(latents, latent_frames_per_chunk=1)
    failing_at(monkeypatch, 32, after)
    video = decode(latents, latent_frames_per_chunk=1, warn=said.append)
    lines = [f"out of memory: decoded again in {n} bands of rows" for n in (2, 4)]
    assert said == [f"{line} (CUDA out of memory. Tried to allocate 2.00 GiB.)" for line in lines]
    assert torch.equal(video.floats, wanted.floats), "nothing is lost, and nothing comes twice"
    assert torch.equal(video.frames, wanted.frames)


def test_memory_that_runs_out_for_good_is_one_line(monkeypatch):
    failing_at(monkeypatch, 0, 0)
    with pytest.raises(
        InputError,
        match=r"^out of memory with whole frames in 4 bands of rows \(CUDA out of memory\. Tried to allocate 2\.00 GiB"
        r"\.\); the latents are on disk: run this stage again with --tile_size 128, or where more memory is free$",
    ):
        decode(draw_latents(2, 4, 2), latent_frames_per_chunk=1)
