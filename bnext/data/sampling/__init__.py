"""Batches of a training, told by the indices of their images: a pure function of the seed and the iteration.

    records of a training  --build_sampler-->  sampler  --iteration by iteration-->  [(position, index), ...]

A sample is named by its position in the stream of a training as well as by its index in the data set, so that its
augmentation can be seeded without knowing who loads it. Nothing here reads an image.

A further sampler is a class like `GroupedBatchSampler` and a line of `build_sampler`, which chooses.
"""
