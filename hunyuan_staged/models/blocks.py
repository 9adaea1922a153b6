"""The parts of a double-stream block.

On a GPU, where no compiler fuses what is written here in torch, kernels of our own (block_kernels.py) take its place. They
round where it does.

`modulation` [2, 6, C] is the video's and the text's: shift, scale, gate for attention, then for the feed-forward.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from hunyuan_staged.attention import packages
from hunyuan_staged.models.embeddings import apply_rope
from hunyuan_staged.parallel.heads import pack


def fused(x: torch.Tensor) -> bool:
    """Whether kernels of our own compute on x: on a GPU that has Triton, outside of compiling and training."""
    if torch.compiler.is_compiling() or not x.is_cuda:
        return False
    return not torch.is_grad_enabled() and not torch.is_autocast_enabled("cuda") and packages.installed("triton")


def modulate(x: torch.Tensor, norm: nn.Module, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Adaptive layer norm: norm(x) * (1 + scale) + shift."""
    if fused(x):
        from hunyuan_staged.models import block_kernels

        return block_kernels.modulate(x, shift, scale)
    return norm(x) * (1 + scale) + shift


def add_gated(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """x + y * gate; it may take y's place."""
    if fused(x):
        from hunyuan_staged.models import block_kernels

        return block_kernels.add_gated(x, y, gate)
    return x + y * gate


def project_qkv(x: torch.Tensor, projections: tuple, norms: tuple, heads: int) -> list[torch.Tensor]:
    """q, k, v [1, s, H, D] of tokens [1, s, C], with q and k normalised."""
    q, k, v = (projection(x).unflatten(-1, (heads, -1)) for projection in projections)
    return [norms[0](q), norms[1](k), v]


def linear_gelu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """gelu(x W^T + b), tanh form, [1, s, C] → [1, s, F], on a GPU with the activation inside the product (cuBLASLt).

    For a compiler an op of its own: it would take it apart again, and write and read the product once more. Eager calls
    pass the op by, because calling one imports the compiler.
    """
    return (_linear_gelu_op if torch.compiler.is_compiling() else _linear_gelu)(x, weight, bias)


def _linear_gelu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    if x.is_cuda:
        return torch._addmm_activation(bias, x[0], weight.mT, use_gelu=True)[None]
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


_linear_gelu_op = torch.library.custom_op("hunyuan_staged::linear_gelu", _linear_gelu, mutates_args=())


@_linear_gelu_op.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return x.new_empty(1, x.shape[1], weight.shape[0])


def feed_forward(ff: Any, x: torch.Tensor) -> torch.Tensor:
    """A FeedForward with GELU, [1, s, C] → [1, s, C], which may take the place of x."""
    first, last = ff.net[0].proj, ff.net[2]
    if getattr(first, "fp8_matmul", False):  # it multiplies by float8, and has no wide weight to hand over
        return last(F.gelu(first(x), approximate="tanh"))
    hidden = linear_gelu(x, first.weight, first.bias)
    if fused(x) and is_plain(last):
        linear_into(x[0], last, hidden)
        return x
    return last(hidden)


def is_plain(linear: nn.Module) -> bool:
    """Whether a layer's weight is not stored in another form."""
    return type(linear) is nn.Linear


def linear_into(out: torch.Tensor, linear: Any, x: torch.Tensor) -> None:
    """linear(x) of tokens [1, s, C], written to out [s, F]."""
    if is_plain(linear):
        torch.addmm(linear.bias, x[0], linear.weight.mT, out=out)
    else:
        out.copy_(linear(x)[0])


def before_attention(
    block: Any, video: torch.Tensor, text: torch.Tensor, modulation: torch.Tensor, rope: tuple[torch.Tensor, ...]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """A block up to its attention: q, k, v [1, s, H, D] of the video [1, s, C], and [1, L, H, D] of the text [1, L, C]."""
    attn = block.attn
    shift, scale = modulation[0, :2]
    q, k, v = project_qkv(
        modulate(video, block.norm1.norm, shift, scale),
        (attn.to_q, attn.to_k, attn.to_v),
        (attn.norm_q, attn.norm_k),
        attn.heads,
    )
    shift, scale = modulation[1, :2]
    text_qkv = project_qkv(
        modulate(text, block.norm1_context.norm, shift, scale),
        (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj),
        (attn.norm_added_q, attn.norm_added_k),
        attn.heads,
    )
    return [apply_rope(q, rope), apply_rope(k, rope), v], text_qkv


def project_together(block: Any, video: torch.Tensor, text: torch.Tensor, modulation: torch.Tensor) -> torch.Tensor:
    """q, k, v [3, s + L, C] of all tokens, text behind video, each where its projection writes it; not normalised."""
    attn, tokens = block.attn, video.shape[1]
    qkv = video.new_empty(3, tokens + text.shape[1], video.shape[2])
    projections = (attn.to_q, attn.to_k, attn.to_v), (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
    x = modulate(video, block.norm1.norm, *modulation[0, :2])
    for out, projection in zip(qkv[:, :tokens], projections[0], strict=True):
        linear_into(out, projection, x)
    x = modulate(text, block.norm1_context.norm, *modulation[1, :2])
    for out, projection in zip(qkv[:, tokens:], projections[1], strict=True):
        linear_into(out, projection, x)
    return qkv


def qk_norms(attn: Any) -> tuple[torch.Tensor, ...]:
    """The weights [D] of the video's norms of q and k, and of the text's."""
    return tuple(norm.weight for norm in (attn.norm_q, attn.norm_k, attn.norm_added_q, attn.norm_added_k))


def joint_qkv_fused(
    block: Any, video: torch.Tensor, text: torch.Tensor, modulation: torch.Tensor, rope: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, ...]:
    """joint_qkv by kernels of our own, with no copy of q, k and v."""
    from hunyuan_staged.models import block_kernels

    qkv = project_together(block, video, text, modulation)
    block_kernels.normalise_rotate(qkv, qk_norms(block.attn), rope, block.attn.heads)
    return qkv[:, None].unflatten(-1, (block.attn.heads, -1)).unbind()


def packed_qkv_fused(
    shares: Sequence[int],
    left: int,
    block: Any,
    video: torch.Tensor,
    text: torch.Tensor,
    modulation: torch.Tensor,
    rope: tuple[torch.Tensor, ...],
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """packed_qkv by kernels of our own, which pack as well where the heads divide."""
    from hunyuan_staged.models import block_kernels

    qkv = project_together(block, video, text, modulation)
    norms, heads, tokens = qk_norms(block.attn), block.attn.heads, video.shape[1]
    if left == 0 and min(shares) == max(shares):
        packed, text_qkv = block_kernels.normalise_rotate_pack(qkv, norms, rope, heads, len(shares))
        return [packed], text_qkv
    block_kernels.normalise_rotate(qkv, norms, rope, heads)
    by_head = qkv.unflatten(-1, (heads, -1))
    return pack(list(by_head[:, :tokens]), list(by_head[:, tokens:]), shares, left)


def joint_qkv(*args: Any) -> tuple[torch.Tensor, ...]:
    """before_attention where all tokens are here: q, k, v [1, S + L, H, D], text behind video."""
    if fused(args[1]):
        return joint_qkv_fused(*args)
    return tuple(torch.cat(pair, dim=1) for pair in zip(*before_attention(*args), strict=True))


def packed_qkv(shares: Sequence[int], left: int, *args: Any) -> tuple[list[torch.Tensor], torch.Tensor]:
    """before_attention for the exchanges of a HeadSplit: as `pack` gives it."""
    if fused(args[1]):
        return packed_qkv_fused(shares, left, *args)
    video, text = before_attention(*args)
    return pack([x[0] for x in video], [x[0] for x in text], shares, left)


def attention_residual(
    block: Any,
    video: torch.Tensor,
    text: torch.Tensor,
    video_out: torch.Tensor,
    text_out: torch.Tensor,
    modulation: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Video [1, s, C] and text [1, L, C] with what attention gave, [s, H, D] and [L, H, D], projected, gated and added."""
    video = add_gated(video, block.attn.to_out[0](video_out.flatten(1)[None]), modulation[0, 2])
    return video, add_gated(text, block.attn.to_add_out(text_out.flatten(1)[None]), modulation[1, 2])


def mlp_residual(
    block: Any, video: torch.Tensor, text: torch.Tensor, modulation: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rest of a block, behind its attention: video [1, s, C] and text [1, L, C] → the same.

    Apart from attention_residual so that what attention gave is freed before the feed-forward's hidden layer, the largest
    activation of all, comes to be.
    """
    shift, scale, gate = modulation[0, 3:]
    video = add_gated(video, feed_forward(block.ff, modulate(video, block.norm2, shift, scale)), gate)
    shift, scale, gate = modulation[1, 3:]
    return video, add_gated(
        text, feed_forward(block.ff_context, modulate(text, block.norm2_context, shift, scale)), gate
    )
