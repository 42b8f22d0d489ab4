"""The ground truth that COCO's evaluation compares with: read from a set, mended where pycocotools would misread it.

What is mended is the copy in memory that the evaluator gets; no file is written. Nothing is changed that says where an
object is, what it is, or whether it counts.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import pycocotools.mask as coco_mask
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from bnext.data.check_coco import EVALUATORS
from bnext.data.check_objects import has_corners
from bnext.data.classes import IGNORED, LEFT_OUT, rename_categories
from bnext.data.records import Record
from bnext.errors import DatasetError, Refusal, list_few
from bnext.garbage import without_collection
from bnext.notices import tell_once
from bnext.numbers import is_number

__all__ = [
    "convert_records",
    "draw_mask",
    "is_crowd",
    "join_categories",
    "mend",
    "name_file",
    "read_ground_truth",
]

Content = dict[str, Any]
Annotation = dict[str, Any]

_INVALID = Refusal(
    DatasetError,
    "The annotations of data set {name!r}",
    "have {rule}",
    "Correct the annotations, or leave these objects out.",
)
_LARGEST_AREA = 1e10  # pycocotools leaves out what is larger


@without_collection()
def read_ground_truth(name: str, records: Iterable[Record]) -> Content:
    """Images, annotations and categories of a set, in COCO's format.

    Args:
        name: of a registered set.
        records: of the set, for one that has no annotation file.
    """
    metadata = MetadataCatalog.get(name)
    json_file = metadata.get("json_file")
    if not json_file or metadata.get("evaluator_type", "coco") not in EVALUATORS:
        return convert_records(name, records)

    with open(PathManager.get_local_path(str(json_file)), encoding="utf-8-sig") as file:
        content: Content = json.load(file)
    return content


def name_file(name: str) -> str:
    """The annotation file of a registered set, for messages."""
    return str(MetadataCatalog.get(name).get("json_file") or "registered as a function")


def convert_records(name: str, records: Iterable[Record]) -> Content:
    """A set that was registered as a function, in COCO's format; the category of class index i has the id i.

    Args:
        name: of a registered set, whose metadata name its `thing_classes`.
        records: Detectron2's; left as they are.

    Raises:
        DatasetError: the classes have no names, or a record is not of Detectron2's form.
    """
    classes = MetadataCatalog.get(name).get("thing_classes")
    if classes is None:
        remedy = f"Write MetadataCatalog.get({name!r}).thing_classes = [...] where it is registered."
        raise DatasetError.of(f"Data set {name!r}", "name its thing_classes", got="none", remedy=remedy)

    images: list[Content] = []
    annotations: list[Annotation] = []
    for record in records:
        try:
            number = record["image_id"]
            sizes = {"height": int(record["height"]), "width": int(record["width"])}
            images.append({"id": number, "file_name": str(record.get("file_name", "")), **sizes})
            for each in record.get("annotations", ()):
                annotations.append({"id": len(annotations) + 1, "image_id": number, **_convert(each)})
        except (KeyError, TypeError, ValueError, AssertionError, NotImplementedError) as error:
            where = str(record.get("file_name") or record.get("image_id"))
            rule, got = "be of Detectron2's form to be evaluated", f"{type(error).__name__}: {error}"
            remedy = "Give it image_id, height, width, and annotations with bbox, bbox_mode and category_id."
            raise DatasetError.of(f"A record of {name!r}", rule, got=got, where=where, remedy=remedy) from error

    categories = [{"id": index, "name": str(each)} for index, each in enumerate(classes)]
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


def _convert(annotation: Mapping[str, Any]) -> Annotation:
    """An annotation of Detectron2 in COCO's format."""
    box = [float(number) for number in annotation["bbox"]]
    if len(box) != 4:
        raise ValueError(f"a bbox of {len(box)} numbers, where COCO's evaluation takes 4")

    converted = {
        "bbox": [float(number) for number in BoxMode.convert(box, annotation["bbox_mode"], BoxMode.XYWH_ABS)],
        "category_id": int(annotation["category_id"]),
        "iscrowd": annotation.get("iscrowd", 0),
    }
    if annotation.get("segmentation") is not None:
        converted["segmentation"] = annotation["segmentation"]
    if annotation.get("keypoints") is not None:
        points = np.array(annotation["keypoints"], dtype=float).reshape(-1, 3)
        points[:, :2] -= 0.5  # Detectron2's are at the middle of a pixel, COCO's its index
        converted["keypoints"] = points.flatten().tolist()
    return converted


