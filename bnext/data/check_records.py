"""Checks of a set that is registered as a function which returns records: those of `check_objects` and `check_images`.

A record has no file in which its annotations have ids: they are named by their picture and place.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode

from bnext.data.check_images import Pictures, check_files, check_sizes, read_side
from bnext.data.check_objects import Fault, Notice, Objects, Task, check_objects, read_boxes
from bnext.data.records import Record, check_records_are_dicts, read_registered
from bnext.errors import list_few

__all__ = ["check_records"]

_MODES = (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)
_ROTATED = BoxMode.XYWHA_ABS


def check_records(name: str, task: Task, *, check_images: bool) -> Iterator[Fault | Notice]:
    """Faults of the records of a registered set.

    Args:
        name: of the set; its function is called once.
        task: what the model wants of it.
        check_images: look for the files, too.

    Raises:
        DatasetError: it gives no records.
    """
    records = read_registered(name)
    if not isinstance(records, (list, tuple)):
        return  # a torch Dataset, say, which may make its records as they are asked for
    check_records_are_dicts(name, records)

    yield from _find_records_without_annotations(records, task)
    pictures = yield from _read_pictures(records)
    yield from check_sizes(pictures, task)

    objects = yield from _read_objects(name, records, pictures, task)
    if len(objects):
        yield from check_objects(objects, task)

    without = [index for index, record in enumerate(records) if "file_name" not in record]
    if without and len(without) < len(records):  # else a mapper of the user's own reads the pictures
        got = f"none in {len(without)} of {len(records)}: {list_few([_name(records, index) for index in without])}"
        yield Fault("The records", "have a file_name", got)

    if check_images and not without:
        yield from check_files(pictures, task)


def _find_records_without_annotations(records: Sequence[Record], task: Task) -> Iterator[Fault]:
    without = [index for index, record in enumerate(records) if not isinstance(record.get("annotations"), list)]
    is_semantic = all("sem_seg_file_name" in record for record in records)

    if task.is_training and without and not is_semantic:
        yield Fault(
            "The records",
            "have a list `annotations`, be it empty",
            f"none in {len(without)} of {len(records)}: {list_few([_name(records, index) for index in without])}",
        )
    if task.is_training and not is_semantic and not any(record["annotations"] for record in records):
        yield Fault("The annotations", "not be empty", "none")


def _name(records: Sequence[Record], index: int) -> str:
    return str(records[index].get("file_name", f"record {index}"))


def _read_pictures(records: Sequence[Record]) -> Any:
    sizes = np.full((len(records), 2), np.nan)

    for index, record in enumerate(records):
        for place, key in enumerate(("width", "height")):
            value = record.get(key)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
                got = f"{key} {value!r} in {_name(records, index)}"
                yield Fault("The width and height of records", "be numbers", got)
                continue
            sizes[index, place] = read_side(value)  # type: ignore[arg-type]

    return Pictures("", tuple(_name(records, index) for index in range(len(records))), sizes)


def _read_objects(name: str, records: Sequence[Record], pictures: Pictures, task: Task) -> Any:
    ids, owners, annotations = [], [], []
    for index, record in enumerate(records):
        for place, annotation in enumerate(record.get("annotations") or []):
            ids.append(f"{place} of {pictures.file_names[index]}")
            owners.append(index)
            annotations.append(annotation)

    yield from _find_missing_keys(annotations, ids)
    yield from _find_odd_modes(annotations, ids)
    yield from _find_odd_categories(name, annotations, ids, task)

    boxes = read_boxes([_take_box(annotation) for annotation in annotations], ids)
    if isinstance(boxes, Fault):
        yield boxes
        boxes = np.zeros((len(annotations), 4))

    modes = np.array([annotation["bbox_mode"] for annotation in annotations], dtype=np.int64)
    boxes[modes == BoxMode.XYXY_ABS, 2:] -= boxes[modes == BoxMode.XYXY_ABS, :2]
    boxes[modes == _ROTATED] = np.nan

    return Objects(
        ids=ids,
        pictures=np.array(owners, dtype=np.int64),
        sizes=pictures.sizes,
        boxes=boxes,
        is_xywh=bool((modes == BoxMode.XYWH_ABS).all()),
        is_filtered=False,
        iscrowd=[annotation.get("iscrowd", 0) for annotation in annotations],
        segmentations=[annotation.get("segmentation") for annotation in annotations],
        keypoints=[annotation.get("keypoints") for annotation in annotations],
    )


def _take_box(annotation: dict[str, Any]) -> Any:
    """The four numbers of a box, without the angle of a rotated one."""
    box = annotation["bbox"]
    if isinstance(box, (np.ndarray, tuple)):
        box = list(box)
    return box[:4] if annotation["bbox_mode"] == _ROTATED and isinstance(box, list) else box


def _find_missing_keys(annotations: Sequence[Any], ids: Sequence[str]) -> Iterator[Fault]:
    for annotation, name in zip(annotations, ids, strict=True):
        keys = ("bbox", "bbox_mode", "category_id")
        missing = [key for key in keys if not isinstance(annotation, dict) or key not in annotation]
        if missing:
            yield Fault("Every annotation", f"have {', '.join(keys)}", f"no {missing[0]} in annotation {name}")
            return


def _find_odd_modes(annotations: Sequence[dict[str, Any]], ids: Sequence[str]) -> Iterator[Fault]:
    for annotation, name in zip(annotations, ids, strict=True):
        mode = annotation["bbox_mode"]
        if not isinstance(mode, (int, np.integer)) or mode not in (*_MODES, _ROTATED):
            yield Fault(
                "The bbox_mode of annotations",
                "be BoxMode.XYXY_ABS, XYWH_ABS or XYWHA_ABS, of boxes in pixels",
                f"{mode!r} in annotation {name}",
                remedy="Write boxes in pixels, and a member of detectron2.structures.BoxMode.",
            )
            return


def _find_odd_categories(
    name: str, annotations: Sequence[dict[str, Any]], ids: Sequence[str], task: Task
) -> Iterator[Fault]:
    classes = MetadataCatalog.get(name).get("thing_classes")
    number = task.num_classes if classes is None else len(classes)
    said = "NUM_CLASSES of the model" if classes is None else "`thing_classes` in the set's metadata"

    if classes is not None and task.num_classes is not None and len(classes) > task.num_classes:
        yield Fault(
            "The thing_classes",
            f"be at most the {task.num_classes} classes of the model",
            str(len(classes)),
            remedy="Set MODEL.*.NUM_CLASSES of the head in use to the number of classes.",
        )

    for annotation, label in zip(annotations, ids, strict=True):
        try:
            category = operator.index(annotation["category_id"])
        except TypeError:
            category = -1
        if category < 0 or (number is not None and category >= number):
            last = "" if number is None else f" to {number - 1}, below the {number} of {said}"
            yield Fault(
                "The category_id of annotations",
                f"be a whole number from 0{last}",
                f"{annotation['category_id']!r} in annotation {label}",
                remedy="Number the classes from 0, in the order of thing_classes.",
            )
            return
