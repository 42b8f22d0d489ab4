"""Data sets: the digits set, the catalog, the reader of pictures, checks before training, samplers, loaders."""
