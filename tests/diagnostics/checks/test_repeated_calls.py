import dataclasses

import pytest
import torch
from torch import nn

import bnext
from bnext import LevelBatchNorm2d, NormSpec, repair
from bnext.diagnostics.checks.repeated_calls import CHECK
from bnext.diagnostics.diagnose import collect_facts
from bnext.diagnostics.facts import Origin, StepFacts, WeightsFacts
from tests.diagnostics.checks.diagnosing import find


class Head(nn.Module):
    """A tower that is called on features whose means are apart."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.tower = nn.Sequential(nn.Conv2d(3, 4, 1), norm)

    def forward(self, features):
        return [self.tower(feature) for feature in features]


def make_levels(offset=2.0):
    generator = torch.Generator().manual_seed(0)
    sizes = ((2, 3, 8, 8), (2, 3, 4, 4))
    return [
        [torch.randn(size, generator=generator) + offset * level for level, size in enumerate(sizes)] for _ in range(3)
    ]


def test_finds_a_norm_that_sees_two_levels():
    (evidence,) = find("BN001", Head(nn.BatchNorm2d(4)), make_levels())

    assert evidence.severity == "error"
    assert evidence.layers == ("tower.1",)
    assert evidence.numbers["calls"] == 2
    assert evidence.numbers["distance"] > 0.5


def test_nothing_is_left_after_its_remedy():
    model, data = Head(nn.BatchNorm2d(4)), make_levels()

    exec(
        find("BN001", model, data)[0].remedy.call.replace("bnext.", ""),
        {"repair": repair, "model": model, "data": data},
    )

    assert not find("BN001", model, data)


def test_a_norm_of_one_call_is_healthy():
    assert not find(
        "BN001", nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), [batch[0] for batch in make_levels()]
    )


def test_calls_on_features_that_are_alike_are_a_note():
    (evidence,) = find("BN001", Head(nn.BatchNorm2d(4)), [[batch[0], batch[0].flip(-1)] for batch in make_levels()])

    assert evidence.severity == "note"


def test_levels_that_are_one_mini_batch_are_healthy():
    class Named(nn.Module):
        def __init__(self, statistics):
            super().__init__()
            self.norm = LevelBatchNorm2d(3, ("p3", "p4"), NormSpec(statistics=statistics))

        def forward(self, features):
            return self.norm(dict(zip(("p3", "p4"), features, strict=True)))

    assert not find("BN001", Named("shared"), make_levels())
    assert find("BN001", Named("per_level"), make_levels())  # row 3


@pytest.mark.parametrize(("row", "number"), [(1, 0), (2, 0), (3, 1), (4, 0), (5, 1), (6, 0)])
def test_rows_of_a_level_norm(row, number):
    """Row 5, of which each level has an affine, stores as wrongly as row 3."""
    head = LevelBatchNorm2d(3, ("p3", "p4"), NormSpec.from_table5_row(row))
    data = [dict(zip(("p3", "p4"), features, strict=True)) for features in make_levels()]

    assert len(find("BN001", head, data)) == number


@pytest.mark.parametrize(("said", "is_command"), [("per_level", True), ("shared", False)])
def test_heeds_how_a_file_says_that_it_was_trained(said, is_command):
    weights = WeightsFacts("model.pth", is_loaded=True, statistics={"norm": said})
    (evidence,) = CHECK.examine(make_row_3(weights=weights, config={"MODEL.META_ARCHITECTURE": "BNextRetinaNet"}))

    assert bool(evidence.remedy.command) == is_command
    assert bool(evidence.remedy.keys) != is_command


def make_row_3(**facts_of_config):
    facts = collect_facts(nn.ModuleDict({"norm": LevelBatchNorm2d(3, ("p3", "p4"), NormSpec.from_table5_row(3))}))
    norms = tuple(dataclasses.replace(norm, place="RETINANET", levels=("p3", "p4")) for norm in facts.norms)
    origin = Origin("config", "a.yaml", weights="model.pth")
    return dataclasses.replace(facts, norms=norms, origin=origin, **facts_of_config)


def test_a_repaired_file_without_its_key_needs_the_key_alone():
    weights = WeightsFacts("model.pth", is_loaded=True, populations={"norm": "per_level"})

    (evidence,) = CHECK.examine(make_row_3(weights=weights, config={"MODEL.META_ARCHITECTURE": "BNextRetinaNet"}))

    assert evidence.remedy.keys == {"MODEL.BNEXT.RETINANET.POPULATION": "per_level"}
    assert not evidence.remedy.command


@pytest.mark.parametrize(
    ("architecture", "keys"),
    [
        ("BNextFCOS", {"MODEL.BNEXT.RETINANET.STATISTICS"}),
        ("RetinaNet", {"MODEL.BNEXT.RETINANET.STATISTICS", "MODEL.META_ARCHITECTURE"}),
        ("Theirs", set()),
    ],
)
def test_names_keys_that_the_architecture_heeds(architecture, keys):
    (evidence,) = CHECK.examine(make_row_3(config={"MODEL.META_ARCHITECTURE": architecture}))

    assert set(evidence.remedy.keys) == keys
    assert evidence.remedy.call.startswith("bnext.repair(")


def make_counted(head, *others):
    model = nn.Sequential(Head(nn.BatchNorm2d(4)), *(nn.BatchNorm2d(4) for _ in others))
    for norm, count in zip((model[0].tower[1], *model[1:]), (head, *others), strict=True):
        norm.num_batches_tracked.fill_(count)
    return model


def test_counters_of_a_file_tell_how_often_a_norm_was_called():
    (evidence,) = find("BN001", make_counted(500, 100, 100).state_dict())

    assert evidence.layers == ("0.tower.1",)
    assert evidence.numbers["calls"] == 5


def test_counters_that_say_something_else_tell_nothing():
    for counts in ((200, 100, 100), (503, 100, 100), (100, 100, 100), (0, 100, 100), (500, 0, 0)):
        assert not find("BN001", make_counted(*counts).state_dict())


@pytest.mark.parametrize(("number", "expected"), [(3, 3), (2, None), (1, None)])
def test_calls_in_the_steps_of_a_training_are_known_without_a_config(number, expected):
    """Two may be views of one image, and nobody saw how far apart they are."""
    facts = dataclasses.replace(
        collect_facts(Head(nn.BatchNorm2d(4))), steps=StepFacts(20, 20, {}, {}, {"tower.1": number})
    )

    assert [evidence.numbers["calls"] for evidence in CHECK.examine(facts)] == ([expected] if expected else [])


def test_the_remedy_repairs_views_of_one_size_too():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

        def forward(self, images):
            return self.part(images) + self.part(3 * images + 2)

    model, data = Pair(), [torch.randn(16, 3, 6, 6) for _ in range(4)]
    (evidence,) = find("BN001", model, data)
    assert evidence.severity == "error"

    exec(evidence.remedy.call, {"bnext": bnext, "model": model, "data": data})
    assert not find("BN001", model, data)
