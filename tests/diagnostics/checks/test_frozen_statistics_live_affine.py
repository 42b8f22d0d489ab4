from torch import nn

import bnext
from tests.diagnostics.checks.diagnosing import find


def make_model(norm=nn.BatchNorm2d):
    return nn.Sequential(nn.Conv2d(3, 4, 1), norm(4), nn.Conv2d(4, 4, 1), norm(4))


def test_notes_norms_in_evaluation_mode():
    model = make_model()
    model[1].eval()

    (evidence,) = find("BN005", model)

    assert evidence.severity == "note"
    assert evidence.layers == ("1",)
    exec(evidence.remedy.call, {"bnext": bnext, "model": model})
    assert not find("BN005", model)
    assert model[3].weight.requires_grad


def test_notes_norms_of_bnext():
    model = make_model(lambda channels: bnext.BatchNorm2d(channels, bnext.NormSpec(frozen="statistics")))

    (evidence,) = find("BN005", model)
    exec(evidence.remedy.call, {"bnext": bnext, "model": model})

    assert not find("BN005", model)


def test_leaves_what_is_frozen_whole_or_not_at_all():
    frozen = make_model()
    frozen[1].eval().requires_grad_(False)

    assert not find("BN005", frozen)
    assert not find("BN005", make_model())
    assert not find("BN005", make_model().eval())


def test_leaves_norms_over_workers_to_another_check():
    model = make_model(nn.SyncBatchNorm)
    model[1].eval()

    assert not find("BN005", model)
