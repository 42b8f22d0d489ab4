"""What is timed against another does the same."""

import pytest
import torch
from torch import nn

from bnext.proofs import speed
from bnext.proofs.uses import in_world_of_one

CPU = torch.device("cpu")


@pytest.mark.parametrize("make", [speed._make_pyramid, speed._make_domains])
def test_both_arms_give_the_same(make):
    features, (ours, other) = make(CPU)
    features = {name: feature[..., :9] for name, feature in features.items()}
    expected = other(features)
    for name, output in ours(features).items():
        torch.testing.assert_close(output, expected[name], rtol=1e-4, atol=1e-4)


def test_ours_over_all_workers_is_a_batch_norm():
    norms = speed._Synchronized(3).double(), nn.BatchNorm2d(3).double()
    feature = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    results = []
    with in_world_of_one(CPU):
        for norm in norms:
            input = feature.clone().requires_grad_()
            output = norm(input)
            output.pow(3).sum().backward()
            results.append([output, input.grad, norm.weight.grad, norm.running_mean, norm.running_var])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)
