import dataclasses

import pytest
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

import bnext
from bnext.diagnostics.checks.frozen_unwritten import CHECK
from bnext.diagnostics.diagnose import collect_facts
from bnext.diagnostics.facts import Origin, WeightsFacts
from tests.diagnostics.checks.diagnosing import find


def make_model(norm=FrozenBatchNorm2d):
    return nn.Sequential(nn.Conv2d(3, 4, 1), norm(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))


def examine(model, weights, **changes):
    return list(CHECK.examine(dataclasses.replace(collect_facts(model), weights=weights, **changes)))


def test_finds_frozen_norms_that_nothing_was_loaded_into():
    model = make_model()

    (evidence,) = find("BN006", model)

    assert evidence.severity == "warning"
    assert evidence.layers == ("1",)
    exec(evidence.remedy.call, {"bnext": bnext, "model": model})
    assert not find("BN006", model)


def test_finds_new_norms_in_evaluation_mode():
    model = make_model(nn.BatchNorm2d)
    model[1].eval()

    (evidence,) = find("BN006", model)

    exec(evidence.remedy.call, {"bnext": bnext, "model": model})
    assert not find("BN006", model)


def test_is_an_error_in_a_model_that_was_trained():
    model = make_model()
    model[3].bias.data += 1

    assert find("BN006", model)[0].severity == "error"


@pytest.mark.parametrize(
    ("weights", "number"),
    [
        (WeightsFacts(""), 1),
        (WeightsFacts("model.pth", is_loaded=True, missing=("1",)), 1),
        (WeightsFacts("detectron2://R-50.pkl"), 0),
    ],
)
def test_believes_weights_that_were_not_read(weights, number):
    found = examine(make_model(), weights)

    assert [evidence.severity for evidence in found] == ["error"] * number


@pytest.mark.parametrize("field", ["running_mean", "running_var", "bias"])
def test_one_that_does_anything_is_healthy(field):
    """Statistics that are folded into the affine, as detectron2's MSRA backbones have them, are statistics."""
    model = make_model()
    getattr(model[1], field)[0] += 0.5

    assert not find("BN006", model)
    assert not find("BN006", make_model(nn.BatchNorm2d))
    assert not find("BN006", make_model(nn.BatchNorm2d).eval())


def test_its_remedy_is_the_keys_of_a_config():
    facts = collect_facts(make_model())
    norms = tuple(dataclasses.replace(norm, place="RESNETS", norm_key="MODEL.RESNETS.NORM") for norm in facts.norms)
    facts = dataclasses.replace(facts, norms=norms, origin=Origin("config", "a.yaml"), weights=WeightsFacts(""))

    (evidence,) = CHECK.examine(facts)

    assert evidence.remedy.keys == {"MODEL.RESNETS.NORM": "BN", "MODEL.BACKBONE.FREEZE_AT": 0}


def test_a_norm_with_values_that_are_no_numbers_is_another_matter():
    model = make_model()
    model[1].running_mean[0] = torch.nan

    assert not find("BN006", model)
