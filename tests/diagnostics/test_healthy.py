"""The models that people start from: the doctor has nothing against them, neither a warning nor an error."""

import copy

import pytest
import timm
import torch
from torchvision import models
from torchvision.models import detection
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from bnext import diagnose, load_config
from bnext.diagnostics.diagnose import examine_facts
from bnext.diagnostics.facts import Origin
from bnext.evaluation.doctor import examine_detector
from tests.stock import FOLDER

FCOS = "COCO-Detection/fcos_R_50_FPN_1x.py"
ZOO = [
    "COCO-Detection/retinanet_R_50_FPN_3x.yaml",
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml",
    "COCO-PanopticSegmentation/panoptic_fpn_R_50_3x.yaml",
]
MORE_ZOO = [
    "COCO-Detection/faster_rcnn_R_50_FPN_3x.yaml",
    "COCO-Detection/faster_rcnn_R_50_C4_3x.yaml",
    "COCO-Detection/faster_rcnn_R_50_DC5_3x.yaml",
    "COCO-Detection/rpn_R_50_FPN_1x.yaml",
    FCOS,
    "COCO-Detection/retinanet_R_50_FPN_1x.py",
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py",
    "COCO-Keypoints/keypoint_rcnn_R_50_FPN_3x.yaml",
    "Misc/cascade_mask_rcnn_R_50_FPN_3x.yaml",
    "Misc/mask_rcnn_R_50_FPN_3x_gn.yaml",
    "Misc/scratch_mask_rcnn_R_50_FPN_3x_gn.yaml",
    "Misc/semantic_R_50_FPN_1x.yaml",
]
OURS = [
    "Digits-Detection/retinanet_R_18_FPN.yaml",
    "COCO-Detection/retinanet_R_50_FPN_1x_SyncBN.yaml",
]
CLASSIFIERS = ["resnet18", "mobilenet_v3_small"]
MORE_CLASSIFIERS = ["resnet50", "densenet121", "efficientnet_b0", "convnext_tiny", "regnet_y_400mf", "mobilenet_v2"]
TIMM = ["resnet18"]
MORE_TIMM = ["resnet50", "resnet50d", "resnext50_32x4d", "seresnet50", "resnetv2_50", "ecaresnet50d", "wide_resnet50_2"]
DETECTORS = ["ssdlite320_mobilenet_v3_large"]
MORE_DETECTORS = [
    "fasterrcnn_resnet50_fpn",
    "fasterrcnn_resnet50_fpn_v2",
    "fasterrcnn_mobilenet_v3_large_fpn",
    "maskrcnn_resnet50_fpn",
    "maskrcnn_resnet50_fpn_v2",
    "keypointrcnn_resnet50_fpn",
    "retinanet_resnet50_fpn",
    "retinanet_resnet50_fpn_v2",
    "fcos_resnet50_fpn",
    "ssd300_vgg16",
]
slow = pytest.mark.slow


def also_slow(quick, others):
    return [*quick, *(pytest.param(name, marks=slow) for name in others)]


def complain(diagnosis):
    return [(finding.code, finding.severity, finding.evidence.text) for finding in diagnosis.select("warning")]


def fine_tune(model, run, num_steps=12):
    """A few steps of a training."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01, momentum=0.9)
    for step in range(num_steps):
        optimizer.zero_grad()
        run(model, step).backward()
        optimizer.step()
    return model, optimizer


def examine(config, device, num_workers=8, opts=()):
    cfg = load_config(str(config), ["MODEL.DEVICE", device, "SOLVER.IMS_PER_BATCH", "16", *opts])
    facts, _ = examine_detector(cfg, Origin("config", str(config), weights=cfg.MODEL.WEIGHTS), num_workers=num_workers)
    return examine_facts(facts)


# ---- detectron2 and bnext


@pytest.mark.parametrize("name", ZOO)
def test_configs_of_detectron2_without_a_forward(name):
    assert not complain(examine(FOLDER / name, "meta"))


@slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", [*ZOO, *MORE_ZOO])
def test_configs_of_detectron2(name):
    # Detectron2 0.6 tries the GN of its FCOS on a single channel, which torch refuses.
    opts = ("model.head.norm=''",) if name == FCOS else ()
    diagnosis = examine(FOLDER / name, "cpu", opts=opts)

    assert not complain(diagnosis)
    assert not diagnosis.failures


@pytest.mark.parametrize("name", OURS)
def test_configs_of_bnext(name):
    assert not complain(examine(name, "meta", num_workers=1))


# ---- torchvision and timm


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("name", also_slow(CLASSIFIERS, MORE_CLASSIFIERS))
def test_classifiers_of_torchvision(name, mode):
    torch.manual_seed(0)
    model = getattr(models, name)(num_classes=10).train(mode)

    assert not complain(diagnose(model, [torch.randn(16, 3, 64, 64)]))


@pytest.mark.parametrize("name", also_slow(TIMM, MORE_TIMM))
def test_resnets_of_timm(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10)

    assert not complain(diagnose(model, [torch.randn(16, 3, 64, 64)]))


@slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("model", [models.resnet18(num_classes=4), timm.create_model("resnet18", num_classes=4)])
def test_classifiers_that_were_fine_tuned(model):
    torch.manual_seed(0)
    data = [torch.randn(16, 3, 64, 64) for _ in range(8)]

    def run(model, step):
        return torch.nn.functional.cross_entropy(model(data[step % 8]), torch.arange(16) % 4)

    model, optimizer = fine_tune(model, run, num_steps=60)

    assert not complain(diagnose(model, data, optimizer=optimizer))


def make_images(number=2, size=128):
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, size, size, generator=generator) for _ in range(number)]
    box = torch.tensor([[10.0, 10.0, 60.0, 60.0]])
    masks, keypoints = torch.zeros(1, size, size, dtype=torch.uint8), torch.ones(1, 17, 3)
    masks[:, 10:60, 10:60] = 1
    target = {"boxes": box, "labels": torch.tensor([1]), "masks": masks, "keypoints": keypoints * 30}
    return images, [target for _ in images]


@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", also_slow(DETECTORS, MORE_DETECTORS))
def test_detectors_of_torchvision(name):
    torch.manual_seed(0)
    model = getattr(detection, name)(weights=None, weights_backbone=None, num_classes=2)

    assert not complain(diagnose(model))
    assert not complain(diagnose(model.eval()))


def make_with_frozen_backbone(name):
    """A detector as it begins from weights of ImageNet: its backbone's norms are frozen, with a state of their own."""
    levels = {"returned_layers": [2, 3, 4], "extra_blocks": LastLevelP6P7(256, 256)} if name != "FasterRCNN" else {}
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, **levels)
    for norm in backbone.modules():
        if isinstance(norm, FrozenBatchNorm2d):
            norm.running_mean.normal_(0, 0.3)
            norm.running_var.uniform_(0.3, 2)
            norm.bias.normal_(0, 0.1)
    return getattr(detection, name)(backbone, num_classes=2, min_size=128, max_size=128)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", also_slow(["RetinaNet"], ["FasterRCNN", "FCOS"]))
def test_detectors_that_were_fine_tuned(name):
    torch.manual_seed(0)
    images, targets = make_images()

    model, optimizer = fine_tune(
        make_with_frozen_backbone(name), lambda model, _: sum(model(images, targets).values()), num_steps=2
    )

    diagnosis = diagnose(model, [images], optimizer=optimizer)
    assert not diagnosis.failures
    assert not complain(diagnosis)