def _name_categories(name: str, content: Content) -> dict[Any, str]:
    """Category id -> name of its class, in the order of the ids, as Detectron2's metadata of the set have it."""
    metadata = MetadataCatalog.get(name)
    places, classes = metadata.get("thing_dataset_id_to_contiguous_id"), metadata.get("thing_classes")
    names = {category["id"]: str(category["name"]) for category in content["categories"]}

    for number in names:
        if places is not None and classes is not None and number in places and places[number] < len(classes):
            names[number] = str(classes[places[number]])
    return {number: names[number] for number in sorted(names)}


def join_categories(cfg: CfgNode, name: str, content: Content) -> dict[Any, str]:
    """The categories of a set as the model's classes are called, those that are one class joined, in place.

    Objects of categories that are none of the classes go. A region of an object that may be of any class becomes a
    crowd of each: a detection in it does not count.

    Args:
        cfg: DATASETS.BNEXT.CLASS_MAP is read; a set that it does not name stays as it is.
        name: of the set.
        content: of its annotation file, in memory.

    Returns:
        Category id -> name; a class of several categories has the id of the first.
    """
    names = _name_categories(name, content)
    classes = dict(zip(names, rename_categories(cfg, name, names.values()), strict=True))
    if classes == names:
        return names

    first: dict[str, Any] = {}
    for number, kind in classes.items():
        if kind not in (LEFT_OUT, IGNORED):
            first.setdefault(kind, number)

    given = [each.get("id") for each in content.get("annotations", ())]
    unused = itertools.count(1 + max((number for number in given if isinstance(number, int)), default=0))
    annotations: list[Annotation] = []
    for annotation in content.get("annotations", ()):
        kind = classes.get(annotation["category_id"], LEFT_OUT)
        if kind == IGNORED:
            for number in first.values():
                annotations.append({**annotation, "id": next(unused), "category_id": number, "iscrowd": 1})
        elif kind != LEFT_OUT:
            annotations.append({**annotation, "category_id": first[kind]})

    if "annotations" in content:
        content["annotations"] = annotations
    content["categories"] = [{"id": number, "name": kind} for kind, number in first.items()]
    return {number: kind for kind, number in first.items()}


def is_crowd(annotation: Mapping[str, Any]) -> bool:
    """Whether an annotation is a region of many objects, which does not count; without `iscrowd` it is not."""
    return bool(annotation.get("iscrowd"))


def mend(name: str, content: Content, *, keypoints: int | None = None) -> None:
    """Put right what pycocotools would misread or fail at, in place, and say so once.

    Args:
        name: of the set.
        content: of its annotation file, in memory.
        keypoints: of an object, where they are evaluated.

    Raises:
        DatasetError: an annotation cannot be evaluated and cannot be mended.
    """
    annotations: list[Annotation] = content.get("annotations", [])
    content.setdefault("info", {})
    _refuse_invalid(name, annotations)

    mended: dict[str, int] = {}
    for rule, repair in _REPAIRS.items():
        number = sum(repair(annotation) for annotation in annotations)
        if number:
            mended[rule] = number
    if keypoints is not None:
        _complete_keypoints(annotations, keypoints)

    ids = [annotation.get("id") for annotation in annotations]
    if not _are_good_ids(ids):
        # pycocotools takes an object with the id 0 for one that nothing has found, and looks up objects by their ids.
        for number, annotation in enumerate(annotations, start=1):
            annotation["id"] = number
        mended["ids that are 0, words, missing or repeated: numbered anew"] = len(ids)

    if mended:
        words = "; ".join(f"{rule} ({number} of {len(annotations)} annotations)" for rule, number in mended.items())
        message = "The evaluation on data set '%s' mends its copy of the annotations: %s. The file stays as it is."
        tell_once(logging.getLogger(__name__), (name, words), message, name, words)


