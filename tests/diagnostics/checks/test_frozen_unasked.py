import pytest
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from bnext import freeze_norms
from tests.diagnostics.checks.configs import RETINANET, describe, examine, list_pairs
from tests.diagnostics.checks.diagnosing import find

FREEZE = ("MODEL.BACKBONE.FREEZE_AT", 2)


def test_finds_stages_that_are_frozen_though_their_norm_is_another():
    (evidence,) = examine("BN007", describe(RETINANET, *FREEZE))

    assert evidence.severity == "note"
    assert (evidence.numbers["frozen"], evidence.numbers["norms"]) == (6, 21)  # the stem and res2
    assert not examine("BN007", describe(RETINANET, *FREEZE, *list_pairs(evidence.remedy)))


def test_frozen_norms_that_were_asked_for_are_healthy():
    assert not examine("BN007", describe(RETINANET, *FREEZE, "MODEL.RESNETS.NORM", "FrozenBN"))


def make(norm):
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(norm, nn.ReLU()))


@pytest.mark.parametrize(("kind", "severity"), [(nn.SyncBatchNorm, "warning"), (nn.BatchNorm2d, "note")])
def test_finds_norms_in_evaluation_mode(kind, severity):
    model = make(kind(4))
    model[1].eval()

    (evidence,) = find("BN007", model)

    assert (evidence.severity, evidence.layers) == (severity, ("1.0",))
    exec(evidence.remedy.call, {"model": model})
    assert not find("BN007", model)


def test_norms_that_are_frozen_altogether_were_meant_to_be():
    teacher = make(nn.SyncBatchNorm(4)).eval().requires_grad_(False)
    assert not find("BN007", nn.Sequential(teacher, nn.BatchNorm2d(4)))

    frozen = make(nn.BatchNorm2d(4))
    freeze_norms(frozen)
    assert not find("BN007", frozen)
    assert not find("BN007", make(FrozenBatchNorm2d(4)))
    assert not find("BN007", make(nn.GroupNorm(2, 4)).eval())
    assert not find("BN007", make(nn.SyncBatchNorm(4)).eval())  # the whole model is
