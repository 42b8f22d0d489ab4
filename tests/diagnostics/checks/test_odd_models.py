"""Models of which there is little to say, or that hold what cannot be: no check raises."""

import dataclasses

import pytest
import torch
from torch import nn

import bnext
from bnext.diagnostics import diagnose
from bnext.diagnostics.diagnose import collect_facts, examine_facts
from bnext.diagnostics.facts import Origin, WeightsFacts


def fill(value):
    norm = nn.BatchNorm2d(3)
    for tensor in (norm.running_mean, norm.running_var, norm.weight.data, norm.bias.data):
        tensor.fill_(value)
    return nn.Sequential(nn.Conv2d(3, 3, 1), norm)


def put(norm):
    return nn.Sequential(nn.Conv2d(3, 3, 1), norm)


LEVELS = ("a", "b")
MODELS = {
    "nothing": nn.Sequential(),
    "a norm": nn.BatchNorm2d(3),
    "lazy": nn.Sequential(nn.LazyConv2d(3, 1), nn.LazyBatchNorm2d()),
    "meta": put(nn.BatchNorm2d(3)).to("meta"),
    "1 channel": nn.Sequential(nn.BatchNorm2d(1)),
    "no channel": nn.Sequential(nn.BatchNorm2d(0)),
    "vectors": nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)),
    "no state": put(nn.BatchNorm2d(3, affine=False, track_running_stats=False)),
    "no population": put(bnext.BatchNorm2d(3, bnext.NormSpec(population="none", inference="mini_batch"))),
    "instance": put(nn.InstanceNorm2d(3, track_running_stats=True)),
    "group": put(nn.GroupNorm(1, 3)),
    "half": put(nn.BatchNorm2d(3)).half(),
    "cumulative": put(nn.BatchNorm2d(3, momentum=None)),
    "NaN": fill(torch.nan),
    "infinite": fill(torch.inf),
    "negative": fill(-1.0),
    "levels": nn.Sequential(bnext.LevelBatchNorm2d(3, LEVELS, bnext.NormSpec.from_table5_row(2))),
    "frozen": put(bnext.BatchNorm2d(3, bnext.NormSpec(frozen="both"))),
}


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_no_check_raises(name, mode):
    model = MODELS[name].train(mode)

    assert not diagnose(model).failures
    for before in ("nothing", "a norm", "lazy", "NaN", "levels", "group"):
        assert not diagnose(model, before=MODELS[before], averaged=MODELS[name]).failures


@pytest.mark.parametrize("kind", ["model", "config", "checkpoint"])
@pytest.mark.parametrize("name", MODELS)
def test_no_check_raises_for_any_weights(name, kind):
    facts = dataclasses.replace(collect_facts(MODELS[name]), origin=Origin(kind, "a.yaml"))
    paths = tuple(norm.path for norm in facts.norms)
    odd = dict.fromkeys([*paths, "another"], float("nan"))

    for weights in (
        WeightsFacts("model.pth", is_loaded=True, is_folded=True, folded=paths),
        WeightsFacts("model.pth", is_loaded=True, is_folded=True, missing=paths, eps=odd),
        WeightsFacts("model.pth", is_loaded=True, without_statistics=paths, statistics=dict.fromkeys(paths, "odd")),
    ):
        assert not examine_facts(dataclasses.replace(facts, weights=weights)).failures
