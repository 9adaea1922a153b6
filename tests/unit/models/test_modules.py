"""Our modules against diffusers', which are the reference: names, shapes, and the numbers of every forward they have."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, golden_weights
from safetensors.torch import load_file

from hunyuan_staged.models.modules import TransformerConfig, TransformerModules
from hunyuan_staged.models.vae_encoder import Encoder
from hunyuan_staged.models.vae_modules import Vae, VaeConfig
from hunyuan_staged.weights.key_maps import VAE_MAP, to_diffusers

TINY = {
    "num_attention_heads": 3,
    "attention_head_dim": 16,
    "num_layers": 2,
    "text_embed_dim": 24,
    "text_embed_2_dim": 20,
    "image_embed_dim": 12,
    "rope_axes_dim": [4, 6, 6],
}
TRANSFORMERS = {
    "published": {},
    "tiny": TINY,
    "meanflow": TINY | {"use_meanflow": True},
    "super resolution": {"in_channels": 98, "use_meanflow": True},
    "patches": TINY | {"patch_size": 2, "patch_size_t": 2, "in_channels": 9, "out_channels": None, "mlp_ratio": 2.5},
    "one refiner layer": TINY | {"num_refiner_layers": 1, "task_type": "t2v", "target_size": 960},
}
VAES = {
    "published": {},
    "tiny": {"block_out_channels": [64, 64, 64, 128, 128], "layers_per_block": 1},
    "own widths": {
        "latent_channels": 16,
        "block_out_channels": [32, 32, 64, 64],
        "spatial_compression_ratio": 8,
        "temporal_compression_ratio": 2,
        "downsample_match_channel": False,
        "upsample_match_channel": False,
    },
}


def shapes(model: torch.nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    """In the order in which files hold them."""
    return [(name, tuple(tensor.shape)) for name, tensor in model.state_dict().items()]


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_the_transformers_weights_are_diffusers(name):
    from diffusers import HunyuanVideo15Transformer3DModel

    with torch.device("meta"):
        ours = TransformerModules(TransformerConfig(**TRANSFORMERS[name]))
        reference = HunyuanVideo15Transformer3DModel(**TRANSFORMERS[name])
    assert shapes(ours) == shapes(reference)
    kept = {key: value for key, value in reference.config.items() if not key.startswith("_")}
    assert vars(ours.config) == kept


@pytest.mark.parametrize("name", VAES)
def test_the_vaes_weights_are_diffusers(name):
    from diffusers import AutoencoderKLHunyuanVideo15

    with torch.device("meta"):
        ours = Vae(VaeConfig(**VAES[name]))
        reference = AutoencoderKLHunyuanVideo15(**VAES[name])
    assert shapes(ours) == shapes(reference)
    kept = {key: value for key, value in reference.config.items() if not key.startswith("_")}
    assert vars(ours.config) == kept
    attributes = {"repeat", "repeats", "add_temporal_upsample", "add_temporal_downsample"}
    for module, other in zip(ours.modules(), map(reference.get_submodule, dict(ours.named_modules())), strict=True):
        assert {key: value for key, value in vars(module).items() if key in attributes} == {
            key: value for key, value in vars(other).items() if key in attributes
        }


@pytest.fixture(scope="module", params=["tiny", "own widths"])
def vaes(request):
    """A VAE with drawn weights, ours and diffusers'."""
    from diffusers import AutoencoderKLHunyuanVideo15

    torch.manual_seed(0)
    reference = AutoencoderKLHunyuanVideo15(**VAES[request.param]).eval().requires_grad_(False)
    for parameter in reference.parameters():
        if parameter.ndim != 5:  # gammas and biases, which are ones and nearly nothing at first
            parameter.add_(torch.randn(parameter.shape) * 0.3)
    ours = Vae(VaeConfig(**VAES[request.param])).requires_grad_(False)
    ours.load_state_dict(reference.state_dict())
    return ours, reference


