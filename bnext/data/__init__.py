"""Data sets: the embedded digits set, catalog entries, the reader of pictures, checks before training, samplers, loaders."""
