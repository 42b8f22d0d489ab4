import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import bnext
from tests.diagnostics.checks.diagnosing import find


def make_model():
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))


def make_data(offset=3.0):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 3, 4, 4, generator=generator) + offset for _ in range(40)]


def train(buffers="kept"):
    """A model whose statistics move far, and an average of its weights, whose buffers nobody thought of."""
    torch.manual_seed(0)
    model = make_model()
    average = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for batch in make_data():
        optimizer.zero_grad()
        (model(batch) - 1).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            for averaged, now in zip(average.parameters(), model.parameters(), strict=True):
                averaged.lerp_(now, 0.1)
            for averaged, now in zip(average.buffers(), model.buffers(), strict=True):
                if buffers != "kept":
                    averaged.copy_(now if buffers == "copied" or averaged.dim() == 0 else averaged.lerp(now, 0.1))
    return model, average


def test_finds_an_average_with_the_statistics_of_a_new_model():
    model, average = train()
    (evidence,) = find("BN026", model, averaged=average)

    assert (evidence.severity, evidence.layers) == ("error", ("1",))
    assert evidence.numbers["distance"] > 0.5


def test_finds_statistics_that_stayed_where_the_average_began():
    model, average = train()
    average[1].running_mean.add_(0.01)  # it began with loaded weights
    (evidence,) = find("BN026", model, averaged=average)

    assert evidence.severity == "warning"


def test_nothing_is_left_after_its_remedy():
    model, average = train()
    call = find("BN026", model, averaged=average)[0].remedy.call
    exec(call, {"averaged": average, "data": make_data(), "bnext": bnext})

    assert not find("BN026", model, averaged=average)


@pytest.mark.parametrize("buffers", ["copied", "averaged"])
def test_averaged_and_copied_buffers_are_healthy(buffers):
    model, average = train(buffers)
    wrapped = AveragedModel(average)  # whose paths are others

    assert not find("BN026", model, averaged=wrapped)


def test_weights_that_are_far_from_the_model_may_have_other_statistics():
    model, average = train()
    average[1].running_mean.add_(0.01)
    average[1].weight.data.mul_(2)

    assert not find("BN026", model, averaged=average)


def test_takes_new_models_other_models_and_odd_values():
    model = make_model()
    assert not find("BN026", model, averaged=copy.deepcopy(model))
    assert not find("BN026", model, averaged=nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4)))

    odd = copy.deepcopy(model)
    odd[1].running_var.fill_(float("nan"))
    assert not find("BN026", model, averaged=odd)
    assert not find("BN026", model, averaged=copy.deepcopy(model).to("meta"))
