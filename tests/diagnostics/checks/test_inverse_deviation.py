import dataclasses

import pytest
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

import bnext
from bnext.diagnostics.diagnose import collect_facts, examine_facts
from bnext.diagnostics.facts import WeightsFacts
from tests.diagnostics.checks.diagnosing import find

SPOIL = {
    "inverse": lambda norm: norm.running_var.copy_((norm.running_var + norm.eps).rsqrt()),
    "deviation": lambda norm: norm.running_var.sqrt_(),
    "factor": lambda norm: (norm.running_var.mul_(998), norm.running_mean.mul_(998)),
    "nothing": lambda norm: None,
    "other statistics": lambda norm: (norm.running_var.mul_(30), norm.running_mean.mul_(5)),
}


def make_data(offset=1.0):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, 8, 8, generator=generator) + offset for _ in range(3)]


def make_model(kind="nothing", channels=16):
    """Three norms with the statistics of the data, in some convention."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs in (3, channels, channels):
        layers += [nn.Conv2d(inputs, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
    model = nn.Sequential(*layers)
    for conv in model[::3]:
        conv.weight.data *= torch.logspace(-1, 1, channels).view(-1, 1, 1, 1)

    bnext.recompute_population_statistics(model, make_data())
    for norm in model[1::3]:
        SPOIL[kind](norm)
    return model


@pytest.mark.parametrize("kind", ["inverse", "deviation", "factor"])
@pytest.mark.parametrize("channels", [16, 4])
def test_finds_another_convention_and_reads_it(kind, channels):
    model = make_model(kind, channels)

    (evidence,) = find("BN019", model, make_data())

    assert evidence.severity == "error"
    assert evidence.layers == ("1", "4", "7")
    exec(evidence.remedy.call, {"model": model, "data": make_data(), "bnext": bnext})
    right = make_model("nothing", channels)
    for norm, expected in zip(model[1::3], right[1::3], strict=True):
        assert torch.allclose(norm.running_var, expected.running_var, rtol=1e-3)


def test_finds_it_in_evaluation_mode():
    assert find("BN019", make_model("inverse").eval(), make_data())


@pytest.mark.parametrize("kind", ["nothing", "other statistics"])
def test_variances_are_healthy_whatever_images_they_are_of(kind):
    assert not find("BN019", make_model(kind), make_data())
    assert not find("BN019", make_model(kind), make_data(offset=3))


def test_a_moving_average_on_its_way_is_healthy():
    model = make_model()
    for norm in model[1::3]:
        norm.reset_running_stats()
    assert not find("BN019", model, make_data())

    for _ in range(4):
        model(make_data()[0])
        model(make_data()[1])
        assert not find("BN019", model, make_data())


@pytest.mark.parametrize("scale", [1.0, 3.0, 10.0])
@pytest.mark.parametrize("rest", [0.2, 0.5, 0.8, 0.9])
def test_a_moving_average_on_its_way_looks_like_a_root_and_is_none(scale, rest):
    model = make_model()
    for conv in model[::3]:
        conv.weight.data *= scale * torch.logspace(0.75, -0.75, 16).view(-1, 1, 1, 1)
    bnext.recompute_population_statistics(model, make_data())
    for norm in model[1::3]:
        norm.running_var.mul_(1 - rest).add_(rest)
        norm.running_mean.mul_(1 - rest)

    assert not find("BN019", model, make_data())


def test_the_first_of_frozen_norms_speaks_for_all():
    model = make_model("inverse")
    for index in (1, 4, 7):
        frozen = FrozenBatchNorm2d(16)
        frozen.load_state_dict(model[index].state_dict())
        model[index] = frozen

    (evidence,) = find("BN019", model, make_data())

    assert evidence.layers == ("1", "4", "7")
    exec(evidence.remedy.call, {"model": model, "bnext": bnext})
    assert torch.allclose(model[7].running_var, make_model()[7].running_var, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "is_found"),
    [("1.scale_factor", True), ("4.running_inv_std", True), ("1.inv_var", True), ("head.scale_factor", False)],
)
def test_finds_names_of_other_conventions_in_a_file(name, is_found):
    facts = collect_facts(make_model())
    weights = WeightsFacts("a.pth", is_loaded=True, unexpected=(name, "1.weight_v"))

    diagnosis = examine_facts(dataclasses.replace(facts, weights=weights))

    found = [finding for finding in diagnosis.findings if finding.code == "BN019"]
    assert bool(found) == is_found
    assert all(finding.severity == "warning" for finding in found)


def test_made_up_images_say_nothing():
    facts = collect_facts(make_model("inverse"))

    assert not [finding for finding in examine_facts(facts).findings if finding.code == "BN019"]
