"""The RPN head with a norm: all rows of Table 5, and detectron2's head where there is no batch norm."""

import pytest
import torch
from detectron2.layers import Conv2d
from detectron2.modeling.proposal_generator.rpn import RPN_HEAD_REGISTRY, StandardRPNHead
from torch import nn
from torch.nn import functional as F

from bnext import NormSpec
from bnext.errors import ConfigError
from bnext.heads import RPNHead
from bnext.layers import LevelBatchNorm2d
from tests.cases import ROWS
from tests.heads.detectors import make_batch, make_model, run_step

LEVELS = ("p2", "p3", "p4", "p5", "p6")
SIDES = (16, 8, 4, 2, 2)


def make_features(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 8, side, side, generator=generator) for side in SIDES]


def make_heads(norm, conv_dims=(-1,)):
    torch.manual_seed(0)
    stock = StandardRPNHead(in_channels=8, num_anchors=3, conv_dims=conv_dims)
    torch.manual_seed(0)
    return stock, RPNHead(levels=LEVELS, norm=norm, in_channels=8, num_anchors=3, conv_dims=conv_dims)


@pytest.mark.parametrize("conv_dims", [(-1,), (4, 8)])
def test_without_a_norm_it_is_detectron2s_head_from_the_same_seed(conv_dims):
    stock, ours = make_heads("", conv_dims)
    assert list(stock.state_dict()) == list(ours.state_dict())
    for found, expected in zip(ours(make_features()), stock(make_features()), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("conv_dims", [(-1,), (4, 8)])
@pytest.mark.parametrize("name", ["GN", "LN", "FrozenBN"])
def test_other_norms_follow_the_convolution_of_each_level(name, conv_dims):
    stock, ours = make_heads(name, conv_dims)
    for found, expected in zip(ours(make_features()), StandardRPNHead.forward(ours, make_features()), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    convs = [part for part in ours.conv.modules() if isinstance(part, Conv2d)]
    assert len(convs) == len(conv_dims)
    assert all(conv.bias is None and conv.norm is not None for conv in convs)
    starts = [part for part in stock.conv.modules() if isinstance(part, Conv2d)]
    assert all(torch.equal(conv.weight, start.weight) for conv, start in zip(convs, starts, strict=True))


@pytest.mark.parametrize("norm", ["BN", NormSpec.from_table5_row(4)])
def test_a_batch_norm_has_statistics_per_level(norm):
    """Against torch's norm, which gets each level alone."""
    _, ours = make_heads(norm)
    features = make_features()
    found = ours(features)
    norms = [nn.BatchNorm2d(8) for _ in LEVELS]
    convolved = [F.conv2d(feature, ours.conv.weight, padding=1) for feature in features]
    hidden = [torch.relu(own(feature)) for own, feature in zip(norms, convolved, strict=True)]
    for level, right, logits, deltas, own in zip(LEVELS, hidden, *found, norms, strict=True):
        torch.testing.assert_close(logits, ours.objectness_logits(right))
        torch.testing.assert_close(deltas, ours.anchor_deltas(right))
        torch.testing.assert_close(ours.conv.norm.population_state(level).running_var, own.running_var)


@pytest.mark.parametrize("row", ROWS)
def test_six_rows_by_keys(row):
    spec = NormSpec.from_table5_row(row)
    keys = [
        item
        for key in ("STATISTICS", "POPULATION", "AFFINE")
        for item in (f"MODEL.BNEXT.RPN.{key}", getattr(spec, key.lower()))
    ]
    pairs = ("MODEL.BNEXT.RPN.NORM", "SyncBN", *keys, "MODEL.RPN.CONV_DIMS", [-1, 8])
    model = make_model(*pairs, architecture="BNextProposalNetwork")
    norms = {path: norm for path, norm in model.named_modules() if isinstance(norm, LevelBatchNorm2d)}
    assert list(norms) == [f"proposal_generator.rpn_head.conv.conv{index}.norm" for index in range(2)]
    assert {(norm.spec.table5_row, norm.spec.workers, norm.levels) for norm in norms.values()} == {(row, "all", LEVELS)}
    losses, gradients = run_step(model, make_batch())
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert gradients.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    updates = 1 if spec.statistics == "shared" or spec.population == "per_level" else len(LEVELS)
    assert {int(state.num_batches_tracked) for norm in norms.values() for _, state in norm.populations()} == {updates}
    with torch.no_grad():
        assert len(model.eval()(make_batch())) == 2


def test_another_number_of_features_is_refused():
    _, ours = make_heads("BN")
    with pytest.raises(ConfigError, match=r"got 4 features for the levels .* Set the head's IN_FEATURES"):
        ours(make_features()[:4])


@pytest.fixture
def own_head():
    RPN_HEAD_REGISTRY._do_register("OwnRPNHead", lambda cfg, input_shape: StandardRPNHead(cfg, input_shape))
    yield "OwnRPNHead"
    del RPN_HEAD_REGISTRY._obj_map["OwnRPNHead"]


def test_a_head_of_ones_own_cannot_have_the_norm(own_head):
    with pytest.raises(ConfigError, match=r"MODEL\.BNEXT\.RPN\.NORM must .*HEAD_NAME to StandardRPNHead"):
        make_model(
            *("MODEL.BNEXT.RPN.NORM", "BN", "MODEL.RPN.HEAD_NAME", own_head), architecture="BNextProposalNetwork"
        )
