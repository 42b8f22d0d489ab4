"""Running statistics move as torch's do, to the last digit of their type."""

import pytest
import torch
from torch import nn

from bnext.functional import Moments, batch_moments, update_running_statistics


@pytest.mark.parametrize("momentum", [0.1, 0.01, 1 / 3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_update_is_that_of_torch(dtype, momentum):
    bn = nn.BatchNorm2d(4, momentum=momentum).to(dtype).train()
    mean, var = torch.zeros(4, dtype=dtype), torch.ones(4, dtype=dtype)
    for seed in range(3):
        data = torch.randn(3, 4, 5, 2, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 3 + 2
        bn(data)
        mean, var = update_running_statistics(mean, var, batch_moments(data), momentum)
    tolerance = {"rtol": 1e-13, "atol": 1e-13} if dtype == torch.float64 else {}
    torch.testing.assert_close(mean, bn.running_mean, **tolerance)
    torch.testing.assert_close(var, bn.running_var, **tolerance)


def test_momentum_may_be_a_tensor():
    data = torch.randn(3, 4, 5, 2, dtype=torch.float64)
    old = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    by_number = update_running_statistics(*old, batch_moments(data), 0.25)
    by_tensor = update_running_statistics(*old, batch_moments(data), torch.tensor(0.25))
    assert all(torch.equal(a, b) for a, b in zip(by_number, by_tensor, strict=True))


@pytest.mark.parametrize("count", [0.0, 1.0])
def test_fewer_than_two_elements_change_nothing(count):
    moments = Moments(torch.tensor(count), torch.full((3,), 9.0), torch.zeros(3))
    mean, var = update_running_statistics(torch.ones(3), torch.full((3,), 2.0), moments, 0.5)
    assert torch.equal(mean, torch.ones(3))
    assert torch.equal(var, torch.full((3,), 2.0))


def test_old_values_are_not_changed_and_keep_their_type():
    mean, var = torch.zeros(3, dtype=torch.float16), torch.ones(3, dtype=torch.float16)
    new = update_running_statistics(mean, var, batch_moments(torch.randn(4, 3, 2, 2)), 0.5)
    assert {tensor.dtype for tensor in new} == {torch.float16}
    assert torch.equal(mean, torch.zeros(3).half())
    assert torch.equal(var, torch.ones(3).half())
    assert not torch.equal(new[0], mean)
