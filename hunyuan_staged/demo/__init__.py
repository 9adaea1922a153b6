"""The small checkpoint that ships, and what made it."""
