"""Facts of a torch model, a state dict, some batches, the steps of a training: read, never changed."""
