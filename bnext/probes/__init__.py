"""Looks into the training of any torch model: its gradients, its loss around the weights, its activations, its rates.

Each takes batches as the training has them, detectron2's lists of records included, and leaves the model as it was.
What the norms of a model are, and whether they are right, is asked in `bnext.diagnostics`.

Shape letters: N samples, C channels, B batches, K step sizes.
"""

from bnext.probes.activations import LayerActivations, activations_by_depth
from bnext.probes.gradients import (
    GradientHistogram,
    OutputGradients,
    find_middle_weight,
    gradient_histogram,
    output_gradients,
)
from bnext.probes.learning_rates import LearningRateSearch, RateTrial, highest_learning_rate
from bnext.probes.loss_along_gradient import LossAlongGradient, loss_along_gradient

__all__ = [
    "GradientHistogram",
    "LayerActivations",
    "LearningRateSearch",
    "LossAlongGradient",
    "OutputGradients",
    "RateTrial",
    "activations_by_depth",
    "find_middle_weight",
    "gradient_histogram",
    "highest_learning_rate",
    "loss_along_gradient",
    "output_gradients",
]
