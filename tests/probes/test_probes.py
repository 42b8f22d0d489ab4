"""The probes against slow definitions, on a detector, and what they leave behind: nothing."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_model
from torch import nn
from torch.optim import SGD

import bnext
from bnext.data.batches import build_validation_batches
from bnext.errors import ConfigError, StatisticsError
from bnext.seeding import seeded
from tests import tiny


def build(norm=nn.BatchNorm2d):
    with seeded(1):
        layers = [nn.Conv2d(2, 4, 3, padding=1), norm(4), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 3, 3, padding=1)]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()


def make_batches(number=3):
    generator = torch.Generator().manual_seed(2)
    pixels = [torch.randn(5, 2, 6, 6, generator=generator, dtype=torch.double) for _ in range(number)]
    return [(each, torch.tensor([0, 1, 2, 0, 1])) for each in pixels]


def forward(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def slow_loss(model, batch):
    """By functional calls, in training mode without dropout."""
    x = F.conv2d(batch[0], model[0].weight, model[0].bias, padding=1)
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
    x = (x - mean) / (var + 1e-5).sqrt() * model[1].weight[:, None, None] + model[1].bias[:, None, None]
    x = F.conv2d(x.relu(), model[4].weight, model[4].bias, padding=1)
    return F.cross_entropy(x.mean((2, 3)), batch[1])


PROBES = {
    "gradient_histogram": lambda model, batches, run: bnext.gradient_histogram(model, batches, forward=run),
    "output_gradients": lambda model, batches, run: bnext.output_gradients(model, batches, "4", forward=run),
    "loss_along_gradient": lambda model, batches, run: bnext.loss_along_gradient(
        model, batches, [0.1, 1e6], forward=run
    ),
    "activations_by_depth": lambda model, batches, run: bnext.activations_by_depth(model, batches, forward=run),
    "highest_learning_rate": lambda model, batches, run: bnext.highest_learning_rate(
        model, batches, num_steps=4, num_trials=3, forward=run
    ),
}


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("name", PROBES)
def test_a_probe_leaves_nothing_behind(name, fails):
    model = build().eval()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before, modes = copy.deepcopy(model.state_dict()), [each.training for each in model.modules()]
    random, calls = torch.get_rng_state(), []

    def run(model, batch):
        calls.append(batch)
        if fails and len(calls) == 2:
            raise KeyError("in the middle")
        return forward(model, batch)

    if fails:
        with pytest.raises(KeyError):
            PROBES[name](model, make_batches(), run)
    else:
        PROBES[name](model, make_batches(), run)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [each.training for each in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert model[4].weight.grad is None
    assert not any(each._forward_hooks for each in model.modules())


def test_gradients_are_those_of_the_definition():
    model, batches = build(), make_batches()
    histogram = bnext.gradient_histogram(model, batches, ["0.weight"], forward=forward, num_bins=7)["0.weight"]

    slow = [torch.autograd.grad(slow_loss(model, batch), model[0].weight)[0] for batch in batches]
    elements = torch.cat([each.flatten() for each in slow])
    assert math.isclose(histogram.deviation, float(elements.std(correction=0)), rel_tol=1e-9)
    assert math.isclose(histogram.largest, float(elements.abs().max()), rel_tol=1e-9)
    moved = (elements - elements.mean()) / elements.std(correction=0)
    assert math.isclose(histogram.excess_kurtosis, float(moved.pow(4).mean()) - 3, rel_tol=1e-6)
    places = torch.bucketize(elements, histogram.edges).clamp(1, 7) - 1
    assert torch.equal(histogram.counts, places.bincount(minlength=7))


def test_gradients_of_outputs_are_those_of_the_definition():
    model, batches = build(), make_batches()
    gradients = bnext.output_gradients(model, batches, "4", forward=forward).values
    rows = []
    for batch in batches:
        x = model.train()
        x[3].eval()
        scores = x(batch[0])
        rows.append((scores.softmax(1) - F.one_hot(batch[1], 3)) / 5)  # the mean over positions: all sum to this
    torch.testing.assert_close(gradients, torch.cat(rows).detach())


def test_the_loss_along_the_gradient_is_that_of_the_definition():
    model, batches = build(), make_batches(2)
    result = bnext.loss_along_gradient(model, batches, [0.01, 0.1, 3.0], forward=forward)

    for row, batch in enumerate(batches):
        start = slow_loss(model, batch)
        gradients = torch.autograd.grad(start, list(model.parameters()))
        for column, size in enumerate([0.01, 0.1, 3.0]):
            moved = copy.deepcopy(model)
            for parameter, gradient in zip(moved.parameters(), gradients, strict=True):
                parameter.data -= size * gradient
            expected = float((slow_loss(moved, batch) / start).detach())
            assert math.isclose(float(result.ratios[row, column]), expected, rel_tol=1e-9)
        length = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
        assert math.isclose(float(result.gradient_norms[row]), length, rel_tol=1e-9)


def test_the_largest_good_step_is_the_last_before_harm():
    from bnext.probes import LossAlongGradient

    ratios = torch.tensor([[0.9, 1.1, 0.8], [0.9, 0.8, math.inf], [1.2, 0.1, 0.1]], dtype=torch.double)
    sizes = torch.tensor([0.1, 1.0, 10.0], dtype=torch.double)
    result = LossAlongGradient(sizes, torch.ones(3), ratios, torch.ones(3))
    assert result.largest_good_steps.tolist() == [0.1, 1.0, 0.0]


def test_activations_are_those_of_all_batches_together():
    model, batches = build(), make_batches()
    first, second = bnext.activations_by_depth(model, batches, forward=forward)
    x = torch.cat([F.conv2d(batch[0], model[0].weight, model[0].bias, padding=1) for batch in batches]).detach()
    assert (first.layer, second.layer, first.count) == ("0", "4", 3 * 5 * 36)
    torch.testing.assert_close(first.means, x.mean((0, 2, 3)))
    torch.testing.assert_close(first.deviations, x.std((0, 2, 3), correction=0))


def test_a_training_with_the_rate_is_the_same_without_the_probe():
    model, batches = build(), make_batches()
    model[3] = nn.Identity()
    search = bnext.highest_learning_rate(model, batches, num_steps=5, num_trials=2, low=0.05, forward=forward)

    by_hand, losses = copy.deepcopy(model).train(), []
    optimizer = SGD(by_hand.parameters(), 0.05, momentum=0.9)
    for step in range(5):
        loss = forward(by_hand, batches[step % 3])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert search.trials[0].losses == tuple(losses)


def test_every_probe_looks_into_a_detector(digits, tmp_path):
    cfg = tiny.load(tmp_path)
    with seeded(1):
        model = build_model(cfg)
    before = copy.deepcopy(model.state_dict())
    batches = list(itertools.islice(build_validation_batches(cfg, cfg.DATASETS.TRAIN[0]), 2))

    (histogram,) = bnext.gradient_histogram(model, batches).values()
    assert histogram.num_elements > 0
    assert histogram.num_not_finite == 0
    ratios = bnext.loss_along_gradient(model, batches, [1e-4, 1e9]).ratios
    assert (ratios[:, 0] < 1).all()
    assert not (ratios[:, 1] < 1).any()
    names = [each.layer for each in bnext.activations_by_depth(model, batches)]
    assert names[0].startswith("backbone")
    assert names[-1].startswith("head")
    search = bnext.highest_learning_rate(model, batches, num_steps=6, num_trials=2, low=1e-3, high=1e6)
    assert search.highest == 1e-3
    assert search.lowest_failing == 1e6
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


REFUSALS = [
    (bnext.gradient_histogram, (["0.weigth"],), ConfigError, "0.weigth"),
    (bnext.output_gradients, ("7",), ConfigError, "layer"),
    (bnext.loss_along_gradient, ([0.0],), StatisticsError, "step_sizes"),
]


@pytest.mark.parametrize(("probe", "arguments", "kind", "named"), REFUSALS)
def test_an_argument_that_cannot_be_is_refused(probe, arguments, kind, named):
    with pytest.raises(kind, match=named):
        probe(build(), make_batches(), *arguments, forward=forward)


@pytest.mark.parametrize("options", [{"low": 1, "high": 0.5}, {"num_trials": 1}, {"num_steps": 0}, {"drop": 1}])
def test_a_search_that_cannot_be_is_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        bnext.highest_learning_rate(build(), make_batches(), forward=forward, **options)


def test_no_batches_no_layer_and_nothing_trained_are_refused():
    with pytest.raises(StatisticsError, match="batches"):
        bnext.gradient_histogram(build(), [], forward=forward)
    with pytest.raises(StatisticsError, match="layer"):
        bnext.activations_by_depth(build(), make_batches(), kinds=nn.LSTM, forward=forward)
    with pytest.raises(StatisticsError, match="loss"):
        bnext.loss_along_gradient(build().requires_grad_(False), make_batches(), [0.1], forward=forward)


@pytest.mark.parametrize("shape", [(6, 4), (6, 5, 4)])
def test_a_linear_layer_has_its_channels_last(shape):
    model, x = nn.Linear(4, 3).double(), torch.randn(shape, dtype=torch.double)
    (layer,) = bnext.activations_by_depth(model, [x])
    torch.testing.assert_close(layer.means, model(x).detach().flatten(0, -2).mean(0))
    gradients = bnext.output_gradients(
        nn.Sequential(model), [x], "0", forward=lambda model, batch: model(batch).square().sum()
    )
    torch.testing.assert_close(gradients.values, 2 * model(x).detach().reshape(6, -1, 3).sum(1))


def test_a_lazy_model_is_refused_as_it_could_not_be_put_back():
    with pytest.raises(StatisticsError, match="model"):
        bnext.activations_by_depth(nn.Sequential(nn.LazyConv2d(4, 3)), [torch.randn(2, 3, 8, 8)])


def test_a_path_counts_once_and_step_sizes_may_be_an_array():
    model, batches = build(), make_batches(1)
    twice = bnext.gradient_histogram(model, batches, ["0.weight", "0.weight"], forward=forward)["0.weight"]
    assert twice.num_elements == model[0].weight.numel()
    with pytest.raises(ConfigError, match="parameters"):
        bnext.gradient_histogram(model, batches, "0.weight", forward=forward)
    assert bnext.loss_along_gradient(model, batches, torch.tensor([0.1, 1.0]), forward=forward).ratios.shape == (1, 2)