def _refuse_invalid(name: str, annotations: Iterable[Annotation]) -> None:
    """Refuse what can neither be evaluated nor mended."""
    for rule, is_valid in _RULES.items():
        culprits = [annotation for annotation in annotations if not is_valid(annotation)]
        if culprits:
            key = rule.split()[0]
            shown = list_few(f"{each.get(key)!r} in annotation {each.get('id')!r}" for each in culprits)
            raise _INVALID.of(shown, name_file(name), name=name, rule=rule)


def _has_box(annotation: Annotation) -> bool:
    box = annotation.get("bbox")
    return isinstance(box, (list, tuple)) and len(box) == 4 and all(map(is_number, box))


_RULES: dict[str, Callable[[Annotation], bool]] = {
    "bbox of four finite numbers": _has_box,
    "iscrowd of 0 or 1": lambda annotation: annotation.get("iscrowd") in (None, 0, 1),
}


def _set_crowd(annotation: Annotation) -> bool:
    has_crowd = annotation.get("iscrowd") is not None
    annotation["iscrowd"] = int(annotation.get("iscrowd") or 0)
    return not has_crowd


def _set_area(annotation: Annotation) -> bool:
    """An area that is none becomes that of the mask or, without one, of the box; it decides on the size class alone."""
    area: Any = annotation.get("area")
    _, _, width, height = annotation["bbox"]
    is_area = is_number(area) and 0 <= area <= _LARGEST_AREA
    if is_area and (area > 0 or width * height <= 0):
        return False

    annotation["area"] = _measure_mask(annotation.get("segmentation")) or max(0.0, float(width * height))
    return True


def _measure_mask(segmentation: Any) -> float:
    """The area in pixels; 0: there is no mask that can be measured."""
    if isinstance(segmentation, dict):
        try:
            return float(coco_mask.area(_compress(segmentation)))
        except (KeyError, TypeError, ValueError):
            return 0.0

    total = 0.0
    for polygon in segmentation or ():
        if isinstance(polygon, (list, tuple)) and has_corners(polygon):
            x, y = np.array(polygon, dtype=float).reshape(-1, 2).T
            total += 0.5 * abs(float(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))))
    return total


_REPAIRS: dict[str, Callable[[Annotation], bool]] = {
    "iscrowd that is missing or null: 0": _set_crowd,
    "an area that is missing or none: that of mask or box": _set_area,
}


def _are_good_ids(ids: list[Any]) -> bool:
    return all(type(number) is int and number != 0 for number in ids) and len(set(ids)) == len(ids)


def _complete_keypoints(annotations: Iterable[Annotation], number: int) -> None:
    """An object without keypoints has none that are visible, as in COCO's files, and does not count for them."""
    for annotation in annotations:
        points = annotation.setdefault("keypoints", [0] * (3 * number)) or [0] * (3 * number)
        annotation["keypoints"] = points
        if not isinstance(annotation.get("num_keypoints"), int):
            annotation["num_keypoints"] = sum(visible > 0 for visible in points[2::3])


def _compress(segmentation: Mapping[str, Any]) -> Any:
    """Run lengths in the form that pycocotools computes with."""
    if isinstance(segmentation["counts"], list):
        return coco_mask.frPyObjects(segmentation, *segmentation["size"])
    return segmentation


def draw_mask(annotation: Mapping[str, Any], height: int, width: int) -> np.ndarray:
    """The mask of an object as pixels [H, W] of 0 and 1.

    Raises:
        ValueError: it has none, or one of another size.
    """
    segmentation = annotation.get("segmentation")
    if not segmentation:
        raise ValueError("no mask")

    if isinstance(segmentation, dict):
        if list(segmentation.get("size", ())) != [height, width]:
            raise ValueError(f"a mask of {segmentation.get('size')} in an image of {[height, width]}")
        return coco_mask.decode(_compress(segmentation))

    if not all(map(has_corners, segmentation)):
        raise ValueError("a polygon of fewer than 3 corners")
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width)))
