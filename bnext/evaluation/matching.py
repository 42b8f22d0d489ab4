"""Detections of one image matched with its objects by COCO's rules, and what each detection is: right, or which error.

Pure arithmetic on boxes; nothing is drawn or read here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pycocotools.mask as coco_mask

from bnext.errors import ConfigError

__all__ = ["BACKGROUND_IOU", "OUTCOMES", "Matches", "count_outcomes", "match_detections"]

OUTCOMES = {
    "right": "right",
    "wrong_class": "wrong class",
    "duplicate": "duplicate",
    "badly_placed": "badly placed",
    "background": "background",
    "missed": "missed object",
}  # name -> words
BACKGROUND_IOU = 0.1  # what overlaps every object by less is background
_IGNORED = "ignored"


@dataclass(frozen=True)
class Matches:
    """Outcomes of the detections of an image, and which objects are found.

    Args:
        outcomes: of each detection one of `OUTCOMES` but "missed"; or "ignored", which counts neither way: it lies in
            a crowd region of its class, or is one of more detections of a class than COCO takes.
        objects: of each detection the index of the object that it is compared with: the one that it finds, the taken
            one of a duplicate, or the one that it overlaps most; -1: background.
        missed: of each object whether it counts and nothing has found it.
    """

    outcomes: tuple[str, ...]
    objects: np.ndarray
    missed: np.ndarray


def match_detections(
    boxes: np.ndarray,
    classes: np.ndarray,
    scores: np.ndarray,
    object_boxes: np.ndarray,
    object_classes: np.ndarray,
    is_crowd: np.ndarray,
    *,
    iou: float = 0.5,
    most: int = 100,
) -> Matches:
    """Match as COCO's evaluation does, class by class, and tell the errors apart.

    In the order of its score each detection takes the free object of its class that it overlaps most, by `iou` or
    more; where there is none, a crowd region of its class that it lies in. What has taken an object is right. Of the
    others the first that holds:

        duplicate      an object of its class, which another has taken, is overlapped by `iou` or more
        wrong class    an object of another class is
        badly placed   an object of any class is overlapped by BACKGROUND_IOU or more
        background     none is

    Args:
        boxes [N, 4], object_boxes [M, 4]: x, y, width, height.
        classes [N], object_classes [M]: anything that can be compared.
        scores [N]: higher ones first; equal ones in their order.
        is_crowd [M]: regions of many objects; the overlap with one is the share of the detection in it.
        iou: above 0, at most 1.
        most: detections of a class; others are ignored.

    Note:
        Leaving out detections below a score changes nothing of those above it.

    Source:
        COCO's rules as pycocotools has them (COCOeval.evaluateImg); kinds of errors after Bolya et al., *TIDE: A
        General Toolbox for Identifying Object Detection Errors*, 2020, of which "localization" and "both" are one.
    """
    _check_iou(iou)
    num_detections, num_objects = len(boxes), len(object_boxes)
    crowds, order = np.asarray(is_crowd, dtype=bool), np.argsort(-np.asarray(scores), kind="stable")

    overlaps = _measure_overlaps(boxes, object_boxes, crowds)

    outcomes = [""] * num_detections
    objects = np.full(num_detections, -1)
    is_taken = np.zeros(num_objects, dtype=bool)
    num_seen: dict[object, int] = {}

    for index in order:
        label = classes[index]
        num_seen[label] = num_seen.get(label, 0) + 1
        if num_seen[label] > most:
            outcomes[index] = _IGNORED
            continue

        of_class = np.asarray(object_classes == label).reshape(num_objects)
        for outcome, candidates in (("right", of_class & ~crowds & ~is_taken), (_IGNORED, of_class & crowds)):
            best = _find_largest(overlaps[index], candidates)
            if best >= 0 and overlaps[index, best] >= min(iou, 1 - 1e-10):
                outcomes[index], objects[index] = outcome, best
                is_taken[best] |= outcome == "right"
                break
        else:
            outcomes[index], objects[index] = _tell_error(overlaps[index], of_class, crowds, iou)

    return Matches(tuple(outcomes), objects, ~is_taken & ~crowds)


def _check_iou(iou: float) -> None:
    if not 0 < iou <= 1:
        raise ConfigError.of("iou", "be above 0 and at most 1", got=iou, remedy="Use 0.5, or 0.75 for strict ones.")


def _measure_overlaps(boxes: np.ndarray, object_boxes: np.ndarray, crowds: np.ndarray) -> np.ndarray:
    """[N, M], the numbers that COCO's evaluation compares, to the last bit."""
    if not len(boxes) or not len(object_boxes):
        return np.zeros((len(boxes), len(object_boxes)))
    both = [np.asarray(each, dtype=np.float64).reshape(-1, 4) for each in (boxes, object_boxes)]
    overlaps: np.ndarray = coco_mask.iou(*both, [int(each) for each in crowds])
    return overlaps


def _find_largest(overlaps: np.ndarray, candidates: np.ndarray) -> int:
    """The candidate with the largest overlap, of equal ones the last as in pycocotools; -1: there is no candidate."""
    if not candidates.any():
        return -1
    places = np.flatnonzero(candidates)
    return int(places[len(places) - 1 - np.argmax(overlaps[places][::-1])])


def _tell_error(overlaps: np.ndarray, of_class: np.ndarray, crowds: np.ndarray, iou: float) -> tuple[str, int]:
    for outcome, candidates, least in (
        ("duplicate", of_class & ~crowds, iou),  # free ones have been offered
        ("wrong_class", ~of_class & ~crowds, iou),
        ("badly_placed", ~crowds, BACKGROUND_IOU),
    ):
        best = _find_largest(overlaps, candidates)
        if best >= 0 and overlaps[best] >= least:
            return outcome, best
    return "background", -1


def count_outcomes(matches: Sequence[Matches]) -> dict[str, int]:
    """The number of detections of each outcome, and of missed objects, in images; see `OUTCOMES`."""
    counts = dict.fromkeys(OUTCOMES, 0)
    for image in matches:
        for outcome in image.outcomes:
            if outcome in counts:
                counts[outcome] += 1
        counts["missed"] += int(image.missed.sum())
    return counts
