"""Faults of the peers' code that made us write ours: each is shown on the peer as installed, and then not on ours.

Where a peer mends its fault, its half of the test fails: then the fault is history, and the test's first half goes.
"""

import copy
import logging
import math

import pytest

pytest.importorskip("detectron2")

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.layers import CycleBatchNormList, NaiveSyncBatchNorm, ShapeSpec
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead as Detectron2RetinaNetHead
from detectron2.solver.build import get_default_optimizer_params
from fvcore.nn.distributed import differentiable_all_reduce
from torch import nn

from bnext import convert_norm, convert_norm_state
from bnext.checkpoints import Checkpointer
from bnext.distributed import all_reduce_sum, resolve_group
from bnext.errors import CheckpointError, ConfigError
from bnext.functional import deal_samples
from bnext.heads import RetinaNetHead
from bnext.layers import TABLE5_ROWS, BatchNorm2d, LevelBatchNorm2d, NormSpec
from tests import reference
from tests.cases import LEVELS, NUM_CHANNELS, make_features, make_norm
from tests.workers import run_workers

FIVE_LEVELS = ("p3", "p4", "p5", "p6", "p7")
ROW_3, ROW_4 = NormSpec.from_table5_row(3), NormSpec.from_table5_row(4)


def make_head(kind, norm, **levels):
    shapes = [ShapeSpec(channels=8)] * len(FIVE_LEVELS)
    return kind(input_shape=shapes, num_classes=2, num_anchors=1, conv_dims=[8] * 4, norm=norm, **levels)


def make_cycling():
    return CycleBatchNormList(len(LEVELS), bn_class=nn.BatchNorm2d, num_features=NUM_CHANNELS).double()


def make_batches(number=4, offset=0.0):
    features = [make_features(seed)["p3"] for seed in range(number)]
    return [feature + offset for feature in features]


# detectron2: the study's shuffle BN


@pytest.mark.parametrize(
    ("num_rois", "by_ceil", "even"),
    [
        ([10, 1, 1, 1], [4, 4, 4, 1], [4, 3, 3, 3]),
        ([5, 0, 0, 0], [2, 2, 1, 0], [2, 1, 1, 1]),
        ([3, 3, 3, 0], [3, 3, 3, 0], [3, 2, 2, 2]),
    ],
)
def test_the_studys_shuffle_splits_by_ceil(num_rois, by_ceil, even):
    """projects/Rethinking-BatchNorm/configs/mask_rcnn_BNhead_shuffle.py; no part of the installed package, so its rule
    is told here: a worker gets its piece of `torch.split(..., ceil(total / workers))`, or nothing."""
    total, workers = sum(num_rois), len(num_rois)
    pieces = torch.arange(total).split(math.ceil(total / workers))
    assert [len(piece) for piece in pieces] + [0] * (workers - len(pieces)) == by_ceil
    assert torch.cat(deal_samples(num_rois, workers, seed=0)).bincount(minlength=workers).tolist() == even


# detectron2: CycleBatchNormList


def test_cycling_is_misaligned_for_ever_after_one_partial_forward():
    features = make_features()
    peer, ours = make_cycling(), make_norm(ROW_4)
    for state, level in zip(peer, LEVELS, strict=True):  # give every level statistics of its own
        state.load_state_dict(ours.get_submodule(level).state_dict())
    peer.weight.data, peer.bias.data = ours.weight.data.clone(), ours.bias.data.clone()
    peer.eval()
    ours.eval()
    before = {level: peer(feature) for level, feature in features.items()}
    peer(features["p3"])  # the second level raises, say
    for _ in range(3):
        after = {level: peer(feature) for level, feature in features.items()}
        assert not any(torch.allclose(after[level], before[level]) for level in LEVELS)
    ours({"p3": features["p3"]})
    again = ours(features)
    torch.testing.assert_close(again, before, rtol=1e-12, atol=1e-12)


def test_the_affine_of_cycling_gets_weight_decay():
    for norm, decay in (
        (make_cycling(), 1e-4),
        (make_norm(ROW_4), 0.0),
        (make_norm(ROW_4.replace(affine="per_level")), 0.0),
    ):
        groups = get_default_optimizer_params(norm, base_lr=0.1, weight_decay=1e-4, weight_decay_norm=0.0)
        assert {group["weight_decay"] for group in groups} == {decay}


def test_the_warning_of_a_shared_batch_norm_never_fires(caplog):
    with caplog.at_level(logging.WARNING):
        head = make_head(Detectron2RetinaNetHead, "nnSyncBN")
    assert isinstance(head.cls_subnet[1], nn.SyncBatchNorm), "this is the shared norm that it should warn of"
    assert not caplog.records
    # Ours needs no warning: what is shared is said, one of six ways.
    specs = [NormSpec.from_table5_row(row) for row in TABLE5_ROWS]
    heads = [make_head(RetinaNetHead, spec, levels=FIVE_LEVELS) for spec in specs]
    assert [head.cls_subnet[1].spec.table5_row for head in heads] == list(TABLE5_ROWS)


