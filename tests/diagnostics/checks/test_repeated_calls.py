import torch
from torch import nn

from bnext import LevelBatchNorm2d, NormSpec, repair
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
