"""What a re-estimation refuses, by a message that names it; the model is as it was."""

import math

import pytest
import torch
from torch import nn

from bnext import StatisticsError, recompute_population_statistics
from bnext.errors import BNextError
from bnext.layers import NormSpec
from tests.cases import NUM_CHANNELS, make_features, make_norm
from tests.statistics.models import assert_as_before, batches, make_net, snapshot

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("num_batches", (0, -1, 2.5, "3", True, NAN)),
        ("num_samples", (0, -5, 10.0, "100", False)),
        ("population_size", (0, -5, 10.0, "100", False)),
        ("tolerance", (0, -1, NAN, INF, "0.01", True)),
        ("momentum", (0, 1.1, NAN, "0.1", True, None)),
        ("source_samples", (-1, NAN, INF, "5", True, None)),
        ("seed", (-1, 2**64, 0.5, "0", True)),
        ("estimator", ("precise", None)),
        ("domain", (["day", "night"], 3)),
    ],
)
def test_arguments_out_of_range_or_of_another_type(name, values):
    net, seen = make_net(), []
    before = snapshot(net)
    for value in values:
        with pytest.raises(BNextError, match=f"^{name} must ") as caught:
            recompute_population_statistics(net, batches(), forward=lambda m, x: seen.append(x), **{name: value})
        assert f"got {value!r} (recompute_population_statistics)" in str(caught.value)
    assert not seen
    assert_as_before(net, before)


@pytest.mark.parametrize("data", [None, 5, batches()[0], {"image": batches()[0]}, "train"])
def test_data_that_are_no_batches(data):
    net = make_net()
    before = snapshot(net)
    with pytest.raises(StatisticsError, match=r"data must be a loader or a list of batches; got \w+ .*\[batch\]"):
        recompute_population_statistics(net, data)
    assert_as_before(net, before)


@pytest.mark.parametrize("estimator", ["pooled", "mean_of_batches", "moving_average", "layer_by_layer"])
def test_an_empty_loader(estimator):
    net = make_net()
    before = snapshot(net)
    with pytest.raises(StatisticsError, match=r"at least one batch that reaches a norm; got 0 batches.*longer loader"):
        recompute_population_statistics(net, [], estimator=estimator)
    assert_as_before(net, before)


@pytest.mark.parametrize("estimator", ["pooled", "layer_by_layer"])
def test_a_forward_that_reaches_no_norm(estimator):
    net = make_net()
    before = snapshot(net)
    with pytest.raises(StatisticsError, match=r"got 4 batches and no activation.*select norms that forward reaches"):
        recompute_population_statistics(net, batches(), forward=lambda m, x: None, estimator=estimator)
    assert_as_before(net, before)


@pytest.mark.parametrize("estimator", ["pooled", "mean_of_batches", "moving_average", "layer_by_layer"])
@pytest.mark.parametrize("value", [NAN, INF])
def test_activations_that_are_not_finite_are_named(value, estimator):
    net, calls = make_net(), []
    poisoned = 7 if estimator == "layer_by_layer" else 3  # the first pass finds the order only

    def poison(module, args, output):
        calls.append(module)
        return output * value if len(calls) == poisoned else output

    net.drop.register_forward_hook(poison)
    before = snapshot(net)
    with pytest.raises(StatisticsError, match=r"activations must be finite; got NaN or Inf \(second, batch 3\)"):
        recompute_population_statistics(net, batches(), estimator=estimator)
    assert_as_before(net, before)


def test_a_loader_of_inputs_and_labels_needs_a_forward():
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2))
    data = [(torch.randn(2, 3, 4, 4), torch.zeros(2))]
    with pytest.raises(StatisticsError, match=r"forward must say how.*type tuple and TypeError: conv2d.*batch\[0\]"):
        recompute_population_statistics(model, data)
    assert recompute_population_statistics(model, data, forward=lambda model, batch: model(batch[0])).num_samples == 2


def test_a_batch_that_is_none():
    with pytest.raises(StatisticsError, match="a batch must not be None"):
        recompute_population_statistics(nn.BatchNorm2d(2), [torch.randn(2, 2, 3, 3), None])


def test_the_level_is_named_too():
    norm = make_norm(NormSpec.from_table5_row(4))
    model = nn.ModuleDict({"head": norm})
    bad = {**make_features(), "p4": torch.full((1, NUM_CHANNELS, 2, 2), NAN).double()}
    with pytest.raises(StatisticsError, match=r"\(head\.p4, batch 2\)"):
        recompute_population_statistics(model, [make_features(), bad], forward=lambda m, x: m["head"](x))


def test_the_optimizer_is_as_it_was_after_an_error():
    net = make_net(training=True)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net(batches()[0]).square().mean().backward()
    optimizer.step()
    state = [value["momentum_buffer"].clone() for value in optimizer.state.values()]
    used = [parameter for parameter in net.parameters() if parameter.grad is not None]
    gradients = [parameter.grad.clone() for parameter in used]
    before = snapshot(net)
    for poison in (RuntimeError("lost"), KeyboardInterrupt(), torch.full((2, NUM_CHANNELS, 3, 3), NAN).double()):
        with pytest.raises((RuntimeError, KeyboardInterrupt, StatisticsError)):
            recompute_population_statistics(net, [*batches(), poison])
        assert_as_before(net, before)
        kept = [value["momentum_buffer"] for value in optimizer.state.values()]
        assert all(torch.equal(*pair) for pair in zip(kept, state, strict=True))
        assert all(torch.equal(p.grad, g) for p, g in zip(used, gradients, strict=True))
