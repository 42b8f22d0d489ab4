"""Models with one planted fault each, of several architectures and libraries, each as somebody once had it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import timm
import torch
from detectron2.modeling import build_model
from torch import Tensor, nn
from torchvision import models
from torchvision.models import detection

from bench.doctor.case import Case, draw_images, patient, train
from bnext import load_config

__all__: list[str] = []


# ---- architectures


class SmallNet(nn.Module):
    """Three convolutions with norms, and a linear classifier.

    Args:
        make_norm: called with a number of channels.
        bias: of the convolutions.
    """

    def __init__(self, make_norm: Callable[[int], nn.Module] = nn.BatchNorm2d, *, bias: bool = False) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, 2, 1, bias=bias), make_norm(16), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, 2, 1, bias=bias), make_norm(32), nn.ReLU()),
            *(nn.Conv2d(32, 32, 3, 1, 1, bias=bias), make_norm(32), nn.ReLU()),
        )
        self.head = nn.Linear(32, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images).mean((2, 3)))


class Pyramid(nn.Module):
    """A head with a norm that is called at three levels of an image."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 1, 1)
        self.tower = nn.Sequential(nn.Conv2d(16, 16, 3, 1, 1, bias=False), norm, nn.ReLU())
        self.score = nn.Conv2d(16, 4, 1)

    def forward(self, images: Tensor) -> Tensor:
        feature, scores = self.stem(images), []
        for _ in range(3):
            scores.append(self.score(self.tower(feature)).mean((2, 3)))
            feature = 2 * nn.functional.max_pool2d(feature, 2)
        return torch.stack(scores).mean(0)


def classify(model: nn.Module, size: int = 32, num_images: int = 16, **options: Any) -> Case:
    data, labels = draw_images(size, num_images)
    return Case(model.train(), data, labels, **options)


def make_resnet(**options: Any) -> nn.Module:
    return models.resnet18(num_classes=4, **options)


def detect(file: str, *pairs: str) -> Case:
    """A detector of a config, before its training."""
    cfg = load_config(file, ["MODEL.DEVICE", "cpu", *pairs])
    image = torch.randint(256, (3, 128, 128)).float()
    batch = [{"image": image, "height": 128, "width": 128}] * 2
    return Case(build_model(cfg).train(), [batch], config=(file, pairs))


def find_norms(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


SMALL = {"min_size": 128, "max_size": 128}  # pixels, instead of 800 and more
RETINANET, RCNN = "Digits-Detection/retinanet_R_18_FPN.yaml", "Base-MaskRCNN-Digits.yaml"


# ---- over which batch


@patient("BN001", "detectron2", "plain BN in RetinaNet's head")
def _() -> Case:
    return detect("Digits-Detection/retinanet_R_18_FPN_BN.yaml")


@patient("BN001", "torch", "one BN at three sizes")
def _() -> Case:
    return classify(Pyramid(nn.BatchNorm2d(16)))


@patient("BN001", "torchvision", "RetinaNet with BN in its head")
def _() -> Case:
    model = detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=4, **SMALL)
    kinds = (model.head.classification_head, model.head.regression_head)
    for head in kinds:
        head.conv = nn.Sequential(*(nn.Sequential(conv[0], nn.BatchNorm2d(256), nn.ReLU()) for conv in head.conv))
    return Case(model.train(), [[torch.rand(3, 128, 128)] * 16])


@patient("BN002", "detectron2", "trained together, stored per level")
def _() -> Case:
    return detect(RETINANET, "MODEL.BNEXT.RETINANET.STATISTICS", "shared")


@patient("BN003", "detectron2", "BN in box and mask head, one image a worker")
def _() -> Case:
    pairs = ("MODEL.META_ARCHITECTURE", "BNextGeneralizedRCNN", "MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead")
    return detect(RCNN, *pairs, "MODEL.ROI_BOX_HEAD.NORM", "BN", "SOLVER.IMS_PER_BATCH", "1")


@patient("BN008", "torch", "two images a batch")
def _() -> Case:
    return classify(SmallNet(), num_images=2)


