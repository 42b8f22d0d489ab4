import pytest
from torch import nn

from tests.diagnostics.checks.diagnosing import find


@pytest.mark.parametrize("momentum", [0.9, 0.997])
def test_finds_a_momentum_of_another_framework(momentum):
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4, momentum=momentum))

    (evidence,) = find("BN017", model)

    assert evidence.severity == "error"
    assert evidence.layers == ("1",)
    exec(evidence.remedy.call, {"model": model})
    assert model[1].momentum == pytest.approx(1 - momentum)


@pytest.mark.parametrize("momentum", [0.1, 0.01, 0.5, None])
def test_leaves_momenta_of_torch_alone(momentum):
    assert not find("BN017", nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, momentum=momentum)))


def test_a_frozen_norm_has_no_momentum():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, momentum=0.9))
    model[1].eval()

    assert not find("BN017", model)
