"""The heads in LazyConfigs, in the place of detectron2's."""

import torch
from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.config import instantiate

from bnext import LevelBatchNorm2d, NormSpec
from bnext.heads import FCOSHead, RetinaNetHead
from tests.heads.detectors import LEVELS, make_batch, run_step


def make_model(name, head):
    model = model_zoo.get_config(f"common/models/{name}.py").model
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