@patient("BN008", "torchvision", "ResNet-18 with one image a batch")
def _() -> Case:
    return classify(make_resnet(), 64, num_images=1)


@patient("BN009", "detectron2", "micro-batches of 2, accumulated")
def _() -> Case:
    return detect(RETINANET, "SOLVER.IMS_PER_BATCH", "16", "SOLVER.BNEXT.ACCUMULATE", "8")


@patient("BN010", "torch", "BatchNorm1d on single samples")
def _() -> Case:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 16), nn.BatchNorm1d(16), nn.Linear(16, 4))
    return classify(model, num_images=1)


@patient("BN010", "torchvision", "BN on 1 x 1 features of one image")
def _() -> Case:
    model = make_resnet()
    model.avgpool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(512, 512, 1), nn.BatchNorm2d(512))
    return classify(model, 64, num_images=1)


@patient("BN034", "torch", "no running statistics")
def _() -> Case:
    return classify(SmallNet(lambda channels: nn.BatchNorm2d(channels, track_running_stats=False)))


@patient("BN034", "timm", "ResNet-18 without running statistics")
def _() -> Case:
    model = timm.create_model("resnet18", num_classes=4)
    for norm in find_norms(model):
        norm.running_mean = norm.running_var = norm.num_batches_tracked = None
        norm.track_running_stats = False
    return classify(model, 64)


# ---- frozen or not


@patient("BN004", "torchvision", "backbone without gradients, live statistics")
def _() -> Case:
    case = train(classify(make_resnet(), 64), num_steps=8)
    for name, parameter in case.model.named_parameters():
        parameter.requires_grad_(name.startswith("fc."))
    case.optimizer = torch.optim.SGD(case.model.fc.parameters(), lr=0.01)
    return case


@patient("BN004", "timm", "ResNet-18 without gradients, live statistics")
def _() -> Case:
    case = train(classify(timm.create_model("resnet18", num_classes=4), 64), num_steps=8)
    case.model.requires_grad_(False)
    case.model.fc.requires_grad_(True)
    case.optimizer = torch.optim.SGD(case.model.fc.parameters(), lr=0.01)
    return case


@patient("BN005", "torch", "norms in evaluation mode, affine trained")
def _() -> Case:
    case = train(classify(SmallNet()))
    for norm in find_norms(case.model):
        norm.eval()
    return case


@patient("BN006", "detectron2", "FrozenBN from a random start")
def _() -> Case:
    return detect(RETINANET, "MODEL.RESNETS.NORM", "FrozenBN")


@patient("BN006", "torchvision", "Faster R-CNN, frozen norms, nothing loaded")
def _() -> Case:
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None)
    return Case(detection.FasterRCNN(backbone, num_classes=4, **SMALL).train(), [[torch.rand(3, 128, 128)] * 16])


@patient("BN007", "detectron2", "SyncBN asked for, stages frozen")
def _() -> Case:
    pairs = ("MODEL.RESNETS.NORM", "SyncBN", "MODEL.BACKBONE.FREEZE_AT", "2", "SOLVER.IMS_PER_BATCH", "16")
    return detect(RETINANET, *pairs, "MODEL.WEIGHTS", "detectron2://ImageNetPretrained/torchvision/R-50.pkl")


@patient("BN007", "torch", "norm_eval over SyncBatchNorm")
def _() -> Case:
    case = train(classify(SmallNet()))
    case.model = nn.SyncBatchNorm.convert_sync_batchnorm(case.model)
    for norm in find_norms(case.model):
        norm.eval()
    case.data, case.labels = (), ()  # which the class refuses without a GPU
    return case


# ---- values


