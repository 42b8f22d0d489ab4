"""Channels of a norm, as several checks look at them: which still do something."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["find_dead_channels"]

# Of the scale of a layer's strong channels. In trained networks live channels are within a factor of 100 of each
# other; dead ones, whose weights have decayed, are below by six orders of magnitude and more.
_DEAD = 1e-3
# The channel after the strongest twentieth stands for the strong ones, and none counts as more than 10, as trained
# scales are below it: a single huge one makes no other one dead.
_STRONG, _LARGEST = 20, 10.0


def find_dead_channels(weight: Tensor | None, num_features: int) -> Tensor:
    """Whether each channel's scale is 0, or next to nothing beside those of its layer.

    Args:
        weight: scales [C]; None: all are 1.
        num_features: C.

    Returns:
        bool [C]; all False where a scale is not finite, or of another number of channels.
    """
    if weight is None or len(weight) != num_features or not bool(torch.isfinite(weight).all()):
        return torch.zeros(num_features, dtype=torch.bool)
    sizes = weight.abs()
    if not num_features:
        return sizes > 0
    strong = sizes.sort(descending=True).values[(num_features - 1) // _STRONG]
    return sizes <= _DEAD * strong.clamp(max=_LARGEST)
