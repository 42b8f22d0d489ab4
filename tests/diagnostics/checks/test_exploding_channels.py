import pytest
import torch
from torch import nn

import bnext
from tests.diagnostics.checks.diagnosing import find


def make_model(num_norms=5):
    """With the spread of a trained network: variances a factor of 1e4 apart within a layer, 1e3 between layers."""
    generator = torch.Generator().manual_seed(0)
    layers: list[nn.Module] = []
    for number in range(num_norms):
        conv, norm = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)
        norm.running_var.copy_(torch.logspace(-2, 2, 8) * 10.0 ** (number % 4 - 2))
        norm.running_mean.normal_(generator=generator)
        norm.weight.data.copy_(torch.logspace(-1.5, 0.5, 8))
        layers += [conv, norm]
    return nn.Sequential(*layers)


def make_data(scale=1.0):
    generator = torch.Generator().manual_seed(1)
    return [scale * torch.randn(2, 8, 4, 4, generator=generator) for _ in range(2)]


def test_the_spread_of_trained_networks_is_healthy():
    model = make_model()
    assert not find("BN033", model)

    bnext.recompute_population_statistics(model, make_data())
    assert not find("BN033", model, make_data(10))  # a strong shift of the domain


def test_finds_a_channel_of_huge_variance():
    model = make_model()
    model[3].running_var[2] = 1e9

    (evidence,) = find("BN033", model)

    assert evidence.severity == "warning"
    assert evidence.layers == ("3",)
    exec(evidence.remedy.call, {"model": model, "data": make_data(), "bnext": bnext})
    assert not find("BN033", model)


def test_a_channel_of_large_variance_is_healthy():
    model = make_model()
    model[3].running_var[2] = 1e4

    assert not find("BN033", model)


def test_finds_a_layer_of_huge_variances():
    model = make_model()
    model[5].running_var *= 1e9

    assert find("BN033", model)[0].layers == ("5",)


def test_raw_inputs_in_units_of_their_own_are_healthy():
    model = make_model()
    model[1].running_var.copy_(torch.logspace(-3, 10, 8))

    assert not find("BN033", model)


@pytest.mark.parametrize(("value", "is_found"), [(1e4, True), (50.0, False)])
def test_finds_a_huge_scale(value, is_found):
    model = make_model()
    model[3].weight.data[0] = value

    assert bool(find("BN033", model)) == is_found


def test_finds_outputs_that_explode_and_their_remedy_ends_it():
    model, data = make_model(), make_data()
    bnext.recompute_population_statistics(model, data)
    model[0].weight.data *= 1e5

    (evidence,) = find("BN033", model, data)

    assert "1" in evidence.layers
    exec(evidence.remedy.call, {"model": model, "data": data, "bnext": bnext})
    assert not find("BN033", model, data)


def test_a_fresh_model_that_normalizes_nothing_is_healthy():
    model = nn.Sequential(*(layer for _ in range(3) for layer in (nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))))

    assert not find("BN033", model, make_data(1e6))


@pytest.mark.parametrize(("scale", "is_found"), [(1.0, False), (1e7, True)])
def test_features_grow_behind_statistics_on_their_way(scale, is_found):
    """Each norm divides by too little, and the next one by what came of it in training."""
    layers = (layer for _ in range(8) for layer in (nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8, momentum=1e-3)))
    model, data = nn.Sequential(*layers), make_data()
    for conv in model[::2]:
        conv.weight.data *= 1e3
    for batch in data:
        model(batch)
    model[8].weight.data *= scale

    assert bool(find("BN033", model, data)) == is_found