def set_var(model: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    norm = find_norms(model)[1]
    norm.running_var.copy_(change(norm.running_var))


@patient("BN011", "torchvision", "a negative running variance")
def _() -> Case:
    case = train(classify(make_resnet(), 64), num_steps=8)
    find_norms(case.model)[3].running_var[5] = -0.1
    return case


@patient("BN011", "torch", "NaN in running means")
def _() -> Case:
    case = train(classify(SmallNet()))
    find_norms(case.model)[1].running_mean[2] = float("nan")
    return case


@patient("BN011", "timm", "an infinite running variance")
def _() -> Case:
    case = train(classify(timm.create_model("resnet18", num_classes=4), 64), num_steps=8)
    find_norms(case.model)[5].running_var[:] = float("inf")
    return case


@patient("BN012", "torch", "features far below eps")
def _() -> Case:
    case = classify(SmallNet())
    with torch.no_grad():
        case.model.body[3].weight.mul_(1e-4)
        case.model.body[4].weight.fill_(1e-4)
    return train(case, lr=1e-6)


@patient("BN012", "torchvision", "statistics of a scaled network, below eps")
def _() -> Case:
    case = train(classify(make_resnet(), 64), num_steps=20)
    norm = find_norms(case.model)[4]
    norm.running_var.mul_(1e-8)
    norm.running_mean.mul_(1e-4)
    return case


@patient("BN013", "torchvision", "statistics that were never loaded")
def _() -> Case:
    case = train(classify(make_resnet(), 64), num_steps=20)
    for norm in find_norms(case.model):
        norm.reset_running_stats()
    return case


@patient("BN013", "torch", "momentum 0")
def _() -> Case:
    return train(classify(SmallNet(lambda channels: nn.BatchNorm2d(channels, momentum=0.0))))


@patient("BN014", "torch", "moving averages of other weights")
def _() -> Case:
    case = train(classify(SmallNet()))
    buffers = copy.deepcopy(dict(case.model.named_buffers()))
    train(case, num_steps=60, lr=0.1)
    with torch.no_grad():
        for norm in find_norms(case.model)[1:]:
            norm.weight.mul_(1.0)
        for parameter in case.model.body[3:6:3].parameters():
            parameter.mul_(3.0)
        for name, buffer in case.model.named_buffers():
            buffer.copy_(buffers[name])
    case.options = {"depth": "full"}
    return case


@patient("BN014", "torchvision", "statistics of another data set")
def _() -> Case:
    case = train(classify(make_resnet(), 64), num_steps=24)
    case.data = [3 * images + 2 for images in case.data]
    case.options = {"depth": "full"}
    return case


@patient("BN017", "torch", "momentum 0.9")
def _() -> Case:
    return train(classify(SmallNet(lambda channels: nn.BatchNorm2d(channels, momentum=0.9))))


@patient("BN017", "torchvision", "MobileNet with momentum 0.997")
def _() -> Case:
    model = models.mobilenet_v3_small(num_classes=4)
    for norm in find_norms(model):
        norm.momentum = 0.997
    return classify(model, 64)


@patient("BN018", "torchvision", "eps changed after the training")
def _() -> Case:
    case = train(classify(make_resnet(), 64), num_steps=8)
    before = copy.deepcopy(case.model)
    for norm in find_norms(case.model):
        norm.eps = 1e-3
    case.options = {"before": before}
    return case


@patient("BN019", "torch", "inverse standard deviations as variances")
def _() -> Case:
    case = train(classify(SmallNet()), num_steps=60)
    for norm in find_norms(case.model):
        norm.running_var.copy_((norm.running_var + norm.eps).rsqrt())
    return case


@patient("BN019", "torchvision", "Caffe's statistics without their scale factor")
def _() -> Case:
    case = train(classify(make_resnet(), 64), num_steps=60)
    for norm in find_norms(case.model):
        norm.running_var.mul_(999.98)
        norm.running_mean.mul_(999.98)
    return case


@patient("BN020", "detectron2", "folded ImageNet weights under live norms")
def _() -> Case:
    pairs = ("MODEL.WEIGHTS", "detectron2://ImageNetPretrained/MSRA/R-50.pkl", "MODEL.RESNETS.DEPTH", "50")
    return detect(RETINANET, *pairs, "MODEL.RESNETS.RES2_OUT_CHANNELS", "256", "SOLVER.IMS_PER_BATCH", "16")


# ---- a training


@patient("BN026", "torch", "EMA of the parameters alone")
def _() -> Case:
    case = classify(SmallNet())
    average = copy.deepcopy(case.model)
    train(case, num_steps=60)
    for mean, value in zip(average.parameters(), case.model.parameters(), strict=True):
        mean.data.copy_(value.data)
    case.options = {"averaged": average}
    return case


@patient("BN026", "torchvision", "a teacher with the statistics of its start")
def _() -> Case:
    case = classify(make_resnet(), 64)
    average = copy.deepcopy(case.model)
    train(case, num_steps=20)
    for mean, value in zip(average.parameters(), case.model.parameters(), strict=True):
        mean.data.lerp_(value.data, 0.9)
    case.options = {"averaged": average}
    return case


@patient("BN027", "torch", "weight decay on some norms")
def _() -> Case:
    case = classify(SmallNet())
    norms = find_norms(case.model)
    free = {*norms[0].parameters(), *norms[1].parameters()}
    others = [parameter for parameter in case.model.parameters() if parameter not in free]
    groups: list[dict[str, Any]] = [{"params": list(free), "weight_decay": 0.0}, {"params": others}]
    case.optimizer = torch.optim.SGD(groups, lr=0.01, weight_decay=1e-2)
    return case


@patient("BN029", "torch", "a subclass lost in convert_sync_batchnorm")
def _() -> Case:
    class Clipped(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).clamp(-3, 3)

    before = SmallNet(Clipped)
    after = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(before))
    return Case(after.train(), options={"before": before})


