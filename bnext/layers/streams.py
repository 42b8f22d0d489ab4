"""Statistics of a stream of samples, as far as it has come, and a guard that keeps them near those it began with.

The arithmetic of statistics that follow a stream at test: those of `bnext.following_stream`, and of the rule "stream"
for images of unseen domains (`bnext.layers.unseen`).
"""

from __future__ import annotations

import math

import torch

from bnext.functional import Moments, merge_moments, stack_parts

__all__ = ["Stream", "keep_near"]


class Stream:
    """The samples that have come so far, as one mini-batch.

    Args:
        memory: a sample counts for 1 - 1/memory of itself with every later one, so that at most so many count; without
            end all count alike.

    Attributes:
        moments: of their elements, count [], mean and var [C]; None: there were none yet.
        number: of samples, as far as they still count.
    """

    def __init__(self, memory: float = math.inf) -> None:
        self.memory = memory
        self.moments: Moments | None = None
        self.number = 0.0

    def begin_anew(self) -> None:
        """Forget all samples."""
        self.moments, self.number = None, 0.0

    def take_in(self, new: Moments, num_samples: int) -> Moments:
        """Add samples.

        Args:
            new: their moments, count [], mean and var [C].
            num_samples: 0, if they were counted already, as those of another call in the same forward.

        Returns:
            The moments of all so far.
        """
        if self.moments is None:
            self.moments, self.number = new, float(num_samples)
            return new

        kept = (1 - 1 / self.memory) ** num_samples
        before = Moments(*(field.to(new.mean.device) for field in self.moments))
        before = before._replace(count=before.count * kept)
        self.moments = merge_moments(stack_parts([before, new]))
        self.number = self.number * kept + num_samples
        return self.moments


def keep_near(moments: Moments, source: Moments, bound: float, eps: float) -> Moments:
    """Moments that are at most so far from those of a source: a guard against a stream that drifts away.

        |mean - source mean| <= bound * source std,  source var / bound^2 <= var <= source var * bound^2

    Args:
        moments, source: mean and var [..., C].
        bound: in standard deviations of the source, 1 or more; infinity: nothing is kept.
        eps: of the norm, added to the source's variance: a dead channel has none.
    """
    if bound == math.inf:
        return moments

    var = source.var + eps
    reach = bound * var.sqrt()
    mean = torch.minimum(torch.maximum(moments.mean, source.mean - reach), source.mean + reach)
    kept = torch.minimum(torch.maximum(moments.var, var / bound**2 - eps), var * bound**2)
    return Moments(moments.count, mean, kept.clamp(min=0))
