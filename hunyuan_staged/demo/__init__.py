"""The small checkpoint that ships, and what made it."""

from pathlib import Path

from hunyuan_staged.run_options import DEMO_CHECKPOINT

CHECKPOINT = DEMO_CHECKPOINT
ADAPTER = Path(__file__).parent / "adapters" / "bounce.safetensors"
