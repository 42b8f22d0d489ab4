import dataclasses

import pytest
import torch
from torch import nn

import bnext
from bnext import LevelBatchNorm2d, NormSpec
from bnext.diagnostics.collecting.observe import observe_forward
from bnext.diagnostics.facts import ForwardFacts
from bnext.layers import BatchNorm2d
from tests.diagnostics.checks.configs import RETINANET, describe, examine, list_pairs
from tests.diagnostics.checks.diagnosing import find


def make(norm=None):
    return nn.Sequential(nn.Conv2d(3, 32, 1), norm or nn.BatchNorm2d(32))


@pytest.mark.parametrize(
    ("size", "severity"),
    [
        ((1, 3, 1, 1), "error"),
        ((2, 3, 1, 1), "warning"),
        ((1, 3, 2, 2), "note"),
        ((15, 3, 1, 1), "note"),
        ((16, 3, 1, 1), None),
        ((1, 3, 4, 4), None),
    ],
)
def test_by_the_number_of_elements(size, severity):
    found = find("BN010", make(), [torch.zeros(size)])

    assert [evidence.severity for evidence in found] == ([severity] if severity else [])


def test_vectors_have_an_element_of_each_sample():
    (evidence,) = find("BN010", nn.Sequential(nn.BatchNorm1d(3)), [torch.zeros(1, 3)])

    assert evidence.severity == "error"
    assert not evidence.remedy.call  # which convert_norm would refuse
    assert not find("BN010", nn.Sequential(nn.BatchNorm1d(3)), [torch.zeros(16, 3)])


def test_a_single_element_comes_before_the_single_sample_that_it_is_of():
    codes = [finding.code for finding in bnext.diagnose(make(), [torch.zeros(1, 3, 1, 1)]).findings]
    assert codes[:2] == ["BN010", "BN008"]


def test_what_a_single_element_gives_may_be_chosen():
    norm = BatchNorm2d(32, NormSpec(single_element="population"))
    assert find("BN010", make(norm), [torch.zeros(1, 3, 1, 1)])[0].severity == "note"


def test_norms_without_mini_batches_are_healthy():
    for norm in (nn.GroupNorm(32, 32), BatchNorm2d(32, NormSpec(frozen="both")), nn.BatchNorm2d(32).eval()):
        assert not find("BN010", make(norm), [torch.zeros(1, 3, 1, 1)])
    assert not find("BN010", make().eval(), [torch.zeros(1, 3, 1, 1)])


def test_its_call_mends_it():
    model, data = make(), [torch.zeros(1, 3, 1, 1)]

    exec(find("BN010", model, data)[0].remedy.call, {"bnext": bnext, "model": model})

    assert not find("BN010", model, data)


def test_a_last_batch_of_one_sample_is_left_out():
    (evidence,) = find("BN010", make(), [torch.zeros(16, 3, 1, 1), torch.zeros(1, 3, 1, 1)])

    assert evidence.severity == "error"
    assert "drop_last=True" in evidence.remedy.call


def test_the_smallest_level_of_a_config_is_of_its_images():
    norm = LevelBatchNorm2d(3, ("p3", "p7"), NormSpec.from_table5_row(4))
    opts = ("SOLVER.IMS_PER_BATCH", 1, "INPUT.MIN_SIZE_TRAIN", "(256,)")
    facts = describe(RETINANET, *opts)
    path = next(norm.path for norm in facts.norms if norm.place == "RETINANET")
    # A forward of made-up pixels, of a quarter of the training's.
    levels = {"p3": torch.zeros(1, 3, 16, 16), "p7": torch.zeros(1, 3, 1, 1)}
    forward: ForwardFacts = observe_forward(norm, levels, {path: norm}, num_images=1, is_noise=True)

    seen = dataclasses.replace(facts, forwards=(dataclasses.replace(forward, image_size=(128, 128)),))
    (evidence,) = examine("BN010", seen)
    assert (evidence.severity, evidence.numbers["elements"]) == ("note", 4)
    small = dataclasses.replace(seen, forwards=(dataclasses.replace(forward, image_size=(256, 256)),))
    (evidence,) = examine("BN010", small)
    assert evidence.severity == "error"

    mended = describe(RETINANET, *opts, *list_pairs(evidence.remedy))
    assert not examine("BN010", dataclasses.replace(mended, forwards=small.forwards))
