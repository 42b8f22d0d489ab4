"""What is wrong with the state of a model's norms: named by layer, level or domain, and channel."""

import pytest
import torch
from torch import nn
from torchvision.ops.misc import FrozenBatchNorm2d

from bnext.errors import CheckpointError
from bnext.layers import BatchNorm2d, NormSpec
from bnext.surgery.check_state import check_norm_state, check_variances, find_unwritten_frozen_norms, is_unwritten
from tests.surgery.norm_forms import FORMS, LAYOUTS, make

CHANNEL = 2


def hold(name):
    return nn.ModuleDict({"a": make(name)})


@pytest.mark.parametrize("name", LAYOUTS)
def test_written_state_is_well(name):
    assert check_norm_state(hold(name)) == []
    assert find_unwritten_frozen_norms(hold(name)) == []


CASES = [
    ("running_var", -1e-3, "variance"),
    ("running_var", 0.0, "variance"),
    ("running_var", float("nan"), "variance"),
    ("running_var", float("inf"), "variance"),
    ("running_mean", float("nan"), "mean"),
    ("weight", float("inf"), "affine"),
    ("bias", float("nan"), "affine"),
]


@pytest.mark.parametrize(
    ("name", "field", "value", "kind"),
    [
        *(("domains_DDD", *case) for case in CASES),
        *((name, *case) for name in LAYOUTS for case in (CASES[0], CASES[-1])),
    ],
)
def test_values_that_cannot_be_are_found(name, field, value, kind):
    model = hold(name)
    keys = [key for key in model["a"].state_dict() if key.rpartition(".")[2] == field]
    for key in keys:
        model["a"].state_dict()[key][CHANNEL] = value
    findings = check_norm_state(model)
    assert [(finding.path, finding.kind, finding.channels) for finding in findings] == [("a", kind, (CHANNEL,))] * len(
        keys
    )
    assert {finding.owner for finding in findings} == {key.rpartition(".")[0] for key in keys}
    assert all(f"got {value:g} (channel {CHANNEL})" in str(finding) for finding in findings)


@pytest.mark.parametrize("name", LAYOUTS)
def test_statistics_that_nobody_wrote_are_found(name):
    model = nn.ModuleDict({"a": FORMS[name]()}).double()
    findings = check_norm_state(model)
    populations = {key.rpartition(".")[0] for key in model["a"].state_dict() if key.endswith("running_var")}
    assert [finding.kind for finding in findings] == ["unwritten"] * len(populations)
    assert {finding.owner for finding in findings} == populations


def test_one_domain_that_was_never_seen_is_found():
    spec = NormSpec(statistics="per_domain", population="per_domain", domains=("day", "night"))
    model = nn.ModuleDict({"a": BatchNorm2d(4, spec)})
    model["a"].day.running_mean.fill_(1)
    assert [str(found) for found in check_norm_state(model)] == [
        "a (night): population statistics were never written: mean 0 and variance 1 in every channel, 0 mini-batches"
    ]


def test_frozen_norms_whose_statistics_are_in_their_affine_are_left_out():
    """As in ImageNet backbones that detectron2 has from Caffe2."""
    model = nn.ModuleDict({"a": FrozenBatchNorm2d(4), "b": nn.BatchNorm2d(4), "c": FrozenBatchNorm2d(4)})
    model["c"].bias.fill_(0.5)
    assert find_unwritten_frozen_norms(model) == ["a"]


def test_a_counted_mini_batch_is_a_written_one():
    model = nn.ModuleDict({"a": nn.BatchNorm2d(4)})
    model["a"].num_batches_tracked.fill_(1)
    assert check_norm_state(model) == []


def test_channels_that_do_not_fit_are_found():
    model = nn.ModuleDict({"a": make("torch")})
    model["a"].running_mean = torch.zeros(3)
    (found,) = check_norm_state(model)
    assert (found.path, found.kind) == ("a", "channels")
    assert "of its 4 channels" in found.text
    assert "'running_mean': [3]" in found.text


@pytest.mark.parametrize("name", ["own", "domains_DDD"])
def test_eps_besides_that_of_the_spec_is_found(name):
    model = nn.ModuleDict({"a": make(name)})
    where = "p4" if name != "own" else ""
    part = model["a"].get_submodule(where)
    part.eps = 1e-3
    (found,) = check_norm_state(model)
    assert found.owner == where
    assert "eps must be 1e-05, as its spec or its other parts say; got 0.001" in str(found)


def test_numbered_norms_have_one_eps():
    cycling = pytest.importorskip("detectron2.layers").CycleBatchNormList
    model = nn.ModuleDict({"a": cycling(2, num_features=4)})
    for part in model["a"]:
        part.running_mean.fill_(1)
    assert check_norm_state(model) == []


def test_a_norm_at_two_places_is_found_once():
    norm = nn.BatchNorm2d(4)
    assert len(check_norm_state(nn.ModuleDict({"a": norm, "b": norm}))) == 1


@pytest.mark.parametrize(
    ("values", "shown"),
    [((1, -2, 1, -3), "got -2 (channels 1, 3"), ((-1,) * 9, "got -1 (channels 0, 1, 2, 3, 4 and 4 more")],
)
def test_variances_of_a_checkpoint_are_refused_by_name(values, shown):
    state = {"stem.norm.running_var": torch.tensor(values, dtype=torch.float32), "other": -torch.ones(2)}
    with pytest.raises(CheckpointError) as caught:
        check_variances(state, "model.pth")
    assert f"stem.norm.running_var must be 0 or more and finite; {shown}; model.pth)" in str(caught.value)
    check_variances({"norm.running_var": torch.zeros(2)}, "model.pth")
    with pytest.raises(CheckpointError, match=r"norm\.running_mean .*channel 1; x\.pth"):
        check_variances({"norm.running_mean": torch.tensor([0.0, float("nan")])}, "x.pth")


def test_statistics_that_are_zero_everywhere_say_nothing():
    norm = nn.BatchNorm2d(3)
    norm.running_var.zero_()
    norm.num_batches_tracked.fill_(8)
    assert is_unwritten(norm.state_dict())
