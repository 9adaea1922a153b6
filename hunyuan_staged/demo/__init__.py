"""The small checkpoint that ships, and what made it."""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
