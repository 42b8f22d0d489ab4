"""An average of weights: in float64 its definition and torch's own; the model is as it was, whatever it is lent for."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from bnext import recompute_population_statistics
from bnext.distributed.equal_buffers import norm_buffers
from bnext.errors import CheckpointError, ConfigError
from bnext.layers import BatchNorm2d, NormSpec
from bnext.repair import AveragedWeights
from tests.workers import run_workers

EXACT = {"rtol": 1e-13, "atol": 1e-14}
RULES = ["copied", "averaged", "re_estimated"]
IMAGES = torch.randn(12, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def make_model():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    return model.double()


def make_steps(model, number=5):
    """The model after every step of a training."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for step in range(number):
        optimizer.zero_grad()
        model(IMAGES[step : step + 4]).square().mean().backward()
        optimizer.step()
        yield model


def average_slowly(states, decay, warms_up):
    """The definition, on copies of the state after every step."""
    average = {name: value.clone() for name, value in states[0].items()}
    for step, state in enumerate(states[1:]):
        weight = min(decay, (1 + step) / (10 + step)) if warms_up else decay
        for name, value in state.items():
            if value.is_floating_point():
                average[name] = weight * average[name] + (1 - weight) * value
    return average


def copy_state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def estimate(model):
    recompute_population_statistics(model, [IMAGES[:6], IMAGES[6:]])


@pytest.mark.parametrize("warms_up", [True, False])
@pytest.mark.parametrize("rule", RULES)
def test_it_is_the_definition_and_the_rule_says_what_buffers_are(rule, warms_up):
    model = make_model()
    average = AveragedWeights(model, decay=0.6, buffers=rule, warms_up=warms_up)
    states = [copy_state(model)]
    for stepped in make_steps(model):
        average.update(stepped)
        states.append(copy_state(stepped))

    expected, buffers = average_slowly(states, 0.6, warms_up), {name for name, _ in model.named_buffers()}
    if rule != "averaged":
        expected.update({name: states[-1][name] for name in buffers})
    if rule == "re_estimated":
        other = make_model()
        other.load_state_dict(expected)
        estimate(other)
        expected = copy_state(other)
    expected = {
        name: states[-1][name] if "num_batches" in name and rule != "re_estimated" else value
        for name, value in expected.items()
    }

    with average.lent_to(model, estimate):
        torch.testing.assert_close(copy_state(model), expected, **EXACT)
    assert all(torch.equal(value, states[-1][name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("rule", ["copied", "averaged"])
def test_without_a_warm_up_it_is_torchs(rule):
    model = make_model()
    ours = AveragedWeights(model, 0.9, rule, warms_up=False)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=rule == "averaged")
    theirs.update_parameters(model)  # its first one copies
    for stepped in make_steps(model):
        ours.update(stepped)
        theirs.update_parameters(stepped)

    expected = {name.removeprefix("module."): value for name, value in theirs.state_dict().items()}
    expected = {name: value for name, value in expected.items() if value.is_floating_point()}
    with ours.lent_to(model):
        found = {name: value for name, value in model.state_dict().items() if name in expected}
        torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("rule", RULES)
def test_the_model_is_as_it_was_after_an_exception_too(rule):
    model = make_model()
    average = AveragedWeights(model, 0.5, rule)
    for stepped in make_steps(model, 2):
        average.update(stepped)
    model[3].eval()
    before, modes = copy_state(model), [module.training for module in model.modules()]
    gradient = model[0].weight.grad.clone()

    def fail():
        with average.lent_to(model, estimate):
            model.eval()
            model[1].running_mean.add_(1)
            raise KeyError

    pytest.raises(KeyError, fail)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(model[0].weight.grad, gradient)


def test_a_model_that_is_moved_meanwhile_has_its_own_weights_again():
    model = make_model()
    average = AveragedWeights(model, 0.5)
    for stepped in make_steps(model, 2):
        average.update(stepped)
    before = copy_state(model)
    with average.lent_to(model):
        model.half()
        model.double()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_statistics_are_estimated_once_for_the_same_weights():
    model, calls = make_model(), []
    average = AveragedWeights(model, 0.5, "re_estimated")

    def count(lent):
        calls.append(1)
        estimate(lent)

    def lend():
        with average.lent_to(model, count):
            return copy_state(model)

    first, again = lend(), lend()
    assert len(calls) == 1
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    average.update(model)
    lend()
    assert len(calls) == 2


@pytest.mark.parametrize("rule", RULES)
def test_frozen_statistics_stay_and_nothing_is_said(rule, caplog):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), BatchNorm2d(4, NormSpec(frozen="statistics"))).double()
    model(IMAGES)
    before = copy_state(model[1])
    average = AveragedWeights(model, 0.3, rule)
    for stepped in make_steps(model, 3):
        average.update(stepped)
    with average.lent_to(model, estimate):
        model(IMAGES)
    model(IMAGES)
    assert torch.equal(model[1].running_var, before["running_var"])
    assert not caplog.records


