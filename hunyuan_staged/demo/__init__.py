"""The small checkpoint that ships, and what made it."""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
ADAPTER = Path(__file__).parent / "adapters" / "bounce.safetensors"
