"""Models of LazyConfigs as `build_model` makes them: detectron2's common models with norms of bnext."""

import pytest
import torch
from detectron2.modeling import build_model

from bnext.config import load_config
from bnext.errors import ConfigError
from bnext.layers import BatchNorm2d, LevelBatchNorm2d
from tests.heads.detectors import train_and_infer
from tests.stock import FOLDER

RESNETS = "norms.RESNETS.NORM=BN"
STRINGS = ("model.backbone.bottom_up.stem.norm=BN", "model.backbone.bottom_up.stages.norm=BN")
C4_STRINGS = ("model.backbone.stem.norm=BN", "model.backbone.stages.norm=BN", "model.roi_heads.res5.norm=BN")
FPN = (*STRINGS, RESNETS, "model.backbone.norm=SyncBN", "norms.FPN.NORM=SyncBN")
RCNN = (*FPN, "norms.RPN.NORM=BN", "norms.RPN.STATISTICS=shared")
# Overrides, and the norms of bnext that see one feature, and several levels.
MODELS = {
    "retinanet": ((*FPN, "norms.RETINANET.NORM=BN", "norms.RETINANET.POPULATION=shared"), 53 + 6, 8),
    "fcos": ((*FPN, "norms.RETINANET.NORM=SyncBN"), 53 + 6, 8),
    "mask_rcnn_fpn": (RCNN, 53 + 8, 1),
    "mask_rcnn_c4": ((*C4_STRINGS, RESNETS, "norms.RPN.NORM=BN"), 53, 1),
    "cascade_rcnn": (RCNN, 53 + 8, 1),
    "keypoint_rcnn_fpn": (RCNN, 53 + 8, 1),
    "panoptic_fpn": (RCNN, 53 + 8, 1),
}


def load(name, *words, device="meta"):
    return load_config(str(FOLDER / f"common/models/{name}.py"), [f"train.device={device}", *words])


@pytest.mark.parametrize("name", MODELS)
def test_every_common_model_is_built_with_the_norms_of_its_places(name):
    overrides, single, of_levels = MODELS[name]
    with torch.device("meta"):
        model = build_model(load(name, *overrides))
    norms = [module for module in model.modules() if isinstance(module, (BatchNorm2d, LevelBatchNorm2d))]
    assert len([norm for norm in norms if isinstance(norm, LevelBatchNorm2d)]) == of_levels
    assert len([norm for norm in norms if not isinstance(norm, LevelBatchNorm2d)]) == single
    assert all(norm.path for norm in norms)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_common_model_trains_and_detects(name):
    number = "model.num_classes=3" if name in ("retinanet", "fcos") else "model.roi_heads.num_classes=3"
    others = {"keypoint_rcnn_fpn": ["model.roi_heads.keypoint_head.num_keypoints=2"]}.get(name, [])
    torch.manual_seed(0)
    train_and_infer(build_model(load(name, *MODELS[name][0], number, *others, device="cpu")))


def test_the_model_of_a_file_alone_is_detectron2s_own():
    with torch.device("meta"):
        model = build_model(load("retinanet", *STRINGS))
    assert not any(isinstance(module, (BatchNorm2d, LevelBatchNorm2d)) for module in model.modules())


@pytest.mark.parametrize(
    ("name", "words", "culprit"),
    [
        ("mask_rcnn_fpn", ["norms.RETINANET.NORM=BN"], r"norms\.RETINANET must be left out.*model\.head"),
        ("retinanet", ["norms.RPN.NORM=BN"], r"norms\.RPN must be left out"),
        ("retinanet", ["norms.ROI_BOX_HEAD.NORM=BN"], r"ROI_BOX_HEAD"),
        ("retinanet", ["model._target_=torch.nn.init.calculate_gain", "model=null"], "model"),
    ],
)
def test_a_place_that_the_model_has_not_is_refused(name, words, culprit):
    with pytest.raises(ConfigError, match=culprit), torch.device("meta"):
        build_model(load(name, *words))