@pytest.mark.parametrize("frames", [1, 5, 9])
def test_the_training_forwards_are_diffusers(vaes, frames):
    """Attention sums each frame apart, and diffusers builds its mask for a batch of one: hence not bits, and one by one."""
    ours, reference = vaes
    clips = drawn(2, 3, frames, 32, 48)
    moments = ours.encoder(clips)
    mode = moments.chunk(2, dim=1)[0]
    decoded = ours.decoder(mode)
    for row in range(2):
        one = slice(row, row + 1)
        torch.testing.assert_close(moments[one], reference.encoder(clips[one]), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(decoded[one], reference.decoder(mode[one]), rtol=1e-5, atol=1e-5)


def test_the_training_forwards_have_gradients(vaes):
    ours = copy.deepcopy(vaes[0]).requires_grad_(True)
    loss = ours.decoder(ours.encoder(drawn(1, 3, 9, 16, 16)).chunk(2, dim=1)[0]).square().mean()
    loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in ours.parameters())


@pytest.mark.parametrize("frames", [1, 5, 17])
def test_the_encoder_gives_diffusers_posterior_and_its_mode(vaes, frames):
    ours, reference = vaes
    video = drawn(1, 3, frames, 32, 48)
    moments = Encoder(copy.deepcopy(ours.encoder))(video)
    posterior = reference.encode(video).latent_dist
    torch.testing.assert_close(moments, posterior.parameters, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moments.chunk(2, dim=1)[0], posterior.mode(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("latent_frames_per_chunk", [1, 2, 3])
def test_the_encoder_gives_the_same_in_chunks(vaes, latent_frames_per_chunk):
    """Also a last chunk that is shorter. One thread, one kernel for any number of frames: the same bits."""
    encoder = Encoder(copy.deepcopy(vaes[0].encoder))
    video = drawn(1, 3, 17, 32, 48)
    assert torch.equal(encoder(video, latent_frames_per_chunk), encoder(video))


def test_an_encoded_frame_sees_no_later_one(vaes):
    encoder = Encoder(copy.deepcopy(vaes[0].encoder))
    video = drawn(1, 3, 9, 32, 48)
    later = video.clone()
    later[:, :, 5:] += 1
    known = encoder(video[:, :, :5]).shape[2]
    before, after = encoder(video), encoder(later)
    assert torch.equal(before[:, :, :known], after[:, :, :known])
    assert not torch.equal(before[:, :, known], after[:, :, known])


def test_the_encoder_matches_the_official_one(golden_folder):
    reference = load_file(golden_folder / "vae_5x7.safetensors")
    vae = Vae(VaeConfig(block_out_channels=(32, 32, 64, 64, 64), layers_per_block=1))
    vae.load_state_dict(to_diffusers(golden_weights(golden_folder / "vae_shapes.json"), VAE_MAP))
    mode = Encoder(vae.encoder)(reference["image"]).chunk(2, dim=1)[0]
    assert (mode - reference["encoded_mode"]).norm() / reference["encoded_mode"].norm() < 1e-5


@pytest.mark.parametrize("shape", [(4, 32, 48), (5, 33, 48), (5, 32, 40)])
def test_a_video_that_makes_no_whole_latents_is_refused(shape):
    encoder = Encoder(Vae(VaeConfig(**VAES["tiny"])).encoder)
    frames, height, width = shape
    message = rf"{frames} frames of {height}x{width}; allowed: 4n \+ 1 frames, sides of 16n"
    with pytest.raises(ValueError, match=message):
        encoder(torch.zeros(1, 3, *shape))


def test_what_no_published_model_has_is_refused():
    with pytest.raises(ValueError, match="qk_norm is 'layer_norm'; allowed: 'rms_norm'"):
        TransformerConfig(qk_norm="layer_norm")
    with pytest.raises(TypeError, match="guidance_embeds"):
        TransformerConfig(guidance_embeds=True)
    with pytest.raises(TypeError, match="shift_factor"):
        VaeConfig(shift_factor=0.1)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def pair(request):
    """A meanflow transformer with drawn weights, ours and diffusers'."""
    from diffusers import HunyuanVideo15Transformer3DModel

    torch.manual_seed(0)
    reference = HunyuanVideo15Transformer3DModel(**TRANSFORMERS["meanflow"])
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    reference = reference.to(request.param).eval().requires_grad_(False)
    ours = TransformerModules(TransformerConfig(**TRANSFORMERS["meanflow"])).to(request.param).requires_grad_(False)
    ours.load_state_dict(reference.state_dict())
    return ours, reference


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def test_embedders_give_diffusers_bits(pair):
    """The same operations in the same order, hence equal and not only close; so in half precision, too."""
    ours, reference = pair
    dtype = ours.proj_out.weight.dtype
    timestep, later = torch.tensor([999.0, 3.25]), torch.tensor([871.5, 0.0])
    embed = reference.time_embed
    wanted = embed.timestep_embedder(embed.time_proj(timestep).to(dtype))
    assert torch.equal(ours.time_embed(timestep), wanted)
    wanted = wanted + embed.timestep_embedder_r(embed.time_proj_r(later).to(dtype))
    assert torch.equal(ours.time_embed(timestep, later), wanted)

    glyphs, image = drawn(2, 7, 20, dtype=dtype), drawn(2, 5, 12, dtype=dtype)
    assert torch.equal(ours.context_embedder_2(glyphs), reference.context_embedder_2(glyphs))
    assert torch.equal(ours.image_embedder(image), reference.image_embedder(image))
    latents = drawn(2, 65, 2, 3, 4, dtype=dtype)
    assert torch.equal(ours.x_embedder(latents), reference.x_embedder(latents))


def test_the_refiner_gives_diffusers_bits(pair):
    ours, reference = pair
    language = drawn(2, 6, 24, dtype=ours.proj_out.weight.dtype)
    timestep = torch.tensor([999.0, 3.25])
    wanted = reference.context_embedder(language, timestep)
    out = ours.context_embedder(language, timestep, language.mean(dim=1))
    assert out.shape == (2, 6, 48)
    assert torch.equal(out, wanted)


def test_a_masked_token_has_no_part_in_the_refiner(pair):
    ours, _ = pair
    language = drawn(2, 6, 24, dtype=ours.proj_out.weight.dtype)
    mask = (torch.arange(6) < 4).expand(2, 6)
    timestep, pooled = torch.tensor([999.0, 3.25]), language[:, :4].mean(dim=1)
    masked = ours.context_embedder(language, timestep, pooled, mask[:, None, None])[:, :4]
    cut = ours.context_embedder(language[:, :4], timestep, pooled)
    tolerance = 1e-5 if cut.dtype == torch.float32 else 3e-2
    torch.testing.assert_close(masked, cut, rtol=tolerance, atol=tolerance)


def test_norms_and_feed_forwards_give_diffusers_bits(pair):
    ours, reference = pair
    dtype = ours.proj_out.weight.dtype
    x, temb = drawn(2, 5, 48, dtype=dtype), drawn(2, 48, dtype=dtype)
    assert torch.equal(ours.norm_out(x, temb), reference.norm_out(x, temb))
    block, other = ours.transformer_blocks[1], reference.transformer_blocks[1]
    for name in ("ff", "ff_context", "norm2", "norm2_context", "norm1.norm", "norm1_context.norm"):
        assert torch.equal(block.get_submodule(name)(x), other.get_submodule(name)(x)), name
    heads = x.unflatten(-1, (3, 16))
    for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
        assert torch.equal(block.attn.get_submodule(name)(heads), other.attn.get_submodule(name)(heads)), name
    assert block.attn.heads == other.attn.heads == 3


def test_neither_diffusers_nor_a_compiler_is_imported():
    program = (
        "import json, sys, torch\n"
        "from hunyuan_staged.models.modules import TransformerConfig, TransformerModules\n"
        "from hunyuan_staged.models.vae_modules import Vae, VaeConfig\n"
        "with torch.device('meta'):\n"
        "    TransformerModules(TransformerConfig(num_layers=1)), Vae(VaeConfig())\n"
        "print(json.dumps(sorted({'diffusers', 'transformers', 'torch._dynamo', 'torch._inductor'} & set(sys.modules))))"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    assert json.loads(result.stdout) == []
