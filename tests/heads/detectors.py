"""Small detectors and batches for the tests of the heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from bnext import add_bnext_config
from bnext.layers import TABLE5_ROWS
from bnext.layers.forms import find_forms

__all__ = [
    "C4",
    "CASCADE",
    "LEVELS",
    "NUM_CLASSES",
    "ROOTS",
    "make_batch",
    "make_cfg",
    "make_detector",
    "make_model",
    "norms_of",
    "run_step",
    "shuffle_pairs",
    "train_and_infer",
]

# Where the norms of a place are in a model.
ROOTS = {
    "RESNETS": "backbone.bottom_up.",
    "FPN": "backbone.fpn_",
    "RPN": "proposal_generator.",
    "ROI_BOX_HEAD": "roi_heads.box_head.",
    "ROI_MASK_HEAD": "roi_heads.mask_head.",
    "ROI_KEYPOINT_HEAD": "roi_heads.keypoint_head.",
    "SEM_SEG_HEAD": "sem_seg_head.",
}
# Without an FPN; the last stage is in the RoI heads.
C4 = [
    *("MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.RESNETS.OUT_FEATURES", ["res4"]),
    *("MODEL.ROI_HEADS.NAME", "Res5ROIHeads", "MODEL.KEYPOINT_ON", False, "MODEL.ANCHOR_GENERATOR.SIZES", [[32, 64]]),
    *("MODEL.RPN.IN_FEATURES", ["res4"], "MODEL.ROI_HEADS.IN_FEATURES", ["res4"], "MODEL.ROI_MASK_HEAD.NUM_CONV", 0),
]
# Three box heads, one after the other.
CASCADE = ("MODEL.ROI_HEADS.NAME", "CascadeROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True)
LEVELS = ("p3", "p4", "p5", "p6", "p7")
NUM_CLASSES = 3


def make_detector(
    architecture: str = "BNextRetinaNet", norm: str = "BN", row: int = 4, seed: int = 0, pairs: tuple[Any, ...] = ()
) -> nn.Module:
    """A detector on a very narrow ResNet-50-FPN, five levels, on the CPU; `pairs` are KEY, VALUE, ..."""
    cfg = get_cfg()
    add_bnext_config(cfg)
    model = cfg.MODEL
    model.META_ARCHITECTURE, model.DEVICE, model.WEIGHTS = architecture, "cpu", ""
    model.BACKBONE.NAME, model.BACKBONE.FREEZE_AT = "build_retinanet_resnet_fpn_backbone", 0
    model.RESNETS.DEPTH, model.RESNETS.WIDTH_PER_GROUP = 50, 4
    model.RESNETS.RES2_OUT_CHANNELS, model.RESNETS.STEM_OUT_CHANNELS = 16, 8
    model.RESNETS.OUT_FEATURES = model.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    model.RESNETS.NORM, model.FPN.OUT_CHANNELS = "FrozenBN", 32
    model.ANCHOR_GENERATOR.SIZES = [[16.0 * 2**level] for level in range(len(LEVELS))]
    model.RETINANET.IN_FEATURES = list(LEVELS)
    model.RETINANET.NORM, model.RETINANET.NUM_CLASSES, model.RETINANET.NUM_CONVS = norm, NUM_CLASSES, 2
    node = model.BNEXT.RETINANET
    node.STATISTICS, node.POPULATION, node.AFFINE = TABLE5_ROWS[row]
    cfg.merge_from_list(list(pairs))
    torch.manual_seed(seed)
    return build_model(cfg)


def make_cfg(*pairs: Any, architecture: str = "BNextPanopticFPN") -> CfgNode:
    """A config with every place of a two-stage detector, and KEY, VALUE, ... pairs."""
    cfg = get_cfg()
    add_bnext_config(cfg)
    cfg.merge_from_file(str(Path(__file__).with_name("panoptic.yaml")))
    cfg.merge_from_list(["MODEL.META_ARCHITECTURE", architecture, *pairs])
    return cfg


def make_model(*pairs: Any, architecture: str = "BNextPanopticFPN", seed: int = 0) -> nn.Module:
    """The model of `make_cfg`."""
    torch.manual_seed(seed)
    return build_model(make_cfg(*pairs, architecture=architecture))


def shuffle_pairs(form: str, *places: str) -> list[Any]:
    """KEY, VALUE, ... pairs that set the SHUFFLE of heads."""
    return [item for place in places for item in (f"MODEL.BNEXT.{place}.SHUFFLE", form)]


def make_batch(sides: tuple[int, ...] = (64, 64), seed: int = 0) -> list[dict[str, Any]]:
    """Records as a mapper makes them: noise with one object per image; p7 of two images has two elements."""
    generator = torch.Generator().manual_seed(seed)
    batch = []
    for index, side in enumerate(sides):
        instances = Instances((side, side))
        instances.gt_boxes = Boxes(torch.tensor([[4.0, 6.0, 30.0 + index, 40.0]]))
        instances.gt_classes = torch.tensor([index % NUM_CLASSES])
        instances.gt_masks = BitMasks(torch.ones(1, side, side, dtype=torch.bool))
        instances.gt_keypoints = Keypoints(torch.tensor([[[10.0, 12.0, 2.0], [20.0, 30.0, 2.0]]]))
        image = torch.rand(3, side, side, generator=generator) * 255
        record = {"image": image, "instances": instances, "height": side, "width": side}
        batch.append({**record, "sem_seg": torch.arange(side * side).reshape(side, side) % 4})
    return batch


def run_step(model: nn.Module, batch: list[dict[str, Any]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses and gradients of one training step; the sampling of anchors and RoIs is the same in every call."""
    model.zero_grad()
    torch.manual_seed(0)
    with EventStorage():
        losses = model.train()(batch)
        sum(losses.values()).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {name: loss.detach() for name, loss in losses.items()}, gradients


def norms_of(model: nn.Module, place: str | None = None) -> dict[str, Any]:
    """Path -> norm, of a place or of the whole model."""
    root = ROOTS[place] if place else ""
    return {path: norm for path, norm, _ in find_forms(model) if path.startswith(root)}


def train_and_infer(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor], list[dict[str, Any]]]:
    """Losses, gradients and results of one step and one inference, which are finite and complete."""
    losses, gradients = run_step(model, make_batch((64, 96)))
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert gradients.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    model.eval()
    with torch.no_grad():
        results = model(make_batch((64, 96)))
    assert len(results) == 2
    return losses, gradients, results
