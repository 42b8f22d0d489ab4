import copy

import pytest
import torch
from torch import nn

from tests.diagnostics.checks.diagnosing import find


def make_data(number=12, size=8):
    generator = torch.Generator().manual_seed(0)

    def make_batch():
        brightness = torch.randn(size, 1, 1, 1, generator=generator)  # so that mini-batches differ
        return torch.randn(size, 3, 6, 6, generator=generator) + brightness

    return [make_batch() for _ in range(number)]


@pytest.fixture(scope="module")
def trained():
    """Norms whose moving average has converged."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    with torch.no_grad():
        for _ in range(5):
            for batch in make_data():
                model(batch)
    return model


def find_stale(model, **options):
    return find("BN014", model, make_data(), depth="full", **options)


def test_a_moving_average_that_has_converged_is_healthy(trained):
    assert not find_stale(trained)


def test_finds_weights_that_have_changed_since(trained):
    model = copy.deepcopy(trained)
    with torch.no_grad():
        model[0].bias += 2 * model[1].running_var.sqrt()  # the first norm alone: what it gives is as before

    (evidence,) = find_stale(model)

    assert evidence.severity == "error"
    assert evidence.layers == ("1",)
    assert evidence.numbers["mean"] == pytest.approx(2, abs=0.3)
    exec(evidence.remedy.call, {"model": model, "data": make_data()})
    assert not find_stale(model)


def test_finds_variances_of_other_images(trained):
    model = copy.deepcopy(trained)
    model[4].running_var *= 2

    (evidence,) = find_stale(model)

    assert evidence.severity == "warning"
    assert evidence.layers == ("4",)
    assert evidence.numbers["ratio"] == pytest.approx(2, rel=0.2)


def test_what_is_too_little_to_matter_is_left_alone(trained):
    model = copy.deepcopy(trained)
    with torch.no_grad():
        model[0].bias += 0.1 * model[1].running_var.sqrt()

    assert not find_stale(model)


def test_the_noise_of_small_mini_batches_is_a_note(trained):
    model = copy.deepcopy(trained)
    data = make_data(24, size=2)
    for norm in (model[1], model[4]):
        norm.momentum = 0.8
    with torch.no_grad():
        for batch in data:
            model(batch)

    (evidence,) = find("BN014", model, data, depth="full")

    assert evidence.severity == "note"
    assert evidence.numbers["mean"] > 0.25


def test_a_model_that_nobody_has_trained_has_no_stale_statistics():
    assert not find_stale(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))


def test_frozen_statistics_are_as_somebody_wanted_them(trained):
    model = copy.deepcopy(trained)
    model[1].running_mean += 9
    model[1].eval()

    assert "1" not in {path for evidence in find_stale(model) for path in evidence.layers}


def test_broken_statistics_raise_nothing(trained):
    model = copy.deepcopy(trained)
    model[1].running_mean.fill_(float("nan"))

    find_stale(model)


@pytest.mark.parametrize(("number", "share", "severity"), [(20, 1.0, "note"), (20, 1.2, "error"), (200, 1.0, "error")])
def test_a_moving_average_on_its_way_is_healthy(number, share, severity):
    """Over small features it is far from them for as long as it holds some of the 1 that it began with."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, momentum=0.1 * 20 / number))
    model[0].weight.data *= 0.05
    with torch.no_grad():
        for _ in range(number // 20):
            for batch in make_data(20):
                model(batch)
    model[1].running_var *= share

    (evidence,) = find("BN014", model, make_data(20), depth="full")

    assert evidence.severity == severity
    assert "the values that they began with count for" in evidence.text
