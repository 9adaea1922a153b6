"""A model folder, proved on this machine: ours against the published classes, part by part."""
