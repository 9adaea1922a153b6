"""The transformer and its attention: one forward of each guidance branch against diffusers', on a small grid."""

from collections.abc import Mapping
from typing import Any

import torch

from hunyuan_staged.attention.choose import choose_attention
from hunyuan_staged.models.embeddings import Conditioning
from hunyuan_staged.models.transformer import Transformer
from hunyuan_staged.verify import second_reading
from hunyuan_staged.verify.checks import BOUNDS, Bound, Check, compared, drawn, finite, place_for, weight_bytes
from hunyuan_staged.versions import TransformerVersion
from hunyuan_staged.weights import components
from hunyuan_staged.weights.folder import ModelFolder

GRID = (3, 6, 8)  # latent frames, rows, columns
TIMESTEP, NEXT_TIMESTEP = 700.0, 500.0
WORKING = 2 * 2**30  # bytes, of one small forward and of what torch holds besides
ATTENTION_TOKENS = 4096
ATTENTION = {
    torch.float32: Bound(1e-5, "float32: the same sums in another order"),
    # FlashAttention-2, cuDNN and flash4 all measure 3e-3 from float32 on an H100.
    torch.bfloat16: Bound(1e-2, "bf16: probabilities and result are rounded to 2^-9"),
}
IMAGE_TOKENS = 729


def diffusers_model(ours: torch.nn.Module, config: Mapping[str, Any]) -> Any:
    """diffusers' transformer with these very weights, which both hold: a GPU of 24 GB has no room for two. That each of
    them is where it belongs is checked apart, by second_reading."""
    from diffusers import HunyuanVideo15Transformer3DModel

    with torch.device("meta"):
        model = HunyuanVideo15Transformer3DModel(**config)
    model.load_state_dict(ours.state_dict(), assign=True)
    return model.eval()


@torch.no_grad()
def check_transformer(
    folder: ModelFolder,
    version: TransformerVersion,
    device: torch.device,
    dtype: torch.dtype,
    embeddings: dict[str, torch.Tensor],
) -> list[Check]:
    """embeddings: what the encoders' checks gave. Where the GPU does not hold the weights, the CPU computes both."""
    part, config = f"transformer {version.name}", components.transformer_config(folder, version.name)
    place = place_for(weight_bytes(components.transformer_skeleton(folder, version.name), dtype) + WORKING, device)
    model = components.load_transformer(folder, version.name, device=place, dtype=dtype)
    count, wrong = second_reading.misplaced(folder, version.name, model)
    where = f"{count} tensors, rows of each against the file, by a second table of names"
    checks = [
        finite(part, model),
        Check(
            part, "where they belong", not wrong, f"{wrong[0]} and {len(wrong) - 1} more are not" if wrong else where
        ),
    ]
    reference = diffusers_model(model, config)
    attention = choose_attention("flash", place, dtype, head_width=config["attention_head_dim"])
    forward = Transformer(model, attention, GRID)
    hidden = drawn((1, config["in_channels"], *GRID), 1)
    if version.task == "t2v":
        hidden[:, config["out_channels"] :] = 0
    hidden = hidden.to(place, dtype)
    timestep, following = (torch.tensor([time], device=place) for time in (TIMESTEP, NEXT_TIMESTEP))
    image = embeddings.get("image_embeds") if version.task == "i2v" else None
    given = {**embeddings, "image_embeds": image} if image is not None else without_image(embeddings)
    if image is None:
        image = torch.zeros(1, IMAGE_TOKENS, config["image_embed_dim"])
    extra = {"timestep_r": following} if version.use_meanflow else {}
    for prefix in ("", "negative_") if version.guidance_scale != 1 else ("",):
        prompt = Conditioning.from_embeddings(given, negative=bool(prefix), device=place, dtype=dtype)
        ours = forward(hidden, timestep, prompt, extra.get("timestep_r"))
        text = {
            f"encoder_{theirs}{suffix}": given[f"{prefix}prompt_{own}{suffix}"].to(place)
            for own, theirs in (("embeds", "hidden_states"), ("embeds_mask", "attention_mask"))
            for suffix in ("", "_2")
        }
        text = {name: x.to(dtype) if x.is_floating_point() else x for name, x in text.items()}
        # diffusers takes timesteps in the weights' dtype; these two are whole there.
        theirs = reference(
            hidden,
            timestep.to(dtype),
            **text,
            image_embeds=image.to(place, dtype),
            **{name: time.to(dtype) for name, time in extra.items()},
            return_dict=False,
        )[0]
        branch = "unconditional" if prefix else "conditional"
        where = f", {attention.name}" + ("" if place == device else ", on the CPU: the GPU lacks the memory")
        checks.append(compared(part, f"forward, {branch}{where}", ours, theirs, BOUNDS[dtype]))
    return checks


def without_image(embeddings: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The text's embeddings alone."""
    return {name: tensor for name, tensor in embeddings.items() if name != "image_embeds"}


@torch.no_grad()
def check_attention(device: torch.device, dtype: torch.dtype, heads: int, head_width: int) -> Check:
    """The kernel that a run on this device takes, against softmax(Q K^T / sqrt(D)) V written out in float32."""
    attention = choose_attention("flash", device, dtype, head_width=head_width)
    tokens = ATTENTION_TOKENS if device.type == "cuda" else ATTENTION_TOKENS // 8
    q, k, v = (drawn((1, tokens, heads, head_width), seed).to(device, dtype) for seed in (2, 3, 4))
    ours = attention.kernels((1, 1, tokens), 1)[0](q, k, v)
    precise = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        rows = (x[0].transpose(0, 1).float() for x in (q, k, v))
        query, key, value = rows
        theirs = torch.softmax(query @ key.mT * head_width**-0.5, dim=-1) @ value
    finally:
        torch.backends.cuda.matmul.allow_tf32 = precise
    return compared("attention", attention.name, ours[0], theirs.transpose(0, 1), ATTENTION[dtype])
