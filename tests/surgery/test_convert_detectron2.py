"""Norms of detectron2's models: replaced in a model that is built, or asked for in a LazyConfig."""

import copy

import pytest

pytest.importorskip("detectron2")

import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.layers import FrozenBatchNorm2d, NaiveSyncBatchNorm, ShapeSpec
from torch import nn

from bnext.layers import BatchNorm2d, NormSpec, build_norm
from bnext.layers.forms import find_forms
from bnext.scope import use_domain
from bnext.surgery import convert_norm
from tests.cases import randomize
from tests.stock import load_stock_config

DOMAINS = ("day", "night")
SEPARATE = {"statistics": "per_domain", "population": "per_domain", "affine": "per_domain", "domains": DOMAINS}


def build(norm):
    """Mask R-CNN on a ResNet-18-FPN with 16 channels, and norms in all its parts."""
    model = load_stock_config("common/models/mask_rcnn_fpn.py").model
    bottom_up, heads = model.backbone.bottom_up, model.roi_heads
    bottom_up.stages.depth = 18
    del bottom_up.stages.stride_in_1x1
    heads.box_head.conv_dims, heads.box_head.fc_dims, heads.mask_head.conv_dims = [8], [16], [8, 8]
    bottom_up.stem.norm = bottom_up.stages.norm = model.backbone.norm = norm
    heads.box_head.conv_norm = heads.mask_head.conv_norm = norm
    heads.box_head.input_shape = ShapeSpec(channels=16, height=7, width=7)
    heads.mask_head.input_shape = ShapeSpec(channels=16, height=14, width=14)
    heads.box_predictor.input_shape = ShapeSpec(channels=16)
    model.backbone.out_channels = model.proposal_generator.head.in_channels = 16
    torch.manual_seed(0)
    return randomize(instantiate(model)).eval()


@torch.no_grad()
def run(model):
    generator = torch.Generator().manual_seed(0)
    features = model.backbone(torch.rand(1, 3, 64, 64, generator=generator))
    boxes = model.roi_heads.box_head(torch.rand(2, 16, 7, 7, generator=generator))
    masks = model.roi_heads.mask_head.layers(torch.rand(2, 16, 14, 14, generator=generator))
    return [*features.values(), boxes, masks]


@pytest.mark.parametrize(("norm", "kind"), [("FrozenBN", FrozenBatchNorm2d), ("naiveSyncBN", NaiveSyncBatchNorm)])
def test_a_model_that_is_built(norm, kind):
    model = build(norm)
    expected, state = run(model), copy.deepcopy(model.state_dict())
    paths = [path for path, *_ in find_forms(model)]
    assert any(path.endswith("conv1.norm") for path in paths), "as detectron2's Conv2d holds it"
    heads = {"roi_heads.*": "SyncBN", "backbone": NormSpec(**SEPARATE)}
    assert convert_norm(model, heads).keeps_outputs
    norms = {path: module for path, module, _ in find_forms(model)}
    assert list(norms) == paths
    assert all(isinstance(module, BatchNorm2d) for module in norms.values())
    assert all(module.domains == DOMAINS * path.startswith("backbone") for path, module in norms.items())
    with use_domain("night"):
        torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-5)
    assert convert_norm(model, {"": kind}).keeps_outputs
    torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-5)
    kept = {key for key in state if not key.endswith("num_batches_tracked")}
    assert all(torch.equal(model.state_dict()[key], state[key]) for key in kept)
    assert {type(module) for _, module, _ in find_forms(model)} == {kind}


def test_norms_asked_for_in_a_lazy_config():
    spec = L(NormSpec)(**{**SEPARATE, "domains": list(DOMAINS)}, frozen="both")
    model = build(L(build_norm)(spec=spec))
    norms = [module for _, module, _ in find_forms(model)]
    assert len(norms) == 30
    assert {type(norm) for norm in norms} == {BatchNorm2d}
    assert {tuple(norm.spec.domains) for norm in norms} == {DOMAINS}
    with use_domain("day"):
        expected = run(model)
    report = convert_norm(model, {"": nn.BatchNorm2d}, domain_map={"": "day"})
    assert "night was left out" in str(report)
    torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-5)
