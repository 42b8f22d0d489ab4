"""Data sets: the embedded digits set, the catalog entries, the check before training, samplers, loaders."""
