import dataclasses

import pytest
import torch
from torch import nn

from bnext.diagnostics.diagnose import collect_facts, examine_facts
from tests.diagnostics.checks.diagnosing import find


def make_model(num_dead, value=1e-6):
    model = nn.Sequential(nn.Conv2d(3, 20, 1, bias=False), nn.BatchNorm2d(20))
    generator = torch.Generator().manual_seed(0)
    model[1].weight.data.uniform_(0.05, 2, generator=generator)
    model[1].weight.data[:num_dead] *= value
    return model


@pytest.mark.parametrize(("number", "severity"), [(19, "warning"), (10, "warning"), (9, "note"), (5, "note")])
@pytest.mark.parametrize("value", [1e-6, 0.0, -1e-6])
def test_finds_dead_channels_by_their_share(number, severity, value):
    (evidence,) = find("BN032", make_model(number, value))

    assert evidence.severity == severity
    assert evidence.layers == ("1",)
    assert evidence.numbers["share"] == number / 20


def test_a_few_dead_channels_are_healthy():
    assert not find("BN032", make_model(4))


def test_weak_channels_are_alive():
    assert not find("BN032", make_model(10, 0.05))


def test_weights_of_zero_at_the_end_of_a_branch_are_on_purpose():
    model = make_model(20, 0.0)
    assert not find("BN032", model)

    model[1].bias.data[0] = 1  # trained, and still without a scale
    assert find("BN032", model)[0].severity == "warning"


def test_one_huge_scale_makes_no_other_channel_dead():
    model = make_model(0)
    model[1].weight.data[0] = 1e6

    assert not find("BN032", model)


def test_decay_of_norms_is_switched_off_where_a_config_has_it():
    facts = collect_facts(make_model(15))
    for decay, keys in ((1e-4, {"SOLVER.WEIGHT_DECAY_NORM": 0.0}), (0.0, {})):
        diagnosis = examine_facts(dataclasses.replace(facts, config={"SOLVER.WEIGHT_DECAY_NORM": decay}))
        (finding,) = [finding for finding in diagnosis.findings if finding.code == "BN032"]
        assert finding.evidence.remedy.keys == keys
