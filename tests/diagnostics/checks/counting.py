"""What tests of counted updates share: a small net, and a training of it under the watch."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bnext import TrainingWatch
from bnext.diagnostics.findings import Evidence

__all__ = ["Net", "find_in_training", "make_image"]


class Net(nn.Module):
    """Two blocks, of which the second may be checkpointed, run several times, or left out."""

    def __init__(self, *, is_checkpointed=False, num_calls=1):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4))
        self.second = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4))
        self.is_checkpointed, self.num_calls = is_checkpointed, num_calls

    def forward(self, image):
        feature = self.first(image)
        for _ in range(self.num_calls):
            feature = (
                checkpoint(self.second, feature, use_reentrant=False) if self.is_checkpointed else self.second(feature)
            )
        return feature


def make_image():
    return torch.randn(2, 3, 4, 4)


def find_in_training(code, model, num_steps=20, num_forwards=1, between=None) -> list[Evidence]:
    """The findings of one check after some steps; `between` is called after each."""
    watch = TrainingWatch(model)
    for _ in range(num_steps):
        with watch.step():
            for _ in range(num_forwards):
                model(make_image()).square().mean().backward()
        if between is not None:
            between()
    diagnosis = watch.diagnose()
    watch.close()
    assert not [failure for failure in diagnosis.failures if code in failure]
    return [finding.evidence for finding in diagnosis.findings if finding.code == code]
