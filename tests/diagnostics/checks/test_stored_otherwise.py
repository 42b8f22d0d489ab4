import dataclasses

import pytest
import torch
from torch import nn

import bnext
from bnext import LevelBatchNorm2d, NormSpec
from bnext.diagnostics.checks.stored_otherwise import CHECK
from bnext.diagnostics.diagnose import collect_facts
from bnext.diagnostics.facts import Origin, WeightsFacts
from tests.diagnostics.checks.diagnosing import find

LEVELS = ("p3", "p4")


class Head(nn.Module):
    def __init__(self, offset=2.0, scale=1.0, **answers):
        super().__init__()
        self.norm = LevelBatchNorm2d(3, LEVELS, NormSpec(**answers))
        self.train()
        for level, factor in zip(LEVELS, (0.0, 1.0), strict=True):
            with torch.no_grad():
                part = getattr(self.norm, level) if hasattr(self.norm, level) else self.norm
                part.running_mean.fill_(1 + factor * offset)
                part.running_var.fill_(scale**factor)

    def forward(self, features):
        return self.norm(features)


def make_data():
    generator = torch.Generator().manual_seed(0)
    return [{level: torch.randn(2, 3, 4, 4, generator=generator) for level in LEVELS} for _ in range(2)]


@pytest.mark.parametrize("levels", [{"offset": 2.0}, {"offset": 0.0, "scale": 9.0}])
def test_finds_row_2(levels):
    (evidence,) = find("BN002", Head(statistics="shared", population="per_level", **levels))

    assert evidence.severity == "error"
    assert evidence.layers == ("norm",)
    assert evidence.numbers["distance"] > 0.5


def test_nothing_is_left_after_its_remedy():
    model, data = Head(statistics="shared", population="per_level"), make_data()

    exec(find("BN002", model)[0].remedy.call, {"bnext": bnext, "model": model, "data": data})

    assert not find("BN002", model)
    assert model.norm.spec.table5_row == 1


@pytest.mark.parametrize("row", [1, 3, 4, 5, 6])
def test_leaves_other_rows_to_others(row):
    spec = NormSpec.from_table5_row(row)

    assert not find("BN002", Head(statistics=spec.statistics, population=spec.population, affine=spec.affine))


def test_levels_that_are_alike_are_a_note():
    (evidence,) = find("BN002", Head(offset=0.1, statistics="shared", population="per_level"))

    assert evidence.severity == "note"


def test_a_population_for_each_domain_is_a_note():
    spec = NormSpec(population="per_domain", domains=("day", "night"))

    (evidence,) = find("BN002", nn.Sequential(bnext.BatchNorm2d(3, spec)))

    assert evidence.severity == "note"


@pytest.mark.parametrize(
    ("row", "said", "points"),
    [(4, "shared", 37.0), (1, "per_level", 5.0), (4, "per_level", None), (1, "shared", None), (3, "shared", None)],
)
def test_heeds_how_a_file_says_that_it_was_trained(row, said, points):
    spec = NormSpec.from_table5_row(row)
    facts = collect_facts(Head(statistics=spec.statistics, population=spec.population))
    weights = WeightsFacts("model.pth", is_loaded=True, statistics={"norm": said})
    norms = tuple(dataclasses.replace(norm, place="RETINANET") for norm in facts.norms)
    origin = Origin("config", "a.yaml", weights="model.pth")
    facts = dataclasses.replace(facts, norms=norms, weights=weights, origin=origin)

    found = list(CHECK.examine(facts))

    assert [evidence.points for evidence in found] == ([] if points is None else [points])
    for evidence in found:
        assert evidence.remedy.keys["MODEL.BNEXT.RETINANET.POPULATION"] == said
        assert f"--population {said}" in evidence.remedy.command
        assert evidence.remedy.command.endswith(f"MODEL.BNEXT.RETINANET.STATISTICS {said}")