def test_a_shared_checkpoint_does_not_fit_the_cycling_head():
    shared = make_head(Detectron2RetinaNetHead, "nnSyncBN")
    result = make_head(Detectron2RetinaNetHead, "BN").load_state_dict(shared.state_dict(), strict=False)
    assert (len(result.missing_keys), len(result.unexpected_keys)) == (80, 24)
    ours = make_head(RetinaNetHead, ROW_4, levels=FIVE_LEVELS)
    state, report = convert_norm_state(shared.state_dict(), ours)
    ours.load_state_dict(state, strict=True)
    assert "8 norms" in str(report)
    assert "re-estimate" in str(report)


def test_the_norm_of_the_published_configs_does_not_exist():
    assert not hasattr(nn, "SyncBatchNorm2d")  # projects/Rethinking-BatchNorm/configs/retinanet_SyncBNhead*.py
    assert make_head(RetinaNetHead, ROW_3.replace(workers="all"), levels=FIVE_LEVELS)


# Several workers


def run_peers_and_ours(rank):
    """Everything that needs two workers, in one go."""
    share = make_share(rank)
    z = torch.ones(1, requires_grad=True)
    (differentiable_all_reduce(z) + z).sum().backward()
    constant = torch.ones(1)
    total = all_reduce_sum(constant, resolve_group("all"))

    try:
        nn.SyncBatchNorm(NUM_CHANNELS).train()(share.float())
        refusal = ""
    except ValueError as error:
        refusal = str(error)

    naive = NaiveSyncBatchNorm(NUM_CHANNELS).double().train()(share).detach()
    spec = NormSpec(statistics="shared", population="shared", workers="all")
    ours = LevelBatchNorm2d(NUM_CHANNELS, ["p3"], spec).double().train()({"p3": share})["p3"].detach()

    return {
        "gradient": z.grad,
        "sum": (constant, total),
        "refusal": refusal,
        "naive": naive,
        "ours": ours,
    }


def make_share(rank):
    """Images of one worker are larger and brighter than those of the other."""
    return make_features(rank)["p3"] if rank == 0 else make_features(rank, ((2, 2, 3), (1, 1, 1), (1, 1, 1)))["p3"] + 3


@pytest.fixture(scope="module")
def two_workers():
    return run_workers(run_peers_and_ours, 2)


def test_the_all_reduce_of_fvcore_reduces_in_place_in_backward(two_workers):
    assert [result["gradient"].item() for result in two_workers] == [4.0, 4.0], "d(sum over workers of z + z)/dz is 3"
    assert [result["sum"] for result in two_workers] == [(torch.ones(1), torch.full((1,), 2.0))] * 2


def test_torchs_sync_batch_norm_refuses_the_cpu(two_workers):
    assert all("SyncBatchNorm expected input tensor to be on" in result["refusal"] for result in two_workers)
    assert all(torch.isfinite(result["ours"]).all() for result in two_workers)


def test_naive_sync_batch_norm_is_off_where_workers_are_unequal(two_workers):
    ones, zeros = torch.ones(NUM_CHANNELS).double(), torch.zeros(NUM_CHANNELS).double()
    expected = reference.concatenated_batch_norm([make_share(0), make_share(1)], [ones, ones], [zeros, zeros], 1e-5)
    for result, right in zip(two_workers, expected, strict=True):
        assert (result["naive"] - right).abs().max() > 0.1
        torch.testing.assert_close(result["ours"], right, rtol=1e-11, atol=1e-11)


# torch and detectron2: conversion and loading


class WithActivation(nn.BatchNorm2d):
    """As timm's BatchNormAct2d: a norm by type, and more by what it computes."""

    def forward(self, input):
        return super().forward(input).relu()


def test_conversion_to_sync_batch_norm_drops_what_a_subclass_adds():
    """pytorch/pytorch#187298, huggingface/pytorch-image-models#1254."""
    model = nn.Sequential(WithActivation(NUM_CHANNELS).double()).eval()
    features = make_features()["p3"]
    peer = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    assert bool((model(features) >= 0).all())
    assert not bool((peer(features) >= 0).all())
    with pytest.raises(ConfigError, match=r"WithActivation.*\(0\)"):
        convert_norm(model, {"": "SyncBN"})


def test_a_negative_variance_is_loaded_without_a_word(tmp_path, caplog):
    """facebookresearch/detectron2#2413."""
    model = nn.Sequential(nn.BatchNorm2d(NUM_CHANNELS)).eval()
    state = {**model.state_dict(), "0.running_var": torch.tensor([1.0, 1.0, -1e-3, 1.0])}
    path = str(tmp_path / "model.pth")
    torch.save({"model": state}, path)
    DetectionCheckpointer(model).load(path)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert bool(torch.isnan(model(make_features()["p3"].float())).any())
    with pytest.raises(CheckpointError, match=r"0.running_var must be 0 or more and finite; got -0.001 \(channel 2;"):
        Checkpointer(model).load(path)


def test_torchs_variance_in_channels_last_is_off_by_a_factor_far_from_zero():
    generator = torch.Generator().manual_seed(0)
    images = (torch.randn(2, 64, 200, 336, generator=generator) + 1e4).contiguous(memory_format=torch.channels_last)
    variance = images.double().var([0, 2, 3], unbiased=False)
    _, theirs = torch.batch_norm_update_stats(images, None, None, 0.0)
    assert ((theirs - variance) / variance).abs().max() > 10
    norm = BatchNorm2d(64, NormSpec(momentum=1.0))
    norm(images)
    torch.testing.assert_close(norm.running_var.double(), variance, rtol=1e-4, atol=0)
