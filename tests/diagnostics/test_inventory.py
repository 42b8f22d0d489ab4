"""The inventory of norms: every norm of any model once, with its answers; those that agree are one line."""

import copy

import pytest
import torch
from torch import nn
from torchvision.models import resnet50
from torchvision.ops import FrozenBatchNorm2d

from bnext import find_norm_groups, format_norm_groups, freeze_norms
from bnext.diagnostics import find_norm_records
from bnext.layers import BatchNorm2d, LevelBatchNorm2d, NormSpec
from tests.workers import run_workers

ANSWERS = ("statistics", "population", "affine", "inference", "training", "frozen", "batch_size", "momentum")
DOMAINS = ("day", "night")


def still(norm):
    return norm.eval()


# What a norm is, and its answers for 4 samples of a worker.
NORMS = {
    "torch": (nn.BatchNorm2d(8), ("shared", "shared", "shared", "population", "mini_batch", "none", 4, 0.1)),
    "evaluation": (
        still(nn.BatchNorm2d(8)),
        ("none", "shared", "shared", "population", "population", "statistics", None, 0.1),
    ),
    "no statistics": (
        nn.BatchNorm2d(8, affine=False, track_running_stats=False),
        ("shared", "none", "none", "mini_batch", "mini_batch", "none", 4, None),
    ),
    "vectors": (nn.BatchNorm1d(8), ("shared", "shared", "shared", "population", "mini_batch", "none", 4, 0.1)),
    "group": (nn.GroupNorm(2, 8), ("sample", "none", "shared", "sample", "sample", "none", None, None)),
    "instance": (nn.InstanceNorm2d(8), ("sample", "none", "none", "sample", "sample", "none", None, None)),
    "frozen": (FrozenBatchNorm2d(8), ("none", "shared", "shared", "population", "population", "both", None, None)),
    "ours": (BatchNorm2d(8), ("shared", "shared", "shared", "population", "mini_batch", "none", 4, 0.1)),
    "ghost": (
        BatchNorm2d(8, NormSpec(normalization_batch_size=3)),
        ("shared", "shared", "shared", "population", "mini_batch", "none", 2, 0.1),
    ),
    "ours frozen": (
        BatchNorm2d(8, NormSpec(frozen="both")),
        ("none", "shared", "shared", "population", "population", "both", None, 0.1),
    ),
    "renorm": (
        BatchNorm2d(8, NormSpec(training="renorm", average="cumulative")),
        ("shared", "shared", "shared", "population", "renorm", "none", 4, None),
    ),
    "levels": (
        LevelBatchNorm2d(8, ("p3", "p4"), NormSpec.from_table5_row(5)),
        ("per_level", "shared", "per_level", "population", "mini_batch", "none", 4, 0.1),
    ),
    "domains": (
        BatchNorm2d(8, NormSpec(population="per_domain", inference="mini_batch", domains=DOMAINS)),
        ("shared", "per_domain", "shared", "mini_batch", "mini_batch", "none", 4, 0.1),
    ),
}


@pytest.mark.parametrize("name", NORMS)
def test_a_norm_has_its_answers(name):
    norm, answers = NORMS[name]
    model = nn.Module()  # in training mode, whatever the norm is in
    model.norm = copy.deepcopy(norm)
    before = copy.deepcopy(model.state_dict())
    (record,) = find_norm_records(model, 4)
    assert dict(zip(ANSWERS, answers, strict=True)) == {answer: getattr(record, answer) for answer in ANSWERS}
    assert (record.path, record.kind, record.num_features) == ("norm", type(norm).__name__, 8)
    affine = 0 if record.affine == "none" else 16 * len(record.domains if record.affine == "per_level" else "1")
    assert record.num_parameters == affine
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert format_norm_groups(find_norm_groups(model, 4)).count("\n") == 2


def test_without_a_number_of_samples_the_batch_is_what_is_known():
    batches = {name: find_norm_records(norm)[0].batch_size for name, (norm, _) in NORMS.items()}
    assert {name: batch for name, batch in batches.items() if batch is not None} == {"ghost": 3}


def test_norms_are_listed_once_in_their_order_and_parts_are_none():
    norm = nn.BatchNorm2d(4)
    model = nn.Sequential(norm, nn.InstanceNorm2d(4), NORMS["levels"][0], nn.Sequential(nn.Conv2d(4, 4, 1), norm))
    assert [record.path for record in find_norm_records(model)] == ["0", "1", "2"]
    assert find_norm_records(nn.Conv2d(3, 3, 1)) == []
    assert find_norm_records(norm)[0].path == ""


def test_a_norm_without_shapes_yet_is_told():
    (record,) = find_norm_records(nn.Sequential(nn.LazyBatchNorm2d()))
    assert (record.kind, record.num_parameters) == ("LazyBatchNorm2d", 0)


def test_a_resnet_50_is_a_screen():
    model = resnet50()
    groups = find_norm_groups(model, 2)
    assert [group.pattern for group in groups] == [
        "bn1",
        "layer{1,4}.{0-2}.bn{1-3}",
        "layer{1-4}.0.downsample.1",
        "layer2.{0-3}.bn{1-3}",
        "layer3.{0-5}.bn{1-3}",
    ]
    assert sum(len(group.records) for group in groups) == 53
    assert sum(group.num_parameters for group in groups) == 2 * 26560
    table = format_norm_groups(groups)
    assert str(groups[0]) == "bn1: 1 BatchNorm2d, 64 channels, all samples of 2; at inference population; affine shared"
    assert "64-2,048" in table
    assert max(map(len, table.splitlines())) <= 120


def test_equal_paths_with_other_answers_are_apart():
    model = nn.Sequential(*(BatchNorm2d(4) for _ in range(4)))
    freeze_norms(model[1], "statistics")
    assert [group.pattern for group in find_norm_groups(model)] == ["{0,2-3}", "1"]
    assert [group.name for group in find_norm_groups(model)] == ["0_2-3", "1"]


def test_the_number_of_samples_may_depend_on_the_path():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    groups = find_norm_groups(model, lambda path: 3 if path == "0" else None)
    assert [(group.pattern, group.records[0].batch_size) for group in groups] == [("0", 3), ("1", None)]


def count_on_a_worker(rank):
    norms = nn.ModuleDict({"one": BatchNorm2d(4), "all": BatchNorm2d(4, NormSpec(workers="all"))})
    norms["sync"] = nn.SyncBatchNorm(4)
    return {record.path: record.batch_size for record in find_norm_records(norms, 5)}


def test_workers_that_share_a_mini_batch_count():
    assert run_workers(count_on_a_worker, 2) == [{"one": 5, "all": 10, "sync": 10}] * 2
