"""Models without a fault: a tool that complains of their norms has raised a false alarm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import timm
import torch
from torch import nn
from torchvision import models
from torchvision.models import detection

from bench.doctor.case import Case, Patient, train
from bench.doctor.planted import RCNN, RETINANET, SMALL, Pyramid, SmallNet, classify, detect

__all__ = ["list_healthy"]

_TORCHVISION = ("resnet18", "resnet50", "mobilenet_v3_small", "mobilenet_v2", "densenet121", "efficientnet_b0")
_TIMM = ("resnet18", "resnet26d", "resnext26ts", "regnety_002", "resnet10t")
_DETECTORS = (
    "fasterrcnn_resnet50_fpn",
    "retinanet_resnet50_fpn_v2",
    "fcos_resnet50_fpn",
    "ssdlite320_mobilenet_v3_large",
)


def list_healthy() -> Iterator[Patient]:
    """All of them."""
    for name in _TORCHVISION:
        yield _give(name, "torchvision", partial(_make_classifier, getattr(models, name)))
    for name in _TIMM:
        yield _give(name, "timm", partial(_make_classifier, partial(timm.create_model, name)))
    for name in _DETECTORS:
        yield _give(name, "torchvision", partial(_make_detector, name))

    yield _give("RetinaNet, row 4", "detectron2", lambda: detect(RETINANET, "SOLVER.IMS_PER_BATCH", "16"))
    pairs = ("MODEL.BNEXT.RETINANET.STATISTICS", "shared", "MODEL.BNEXT.RETINANET.POPULATION", "shared")
    yield _give("RetinaNet, row 1", "detectron2", lambda: detect(RETINANET, *pairs, "SOLVER.IMS_PER_BATCH", "16"))
    yield _give("RetinaNet, GN", "detectron2", lambda: detect(RETINANET, "MODEL.RETINANET.NORM", "GN", *_SIXTEEN))
    yield _give("Mask R-CNN, GN", "detectron2", lambda: detect(RCNN))

    yield _give("three convolutions", "torch", lambda: classify(SmallNet()))
    yield _give("three convolutions, trained", "torch", lambda: train(classify(SmallNet()), num_steps=60))
    yield _give("three convolutions, GN", "torch", lambda: classify(SmallNet(partial(nn.GroupNorm, 4)), num_images=2))
    yield _give("GN at three sizes", "torch", lambda: classify(Pyramid(nn.GroupNorm(4, 16))))
    yield _give("no norm", "torch", lambda: classify(SmallNet(lambda _: nn.Identity())))
    yield _give("ResNet-18, trained", "torchvision", lambda: train(_make_classifier(models.resnet18), num_steps=24))
    yield _give("ResNet-18, at inference", "torchvision", _make_evaluated)


_SIXTEEN = ("SOLVER.IMS_PER_BATCH", "16")


def _give(name: str, library: str, make: Callable[[], Case]) -> Patient:
    return Patient(name, "", library, make)


def _make_classifier(build: Callable[..., nn.Module]) -> Case:
    return classify(build(num_classes=4), 64)


def _make_evaluated() -> Case:
    case = train(_make_classifier(models.resnet18), num_steps=24)
    case.model.eval()
    return case


def _make_detector(name: str) -> Case:
    build: Any = getattr(detection, name)
    options = {} if name.startswith("ssd") else SMALL
    model = build(weights=None, weights_backbone=None, num_classes=4, **options)
    return Case(model.train(), [[torch.rand(3, 128, 128) for _ in range(16)]])
