import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bnext import LevelBatchNorm2d, NormSpec
from bnext.diagnostics.diagnose import collect_facts, examine_facts
from tests.diagnostics.checks.diagnosing import find


class Block(nn.Module):
    def __init__(self, bias: bool = True, activation: bool = False) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 1, bias=bias), nn.BatchNorm2d(8)
        self.activation = activation

    def forward(self, x):
        x = self.conv1(x)
        return self.bn1(F.relu(x) if self.activation else x)


SEQUENCE = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8))


@pytest.mark.parametrize(("model", "layer"), [(Block(), "bn1"), (SEQUENCE, "1")])
def test_finds_a_bias_and_takes_it_out_without_a_change_of_outputs(model, layer):
    features = torch.randn(4, 3, 2, 2) if isinstance(model, Block) else torch.randn(4, 3)
    model(features)
    before = model.eval()(features)
    model.train()

    (evidence,) = find("BN031", model)

    assert evidence.severity == "note"
    assert evidence.layers == (layer,)
    exec(evidence.remedy.call, {"model": model})
    assert not find("BN031", model)
    assert torch.allclose(model.eval()(features), before, atol=1e-5)


@pytest.mark.parametrize(
    "model",
    [
        Block(bias=False),
        Block(activation=True),
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.BatchNorm2d(8)),
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8)),
    ],
)
def test_a_bias_that_does_something_is_healthy(model):
    assert not find("BN031", model)


def test_a_frozen_norm_subtracts_no_bias():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))
    model[1].eval()

    assert not find("BN031", model)


def test_heads_of_a_detector_are_as_they_are_built():
    facts = collect_facts(Block())
    norms = tuple(dataclasses.replace(norm, place="RETINANET") for norm in facts.norms)

    diagnosis = examine_facts(dataclasses.replace(facts, norms=norms))

    assert not [finding for finding in diagnosis.findings if finding.code == "BN031"]


def test_all_norms_are_one_finding():
    assert len(find("BN031", nn.Sequential(*(Block() for _ in range(3))))) == 1


def test_the_mean_of_every_level_takes_the_bias_in():
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.norm = LevelBatchNorm2d(4, ("p3", "p4"), NormSpec(population="per_level", statistics="per_level"))

    facts = collect_facts(Head())
    assert facts.norms[0].layer_before is None  # not shown by a forward: nothing is guessed


def test_looking_for_layers_changes_nothing():
    class Drawing(Block):
        def forward(self, x):
            self.drawn = torch.rand(())
            return super().forward(x)

    model, state = Drawing(), torch.get_rng_state()

    facts = collect_facts(model)

    assert facts.norms[0].layer_before.path == "conv1"
    assert torch.equal(torch.get_rng_state(), state)
    assert not hasattr(model, "drawn")


def test_a_checkpoint_alone_is_not_built_again():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))

    assert find("BN031", model)
    assert not find("BN031", model.state_dict())
