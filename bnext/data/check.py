"""Checks COCO-format data sets before training starts: what is missing, broken or contradicts itself.

Works from the metadata of registered sets; each annotation file is read once per process. Pictures are looked
for in a listing of their folder, not opened.
"""

from __future__ import annotations

import difflib
import gc
import json
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

from bnext.data.digits import FOLDER
from bnext.errors import DatasetError

__all__ = ["check_datasets", "check_registered"]

logger = logging.getLogger(__name__)

COCO_EVALUATORS = ("coco", "coco_panoptic_seg")  # other kinds (LVIS, Cityscapes) have formats of their own
NAMED = 3  # how many culprits a message names
REQUIRED: dict[str, dict[str, type | tuple[type, ...]]] = {
    "images": {"id": (int, str), "file_name": str, "height": (int, float), "width": (int, float)},
    "annotations": {"id": (int, str), "image_id": (int, str), "category_id": int, "bbox": list},
    "categories": {"id": int, "name": str},
}


@dataclass(frozen=True)
class _Contents:
    """What the later checks need of an annotation file that is consistent in itself."""

    categories: tuple[str, ...]
    file_names: tuple[str, ...]
    num_annotations: int | None  # None: the file has no list of annotations, as those of test sets
    num_boxes: int  # annotations that can be trained on: no crowd, a box with an area


@dataclass(frozen=True)
class _Subject:
    """The set that is being checked, for the messages."""

    name: str
    json_file: str
    image_root: str

    def fault(self, thing: str, rule: str, got: str, where: str = "", remedy: str = "") -> DatasetError:
        return DatasetError(
            f"{thing} of data set '{self.name}' must {rule}; got {got} ({where or self.json_file}). "
            f"{remedy or self.remedy()}"
        )

    def remedy(self) -> str:
        folder = os.path.dirname(os.path.dirname(self.json_file))
        if self.name.startswith("digits_") and os.path.basename(folder) == FOLDER:
            root = os.path.dirname(folder) or "."
            overwrite = " --overwrite" if os.path.lexists(folder) else ""
            return f"Run `python datasets/prepare_digits.py {root}{overwrite}`."
        if "coco" in self.name:
            return "Download it again or set DETECTRON2_DATASETS to the folder of `coco`; see datasets/README.md."
        return "Correct the file, or the path that the set was registered with."


_contents: dict[tuple[str, int, int], _Contents] = {}  # by path, time and size of the annotation file


def check_datasets(
    names: Sequence[str], *, num_classes: int | None = None, check_images: bool = True, training: bool = True
) -> None:
    """Check that registered COCO-format sets are there, whole, and fit the model.

    Args:
        names: names of registered sets; those without COCO annotations are passed over.
        num_classes: classes that the model's head predicts; None leaves the number of categories unchecked.
        check_images: look for every image file as well.
        training: the sets are trained on, so at least one annotation has to be left after Detectron2's filtering.

    Raises:
        DatasetError: names the set, the file and the remedy.

    Note:
        Boxes without area are no error (COCO 2017 has one): Detectron2 leaves them out, and they are logged.
        One worker is enough to check. COCO 2017's training set takes about as long as parsing its 450 MB of JSON.
    """
    for name in names:
        subject = _find(name)
        if subject is None:
            continue
        contents = _read_contents(subject)
        _check_classes(subject, contents, num_classes)
        _check_not_empty(subject, contents, training)
        if check_images and "://" not in subject.image_root:
            _check_images(subject, contents.file_names)


def check_registered(name: str) -> None:
    """Raise DatasetError, with the nearest names, unless a data set of that name is registered."""
    if name in DatasetCatalog:
        return
    near = difflib.get_close_matches(name, DatasetCatalog.list(), n=3, cutoff=0.5)
    raise DatasetError.of(
        "A data set",
        "be registered",
        got=f"'{name}', which is not",
        where=f"nearest: {', '.join(near)}" if near else "no name is near",
        remedy="Correct DATASETS.TRAIN and DATASETS.TEST, or import the module that registers it.",
    )


def _find(name: str) -> _Subject | None:
    """The set of that name; None when it has no COCO annotations."""
    check_registered(name)
    metadata = MetadataCatalog.get(name)
    json_file = metadata.get("json_file")
    if not json_file or metadata.get("evaluator_type") not in COCO_EVALUATORS:
        return None
    return _Subject(name, str(json_file), str(metadata.get("image_root") or ""))


def _read_contents(subject: _Subject) -> _Contents:
    path = PathManager.get_local_path(subject.json_file)
    try:
        status = os.stat(path)
        key = (os.path.abspath(path), status.st_mtime_ns, status.st_size)
        if key not in _contents:
            _contents[key] = _check_contents(subject, _load_json(path))
        return _contents[key]
    except FileNotFoundError:
        raise subject.fault("The annotation file", "exist", "no such file") from None
    except json.JSONDecodeError as error:
        found = f"{error.msg} at line {error.lineno} column {error.colno}, character {error.pos} of {len(error.doc)}"
        raise subject.fault("The annotation file", "be whole JSON", found) from None
    except UnicodeDecodeError as error:
        raise subject.fault("The annotation file", "be JSON in UTF-8", f"another byte at {error.start}") from None
    except OSError as error:
        raise subject.fault("The annotation file", "be readable", error.strerror or str(error)) from None


