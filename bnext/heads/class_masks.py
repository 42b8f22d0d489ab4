"""The ignore mask of classification losses: images of a set that does not annotate a class are no negatives for it.

    logits, records of the batch  --hide-->  logits of which some are so low that their loss and gradient are exactly 0
                                  ------->  detectron2's own loss

Sigmoid and softmax of a hidden logit are 0 in every precision: the focal loss of a RetinaNet or FCOS is the sum over
the columns that are left, the softmax of an R-CNN is over these and the background. Box, mask and keypoint losses are
of annotated objects alone. An RPN knows no classes: what it would call an object in another set may be a negative here.

A record says what is hidden in its image, see `bnext.data.classes`:

    annotated_classes   class indices; without the key all are annotated
    ignored_boxes       [M, 4] x0, y0, x1, y1 in pixels of the mapped image; an anchor or RoI of the background of which
                        half lies in one of them is a negative for no class, and none of an RPN
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detectron2.structures import Boxes, pairwise_ioa
from torch import Tensor, nn

from bnext.data.classes import find_partial_sets
from bnext.errors import ConfigError, DatasetError, Refusal, list_few

__all__ = ["ClassMasks", "check_maskable", "mask_classes"]

Record = dict[str, Any]

HIDDEN = -1e4  # finite in half precision, and exp(HIDDEN) is 0 in float64, too
COVERED = 0.5  # of its own area, from which on an anchor or RoI lies in an ignored box

_UNKNOWN_CLASSES = Refusal(
    DatasetError,
    "`annotated_classes` of a record",
    "be class indices of the model, 0 to {last}",
    "Correct the function that the data set was registered with.",
)
_CONTRADICTED = Refusal(
    DatasetError,
    "`annotated_classes` of a record",
    "hold the class of every object of its image",
    "Add the class, or leave the object out.",
)
_NOT_MASKABLE = Refusal(
    ConfigError,
    "MODEL.META_ARCHITECTURE",
    "have the loss of a RetinaNet, an FCOS or an R-CNN where data sets do not annotate all classes, so that their "
    "images are no negatives for the others",
    "Take one of these architectures, or annotate all classes in every set.",
)


class ClassMasks:
    """The records of the batch that a detector computes its losses for, and what they hide.

    Args:
        model: whose forward gets the records.
    """

    def __init__(self, model: nn.Module) -> None:
        self._records: Sequence[Record] = ()
        model.register_forward_pre_hook(self._begin, with_kwargs=True)
        model.register_forward_hook(self._end, always_call=True)

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        records = next(iter((*args, *kwargs.values())), ())
        is_batch = model.training and isinstance(records, (list, tuple))
        self._records = records if is_batch and any(map(_hides, records)) else ()

    def _end(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._records = ()

    @property
    def hides(self) -> bool:
        """Whether a record of the batch that is in the model's forward hides anything."""
        return len(self._records) > 0

    def find_hidden(self, labels: Sequence[Tensor], boxes: Sequence[Tensor], num_classes: int) -> Tensor:
        """Logits that the loss is not to see.

        Args:
            labels: of each image [R_i], the class of each anchor or RoI; `num_classes`: the background.
            boxes: of each image [R_i, 4].
            num_classes: K.

        Returns:
            Of all images one after the other [sum R_i, K], bool.

        Raises:
            DatasetError: a record contradicts itself or the model.
        """
        hidden = []
        ignored = self.find_ignored(labels, boxes, num_classes)
        for record, of_image in zip(self._records, ignored, strict=True):
            columns = _find_columns(record, num_classes).to(of_image.device, non_blocking=True)
            hidden.append(columns[None, :] | of_image[:, None])
        return torch.cat(hidden)

    def find_ignored(self, labels: Sequence[Tensor], boxes: Sequence[Tensor], background: int) -> list[Tensor]:
        """Whether an anchor or RoI is of the background and lies in an ignored box, of each image [R_i].

        Args:
            labels, boxes: see `find_hidden`.
            background: its label.
        """
        triples = zip(self._records, labels, boxes, strict=True)
        return [(of_image == background) & _find_covered(places, record) for record, of_image, places in triples]


def _hides(record: Any) -> bool:
    if not isinstance(record, dict):
        return False
    return record.get("annotated_classes") is not None or len(record.get("ignored_boxes", ())) > 0


def _find_columns(record: Record, num_classes: int) -> Tensor:
    """[K], whether the image of a record says nothing of a class."""
    annotated = record.get("annotated_classes")
    if annotated is None:
        return torch.zeros(num_classes, dtype=torch.bool)

    where = str(record.get("file_name", ""))
    if not all(0 <= index < num_classes for index in annotated):
        raise _UNKNOWN_CLASSES.of(list(annotated), where, last=num_classes - 1)
    present = set(record["instances"].gt_classes.tolist())
    if not present <= set(annotated):
        raise _CONTRADICTED.of(f"{list(annotated)} and an object of {min(present - set(annotated))}", where)

    columns = torch.ones(num_classes, dtype=torch.bool)
    columns[list(annotated)] = False
    return columns


