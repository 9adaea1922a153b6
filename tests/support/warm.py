"""Imported once by the process that forked.py forks stages from: everything that a stage imports, however late."""

import diffusers
import torch
import transformers
from diffusers.models.autoencoders import autoencoder_kl_hunyuanvideo15  # noqa: F401
from diffusers.models.transformers import transformer_hunyuan_video15  # noqa: F401
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl  # noqa: F401

import stage1_text_encoder  # noqa: F401
import stage2_transformer  # noqa: F401
import stage3_vae_decoder  # noqa: F401

for name in ("AutoencoderKLHunyuanVideo15", "HunyuanVideo15Transformer3DModel"):
    getattr(diffusers, name)  # they are imported when first asked for
for name in ("AutoTokenizer", "T5EncoderModel", "T5Config", "Qwen2_5_VLConfig", "Qwen2TokenizerFast"):
    getattr(transformers, name)
torch.set_num_threads(1)
