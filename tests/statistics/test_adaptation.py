"""Population statistics of another data set: a blend with the source's by the number of samples, and domains."""

import pytest
import torch
from torch import nn

from bnext import recompute_population_statistics, use_domain
from bnext.layers import BatchNorm2d, NormSpec
from tests import reference
from tests.cases import NUM_CHANNELS, randomize
from tests.statistics.models import assert_population, batches, make_net

EXACT = {"rtol": 1e-12, "atol": 1e-12}
OWN = NormSpec(statistics="per_domain", population="per_domain", affine="shared", domains=("day", "night", "fog"))


def define(data, former, source_samples, samples):
    """New mean and variance with correction 1."""
    count, mean, var = reference.moments_of(data)
    weight = samples / (samples + source_samples)
    return [
        (1 - weight) * old + weight * new for old, new in zip(former, (mean, var * count / (count - 1)), strict=True)
    ]


def read(state):
    return [state.running_mean.clone(), state.running_var.clone()]


def assert_is(state, expected):
    for value, wanted in zip(read(state), expected, strict=True):
        torch.testing.assert_close(value, wanted, **EXACT)


@pytest.mark.parametrize("source_samples", [0, 1, 18, 1e9])
def test_source_samples_weigh_the_former_statistics(source_samples):
    net, data = make_net(), batches()
    former, number = read(net.first), sum(map(len, data))
    report = recompute_population_statistics(net, data, source_samples=source_samples)
    assert_is(net.first, define(data, former, source_samples, number))
    (first, _) = report.estimates
    mean, var = define(data, former, source_samples, number)
    assert first.mean_shift == pytest.approx(float(((mean - former[0]).abs() / (var + 1e-5).sqrt()).max()), rel=1e-9)


def test_the_samples_of_a_norm_on_rois_are_the_images():
    """Ten RoIs of each of the images."""
    norm = randomize(nn.BatchNorm2d(NUM_CHANNELS).double())
    data, former = batches(), read(norm)
    recompute_population_statistics(norm, data, forward=lambda m, x: m(torch.cat([x] * 10)), source_samples=9)
    expected = define([x for x in data for _ in range(10)], former, 9, sum(map(len, data)))
    assert_is(norm, expected)


@pytest.mark.parametrize("estimator", ["mean_of_batches", "moving_average", "layer_by_layer"])
def test_every_estimator_is_blended(estimator):
    plain, blended, data = make_net(), make_net(), batches()
    former = read(plain.first)
    recompute_population_statistics(plain, data, estimator=estimator)
    recompute_population_statistics(blended, data, estimator=estimator, source_samples=36)
    number = sum(map(len, data))
    weight = number / (number + 36)
    assert_is(blended.first, [(1 - weight) * a + weight * b for a, b in zip(former, read(plain.first), strict=True)])


def make_domains():
    return nn.Sequential(randomize(BatchNorm2d(NUM_CHANNELS, OWN).double()))


@pytest.mark.parametrize(
    "domain",
    ["night", lambda batch: "night", lambda batch: ["night"] * len(batch)],
    ids=["name", "of_batch", "of_each"],
)
def test_all_images_are_of_one_domain(domain):
    model, data = make_domains(), batches()
    former = {name: read(model[0].population_state(name)) for name in OWN.domains}
    report = recompute_population_statistics(model, data, domain=domain)
    assert_population(model[0].night, data)
    assert [estimate.name for estimate in report.not_reached] == ["0.day", "0.fog"]
    assert "not reached, left as it was: 0 day" in str(report)
    for name in ("day", "fog"):
        assert all(torch.equal(*pair) for pair in zip(read(model[0].population_state(name)), former[name], strict=True))


def choose(batch):
    return ["day" if index % 3 else "night" for index in range(len(batch))]


def pick(data, name):
    parts = [batch[[own == name for own in choose(batch)]] for batch in data]
    return [part for part in parts if len(part)]


def test_a_batch_of_several_domains_and_each_ones_own_number_of_samples():
    """A domain of few images keeps more of its source."""
    model, data = make_domains(), batches()
    former = {name: read(model[0].population_state(name)) for name in OWN.domains}
    report = recompute_population_statistics(model, data, domain=choose, source_samples=5)
    for name in ("day", "night"):
        own = pick(data, name)
        assert_is(model[0].population_state(name), define(own, former[name], 5, sum(map(len, own))))
    numbers = {estimate.name: estimate.num_samples for estimate in report.reached}
    assert numbers == {f"0.{name}": sum(map(len, pick(data, name))) for name in ("day", "night")}
    assert [estimate.name for estimate in report.not_reached] == ["0.fog"]


def test_layer_by_layer_by_domain():
    model, data = nn.Sequential(*make_domains(), *make_domains()).eval(), batches()
    recompute_population_statistics(model, data, domain=choose, estimator="layer_by_layer")
    inputs = []
    for batch in data:
        with use_domain(choose(batch)), torch.no_grad():
            inputs.append(model[0](batch))
    for index, seen in enumerate((data, inputs)):
        for name in ("day", "night"):
            own = [x[[d == name for d in choose(x)]] for x in seen]
            assert_population(model[index].population_state(name), [x for x in own if len(x)])


def test_the_domain_of_the_caller_holds_without_one():
    model, data = make_domains(), batches()
    with use_domain("fog"):
        recompute_population_statistics(model, data)
    assert_population(model[0].fog, data)
