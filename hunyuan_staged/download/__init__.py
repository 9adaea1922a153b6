"""Fetch what a version needs from the hubs."""
