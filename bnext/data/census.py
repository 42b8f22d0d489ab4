"""Numbers of a data set, as detectron2 reads it: images, objects, categories and sizes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from detectron2.structures import BoxMode

from bnext.data.records import Record

__all__ = ["Census", "count_records"]

# COCO's, in pixels; here of the box, as every set has one.
_SIZES = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, float("inf"))}


@dataclass(frozen=True)
class Census:
    """Numbers of a data set.

    Args:
        num_images, num_empty: images, and those without an object that is trained on.
        num_objects, num_crowds: objects, and how many more stand for crowds.
        num_masks, num_keypoints: objects that have such.
        smallest, largest: sides of images, width x height, by area; "": the records do not have them.
        sizes: small, medium and large -> objects, by the area of their boxes.
        categories: index of a class -> objects, and images that have some.
    """

    num_images: int
    num_empty: int
    num_objects: int
    num_crowds: int
    num_masks: int
    num_keypoints: int
    smallest: str
    largest: str
    sizes: dict[str, int]
    categories: dict[int, tuple[int, int]]


def count_records(records: Sequence[Record]) -> Census:
    """The numbers of records."""
    kept, images_of = [], Counter[int]()
    num_empty = num_crowds = 0

    for record in records:
        annotations = record.get("annotations") or []
        objects = [annotation for annotation in annotations if not annotation.get("iscrowd")]
        kept += objects
        num_crowds += len(annotations) - len(objects)
        num_empty += not objects
        images_of.update({int(annotation["category_id"]) for annotation in objects})

    areas = np.array([_measure(annotation) for annotation in kept])
    counts = Counter(int(annotation["category_id"]) for annotation in kept)
    sides = sorted((r["width"] * r["height"], f"{r['width']} x {r['height']}") for r in records if r.get("width"))
    return Census(
        num_images=len(records),
        num_empty=num_empty,
        num_objects=len(kept),
        num_crowds=num_crowds,
        num_masks=sum(bool(annotation.get("segmentation")) for annotation in kept),
        num_keypoints=sum(bool(annotation.get("keypoints")) for annotation in kept),
        smallest=sides[0][1] if sides else "",
        largest=sides[-1][1] if sides else "",
        sizes={name: int(((areas >= low) & (areas < high)).sum()) for name, (low, high) in _SIZES.items()},
        categories={number: (counts[number], images_of[number]) for number in sorted(counts)},
    )


def _measure(annotation: Record) -> float:
    """Area of a box."""
    a, b, c, d = (float(value) for value in annotation["bbox"][:4])
    return (c - a) * (d - b) if annotation["bbox_mode"] == BoxMode.XYXY_ABS else c * d
