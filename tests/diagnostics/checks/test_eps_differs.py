import dataclasses

import pytest
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

import bnext
from bnext.diagnostics.checks.eps_differs import CHECK
from bnext.diagnostics.diagnose import collect_facts
from bnext.diagnostics.facts import WeightsFacts
from tests.diagnostics.checks.diagnosing import find


def make_model(norm=nn.BatchNorm2d, var=1.0, **options):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), norm(4, **options), nn.Conv2d(4, 4, 1), norm(4, **options))
    for layer in (model[1], model[3]):
        layer.running_var.fill_(var)
    return model


@pytest.mark.parametrize(("eps", "var", "severity"), [(1e-3, 0.01, "warning"), (1e-3, 1.0, "note"), (1e-5, 0.01, None)])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, bnext.BatchNorm2d])
def test_compares_with_what_a_file_says(norm, eps, var, severity):
    model = make_model(norm, var)
    weights = WeightsFacts("model.pth", is_loaded=True, eps={"1": eps, "3": 1e-5})

    found = list(CHECK.examine(dataclasses.replace(collect_facts(model), weights=weights)))

    assert [evidence.severity for evidence in found] == ([severity] if severity else [])
    for evidence in found:
        assert evidence.layers == ("1",)
        exec(evidence.remedy.call, {"model": model})
        assert not list(CHECK.examine(dataclasses.replace(collect_facts(model), weights=weights)))
        assert getattr(model[1], "spec", model[1]).eps == eps


def test_compares_with_the_model_before():
    (evidence,) = find("BN018", make_model(var=0.01), before=make_model(var=0.01, eps=1e-3))

    assert evidence.layers == ("1", "3")
    assert evidence.severity == "warning"
    assert evidence.numbers["change"] == pytest.approx((0.01001 / 0.011) ** 0.5 - 1, abs=0.1)


def test_one_eps_for_all_is_healthy():
    assert not find("BN018", make_model(eps=1e-3, var=1e-4))
    assert not find("BN018", make_model(FrozenBatchNorm2d, var=1e-4))


def test_two_parts_of_a_model_may_differ():
    model = nn.ModuleDict({"body": make_model(eps=1e-3), "head": make_model(FrozenBatchNorm2d)})

    assert not find("BN018", model)


@pytest.mark.parametrize(("var", "severity"), [(0.01, "warning"), (10.0, "note")])
def test_frozen_norms_have_the_eps_of_those_that_are_not(var, severity):
    model = nn.Sequential(make_model(FrozenBatchNorm2d, var), make_model(eps=1e-3))
    model = nn.ModuleDict({"body": model})

    (evidence,) = find("BN018", model)

    assert evidence.layers == ("body.0.1", "body.0.3")
    assert evidence.severity == severity
    exec(evidence.remedy.call, {"model": model})
    assert not find("BN018", model)


@pytest.mark.parametrize(
    ("norm", "var", "is_found"),
    [(FrozenBatchNorm2d, 1e-4, True), (FrozenBatchNorm2d, 1.0, False), (nn.BatchNorm2d, 1.0, True)],
)
def test_eps_0(norm, var, is_found):
    model = make_model(norm, var, eps=0.0)

    found = find("BN018", model)

    assert [evidence.severity for evidence in found] == ["warning"] * is_found
    for evidence in found:
        exec(evidence.remedy.call, {"model": model})
    assert not is_found or not find("BN018", model)


@pytest.mark.parametrize(("dtype", "eps", "number"), [("half", 1e-7, 1), ("half", 1e-5, 0), ("bfloat16", 1e-7, 0)])
def test_eps_in_half_precision(dtype, eps, number):
    model = getattr(make_model(eps=eps), dtype)()

    found = find("BN018", model)

    assert len(found) == number
    for evidence in found:
        exec(evidence.remedy.call, {"model": model})
        assert not find("BN018", model)


def test_odd_variances_are_passed_over():
    for var in (torch.nan, -1.0):
        model = make_model(var=0.01)
        model[1].running_var[0] = var
        assert find("BN018", model, before=make_model(eps=1e-3))[0].severity == "warning"
