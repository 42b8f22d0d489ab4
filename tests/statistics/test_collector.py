"""What is collected of a set: updates as a moving average takes them, images by domain, what cannot be collected."""

import json
import math

import pytest
import torch
from torch import nn

from bnext import StatisticsError, recompute_population_statistics
from bnext.layers import BatchNorm2d, LevelBatchNorm2d, NormSpec
from tests.cases import NUM_CHANNELS, make_features, make_norm, randomize
from tests.statistics.models import STATE, assert_as_before, batches, make_net, snapshot

EXACT = {"rtol": 1e-12, "atol": 1e-12}


class Twice(nn.Module):
    """A norm that is called for two parts of a batch, one after the other."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(NUM_CHANNELS).double()

    def forward(self, x):
        self.bn(x[:2] + 7)
        self.bn(x[2:])


def test_every_call_of_a_norm_is_an_update_of_a_moving_average():
    ours, theirs, data = Twice(), Twice(), batches()
    recompute_population_statistics(ours, data, estimator="moving_average", momentum=0.3)
    theirs.bn.momentum = 0.3
    for batch in data:
        theirs.train()(batch)
    for name in STATE:
        torch.testing.assert_close(getattr(ours.bn, name), getattr(theirs.bn, name), **EXACT)
    recompute_population_statistics(ours, data, estimator="mean_of_batches")
    parts = [part for batch in data for part in (batch[:2] + 7, batch[2:]) if part.numel()]
    torch.testing.assert_close(ours.bn.running_mean, torch.stack([x.mean([0, 2, 3]) for x in parts]).mean(0), **EXACT)


@pytest.mark.parametrize("row", range(1, 7))
def test_the_moving_average_of_a_head_is_that_of_its_training(row):
    """Rows 3 and 5: levels with statistics of their own and a common population are updates of their own."""
    ours, theirs = (make_norm(NormSpec.from_table5_row(row)) for _ in range(2))
    data = [make_features(seed) for seed in range(4)]
    recompute_population_statistics(ours, data, estimator="moving_average", momentum=theirs.spec.momentum)
    for batch in data:
        theirs.train()(batch)
    for (key, value), expected in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        if key.endswith(STATE):
            torch.testing.assert_close(value, expected, **EXACT)


@pytest.mark.parametrize("estimator", ["mean_of_batches", "moving_average"])
def test_mini_batches_of_single_elements_are_no_estimate_of_a_mean_of_batches(estimator):
    """Elsewhere such a set ends with variance 0, as a layer does that fvcore does not reach."""
    norm = BatchNorm2d(3, NormSpec(single_element="population")).eval()
    data = [torch.randn(1, 3, 1, 1) * 2 + 5 for _ in range(30)]
    model = nn.Sequential(norm)
    before = snapshot(model)
    with pytest.raises(StatisticsError, match="got 30 batches and 30 activations, each"):
        recompute_population_statistics(model, data, estimator=estimator)
    assert_as_before(model, before)
    levels = LevelBatchNorm2d(3, ["p3", "p7"], NormSpec.from_table5_row(4).replace(single_element="population"))
    features = [{"p3": torch.randn(1, 3, 4, 4), "p7": x} for x in data]
    report = recompute_population_statistics(levels, features, estimator=estimator)
    assert [estimate.name for estimate in report.not_reached] == [".p7"]
    assert float(levels.population_state("p7").running_var.min()) == 1.0
    report = recompute_population_statistics(levels, features)
    found = levels.population_state("p7")
    torch.testing.assert_close(found.running_var, torch.cat(data).flatten(1).var(0))
    assert math.isfinite(report.estimates[-1].error), "pooled they are thirty samples"


def test_samples_of_several_levels_count_once():
    norm = make_norm(NormSpec.from_table5_row(3))
    data = [make_features(seed) for seed in range(3)]
    report = recompute_population_statistics(norm, data)
    assert report.estimates[0].num_samples == sum(max(len(x) for x in batch.values()) for batch in data)


def test_a_domain_counts_its_own_images_also_on_rois():
    """Two images of the day, with a hundred RoIs each, weigh as two, whatever the night has."""
    spec = NormSpec(statistics="per_domain", population="per_domain", domains=("day", "night"))
    model = nn.Sequential(randomize(BatchNorm2d(NUM_CHANNELS, spec).double()))
    former = model[0].day.running_mean.clone()
    data = {
        "day": torch.randn(1, NUM_CHANNELS, 3, 3).double() + 9,
        "night": torch.randn(50, NUM_CHANNELS, 3, 3).double(),
    }

    def with_rois(model, batch):
        model(batch.repeat(100, 1, 1, 1))

    names = ["day", "night", "day", "night"]
    domains = iter(names)
    recompute_population_statistics(
        model, [data[name] for name in names], forward=with_rois, domain=lambda _: next(domains), source_samples=2
    )
    expected = (former + data["day"].mean([0, 2, 3])) / 2
    torch.testing.assert_close(model[0].day.running_mean, expected, **EXACT)


@pytest.mark.parametrize("estimator", ["pooled", "layer_by_layer"])
def test_a_forward_that_changes_the_mode_is_refused(estimator):
    net, data = make_net(), batches()
    before = snapshot(net)

    def forward(model, batch):
        model.train(estimator == "layer_by_layer")
        model(batch)

    with pytest.raises(StatisticsError, match=r"forward must leave the mode of norms as it is; got training=.*first"):
        recompute_population_statistics(net, data, forward=forward, estimator=estimator)
    assert_as_before(net, before)


def test_a_norm_without_a_counter():
    bn = nn.BatchNorm2d(NUM_CHANNELS).double()
    bn.num_batches_tracked = None
    recompute_population_statistics(nn.Sequential(bn), batches())
    assert bn.running_mean.any()


class Counting(nn.Module):
    """A buffer that is none of a norm."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(NUM_CHANNELS).double()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.bn(x)


