import dataclasses

import pytest
from detectron2.layers import FrozenBatchNorm2d
from torch import nn

import bnext
from bnext.diagnostics.checks.fused import CHECK
from bnext.diagnostics.diagnose import collect_facts
from bnext.diagnostics.facts import Origin, WeightsFacts
from tests.diagnostics.checks.diagnosing import find


def make_model(norm=nn.BatchNorm2d):
    return nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), norm(4), nn.Conv2d(4, 4, 1, bias=False), norm(4))


def examine(model, weights, **changes):
    return list(CHECK.examine(dataclasses.replace(collect_facts(model), weights=weights, **changes)))


@pytest.mark.parametrize(("is_loaded", "severity"), [(True, "warning"), (False, "note")])
def test_finds_folded_weights_of_live_norms(is_loaded, severity):
    weights = WeightsFacts("R-50.pkl", is_loaded, is_folded=True, folded=("1",))
    model = make_model()

    (evidence,) = examine(model, weights)

    assert evidence.severity == severity
    assert evidence.layers == ("1",)
    exec(evidence.remedy.call, {"bnext": bnext, "model": model})
    assert not examine(model, weights)


def test_its_remedy_is_a_key_of_a_config():
    facts = collect_facts(make_model())
    norms = tuple(dataclasses.replace(norm, place="RESNETS", norm_key="MODEL.RESNETS.NORM") for norm in facts.norms)
    weights = WeightsFacts("R-50.pkl", is_folded=True, folded=("1",))
    facts = dataclasses.replace(facts, norms=norms, weights=weights, origin=Origin("config", "a.yaml"))

    assert [evidence.remedy.keys for evidence in CHECK.examine(facts)] == [{"MODEL.RESNETS.NORM": "FrozenBN"}]


def test_frozen_norms_may_have_them():
    weights = WeightsFacts("R-50.pkl", is_loaded=True, is_folded=True, folded=("1", "3"))

    assert not examine(make_model(FrozenBatchNorm2d), weights)
    assert not examine(make_model(), dataclasses.replace(weights, is_folded=False, folded=()))


def test_finds_the_state_of_a_frozen_norm_in_one_that_is_not():
    frozen, model = make_model(FrozenBatchNorm2d), make_model()
    frozen[1].bias += 1
    model.load_state_dict(frozen.state_dict(), strict=False)

    (evidence,) = find("BN020", model)

    assert evidence.layers == ("1",)
    assert not find("BN013", model)  # of which this is another case
    assert not find("BN020", frozen)
    assert not find("BN020", model.eval())

    model.train()[1].running_var.fill_(1)
    assert not find("BN020", model)
    assert not find("BN020", make_model())


def test_finds_a_file_whose_norms_are_gone():
    weights = WeightsFacts("folded.pth", is_loaded=True, is_folded=True, missing=("1", "3"))

    (evidence,) = examine(make_model(), weights)

    assert evidence.severity == "error"
    assert evidence.layers == ("1", "3")


def test_finds_a_folded_model_in_training():
    model = make_model().eval()
    bnext.fold_norms(model, allow_training=True)

    assert not find("BN020", model)
    (evidence,) = find("BN020", model.train())
    assert evidence.layers == ("1", "3")
    exec(evidence.remedy.call, {"model": model})
    assert not find("BN020", model)
