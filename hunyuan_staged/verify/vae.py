"""The VAE: decoding and encoding of a small clip, against diffusers' coders."""

from typing import Any

import torch

from hunyuan_staged.models.vae_decoder import Decoder
from hunyuan_staged.models.vae_encoder import Encoder
from hunyuan_staged.verify.checks import BOUNDS, Check, compared, drawn, finite
from hunyuan_staged.weights.folder import ModelFolder

LATENTS = (3, 4, 5)  # frames, rows, columns
CHUNK = 2  # latent frames at once, so that the seam between two chunks is seen


def _diffusers_coder(name: str, ours: torch.nn.Module, config: dict[str, Any]) -> Any:
    from diffusers import AutoencoderKLHunyuanVideo15

    with torch.device("meta"):
        coder = AutoencoderKLHunyuanVideo15(**config).get_submodule(name)
    coder.load_state_dict(ours.state_dict(), assign=True)
    return coder.eval()


@torch.no_grad()
def check_vae(folder: ModelFolder, device: torch.device) -> list[Check]:
    """Both coders in the dtype that stage 3 decodes in: float16 on a GPU, float32 on a CPU."""
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    decoder, config = folder.load_vae_decoder(device=device, dtype=dtype)
    checks = [finite("vae decoder", decoder)]
    latents = drawn((1, config["latent_channels"], *LATENTS), 5).to(device, dtype)
    theirs = _diffusers_coder("decoder", decoder, config)(latents)  # [1, 3, T, H, W]
    frames = torch.cat(list(Decoder(decoder)(latents, CHUNK)))  # [T, H, W, 3]
    checks.append(compared("vae decoder", "a clip", frames.permute(3, 0, 1, 2)[None], theirs, BOUNDS[dtype]))
    del decoder
    encoder, _ = folder.load_vae_encoder(device=device, dtype=dtype)
    checks.append(finite("vae encoder", encoder))
    video = theirs.clamp(-1, 1)
    expected = _diffusers_coder("encoder", encoder, config)(video)
    checks.append(compared("vae encoder", "a clip", Encoder(encoder)(video, CHUNK), expected, BOUNDS[dtype]))
    return checks
