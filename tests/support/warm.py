"""Imported once by the process that forked.py forks stages from: everything that a stage imports, however late."""

import torch
import transformers
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl  # noqa: F401

import stage1_text_encoder  # noqa: F401
import stage2_transformer  # noqa: F401
import stage3_vae_decoder  # noqa: F401

for name in ("AutoTokenizer", "T5EncoderModel", "T5Config", "Qwen2_5_VLConfig", "Qwen2TokenizerFast"):
    getattr(transformers, name)  # they are imported when first asked for
torch.set_num_threads(1)