def _load_json(path: str) -> Any:
    """Parse without garbage collection: nothing of the file is garbage, and COCO's takes half the time."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    finally:
        if collecting:
            gc.enable()


def _check_contents(subject: _Subject, content: Any) -> _Contents:
    lists = _check_format(subject, content)
    for key in REQUIRED:
        if not (key == "annotations" and "minival" in subject.json_file):  # COCO 2014's are known to repeat ids
            _check_unique(subject, key, [entry["id"] for entry in lists[key]])
    annotations = lists["annotations"]
    images = {image["id"] for image in lists["images"]}
    categories = {category["id"]: category["name"] for category in lists["categories"]}
    strangers = [a["id"] for a in annotations if a["image_id"] not in images]
    if strangers:
        raise subject.fault("Annotations", "belong to an image of the file", f"others: ids {_few(strangers)}")
    outside = sorted({str(a["category_id"]) for a in annotations if a["category_id"] not in categories})
    if outside:
        raise subject.fault(
            "The category_id of annotations",
            f"be one of the {len(categories)} categories ({_few(sorted(categories))})",
            _few(outside),
        )
    return _Contents(
        categories=tuple(str(categories[key]) for key in sorted(categories)),
        file_names=tuple(image["file_name"] for image in lists["images"]),
        num_annotations=len(annotations) if "annotations" in content else None,
        num_boxes=_count_boxes(subject, annotations),
    )


def _check_format(subject: _Subject, content: Any) -> dict[str, list[dict]]:
    """The three lists of a COCO file, every entry with the keys that are read; no annotations are an empty list."""
    if not isinstance(content, dict):
        raise subject.fault("The annotation file", "be in COCO format", f"a JSON {type(content).__name__}")
    lists: dict[str, list[dict]] = {"annotations": []}
    for key, required in REQUIRED.items():
        if key not in content:
            if key == "annotations":
                continue
            raise subject.fault("The annotation file", f"be in COCO format with a list '{key}'", "none")
        entries = content[key]
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise subject.fault("The annotation file", f"hold a list of objects '{key}'", "something else")
        for name, kinds in required.items():
            wrong = next((i for i, entry in enumerate(entries) if not isinstance(entry.get(name), kinds)), None)
            if wrong is not None:
                found = f"{entries[wrong].get(name, 'none')!r} in entry {wrong}"
                raise subject.fault(f"Every entry of '{key}'", f"have a valid '{name}'", found)
        lists[key] = entries
    if not lists["images"] or not lists["categories"]:
        raise subject.fault("The annotation file", "list images and categories", "an empty list")
    return lists


def _check_unique(subject: _Subject, key: str, ids: list) -> None:
    if len(set(ids)) == len(ids):
        return
    seen: set = set()
    twice = [one for one in ids if one in seen or seen.add(one)]
    raise subject.fault(f"The ids of '{key}'", "be unique", f"{_few(twice)} more than once")


def _count_boxes(subject: _Subject, annotations: list[dict]) -> int:
    """Annotations that can be trained on; boxes that are no boxes are an error, boxes without area a warning."""
    good, flat = 0, []
    for annotation in annotations:
        box = annotation["bbox"]
        try:
            _, _, width, height = box
            finite = math.isfinite(sum(box))
        except (TypeError, ValueError):
            finite = False
        if not finite:
            raise subject.fault(
                "The bbox of annotations", "be four finite numbers", f"{box} in annotation {annotation['id']}"
            )
        if width <= 0 or height <= 0:
            flat.append(annotation["id"])
        elif not annotation.get("iscrowd"):
            good += 1
    if flat:
        logger.warning(
            f"{len(flat)} of {len(annotations)} boxes of data set '{subject.name}' have no area and are left out "
            f"by Detectron2: annotation ids {_few(flat)} ({subject.json_file})."
        )
    return good


def _check_classes(subject: _Subject, contents: _Contents, num_classes: int | None) -> None:
    number = len(contents.categories)
    if num_classes is not None and number > num_classes:
        raise subject.fault(
            "The categories",
            f"be at most the {num_classes} classes of the model",
            str(number),
            remedy="Set MODEL.*.NUM_CLASSES of the head in use to the number of categories.",
        )
    known = MetadataCatalog.get(subject.name).get("thing_classes")
    if known is not None and tuple(known) != contents.categories:
        pairs = zip(known, contents.categories, strict=False)
        changed = [f"'{new}' instead of '{old}'" for old, new in pairs if old != new]
        raise subject.fault(
            "The categories",
            f"be the {len(known)} thing_classes that the set was registered with",
            f"{number} categories, {_few(changed) if changed else 'the shared ones equal'}",
            remedy="Register the set without thing_classes, or under a name of its own.",
        )


def _check_not_empty(subject: _Subject, contents: _Contents, training: bool) -> None:
    if contents.num_annotations == 0 or (training and not contents.num_annotations):
        raise subject.fault("The annotations", "not be empty", "none")
    if training and contents.num_boxes == 0:
        found = f"{contents.num_annotations}, all of them crowds or without area"
        raise subject.fault("The annotations", "leave something to train on", found)


def _check_images(subject: _Subject, file_names: Sequence[str]) -> None:
    """Compare with one listing per folder: quicker than asking for each of a hundred thousand files."""
    listed: dict[str, set[str]] = {}
    missing = []
    for file_name in file_names:
        folder, base = os.path.split(os.path.join(subject.image_root, file_name))
        if folder not in listed:
            try:
                listed[folder] = set(os.listdir(folder or "."))
            except OSError:
                listed[folder] = set()
        if base not in listed[folder]:
            missing.append(file_name)
    if missing:
        found = f"{len(missing)} of {len(file_names)} missing: {_few(missing)}"
        raise subject.fault("The image files", "exist", found, subject.image_root)


def _few(values: Sequence) -> str:
    shown = ", ".join(str(value) for value in values[:NAMED])
    return shown if len(values) <= NAMED else f"{shown} and {len(values) - NAMED} more"
