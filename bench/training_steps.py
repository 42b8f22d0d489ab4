"""A step of a whole detector, forward, backward and SGD: as fast as Detectron2's with the same norms in its heads."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from bench.harness import NOT_EQUAL, Setting
from bench.pairs import Timer, time_pairs
from bench.record import Result, Speed
from bnext.config import load_config

__all__ = ["ROWS", "TrainingStep"]

NUM_IMAGES, SIDES, NUM_OBJECTS, NUM_CLASSES = 2, (320, 512), 8, 80
TOLERANCE = 1e-6  # of float64: the norms of fifty layers enlarge what rounding does to the first
SECONDS = 90.0  # of measured time, of each detector
SMALL = ["MODEL.WEIGHTS", "", "MODEL.BACKBONE.FREEZE_AT", "0", "MODEL.RESNETS.NORM", "BN"]


def draw_batch() -> list[dict[str, Any]]:
    """Images of random numbers with objects, as Detectron2's mappers give them."""
    rng = torch.Generator().manual_seed(0)
    height, width = SIDES

    batch = []
    for _ in range(NUM_IMAGES):
        corners = torch.rand(NUM_OBJECTS, 2, generator=rng) * torch.tensor([width / 2, height / 2])
        sides = 16 + torch.rand(NUM_OBJECTS, 2, generator=rng) * (height / 2 - 16)
        boxes = torch.cat([corners, corners + sides], dim=1)
        masks = torch.zeros(NUM_OBJECTS, height, width, dtype=torch.bool)
        for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
            mask[top:bottom, left:right] = True

        objects = Instances(SIDES)
        objects.gt_boxes = Boxes(boxes)
        objects.gt_classes = torch.randint(NUM_CLASSES, (NUM_OBJECTS,), generator=rng)
        objects.gt_masks = BitMasks(masks)
        image = torch.randint(256, (3, height, width), generator=rng, dtype=torch.uint8)
        batch.append({"image": image, "instances": objects, "height": height, "width": width})
    return batch


@dataclass(frozen=True)
class TrainingStep:
    """Our detector against Detectron2's with the same weights.

    Args:
        name, peer: of ours and of the other.
        config: of the package.
        architecture: name of Detectron2's.
        opts: KEY VALUE pairs that override the config.
        goal: least ratio that is aimed at.
    """

    name: str
    peer: str
    config: str
    architecture: str
    opts: Sequence[str]
    goal: float

    def run(self, setting: Setting) -> list[Result]:
        """Losses and gradients are shown to be equal in float64, then steps are timed.

        Raises:
            BNextError: they are not.
        """
        batch = draw_batch()
        ours, other = self.build(setting.device)
        difference = self.measure_difference(ours.double(), other.double(), batch)

        steps = [Step(model.float(), batch) for model in (ours, other)]
        limits = dataclasses.replace(setting.limits, seconds=SECONDS)
        with EventStorage():
            pairs = time_pairs(steps[0].run, steps[1].run, Timer(setting.device), limits)
        return [Speed.of(pairs, self.name, self.peer, "NCHW", difference=difference, goal=self.goal)]

    def build(self, device: str) -> tuple[nn.Module, nn.Module]:
        """Ours and Detectron2's, in training mode, with the same weights."""
        cfg = load_config(self.config, [*SMALL, *self.opts, "MODEL.DEVICE", device])
        torch.manual_seed(0)
        ours = build_model(cfg)

        cfg.defrost()
        cfg.MODEL.META_ARCHITECTURE = self.architecture
        other = build_model(cfg)
        other.load_state_dict(ours.state_dict(), strict=False)  # statistics of levels have other keys
        return ours, other

    def measure_difference(self, ours: nn.Module, other: nn.Module, batch: list[dict[str, Any]]) -> float:
        """The largest relative difference of any loss, and of any parameter's gradient."""
        numbers, expected = compute(ours, batch), compute(other, batch)
        worst, name = max((_compare(numbers[name], value), name) for name, value in expected.items())
        if numbers.keys() != expected.keys() or not worst <= TOLERANCE:
            raise NOT_EQUAL.of(f"a difference of {worst:.2g} in {name}", self.name, tolerance=TOLERANCE)
        return worst


def compute(model: nn.Module, batch: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Losses and gradients by name; the gradients are gone afterwards."""
    torch.manual_seed(0)  # proposals are sampled
    with EventStorage(), proposing_in_float32(model):
        losses = model(batch)
    torch.stack(list(losses.values())).sum().backward()

    numbers = {name: loss.detach() for name, loss in losses.items()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            numbers[f"the gradient of {name}"] = parameter.grad
            parameter.grad = None
    return numbers


@contextlib.contextmanager
def proposing_in_float32(model: Any) -> Iterator[None]:
    """Within the block an R-CNN of float64 chooses its proposals in float32, the type of all boxes of Detectron2.

    Proposals have no gradient.
    """
    proposer = getattr(model, "proposal_generator", None)
    if proposer is None:
        yield
        return

    predict = proposer.predict_proposals

    def predict_in_float32(
        anchors: Any, logits: list[Tensor], deltas: list[Tensor], sizes: list[tuple[int, int]]
    ) -> list[Instances]:
        narrow = ([tensor.float() for tensor in tensors] for tensors in (logits, deltas))
        return predict(anchors, *narrow, sizes)

    proposer.predict_proposals = predict_in_float32
    try:
        yield
    finally:
        del proposer.predict_proposals


def _compare(value: Tensor, expected: Tensor) -> float:
    difference = float((value - expected).abs().max() / expected.abs().max().clamp(min=1))
    return difference if difference == difference else float("inf")


class Step:
    """One step of SGD on the same images, with the same proposals.

    Args:
        model: a detector in training mode.
        batch: records.
    """

    def __init__(self, model: nn.Module, batch: list[dict[str, Any]]) -> None:
        self.model, self.batch = model, batch
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)

    def run(self) -> None:
        """Forward, backward, update."""
        torch.manual_seed(0)
        self.optimizer.zero_grad()
        torch.stack(list(self.model(self.batch).values())).sum().backward()
        self.optimizer.step()


BOX_HEAD = ["MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead", "MODEL.ROI_BOX_HEAD.NUM_CONV", "4"]
BOX_HEAD += ["MODEL.ROI_BOX_HEAD.NUM_FC", "1", "MODEL.ROI_BOX_HEAD.NORM", "BN"]

RETINANET = TrainingStep(
    "step of RetinaNet R-50, BN in its head",
    "Detectron2's",
    "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
    "RetinaNet",
    ["MODEL.RETINANET.NORM", "BN"],
    goal=1.0,
)

ROWS = [
    RETINANET,
    TrainingStep(
        "step of Mask R-CNN R-50, BN in its heads",
        "Detectron2's",
        "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
        "GeneralizedRCNN",
        [*BOX_HEAD, "MODEL.ROI_MASK_HEAD.NORM", "BN"],
        goal=1.0,
    ),
]
