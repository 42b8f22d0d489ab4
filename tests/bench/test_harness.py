"""The harness refuses arms that are not equal, and every claim's arms are; one tiny claim goes from end to end."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bench import __main__ as command
from bench import dealt
from bench.harness import Comparison, draw_features, measure_difference
from bnext.errors import BNextError
from tests.workers import run_workers

TINY = {"a": (4, 3, 5, 2), "b": (2, 3, 1, 4)}
CLAIMED = [
    comparison for claim in command.CLAIMS.values() for comparison in claim.ROWS if isinstance(comparison, Comparison)
]


class DetachedMean(nn.BatchNorm2d):
    """The values are right, the gradient of the feature is not."""

    def forward(self, input):
        difference = super().forward(input)
        return difference + (input - input.detach())


class ForeignAffine(nn.BatchNorm2d):
    """The gradient of the weight alone is wrong."""

    def forward(self, input):
        return super().forward(input) + (self.weight - self.weight.detach()).view(-1, 1, 1)


class Broken(nn.BatchNorm2d):
    """One feature of two is no number."""

    def forward(self, input):
        return super().forward(input) * (1.0 if len(input) == 4 else float("nan"))


class ForgottenAverage(nn.BatchNorm2d):
    """Outputs and gradients are right; the running statistics stay as they are."""

    def forward(self, input):
        return nn.functional.batch_norm(input, None, None, self.weight, self.bias, True, 0.1, self.eps)


def norm(kind=nn.BatchNorm2d, **options):
    return kind(3, **options)


def tiny(make_other, differs=""):
    return Comparison("a tiny claim", TINY, norm, make_other, differs)


def prove(comparison):
    """In small: the arms know the numbers of samples and channels, not those of positions."""
    shapes = {}
    for name, (samples, channels, height, width) in comparison.shapes.items():
        shapes[name] = (samples, channels, 1 + height // 16, 1 + width // 16)

    differences = []
    for layout in comparison.layouts:
        features, grads = (draw_features(shapes, layout) for _ in range(2))
        differences.append(measure_difference(comparison, features, grads))
    return differences


@pytest.mark.parametrize(
    ("make_other", "fault"),
    [
        (lambda: norm(eps=1e-6), "a difference"),
        (lambda: norm(DetachedMean), "the gradient of [ab]"),
        (lambda: norm(ForeignAffine), "the gradient of weight"),
        (lambda: norm(ForgottenAverage), "the average running_(mean|var)"),
        (lambda: norm(Broken), "a difference of nan in the output b"),
    ],
)
def test_unequal_arms_are_refused(make_other, fault):
    with pytest.raises(BNextError, match=fault):
        prove(tiny(make_other))
    assert not max(prove(tiny(make_other, differs="it is another norm"))) < 1e-9


def test_a_claim_from_end_to_end(monkeypatch, tmp_path, capsys):
    comparisons = [tiny(norm), dataclasses.replace(tiny(lambda: norm(eps=1.0), "another eps"), layouts=("NCHW",))]
    monkeypatch.setattr(command, "CLAIMS", {"tiny": SimpleNamespace(ROWS=comparisons)})
    assert command.main(["--only", "tiny", "--pairs", "2", "--json", str(tmp_path / "bench.json")]) == 0

    table = capsys.readouterr().out
    assert table.count("a tiny claim") == 4, "three rows and a remark"
    assert "another eps" in table
    speeds = json.loads((tmp_path / "bench.json").read_text())["speeds"]
    assert [speed["layout"] for speed in speeds] == ["NCHW", "channels_last", "NCHW"]


@pytest.mark.parametrize(
    "comparison", [one for one in CLAIMED if one.num_workers == 1], ids=lambda one: one.name.partition(",")[0]
)
def test_arms_of_a_claim_are_equal_or_say_why_not(comparison):
    assert (max(prove(comparison)) < 1e-9) is not bool(comparison.differs)


def prove_on_workers(rank):
    torch.manual_seed(rank)
    return {one.name: prove(one)[0] for one in dealt.ROWS if one.num_workers > 1}


def test_arms_on_two_workers_are_equal_or_say_why_not():
    for differences in run_workers(prove_on_workers, 2):
        assert [difference < 1e-9 for difference in differences.values()] == [True, True, False]
