"""One forward of the HunyuanVideo-1.5 transformer over unpadded tokens.

Where diffusers' own forward pads the text and builds an N x N mask, this one lets only valid tokens in, so no attention
needs a mask. It knows neither ranks nor kernels: `layout` moves tokens (and does nothing on one process),
`attention` computes.

Letters: T h w latent frames, rows and columns after patching; S = T*h*w video tokens, s this rank's; L text tokens;
H heads, D head width, C = H*D; P = values in a patch.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from einops import rearrange

from hunyuan_staged.attention.choose import AttentionMode, BlockAttention
from hunyuan_staged.models.blocks import attention_residual, joint_qkv, mlp_residual, modulate, packed_qkv
from hunyuan_staged.models.embeddings import Conditioning, embed_text, embed_time, rope_table
from hunyuan_staged.models.modulations import Modulations, block_modulation
from hunyuan_staged.parallel.heads import attend, split_heads
from hunyuan_staged.parallel.layout import Layout

RunBlocks = Callable[["BlockRunner", torch.Tensor, torch.Tensor], torch.Tensor]


class Blocks(Protocol):
    """Some neighbouring blocks in order, each with its weights in place while it is current: see memory/offloading.py."""

    def __getitem__(self, part: slice) -> Iterable[Any]: ...


@dataclass(frozen=True)
class BlockRunner:
    """The blocks of a forward at its timestep, to be run in parts."""

    transformer: "Transformer"
    modulation_of: Callable[[int, Any], torch.Tensor]

    def __call__(
        self, video: torch.Tensor, text: torch.Tensor, first: int, last: int | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Video [1, s, C] and text [1, L, C] through the blocks [first, last), all from first on with None."""
        return self.transformer.run_blocks(self.modulation_of, video, text, first, last)

    def modulated(self, video: torch.Tensor) -> torch.Tensor:
        """Video [1, s, C] as the first block's attention gets it, before its projections."""
        return self.transformer.modulated(self.modulation_of, video)