def test_small_steps_of_half_precision_are_not_lost():
    model = nn.Linear(1, 1, bias=False).half()
    nn.init.ones_(model.weight)
    average = AveragedWeights(model, 0.999, warms_up=False)
    nn.init.constant_(model.weight, 1.25)
    for _ in range(1000):
        average.update(model)
    with average.lent_to(model):
        assert model.weight.item() == pytest.approx(1.25 - 0.25 * 0.999**1000, abs=1e-3)
        assert model.weight.dtype == torch.half


def test_a_mask_of_infinities_stays_one():
    """Its average would be inf - inf; a buffer may be a mask of attention, kept out of the state dict."""
    model = nn.Linear(2, 2)
    model.register_buffer("mask", torch.tensor([0.0, -torch.inf, torch.nan]), persistent=False)
    model.register_buffer("scale", torch.tensor([1.0, torch.inf]))
    average = AveragedWeights(model, 0.5, warms_up=False)
    for value in (2.0, 4.0):
        model.scale.fill_(value)
        average.update(model)
    with average.lent_to(model):
        torch.testing.assert_close(model.mask, torch.tensor([0.0, -torch.inf, torch.nan]), equal_nan=True)
        assert model.scale.tolist() == [2.75, 3.0]


def test_a_resumed_average_is_the_uninterrupted_one(tmp_path):
    model = make_model()
    steps, average = make_steps(model, 6), AveragedWeights(model, 0.9)
    for _ in range(3):
        average.update(next(steps))
    torch.save(average.state_dict(), tmp_path / "average.pth")
    resumed = AveragedWeights(copy.deepcopy(model), 0.9)
    resumed.load_state_dict(torch.load(tmp_path / "average.pth"))
    for stepped in steps:
        average.update(stepped)
        resumed.update(stepped)

    first, second = average.state_dict(), resumed.state_dict()
    assert first["num_updates"] == second["num_updates"] == 6
    assert all(torch.equal(value, second["averages"][name]) for name, value in first["averages"].items())


OTHER = AveragedWeights(nn.Linear(2, 2)).state_dict()


@pytest.mark.parametrize("state", [None, {}, {"num_updates": -1, "averages": {}}, OTHER])
def test_what_is_no_state_of_the_model_is_refused(state):
    with pytest.raises(CheckpointError, match="average of weights"):
        AveragedWeights(make_model()).load_state_dict(state)


@pytest.mark.parametrize(("decay", "rule"), [(1.0, "copied"), (-0.1, "copied"), ("0.9", "copied"), (0.9, "none")])
def test_values_outside_their_sets_are_refused(decay, rule):
    with pytest.raises(ConfigError, match=r"decay|buffers"):
        AveragedWeights(make_model(), decay, rule)


def test_a_re_estimation_needs_a_function():
    model = make_model()
    with pytest.raises(ConfigError, match="re_estimate"), AveragedWeights(model, buffers="re_estimated").lent_to(model):
        pass


def equalize_on_a_worker(rank):
    model = make_model()
    for _, buffer in norm_buffers(model):
        buffer.add_(rank)
    average, before = AveragedWeights(model), copy_state(model)
    average.equalize(model)
    with average.lent_to(model):
        lent = copy_state(model)
    return lent, all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_workers_get_equal_statistics():
    (first, first_kept), (second, second_kept) = run_workers(equalize_on_a_worker, 2)
    floating = [name for name, value in first.items() if value.is_floating_point()]
    assert all(torch.equal(first[name], second[name]) for name in floating)
    assert torch.equal(first["1.running_mean"], torch.full((4,), 0.5, dtype=torch.float64))
    assert (first_kept, second_kept) == (True, True)