def test_other_buffers_are_as_they_were():
    model = Counting()
    recompute_population_statistics(model, batches())
    assert int(model.calls) == 0
    assert int(model.bn.num_batches_tracked) == len(batches())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.LazyBatchNorm2d(), "must have been initialized; got a lazy norm"),
        (lambda: nn.BatchNorm2d(NUM_CHANNELS, device="meta"), "must hold values; got the meta device"),
    ],
)
def test_norms_that_hold_nothing_yet(make, message):
    with pytest.raises(StatisticsError, match=message):
        recompute_population_statistics(nn.Sequential(make()), batches())


def test_tensors_of_inference_mode_are_refused_before_anything_is_written():
    with torch.inference_mode():
        bn = nn.BatchNorm2d(NUM_CHANNELS).double()
    with pytest.raises(StatisticsError, match="ordinary tensors; got tensors of torch.inference_mode"):
        recompute_population_statistics(nn.Sequential(bn), batches())
    assert int(bn.num_batches_tracked) == 0


def test_a_mistake_of_the_model_is_not_taken_for_one_of_the_batch():
    model = nn.Sequential(nn.BatchNorm2d(NUM_CHANNELS).double(), nn.Identity())
    model[1].forward = lambda x: x + None
    with pytest.raises(TypeError, match="NoneType"):
        recompute_population_statistics(model, batches())


class Once:
    """Batches that can be gone through once."""

    def __init__(self):
        self.batches = iter(batches())

    def __iter__(self):
        return self.batches


def test_layer_by_layer_needs_the_same_batches_in_every_pass():
    with pytest.raises(StatisticsError, match=r"same batches in every pass.*got 4 in the first, and then 0 \(first\)"):
        recompute_population_statistics(make_net(), Once(), estimator="layer_by_layer")


def test_a_moving_average_does_not_begin_with_nan():
    bn = nn.BatchNorm2d(NUM_CHANNELS).double()
    bn.running_mean.fill_(float("nan"))
    with pytest.raises(StatisticsError, match="must be finite, as estimator='moving_average' begins with them"):
        recompute_population_statistics(nn.Sequential(bn), batches(), estimator="moving_average")
    report = recompute_population_statistics(nn.Sequential(bn), batches())
    row = json.loads(json.dumps(report.as_dict(), allow_nan=False))["estimates"][0]
    assert row["mean_shift"] is None
