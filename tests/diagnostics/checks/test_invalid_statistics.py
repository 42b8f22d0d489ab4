import dataclasses

import pytest
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

import bnext
from bnext.diagnostics.diagnose import collect_facts, examine_facts
from bnext.diagnostics.facts import Origin
from tests.diagnostics.checks.diagnosing import find

DATA = [torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


def make_model(norm: type[nn.Module] = nn.BatchNorm2d):
    return nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), norm(8))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, FrozenBatchNorm2d])
@pytest.mark.parametrize(
    ("name", "value"), [("var", -1e-3), ("var", float("nan")), ("var", float("inf")), ("mean", float("nan"))]
)
def test_finds_statistics_that_cannot_be(norm, name, value):
    model = make_model(norm)
    getattr(model[1], f"running_{name}")[3] = value

    (evidence,) = find("BN011", model)

    assert evidence.severity == "error"
    assert evidence.layers == ("1",)
    assert f"running_{name} is {value:g} in channel 3 of 1" in evidence.text
    exec(evidence.remedy.call, {"model": model, "data": DATA, "bnext": bnext})
    assert not find("BN011", model)


def test_an_affine_that_is_not_finite_is_mended_by_no_statistic():
    model = make_model()
    model[1].weight.data[0] = float("nan")

    (evidence,) = find("BN011", model)

    assert evidence.severity == "error"
    assert not evidence.remedy.call


@pytest.mark.parametrize(("zeros", "severity"), [(8, "error"), (4, "warning"), (3, "note")])
def test_variances_of_zero_by_their_share(zeros, severity):
    model = make_model()
    model[1].running_var[:zeros] = 0

    (evidence,) = find("BN011", model)

    assert evidence.severity == severity
    exec(evidence.remedy.call, {"model": model, "data": DATA, "bnext": bnext})
    assert not find("BN011", model)


def test_channels_without_variance_and_scale_are_no_fault():
    model = make_model()
    model[1].running_var[:3] = 0
    model[1].weight.data[:3] = 1e-9

    assert not find("BN011", model)


def test_small_and_initial_variances_are_healthy():
    model = make_model()
    assert not find("BN011", model)
    model[1].running_var[:] = 1e-30
    assert not find("BN011", model)


def test_a_frozen_backbone_is_mended_by_a_command_that_unfreezes_it():
    model = make_model(FrozenBatchNorm2d)
    model[1].running_var[0] = -1
    facts = collect_facts(model)
    norms = tuple(dataclasses.replace(norm, place="RESNETS") for norm in facts.norms)
    facts = dataclasses.replace(facts, norms=norms, origin=Origin("config", "a.yaml", weights="b.pth"))

    (finding,) = [finding for finding in examine_facts(facts).findings if finding.code == "BN011"]

    command = finding.evidence.remedy.command
    assert command.startswith("bnext reestimate --config-file a.yaml --output repaired.pth MODEL.WEIGHTS b.pth")
    assert "MODEL.RESNETS.NORM BN" in command
