import pytest
from torch import nn

import bnext
from tests.diagnostics.checks.diagnosing import find


def make_model(norm=nn.BatchNorm2d):
    body = nn.Sequential(nn.Conv2d(3, 4, 1), norm(4), nn.Conv2d(4, 4, 1), norm(4))
    return nn.Sequential(body, nn.Conv2d(4, 2, 1), norm(2))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.SyncBatchNorm, bnext.BatchNorm2d])
def test_finds_a_body_that_was_frozen_by_its_parameters(norm):
    model = make_model(norm)
    model[0].requires_grad_(False)

    (evidence,) = find("BN004", model)

    assert evidence.severity == "warning"
    assert evidence.layers == ("0.1", "0.3")

    exec(evidence.remedy.call, {"bnext": bnext, "model": model})
    assert not find("BN004", model.train())
    assert model[2].weight.requires_grad


@pytest.mark.parametrize(
    "norm", [lambda channels: nn.BatchNorm2d(channels, affine=False), type("Subclass", (nn.BatchNorm2d,), {})]
)
def test_its_remedy_fits_norms_of_any_kind(norm):
    model = make_model(norm)
    model[0].requires_grad_(False)

    (evidence,) = find("BN004", model)
    assert evidence.layers == ("0.1", "0.3")

    model.train()
    exec(evidence.remedy.call, {"bnext": bnext, "model": model})
    assert not find("BN004", model)


def test_an_affine_alone_is_a_note():
    model = make_model()
    model[0][1].requires_grad_(False)

    (evidence,) = find("BN004", model)

    assert evidence.severity == "note"


def test_a_teacher_is_a_note():
    model = make_model()
    model.requires_grad_(False)

    (evidence,) = find("BN004", model)

    assert evidence.severity == "note"


def test_leaves_healthy_models_alone():
    frozen = make_model()
    frozen.requires_grad_(False)
    body = make_model()
    body[0].requires_grad_(False).eval()

    assert not find("BN004", make_model())
    assert not find("BN004", frozen.eval())
    assert not find("BN004", body)
    assert not find("BN004", make_model(lambda channels: nn.BatchNorm2d(channels, affine=False)))