class Transformer:
    """The forward of one loaded model on one layout, with what stays the same from step to step computed once.

    model: TransformerModules in eval mode. attention: what choose_attention gave.
    latent_size: (frames, height, width) of the latents. blocks: those of the model, where some of their weights are on the
    host; by default the model's own list. modulations: of the steps to come, where the model no longer has their linear
    maps. compile: let torch.compile fuse what is around attention. Its three parts are compiled once, for all blocks and
    every text length.
    """

    def __init__(
        self,
        model: Any,
        attention: AttentionMode,
        latent_size: tuple[int, int, int],
        layout: Layout | None = None,
        blocks: Blocks | None = None,
        *,
        modulations: Modulations | None = None,
        compile: bool = False,
    ) -> None:
        self.model, self.layout, self.modulations = model, layout or Layout(), modulations
        self.compiled = compile
        self.blocks: Any = list(model.transformer_blocks) if blocks is None else blocks
        parts: list[Callable[..., Any]] = [packed_qkv if self.layout.shards > 1 else joint_qkv]
        parts += [attention_residual, mlp_residual]
        if compile:
            # Without padding products whose number of tokens is odd: for no speed it costs a copy of the activations.
            how: dict[str, Any] = {"fullgraph": True, "options": {"shape_padding": False}}
            parts = [torch.compile(part, **how) for part in parts]
        self.joint_qkv, self.attention_residual, self.mlp_residual = parts
        config = model.config
        self.patch = {"pt": config.patch_size_t, "ph": config.patch_size, "pw": config.patch_size}
        self.grid = tuple(n // p for n, p in zip(latent_size, self.patch.values(), strict=True))
        self.total = self.grid[0] * self.grid[1] * self.grid[2]
        self._kernels: dict[AttentionMode, list[BlockAttention]] = {}
        self.use(attention)
        weight = model.x_embedder.proj.weight
        self.device, self.dtype = weight.device, weight.dtype
        cos, sin = rope_table(model, *self.grid)
        self.rope = tuple(self.layout.scatter(table, dim=0).to(self.device) for table in (cos, sin))

    def use(self, attention: AttentionMode) -> None:
        """Run this attention from now on; its kernels are made once."""
        if attention not in self._kernels:
            self._kernels[attention] = attention.kernels(self.grid, len(self.model.transformer_blocks))
        self.attention = self._kernels[attention]

    @torch.no_grad()
    def __call__(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        conditioning: Conditioning,
        timestep_r: torch.Tensor | None = None,
        run_blocks: RunBlocks | None = None,
    ) -> torch.Tensor:
        """The velocity [1, 32, T, h, w] for the input [1, 65, T, h, w] at a timestep [1] (sigma x 1000, float32, best on
        the host).

        timestep_r [1] is for meanflow models alone. run_blocks(blocks, video, text) gives the video behind the last block,
        from a BlockRunner, which runs some of them: what a cache may do otherwise than to run all.
        Every rank of the layout gets the whole velocity.
        """
        model, layout = self.model, self.layout
        table = self.modulations.at(timestep, timestep_r) if self.modulations else None
        timestep, timestep_r = self._here(timestep), None if timestep_r is None else self._here(timestep_r)
        temb = embed_time(model, timestep, timestep_r)

        def modulation(index: int, block: Any) -> torch.Tensor:
            return block_modulation(block, temb) if table is None else table[index]

        text = embed_text(model, conditioning, timestep)
        patches = rearrange(
            hidden_states.to(self.dtype),
            "b c (t pt) (h ph) (w pw) -> b (t h w) (c pt ph pw)",
            **self.patch,
        )
        embed = model.x_embedder.proj

        def tokens() -> torch.Tensor:
            return F.linear(layout.scatter(patches), embed.weight.flatten(1), embed.bias)

        if run_blocks is None:
            # Not held by a name here: it is as large as any activation, and the first block is done with it.
            video = self.run_blocks(modulation, tokens(), text, 0, None)[0]
        else:
            video = run_blocks(BlockRunner(self, modulation), tokens(), text)
        patches = layout.gather(model.proj_out(model.norm_out(video, temb)), self.total)
        frames, rows, columns = self.grid
        return rearrange(
            patches,
            "b (t h w) (c pt ph pw) -> b c (t pt) (h ph) (w pw)",
            t=frames,
            h=rows,
            w=columns,
            **self.patch,
        )

    def _here(self, timestep: torch.Tensor) -> torch.Tensor:
        """A timestep [1] on the device; a copy would wait for all that the device has to do."""
        if timestep.device == self.device:
            return timestep
        return torch.full_like(timestep, float(timestep), device=self.device)

    def run_blocks(
        self,
        modulation_of: Callable[[int, Any], torch.Tensor],
        video: torch.Tensor,
        text: torch.Tensor,
        first: int,
        last: int | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Video [1, s, C] and text [1, L, C] through the blocks [first, last), all from first on with None."""
        part = slice(first, last)
        indices = range(len(self.attention))[part]
        for index, block, attention in zip(indices, self.blocks[part], self.attention[part], strict=True):
            modulation = modulation_of(index, block)
            self._mark_dynamic(text, 1)
            outs = self._attend(block, video, text, modulation, attention)
            self._mark_dynamic(outs[1], 0)
            video, text = self.attention_residual(block, video, text, *outs, modulation)
            del outs
            self._mark_dynamic(text, 1)
            video, text = self.mlp_residual(block, video, text, modulation)
        return video, text

    def modulated(self, modulation_of: Callable[[int, Any], torch.Tensor], video: torch.Tensor) -> torch.Tensor:
        """Video [1, s, C] as the first block's attention gets it, before its projections."""
        block = self.model.transformer_blocks[0]  # of a block that is offloaded, too, this norm has no weights
        return modulate(video, block.norm1.norm, *modulation_of(0, block)[0, :2])

    def _mark_dynamic(self, x: torch.Tensor, dim: int) -> None:
        if self.compiled:  # without it, the compiler need not even be imported
            torch._dynamo.mark_dynamic(x, dim)

    def _attend(
        self, block: Any, video: torch.Tensor, text: torch.Tensor, modulation: torch.Tensor, attention: BlockAttention
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What attention gives for video [1, s, C] and text [1, L, C]: [s, H, D] and [L, H, D]."""
        if self.layout.shards == 1:
            attended = attention(*self.joint_qkv(block, video, text, modulation, self.rope)).squeeze(0)
            return attended[: self.total], attended[self.total :]
        split = split_heads(block.attn.heads, self.layout.shards, by_queries=attention.any_queries)
        packed, text_qkv = self.joint_qkv(split.shares, split.left, block, video, text, modulation, self.rope)
        return attend(self.layout, split, packed, text_qkv, self.total, attention)
