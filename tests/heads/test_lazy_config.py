"""The heads in LazyConfigs, in the place of detectron2's."""

import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.layers import ShapeSpec

from bnext import BatchNorm2d, LevelBatchNorm2d, NormSpec, build_norm
from bnext.config import NormRecipe
from bnext.heads import FCOSHead, RetinaNetHead, RPNHead, give_norms
from tests.heads.detectors import LEVELS, make_batch, run_step
from tests.stock import load_stock_config


def make_model(name, head):
    model = load_stock_config(f"common/models/{name}.py").model
    model.backbone.bottom_up.stem.norm = model.backbone.bottom_up.stages.norm = "BN"
    model.head._target_ = head
    model.head.levels = LEVELS
    model.head.norm = L(NormSpec)(statistics="shared", population="shared")
    model.num_classes = 3
    torch.manual_seed(0)
    return instantiate(model)


def check_trains_and_detects(model):
    norms = [module for module in model.modules() if isinstance(module, LevelBatchNorm2d)]
    assert {norm.spec.table5_row for norm in norms} == {1}
    assert len(norms) == 8
    losses, gradients = run_step(model, make_batch())
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert all(norm.num_batches_tracked == 1 for norm in norms)
    with torch.no_grad():
        assert "instances" in model.eval()(make_batch())[0]


def test_retinanet():
    check_trains_and_detects(make_model("retinanet", RetinaNetHead))


def test_fcos():
    check_trains_and_detects(make_model("fcos", FCOSHead))


def test_mask_rcnn_with_norms_by_spec_at_every_place():
    """`norm=L(build_norm)(spec=...)` wherever detectron2's LazyConfigs take a norm."""
    model = load_stock_config("common/models/mask_rcnn_fpn.py").model
    norm = L(build_norm)(spec=L(NormSpec)(workers="all", momentum=0.2))
    bottom_up, box_head = model.backbone.bottom_up, model.roi_heads.box_head
    model.backbone.norm = bottom_up.stem.norm = bottom_up.stages.norm = norm
    model.backbone.out_channels = model.proposal_generator.head.in_channels = 16
    model.proposal_generator.head._target_ = RPNHead
    model.proposal_generator.head.levels = "${..in_features}"
    model.proposal_generator.head.norm = norm.spec  # it sees several levels
    box_head.input_shape = L(ShapeSpec)(channels=16, height=7, width=7)
    model.roi_heads.mask_head.input_shape = L(ShapeSpec)(channels=16, height=14, width=14)
    box_head.conv_dims, box_head.fc_dims, box_head.conv_norm = [16], [16], norm
    model.roi_heads.box_predictor.input_shape = L(ShapeSpec)(channels=16)
    model.roi_heads.mask_head.conv_dims, model.roi_heads.mask_head.conv_norm = [16, 16], norm
    model.roi_heads.num_classes = 3
    torch.manual_seed(0)
    model = instantiate(model)
    norms = {path: part for path, part in model.named_modules() if isinstance(part, BatchNorm2d)}
    assert len(norms) == 53 + 8 + 1 + 1 + 1
    assert {(part.spec.workers, part.momentum) for part in norms.values()} == {("all", 0.2)}
    losses, gradients = run_step(model, make_batch())
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert gradients.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        assert "instances" in model.eval()(make_batch())[0]


def test_a_recipe_of_plain_values_gives_a_built_model_its_norms():
    """The keys of MODEL.BNEXT, without a CfgNode; detectron2 builds the model with norms of the same names."""
    model = load_stock_config("common/models/mask_rcnn_fpn.py").model
    model.backbone.bottom_up.stem.norm = model.backbone.bottom_up.stages.norm = "BN"
    model.backbone.norm = "SyncBN"
    nodes = {"RESNETS": {"NORM": "BN", "EPS": 0.01}, "FPN": {"NORM": "SyncBN", "MOMENTUM": 0.2}}

    model = instantiate(model)
    give_norms(model, instantiate(L(NormRecipe.of)(nodes=nodes)))
    norms = {path: part for path, part in model.named_modules() if isinstance(part, BatchNorm2d)}
    answers = {
        (path.startswith("backbone.bottom_up."), norm.spec.workers, norm.eps, norm.momentum)
        for path, norm in norms.items()
    }
    assert answers == {(True, "one", 0.01, 0.1), (False, "all", 1e-5, 0.2)}
    assert len(norms) == 53 + 8
    assert all(norm.path == path for path, norm in norms.items())
