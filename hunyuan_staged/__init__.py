"""The engine of the staged HunyuanVideo-1.5 suite: everything but flags, logs and reports."""
