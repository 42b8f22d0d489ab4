"""After an error, wherever it comes from, the model is bitwise as it was: state, modes, momentum, hooks."""

import pytest
import torch
from torch import nn

from bnext import recompute_population_statistics
from bnext.errors import StatisticsError
from bnext.layers import NormSpec
from tests.cases import NUM_CHANNELS, ROWS, make_features, make_norm
from tests.statistics.models import assert_as_before, batches, make_net, snapshot


@pytest.mark.parametrize(
    ("poison", "error"),
    [
        (RuntimeError("lost"), RuntimeError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (torch.full((2, NUM_CHANNELS, 3, 3), float("nan")).double(), StatisticsError),
        (torch.full((2, NUM_CHANNELS, 3, 3), float("inf")).double(), StatisticsError),
        (torch.zeros(2, NUM_CHANNELS + 1, 3, 3).double(), Exception),
    ],
    ids=["exception", "interrupt", "nan", "inf", "shape"],
)
@pytest.mark.parametrize("training", [True, False])
def test_after_an_error_the_model_is_bitwise_as_it_was(poison, error, training):
    net = make_net(training)
    before = snapshot(net)
    with pytest.raises(error):
        recompute_population_statistics(net, [*batches(), poison])
    assert_as_before(net, before)


def test_a_loader_that_fails_leaves_the_model_bitwise_as_it_was():
    def load():
        yield from batches()
        raise OSError("disk")

    net = make_net(training=True)
    before = snapshot(net)
    with pytest.raises(OSError, match="disk"):
        recompute_population_statistics(net, load())
    assert_as_before(net, before)


@pytest.mark.parametrize("row", ROWS)
def test_level_norms_are_as_they_were_after_an_error(row):
    norm = make_norm(NormSpec.from_table5_row(row)).train()
    before = snapshot(norm)
    bad = {**make_features(), "p4": torch.full((1, NUM_CHANNELS, 2, 2), float("nan")).double()}
    with pytest.raises(StatisticsError, match=r"finite; got NaN or Inf"):
        recompute_population_statistics(norm, [make_features(), bad])
    assert_as_before(norm, before)


def test_a_model_without_a_norm_is_an_error():
    for model in (nn.Conv2d(3, 3, 1), nn.Sequential(nn.GroupNorm(1, 3), nn.BatchNorm2d(3, track_running_stats=False))):
        with pytest.raises(StatisticsError, match="must have a batch norm with running statistics"):
            recompute_population_statistics(model, [torch.zeros(2, 3, 2, 2)])
