"""The attention modes by name. Knows no torch."""

ATTN_MODES = ("flash", "flash2", "flash3", "flash4", "cudnn", "sageattn", "flex-block-attn", "torch")
SPARSE_ATTN_MODE = "flex-block-attn"
DEFAULT_ATTN_MODE = "flash"
