"""SHUFFLE on two gloo workers: statistics and features are the same, in detectron2's heads and in those of a user."""

import pytest
import torch
from detectron2.layers import Conv2d, get_norm
from detectron2.modeling import ROI_BOX_HEAD_REGISTRY, ROI_MASK_HEAD_REGISTRY
from detectron2.modeling.roi_heads.mask_head import BaseMaskRCNNHead
from detectron2.utils.events import EventStorage
from torch import nn

from bnext.functional import deal_samples
from bnext.heads import forward_sampled_rois
from bnext.layers.deal import draw_seed
from bnext.statistics import recompute_population_statistics
from tests.heads.detectors import CASCADE, make_batch, make_model, shuffle_pairs
from tests.workers import run_workers

HEADS = ("ROI_BOX_HEAD", "ROI_MASK_HEAD", "ROI_KEYPOINT_HEAD")


@ROI_BOX_HEAD_REGISTRY.register()
class OwnBoxHead(nn.Module):
    """A user's: one norm by NORM, one that it always has."""

    def __init__(self, cfg, input_shape):
        super().__init__()
        channels = input_shape.channels
        self.conv = Conv2d(channels, 8, 3, bias=False, norm=get_norm(cfg.MODEL.ROI_BOX_HEAD.NORM, 8))
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.output_shape = type(input_shape)(channels=8, height=3, width=3)

    def forward(self, x):
        return self.second(self.conv(x).relu())


@ROI_MASK_HEAD_REGISTRY.register()
class OwnMaskHead(BaseMaskRCNNHead):
    def __init__(self, cfg, input_shape):
        super().__init__()
        self.conv = Conv2d(input_shape.channels, 8, 1, norm=get_norm(cfg.MODEL.ROI_MASK_HEAD.NORM, 8))
        self.norm = nn.BatchNorm2d(8)
        self.predictor = nn.Conv2d(8, cfg.MODEL.ROI_HEADS.NUM_CLASSES, 1)

    def layers(self, x):
        return self.predictor(self.norm(self.conv(x).relu()))


@ROI_BOX_HEAD_REGISTRY.register()
class CouplingHead(nn.Module):
    """Couples RoIs by something that is no norm: each is weighed against the others."""

    def __init__(self, cfg, input_shape):
        super().__init__()
        self.score = nn.Linear(input_shape.channels, 1)
        self.output_shape = type(input_shape)(channels=input_shape.channels)

    def forward(self, x):
        pooled = x.mean((2, 3))
        return pooled * self.score(pooled).softmax(0)


