"""The golden runs of super resolution, and the parts that ours are made of."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from golden_models import CPU, build, golden_upsampler, load

from hunyuan_staged.attention.choose import choose_attention
from hunyuan_staged.models.embeddings import Conditioning
from hunyuan_staged.models.transformer import Transformer
from hunyuan_staged.parallel.layout import Layout
from hunyuan_staged.sampling.conditions import (
    LowResolutionCondition,
    augment,
    condition_channels,
    upsample_latents,
)
from hunyuan_staged.sampling.loop import Sampling, denoise
from hunyuan_staged.sampling.schedule import flow_sigmas, super_resolution_noise


def conditioning_of_row(tensors: dict, row: int = 0, device: torch.device = CPU):
    names = ("text_states", "text_mask", "byt5_states", "byt5_mask")
    ours = ("prompt_embeds", "prompt_embeds_mask", "prompt_embeds_2", "prompt_embeds_mask_2")
    embeddings = {our: tensors[name][row : row + 1] for our, name in zip(ours, names, strict=True)}
    embeddings["image_embeds"] = tensors["vision_states"]
    return Conditioning.from_embeddings(embeddings, device=device, dtype=torch.float32)


def golden_transformer(
    folder: Path, latent_size, layout: Layout | None = None, device: torch.device = CPU
) -> Transformer:
    config = json.loads(load(folder / "sr_dit_t2v.safetensors")[1]["config"])
    model = build(folder, config, "sr_dit_shapes").to(device)
    return Transformer(model, choose_attention("torch", device, torch.float32), latent_size, layout)


@dataclass
class Golden:
    """A golden run, and the parts that ours is made of."""

    tensors: dict
    metadata: dict
    folder: Path

    @property
    def kind(self) -> str:
        return self.metadata["sr_version"].removesuffix("_sr_distilled")

    def upsampled(self) -> torch.Tensor:
        upsampler = golden_upsampler(self.folder, self.kind, json.loads(self.metadata["upsampler"]))
        size = self.tensors["noise"].shape[-2:]
        return upsample_latents(upsampler, self.tensors["lq_latents"], *size, torch.float32)

    def condition(self) -> LowResolutionCondition:
        _, noise = super_resolution_noise(self.tensors["noise"].shape, int(self.metadata["seed"]), torch.float32)
        image = condition_channels(self.tensors["noise"], self.tensors.get("image_latents"))
        return LowResolutionCondition(image, augment(self.upsampled(), noise))

    def run(
        self, *, condition=None, shift=None, meanflow=True, layout=None, velocity=None, device=CPU
    ) -> list[torch.Tensor]:
        """The latents after each step."""
        noise, _ = super_resolution_noise(self.tensors["noise"].shape, int(self.metadata["seed"]), torch.float32)
        guidance_scale = float(self.metadata["guidance_scale"])
        transformer = golden_transformer(self.folder, noise.shape[2:], layout, device)
        steps: list[torch.Tensor] = []
        denoise(
            transformer if velocity is None else lambda *args: velocity(transformer, *args),
            noise.to(device),
            condition or self.condition(),
            [conditioning_of_row(self.tensors, row, device) for row in range(2 if guidance_scale > 1 else 1)],
            flow_sigmas(int(self.metadata["steps"]), shift or float(self.metadata["shift"])),
            Sampling(guidance_scale, meanflow, layout),
            on_step=lambda _, latents, __: steps.append(latents),
        )
        return steps


def golden_run(folder: Path, name: str) -> Golden:
    return Golden(*load(folder / f"sr_loop_{name}.safetensors"), folder)