def _find_covered(boxes: Tensor, record: Record) -> Tensor:
    """[R], whether half of a box lies in an ignored one."""
    regions = torch.as_tensor(record.get("ignored_boxes", ()), dtype=boxes.dtype, device=boxes.device).reshape(-1, 4)
    if not len(regions):
        return torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    return (pairwise_ioa(Boxes(regions), Boxes(boxes)) >= COVERED).any(dim=0)


class _DenseLosses:
    """`losses` of a RetinaNet or FCOS on what its logits show."""

    def __init__(self, model: Any, masks: ClassMasks) -> None:
        self._model, self._masks = model, masks

    def __call__(self, anchors: list[Boxes], logits: list[Tensor], labels: list[Tensor], *others: Any) -> Any:
        if self._masks.hides:
            places = Boxes.cat(anchors).tensor
            hidden = self._masks.find_hidden(labels, [places] * len(labels), logits[0].shape[-1])
            sizes = [of_level.shape[1] for of_level in logits]
            by_level = hidden.reshape(len(labels), len(places), -1).split(sizes, dim=1)
            logits = [of_level.masked_fill(mask, HIDDEN) for of_level, mask in zip(logits, by_level, strict=True)]

        return type(self._model).losses(self._model, anchors, logits, labels, *others)


class _RoiLosses:
    """`losses` of the predictor of an R-CNN on what its logits show; that of the background is never hidden."""

    def __init__(self, predictor: Any, masks: ClassMasks) -> None:
        self._predictor, self._masks = predictor, masks

    def __call__(self, predictions: tuple[Tensor, Tensor], proposals: list[Any]) -> Any:
        if self._masks.hides:
            logits, deltas = predictions
            labels = [of_image.gt_classes for of_image in proposals]
            boxes = [of_image.proposal_boxes.tensor for of_image in proposals]
            hidden = self._masks.find_hidden(labels, boxes, logits.shape[-1] - 1)
            hidden = nn.functional.pad(hidden, (0, 1), value=False)
            predictions = (logits.masked_fill(hidden, HIDDEN), deltas)

        return type(self._predictor).losses(self._predictor, predictions, proposals)


class _RpnLosses:
    """`losses` of an RPN without the negatives in ignored boxes."""

    def __init__(self, rpn: Any, masks: ClassMasks) -> None:
        self._rpn, self._masks = rpn, masks

    def __call__(self, anchors: list[Boxes], logits: list[Tensor], labels: list[Tensor], *others: Any) -> Any:
        if self._masks.hides:
            places = Boxes.cat(anchors).tensor
            ignored = self._masks.find_ignored(labels, [places] * len(labels), 0)
            labels = [of_image.masked_fill(mask, -1) for of_image, mask in zip(labels, ignored, strict=True)]

        return type(self._rpn).losses(self._rpn, anchors, logits, labels, *others)


# The parts of a detector that compute losses of objects and background.
_WRAPPERS: dict[type[nn.Module], Any] = {DenseDetector: _DenseLosses, FastRCNNOutputLayers: _RoiLosses, RPN: _RpnLosses}


def mask_classes(model: nn.Module) -> bool:
    """Let the losses of a detectron2 RetinaNet, FCOS or R-CNN leave out what the records of a batch do not annotate.

    bnext's architectures and its trainer have it done. Nothing changes for records without `annotated_classes` and
    `ignored_boxes`: losses are bitwise detectron2's.

    Args:
        model: whose losses are hidden from; a second call changes nothing.

    Returns:
        Whether the model has such losses.

    Note:
        Puts a `losses` of its own in the place of the method, on this model alone. Only in training mode, in which
        detectors compute losses.
    """
    if not _has_classes(model):
        return False

    owners = [part for part in model.modules() if isinstance(part, tuple(_WRAPPERS)) and hasattr(part, "losses")]
    if not any("losses" in vars(owner) for owner in owners):
        masks = ClassMasks(model)
        for owner in owners:
            wrapper = next(wrapper for kind, wrapper in _WRAPPERS.items() if isinstance(owner, kind))
            vars(owner)["losses"] = wrapper(owner, masks)
    return True


def _has_classes(model: nn.Module) -> bool:
    """Whether a detector has a classification loss that can be masked."""
    kinds = (DenseDetector, FastRCNNOutputLayers)
    return any(isinstance(part, kinds) and hasattr(part, "losses") for part in model.modules())


def check_maskable(cfg: CfgNode, model: nn.Module) -> None:
    """Refuse to train a model whose losses cannot be masked on sets that do not annotate all of its classes.

    Args:
        cfg: see `bnext.data.classes.find_partial_sets`.
        model: on which `mask_classes` was called.

    Raises:
        ConfigError: names the sets.
    """
    partial = find_partial_sets(cfg)
    if partial and not _has_classes(model):
        sets = list_few(map(repr, partial))
        raise _NOT_MASKABLE.of(cfg.MODEL.META_ARCHITECTURE, f"{sets} annotate a part of the classes")
