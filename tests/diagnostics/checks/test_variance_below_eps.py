import pytest
import torch
from torch import nn

import bnext
from tests.diagnostics.checks.diagnosing import find


def make_model(eps=1e-5):
    return nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8, eps=eps))


@pytest.mark.parametrize(("number", "severity"), [(8, "warning"), (6, "warning"), (5, "note"), (2, "note")])
def test_finds_variances_below_eps_by_their_share(number, severity):
    model = make_model()
    model[1].running_var[:number] = 5e-7

    (evidence,) = find("BN012", model)

    assert evidence.severity == severity
    assert evidence.numbers["share"] == number / 8
    exec(evidence.remedy.call, {"model": model, "data": [torch.randn(2, 3, 4, 4)], "bnext": bnext})
    assert not find("BN012", model)


def test_variances_just_below_eps_are_a_note():
    model = make_model()
    model[1].running_var[:] = 5e-6

    assert find("BN012", model)[0].severity == "note"


def test_a_single_channel_is_healthy():
    model = make_model()
    model[1].running_var[0] = 5e-7

    assert not find("BN012", model)


def test_variances_just_above_eps_are_healthy():
    model = make_model(eps=1e-3)
    model[1].running_var[:] = 1.1e-3

    assert not find("BN012", model)


def test_dead_channels_are_another_matter():
    model = make_model()
    model[1].running_var[:4] = 5e-7
    model[1].weight.data[:4] = 0

    assert not find("BN012", model)


def test_finds_features_below_eps_before_the_moving_average_knows():
    model, data = make_model(), [torch.randn(2, 3, 4, 4)]
    model[0].weight.data *= 1e-4

    assert not find("BN012", model)
    assert find("BN012", model, data)[0].severity == "warning"
    model[0].weight.data *= 1e3
    assert not find("BN012", model, data)
