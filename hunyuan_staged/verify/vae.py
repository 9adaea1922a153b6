"""The VAE: decoding and encoding of a small clip, against diffusers' coders, which read the file their own way."""

from typing import Any

import torch

from hunyuan_staged.models.vae_decoder import Decoder
from hunyuan_staged.models.vae_encoder import Encoder
from hunyuan_staged.verify import second_reading
from hunyuan_staged.verify.checks import Check, drawn, finite, within_rounding
from hunyuan_staged.weights import components
from hunyuan_staged.weights.boundary import refusing
from hunyuan_staged.weights.folder import ModelFolder

LATENTS = (3, 4, 5)  # frames, rows, columns
CHUNK = 2  # latent frames at once, so that the seam between two chunks is seen


def _diffusers_coder(
    folder: ModelFolder, name: str, config: dict[str, Any], device: torch.device, dtype: torch.dtype
) -> Any:
    """diffusers' coder with the weights as second_reading finds them; InputError where it does not take them."""
    from diffusers import AutoencoderKLHunyuanVideo15

    with torch.device("meta"):
        coder = AutoencoderKLHunyuanVideo15(**config).get_submodule(name)
    weights = second_reading.vae_coder(folder, name, device, dtype)
    with refusing(f"{folder.folders('vae')[0]}: diffusers' {name} does not take these weights"):
        coder.load_state_dict(weights, assign=True)
    return coder.eval().requires_grad_(False)


def _precise(coder: Any, inputs: torch.Tensor) -> torch.Tensor:
    """What diffusers' coder gives in float32; it stays in float32."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        result: torch.Tensor = coder.float()(inputs.float())
    return result


@torch.no_grad()
def check_vae(folder: ModelFolder, device: torch.device) -> list[Check]:
    """Both coders in the dtype that stage 3 decodes in."""
    dtype = components.vae_decoder_dtype(folder, device)
    decoder, config = components.load_vae_decoder(folder, device=device, dtype=dtype)
    checks = [finite("vae decoder", decoder)]
    latents = drawn((1, config["latent_channels"], *LATENTS), 5).to(device, dtype)
    reference = _diffusers_coder(folder, "decoder", config, device, dtype)
    theirs = reference(latents)  # [1, 3, T, H, W]
    frames = torch.cat(list(Decoder(decoder)(latents, CHUNK))).permute(3, 0, 1, 2)[None]
    checks.append(within_rounding("vae decoder", "a clip", frames, theirs, _precise(reference, latents)))
    del decoder, reference
    encoder, _ = components.load_vae_encoder(folder, device=device, dtype=dtype)
    checks.append(finite("vae encoder", encoder))
    video = theirs.clamp(-1, 1)
    reference = _diffusers_coder(folder, "encoder", config, device, dtype)
    theirs, ours = reference(video), Encoder(encoder)(video, CHUNK)
    checks.append(within_rounding("vae encoder", "a clip", ours, theirs, _precise(reference, video)))
    return checks
