"""Schedules of momentum and renorm limits."""

import math

import pytest
import torch
from torch import nn

from bnext.errors import ConfigError
from bnext.layers.batch_norm import BatchNorm2d
from bnext.layers.level_norm import LevelBatchNorm2d
from bnext.layers.spec import NormSpec
from bnext.surgery.schedules import (
    RENORM_D_MAX_POINTS,
    RENORM_R_MAX_POINTS,
    check_points,
    interpolate,
    set_momentum,
    set_renorm_limits,
)


@pytest.mark.parametrize(
    ("iteration", "value"), [(0, 1.0), (5_000, 1.0), (22_500, 2.0), (40_000, 3.0), (1_000_000, 3.0)]
)
def test_values_are_linear_between_points_and_constant_outside(iteration, value):
    assert interpolate(RENORM_R_MAX_POINTS, iteration) == value


def test_the_renorm_schedule_is_the_papers():
    assert [interpolate(RENORM_D_MAX_POINTS, i) for i in (0, 5_000, 15_000, 25_000, 40_000)] == [0, 0, 2.5, 5, 5]


def test_a_single_point_is_a_constant():
    assert interpolate([(10, 0.5)], 0) == interpolate([(10, 0.5)], 20) == 0.5


@pytest.mark.parametrize(
    ("points", "rule"),
    [
        ([], "pairs"),
        ([1, 2], "pairs"),
        ("ab", "pairs"),
        ([(0, 1, 2)], "pairs"),
        ([(0, math.nan)], "finite"),
        ([(0, "1")], "finite"),
        ([(0, True)], "finite"),
        ([(5, 1), (5, 1)], "increase"),
        ([(-1, 1)], "increase"),
        ([(0, 0.5), (1, 2.0)], "at most 1"),
    ],
)
def test_points_that_are_none_are_refused(points, rule):
    with pytest.raises(ConfigError, match=rf"KEY must .*{rule}"):
        check_points(points, "KEY", "momentum")


def test_momentum_is_set_on_every_moving_average_and_used():
    renorm = BatchNorm2d(2, NormSpec(training="renorm"))
    level = LevelBatchNorm2d(2, ("p3", "p4"), NormSpec.from_table5_row(6))
    cumulative = nn.BatchNorm2d(2, momentum=None)
    ours = BatchNorm2d(2, NormSpec(average="cumulative"))
    model = nn.ModuleList([nn.BatchNorm2d(2), nn.SyncBatchNorm(2), renorm, level, cumulative, ours])
    assert set_momentum(model, 0.5) == ("0", "1", "2", "3")
    assert cumulative.momentum is None
    assert ours.momentum is None
    level({"p3": torch.full((2, 2, 1, 1), 4.0)})
    assert level.p3.running_mean.tolist() == [2, 2]


def test_renorm_limits_are_set_and_used():
    norm = BatchNorm2d(1, NormSpec(training="renorm"))
    model = nn.Sequential(norm, nn.BatchNorm2d(1))
    assert set_renorm_limits(model, r_max=1, d_max=0) == ("0",)
    x = torch.randn(4, 1, 3, 3) * 2 + 1
    assert torch.allclose(norm(x), nn.BatchNorm2d(1)(x), atol=1e-6), "no correction: plain BN"
    assert set_renorm_limits(model, d_max=5) == ("0",)
    assert (norm.r_max, norm.d_max) == (1, 5)
    assert not torch.allclose(norm(x), nn.BatchNorm2d(1)(x), atol=1e-3)


@pytest.mark.parametrize("value", [0, -0.1, 1.1, math.nan])
def test_a_momentum_out_of_range_is_refused(value):
    with pytest.raises(ConfigError, match="momentum"):
        set_momentum(nn.BatchNorm2d(1), value)


@pytest.mark.parametrize("limits", [{"r_max": 0.5}, {"d_max": -1}])
def test_renorm_limits_out_of_range_are_refused(limits):
    with pytest.raises(ConfigError, match=next(iter(limits))):
        set_renorm_limits(BatchNorm2d(1, NormSpec(training="renorm")), **limits)


def test_a_value_without_effect_is_refused():
    with pytest.raises(ConfigError, match="set_renorm_limits"):
        set_renorm_limits(nn.BatchNorm2d(1), r_max=2)
    with pytest.raises(ConfigError, match="set_momentum"):
        set_momentum(nn.GroupNorm(1, 1), 0.5)
