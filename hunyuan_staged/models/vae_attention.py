"""The attention of the VAE's mid block: causal in frames, a frame at a time.

Letters: B clips, t frames, N or M positions of a frame, C channels.
"""

import torch
import torch.nn.functional as F

from hunyuan_staged.models.vae_constants import SCORES_AT_ONCE


def frame_causal_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, queries_per_call: int | None = None
) -> torch.Tensor:
    """Attention in which each position sees its own frame and all earlier ones.

    query [B, t, M, C], of some or all of a frame's positions; key, value [B, t, N, C] → [B, t, M, C]. Frame by frame, so
    that no mask exists: frame i's queries against the keys of frames 0..i. The same sums as diffusers' masked call,
    without the t*N x t*N mask. queries_per_call: where torch's own kernel computes; its rounding depends on it.
    """
    batch, frames, _, channels = query.shape
    # The products are for decoding alone: one clip, no gradients. Training has batches and goes through here, too.
    alone = batch == 1 and not torch.is_grad_enabled()
    products = alone and query.is_cuda and query.dtype != torch.float32
    attend = _attend_in_products if products else F.scaled_dot_product_attention
    outputs = []
    for i in range(frames):
        keys, values = (x[:, : i + 1].reshape(batch, 1, -1, channels) for x in (key, value))
        queries = query[:, i : i + 1]
        parts = [queries] if products or queries_per_call is None else queries.split(queries_per_call, dim=2)
        outputs.append(torch.cat([attend(part, keys, values) for part in parts], dim=2))
    return torch.cat(outputs, dim=1)


def _attend_in_products(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """[1, 1, N, C] x [1, 1, M, C] → [1, 1, N, C] with the scores in memory, in float32.

    The head is as wide as the level, 1024 channels: no flash kernel takes that, and torch's memory-efficient one leaves
    all but a few multiprocessors idle with one head and one frame of queries.
    """
    keys, values = key[0, 0].mT, value[0, 0]
    scale = query.shape[-1] ** -0.5
    outputs = []
    for rows in query[0, 0].split(max(1, SCORES_AT_ONCE // keys.shape[1])):
        scores = torch.mm(rows, keys, out_dtype=torch.float32).mul_(scale)
        outputs.append(torch.softmax(scores, dim=-1).to(values.dtype) @ values)
    return torch.cat(outputs)[None, None]
