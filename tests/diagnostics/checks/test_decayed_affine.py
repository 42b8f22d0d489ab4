import dataclasses

import pytest
import torch
from detectron2.layers import CycleBatchNormList
from detectron2.solver.build import get_default_optimizer_params
from torch import nn

from bnext.diagnostics.checks.decayed_affine import CHECK
from bnext.diagnostics.facts import Facts, Origin, TrainingFacts
from tests.diagnostics.checks.diagnosing import find


def make_model():
    return nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), CycleBatchNormList(2, num_features=4)
    )


def make_optimizer(groups):
    return torch.optim.SGD(groups, lr=0.1, weight_decay=1e-4)


def test_finds_norms_that_the_optimizer_does_not_know_for_norms():
    model = make_model()
    optimizer = make_optimizer(get_default_optimizer_params(model, weight_decay=1e-4, weight_decay_norm=0.0))
    (evidence,) = find("BN027", model, optimizer=optimizer)

    assert (evidence.severity, evidence.layers) == ("warning", ("3",))
    assert evidence.numbers["weight_decay"] == 1e-4


def test_all_decayed_alike_is_a_note_and_its_remedy_leaves_none():
    model = make_model()
    optimizer = make_optimizer(model.parameters())
    (evidence,) = find("BN027", model, optimizer=optimizer)
    assert evidence.severity == "note"

    exec(evidence.remedy.call, {"model": model, "optimizer": optimizer})
    assert not find("BN027", model, optimizer=optimizer)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [1e-4, 0.0]


def test_frozen_affines_and_an_unknown_optimizer_say_nothing():
    model = make_model()
    for index in (1, 3):
        model[index].requires_grad_(False)
    assert not find("BN027", model)
    assert not find("BN027", model, optimizer=make_optimizer([p for p in model.parameters() if p.requires_grad]))


@pytest.mark.parametrize(("wanted", "severities"), [(0.0, ["warning"]), (1e-4, []), (None, ["note"])])
def test_a_config_says_whether_it_is_on_purpose(wanted, severities):
    facts = Facts((), training=TrainingFacts(weight_decay={"a": 1e-4}), origin=Origin("config"))
    config = {} if wanted is None else {"SOLVER.WEIGHT_DECAY_NORM": wanted}
    config["MODEL.META_ARCHITECTURE"] = "RetinaNet"
    seen = list(CHECK.examine(dataclasses.replace(facts, config=config)))

    assert [evidence.severity for evidence in seen] == severities
    assert all(evidence.remedy.keys == {"MODEL.META_ARCHITECTURE": "BNextRetinaNet"} for evidence in seen)