@patient("BN029", "timm", "activations lost with BatchNormAct2d")
def _() -> Case:
    before = timm.create_model("regnety_002", num_classes=4)
    after = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(before))
    return Case(after.train(), options={"before": before})


# ---- data


def make_domains() -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    day, _ = draw_images(32)
    return day, [0.3 * images - 2 for images in day]


@patient("BN023", "torch", "two domains through shared statistics")
def _() -> Case:
    case = classify(SmallNet())
    day, night = make_domains()
    case.data, case.labels = [*day, *night], [*case.labels, *case.labels]
    train(case, num_steps=40)
    case.data, case.labels = day, case.labels[:4]
    case.options = {"domains": {"day": day, "night": night}}
    return case


@patient("BN030", "torchvision", "pixels of 0 to 255 at test, of 0 to 1 in training")
def _() -> Case:
    case = classify(make_resnet(), 64)
    case.data = [(images * 0.25 + 0.5).clamp(0, 1) for images in case.data]
    train(case, num_steps=8)
    case.options = {"test_data": [255 * images for images in case.data]}
    return case


@patient("BN030", "torch", "BGR at test, RGB in training")
def _() -> Case:
    case = classify(SmallNet())
    shift = torch.tensor([2.0, 0.0, -2.0])[:, None, None]
    case.data = [images + shift for images in case.data]
    train(case, num_steps=30)
    case.options = {"test_data": [images.flip(1) for images in case.data]}
    return case


# ---- layers


@patient("BN031", "torch", "convolutions with bias before their norms")
def _() -> Case:
    return classify(SmallNet(bias=True))


@patient("BN032", "torch", "half of the channels dead")
def _() -> Case:
    case = train(classify(SmallNet()), num_steps=40)
    with torch.no_grad():
        find_norms(case.model)[1].weight[:20] = 1e-7
    return case


@patient("BN032", "torchvision", "a layer of ResNet-18 pruned to zero")
def _() -> Case:
    case = train(classify(make_resnet(), 64), num_steps=20)
    with torch.no_grad():
        find_norms(case.model)[6].weight[:100] = 1e-8
    return case


@patient("BN033", "torch", "a channel that explodes")
def _() -> Case:
    case = train(classify(SmallNet()), num_steps=40)
    with torch.no_grad():
        norm = find_norms(case.model)[1]
        norm.weight[3] = 1e4
        norm.running_var[3] = 1e12
    return case


@patient("BN033", "timm", "a variance that explodes")
def _() -> Case:
    case = train(classify(timm.create_model("resnet18", num_classes=4), 64), num_steps=20)
    find_norms(case.model)[8].running_var[:3] = 1e14
    return case