def train_step(rank, pairs, architecture="BNextPanopticFPN"):
    """Losses and gradients of a worker, heads in float64; workers have other images, as many as their rank + 1."""
    model = make_model(*pairs, architecture=architecture).train()
    model.roi_heads.double()
    for name in ("box_pooler", "mask_pooler", "keypoint_pooler"):
        if hasattr(model.roi_heads, name):
            getattr(model.roi_heads, name).register_forward_hook(lambda pooler, args, output: output.double())
    torch.manual_seed(rank)
    with EventStorage():
        losses = model(make_batch((64, 96)[: rank + 1], seed=rank))
        sum(losses.values()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    buffers = {name: value for name, value in model.named_buffers() if "running" in name}
    return {name: loss.detach() for name, loss in losses.items()}, gradients, buffers


def compare_forms(pairs, heads, architecture="BNextPanopticFPN"):
    """Losses of each worker, and gradients in sum over them, of the three settings; the first two are equal."""
    forms = [(*pairs, *shuffle_pairs(form, *heads)) for form in ("statistics", "features", "none")]
    statistics, features, none = (run_workers(train_step, 2, form, architecture) for form in forms)
    for (losses, *_), (expected, *_) in zip(statistics, features, strict=True):
        torch.testing.assert_close(losses, expected, rtol=1e-9, atol=1e-9)
        assert all(torch.isfinite(loss) for loss in losses.values())
    gradients, expected = (sum_gradients(form) for form in (statistics, features))
    assert gradients.keys() == expected.keys()
    for name, value in expected.items():  # a bias before a norm has none, but for rounding
        largest, tolerance = float(value.abs().max()), 1e-9 if value.dtype == torch.float64 else 1e-3
        torch.testing.assert_close(gradients[name], value, rtol=0, atol=tolerance * (largest + 1e-3))
    assert all(torch.equal(value, statistics[1][2][name]) for name, value in statistics[0][2].items() if "roi" in name)
    return statistics, none


def sum_gradients(workers):
    (_, first, _), (_, second, _) = workers
    return {name: first.get(name, 0) + second.get(name, 0) for name in first.keys() | second.keys()}


def test_box_mask_and_keypoint_heads():
    norms = ("MODEL.ROI_BOX_HEAD.NORM", "BN", "MODEL.ROI_MASK_HEAD.NORM", "BN")
    pairs = (*norms, "MODEL.BNEXT.ROI_KEYPOINT_HEAD.NORM", "BN", "MODEL.ROI_BOX_HEAD.NUM_CONV", 2)
    statistics, none = compare_forms(pairs, HEADS)
    for (losses, *_), (others, *_) in zip(statistics, none, strict=True):
        assert abs(losses["loss_cls"] - others["loss_cls"]) > 1e-6, "the same RoIs in other mini-batches"


def test_heads_of_different_settings():
    """Which head moves what is its own."""
    pairs = ("MODEL.ROI_BOX_HEAD.NORM", "BN", "MODEL.ROI_MASK_HEAD.NORM", "BN")
    forms = (("statistics", "features"), ("features", "statistics"), ("statistics", "none"))
    settings = [(*pairs, *shuffle_pairs(a, HEADS[0]), *shuffle_pairs(b, HEADS[1])) for a, b in forms]
    first, second, third = (run_workers(train_step, 2, own) for own in settings)
    for (losses, *_), (same, *_), (other, *_) in zip(first, second, third, strict=True):
        torch.testing.assert_close(losses, same, rtol=1e-9, atol=1e-9)
        assert abs(losses["loss_cls"] - other["loss_cls"]) < 1e-9 < abs(losses["loss_mask"] - other["loss_mask"])


def test_every_stage_of_a_cascade():
    pairs = (*CASCADE, "MODEL.ROI_BOX_HEAD.NORM", "BN")
    statistics, none = compare_forms(pairs, ("ROI_BOX_HEAD",), "BNextGeneralizedRCNN")
    for stage in range(3):
        assert abs(statistics[0][0][f"loss_cls_stage{stage}"] - none[0][0][f"loss_cls_stage{stage}"]) > 1e-9


@pytest.mark.parametrize("norm", ["BN", "GN"])
def test_heads_of_a_user(norm):
    """With norms by NORM, and with norms that they always have: those of torch couple RoIs under any NORM."""
    names = ("MODEL.ROI_BOX_HEAD.NAME", "OwnBoxHead", "MODEL.ROI_MASK_HEAD.NAME", "OwnMaskHead")
    pairs = (*names, "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", 28)
    heads = ("ROI_BOX_HEAD", "ROI_MASK_HEAD")
    if norm == "BN":
        compare_forms((*pairs, "MODEL.ROI_BOX_HEAD.NORM", "BN", "MODEL.ROI_MASK_HEAD.NORM", "BN"), heads)
        return
    forms = [(*pairs, *shuffle_pairs(form, *heads)) for form in ("features", "none")]
    features, none = (run_workers(train_step, 2, form) for form in forms)
    assert all(torch.isfinite(loss) for losses, *_ in features for loss in losses.values())
    assert abs(features[0][0]["loss_cls"] - none[0][0]["loss_cls"]) > 1e-6


def re_estimate(rank, pairs, rois):
    """The statistics of the heads' norms, by each worker's own images; that of the second have no object."""
    model, batch = (
        make_model(*pairs, "MODEL.KEYPOINT_ON", False, architecture="BNextGeneralizedRCNN"),
        make_batch(seed=rank),
    )
    if rank:
        batch = batch[:1]
        batch[0]["instances"] = batch[0]["instances"][:0]
        model.roi_heads.box_predictor.test_score_thresh = 2.0
    torch.manual_seed(rank)
    forward = forward_sampled_rois if rois == "sampled" else None
    report = recompute_population_statistics(model, [batch], forward=forward)
    return {
        estimate.path: (estimate.count, model.get_submodule(estimate.path).running_var) for estimate in report.estimates
    }


@pytest.mark.parametrize("rois", ["sampled", "top_scored"])
def test_statistics_are_re_estimated_alike(rois):
    """Also where a worker has no RoI for its mask head: the moments are those of all RoIs, wherever they were."""
    norms, heads = ("MODEL.ROI_BOX_HEAD.NORM", "BN", "MODEL.ROI_MASK_HEAD.NORM", "BN"), HEADS[:2]
    forms = [run_workers(re_estimate, 2, (*norms, *shuffle_pairs(f, *heads)), rois) for f in ("statistics", "features")]
    for workers in forms:
        assert len(workers[0]) == 2
        for path, (count, variance) in workers[0].items():
            assert count == forms[0][0][path][0] > 0
            assert count == workers[1][path][0]
            assert torch.equal(variance, workers[1][path][1])
            torch.testing.assert_close(variance, forms[0][0][path][1], rtol=1e-4, atol=1e-7)


def call_coupling_head(rank, sizes):
    pairs = ("MODEL.ROI_BOX_HEAD.NAME", "CouplingHead", *shuffle_pairs("features", "ROI_BOX_HEAD"))
    head = make_model(*pairs, architecture="BNextGeneralizedRCNN").roi_heads.box_head.double().train()
    generator = torch.Generator().manual_seed(rank)
    rois = torch.randn(sizes[rank], 16, 7, 7, dtype=torch.float64, generator=generator)
    torch.manual_seed(rank)
    seed = draw_seed()
    torch.manual_seed(rank)
    output = head(rois)
    head.eval()
    return rois, seed, output.detach(), head(rois).detach(), {k: v.detach() for k, v in head.state_dict().items()}


@pytest.mark.parametrize("sizes", [(5, 8), (6, 0)])
def test_a_head_that_couples_rois_by_something_else(sizes):
    """Against the definition: the groups of the deal, each by itself; and at home when it is evaluated."""
    workers = run_workers(call_coupling_head, 2, sizes)
    head = CouplingHead(None, type("Shape", (), {"channels": 16, "__init__": lambda self, channels=16: None})())
    head.double().load_state_dict(workers[0][4])
    rois = torch.cat([worker[0] for worker in workers])
    groups = torch.cat(deal_samples(sizes, 2, workers[0][1]))
    expected = torch.empty(len(rois), 16, dtype=torch.float64)
    for group in range(2):
        expected[groups == group] = head(rois[groups == group]).detach()
    torch.testing.assert_close(torch.cat([worker[2] for worker in workers]), expected)
    for own, _, _, evaluated, _ in workers:
        torch.testing.assert_close(evaluated, head(own).detach())
