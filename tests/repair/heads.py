"""Detectors of others in small, written here: a head in AdelaiDet's manner, one that the model calls level by level."""

from collections import OrderedDict
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.retinanet import RetinaNetHead

CHANNELS = 6
LEVELS = ("p3", "p4", "p5")


def make_tower(depth=2, norm=nn.BatchNorm2d):
    layers = []
    for _ in range(depth):
        layers += [nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), norm(CHANNELS), nn.ReLU()]
    return nn.Sequential(*layers)


class Pyramid(nn.Module):
    """Features of three levels, each of other statistics."""

    out_channels = CHANNELS

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, CHANNELS, 3, stride=2, padding=1), nn.BatchNorm2d(CHANNELS))

    def forward(self, images):
        features = [self.stem(images)]
        for level in (1, 2):
            features.append(F.avg_pool2d(features[-1], 2, ceil_mode=True) * (1 + 2 * level) + level)
        return OrderedDict(zip(LEVELS, features, strict=True))


class TowerHead(nn.Module):
    """As AdelaiDet's FCOS: towers over a list of levels, and a scale of each level."""

    def __init__(self, norm=nn.BatchNorm2d):
        super().__init__()
        self.cls_tower, self.bbox_tower = make_tower(norm=norm), make_tower(norm=norm)
        self.cls_logits, self.bbox_pred = nn.Conv2d(CHANNELS, 2, 1), nn.Conv2d(CHANNELS, 4, 1)
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(())) for _ in LEVELS])
        self.order = (0, 1, 2)  # of the calls; a level may be left out
        self.breaks = False

    def forward(self, features):
        logits, boxes = [], []
        for level in self.order:
            logits.append(self.cls_logits(self.cls_tower(features[level])))
            boxes.append(self.bbox_pred(self.bbox_tower(features[level])) * self.scales[level])
            if self.breaks:
                raise OSError("on purpose")
        return logits, boxes


class TowerDetector(nn.Module):
    def __init__(self, head=None):
        super().__init__()
        self.backbone, self.head = Pyramid(), head or TowerHead()

    def forward(self, images):
        return self.inference(images)

    def inference(self, images):
        logits, boxes = self.head(list(self.backbone(images).values()))
        return [torch.cat(pair, 1) for pair in zip(logits, boxes, strict=True)]


class LevelHead(nn.Module):
    """One level in a call, as heads of others and of one's own are."""

    def __init__(self):
        super().__init__()
        self.tower, self.out = make_tower(), nn.Conv2d(CHANNELS, 3, 1)

    def forward(self, feature):
        return self.out(self.tower(feature))


class LoopingDetector(nn.Module):
    """Calls its head once for each level."""

    def __init__(self):
        super().__init__()
        self.backbone, self.head = Pyramid(), LevelHead()

    def forward(self, images):
        return [self.head(feature) for feature in self.backbone(images).values()]


def make_torchvision():
    """Torchvision's RetinaNet with a batch norm in its head."""
    backbone = Pyramid()
    anchors = AnchorGenerator(sizes=((16,), (32,), (64,)), aspect_ratios=((1.0,),) * 3)
    head = RetinaNetHead(CHANNELS, 1, 2, norm_layer=partial(nn.BatchNorm2d))
    size = {"min_size": 64, "max_size": 64, "image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    return RetinaNet(backbone, 2, anchor_generator=anchors, head=head, **size)


def make_images(number=4, sizes=((32, 40), (48, 32), (36, 52)), seed=0):
    """Batches of images of differing sizes."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(number, 3, *size, generator=generator) + 0.5 for size in sizes]


def settle(model, batches, times=20):
    """Let the moving averages follow the mini-batches of a training, whose weights stay."""
    model.train()
    with torch.no_grad():
        for _ in range(times):
            for batch in batches:
                model(batch)
    return model.eval()
