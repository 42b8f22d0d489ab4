"""Checks COCO-format data sets before training starts: what is missing, broken or contradicts itself.

A rule is a function that gives the faults it finds, and a row of one of two tables: FILE_RULES look at the whole
annotation file, which is read once per process; SET_RULES at the set as it is registered and will be used, and at the
summary of its file. Pictures are looked for in a listing of their folder, not opened.
"""

from __future__ import annotations

import gc
import json
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from detectron2.data import MetadataCatalog
from detectron2.utils.file_io import PathManager

from bnext.data.digits import FOLDER
from bnext.data.records import check_registered
from bnext.errors import DatasetError, list_few

__all__ = ["check_datasets"]

EVALUATORS = ("coco", "coco_panoptic_seg")  # other kinds (LVIS, Cityscapes) have formats of their own
FILE = "The annotation file"
Content = dict[str, list[dict[str, Any]]]  # of an annotation file: images, annotations, categories
ENTRIES: dict[str, dict[str, type | tuple[type, ...]]] = {
    "images": {"id": (int, str), "file_name": str, "height": (int, float), "width": (int, float)},
    "annotations": {"id": (int, str), "image_id": (int, str), "category_id": int, "bbox": list},
    "categories": {"id": int, "name": str},
}


@dataclass(frozen=True)
class Fault:
    """A rule that a data set breaks, in the words of an error's message."""

    thing: str
    rule: str
    got: str
    where: str = ""  # "": the annotation file
    remedy: str = ""  # "": get the set again


@dataclass(frozen=True)
class Summary:
    """Contents of an annotation file that is consistent in itself, as far as they are needed later."""

    categories: tuple[str, ...]
    file_names: tuple[str, ...]
    num_annotations: int | None  # None: the file has no list of annotations, as those of test sets
    num_boxes: int  # annotations that can be trained on: no crowd, a box with an area


@dataclass(frozen=True)
class CocoSet:
    """A set as it is registered and will be used."""

    name: str
    json_file: str
    image_root: str
    num_classes: int | None
    check_images: bool
    training: bool

    def error(self, fault: Fault) -> DatasetError:
        return DatasetError.of(
            f"{fault.thing} of data set '{self.name}'",
            fault.rule,
            got=fault.got,
            where=fault.where or self.json_file,
            remedy=fault.remedy or self._remedy(),
        )

    def _remedy(self) -> str:
        folder = os.path.dirname(os.path.dirname(self.json_file))

        if self.name.startswith("digits_") and os.path.basename(folder) == FOLDER:
            root = os.path.dirname(folder) or "."
            overwrite = " --overwrite" if os.path.lexists(folder) else ""
            return f"Run `python datasets/prepare_digits.py {root}{overwrite}`."

        if "coco" in self.name:
            return "Download it again or set DETECTRON2_DATASETS to the folder of `coco`; see datasets/README.md."
        return "Correct the file, or the path that the set was registered with."


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
        check_registered(name)
        metadata = MetadataCatalog.get(name)
        json_file, image_root = metadata.get("json_file"), metadata.get("image_root")
        if not json_file or metadata.get("evaluator_type") not in EVALUATORS:
            continue

        dataset = CocoSet(name, str(json_file), str(image_root or ""), num_classes, check_images, training)
        summary = _summarize_file(dataset)
        for rule in SET_RULES:
            for fault in rule(dataset, summary):
                raise dataset.error(fault)


_summaries: dict[tuple[str, int, int], Summary] = {}  # by path, time and size of the annotation file


def _summarize_file(dataset: CocoSet) -> Summary:
    """The summary of an annotation file that keeps all rules, made once until the file changes."""
    path = PathManager.get_local_path(dataset.json_file)
    try:
        status = os.stat(path)
        key = (os.path.abspath(path), status.st_mtime_ns, status.st_size)
        if key in _summaries:
            return _summaries[key]
        content = _load_json(path)
    except FileNotFoundError:
        raise dataset.error(Fault(FILE, "exist", "no such file")) from None
    except json.JSONDecodeError as error:
        place = f"{error.msg} at line {error.lineno} column {error.colno}, character {error.pos} of {len(error.doc)}"
        raise dataset.error(Fault(FILE, "be whole JSON", place)) from None
    except UnicodeDecodeError as error:
        raise dataset.error(Fault(FILE, "be JSON in UTF-8", f"another byte at {error.start}")) from None
    except OSError as error:
        raise dataset.error(Fault(FILE, "be readable", error.strerror or str(error))) from None

    for rule in FILE_RULES:
        for fault in rule(content, dataset.json_file):
            raise dataset.error(fault)

    _summaries[key] = _summarize(dataset, content)
    return _summaries[key]


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


def _summarize(dataset: CocoSet, content: Content) -> Summary:
    annotations = content.get("annotations", [])
    categories = {category["id"]: category["name"] for category in content["categories"]}

    flat, num_boxes = [], 0
    for annotation in annotations:
        *_, width, height = annotation["bbox"]
        if width <= 0 or height <= 0:
            flat.append(annotation["id"])
        elif not annotation.get("iscrowd"):
            num_boxes += 1

    if flat:
        logging.getLogger(__name__).warning(
            f"{len(flat)} of {len(annotations)} boxes of data set '{dataset.name}' have no area and are left out "
            f"by Detectron2: annotation ids {list_few(flat)} ({dataset.json_file})."
        )

    return Summary(
        categories=tuple(categories[key] for key in sorted(categories)),
        file_names=tuple(image["file_name"] for image in content["images"]),
        num_annotations=len(annotations) if "annotations" in content else None,
        num_boxes=num_boxes,
    )


# The rules of a file: called as rule(content, json_file), in this order, each relying on those before.


def _find_other_format(content: Any, json_file: str) -> Iterator[Fault]:
    if not isinstance(content, dict):
        yield Fault(FILE, "be in COCO format", f"a JSON {type(content).__name__}")
        return

    for key in ("images", "categories"):
        if key not in content:
            yield Fault(FILE, f"be in COCO format with a list '{key}'", "none")


def _find_other_lists(content: Content, json_file: str) -> Iterator[Fault]:
    for key in ENTRIES:
        entries = content.get(key, [])
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            yield Fault(FILE, f"hold a list of objects '{key}'", "something else")


def _find_empty_list(content: Content, json_file: str) -> Iterator[Fault]:
    if not content["images"] or not content["categories"]:
        yield Fault(FILE, "list images and categories", "an empty list")


def _find_invalid_entry(content: Content, json_file: str) -> Iterator[Fault]:
    for key, fields in ENTRIES.items():
        for name, kinds in fields.items():
            for index, entry in enumerate(content.get(key, [])):
                if not isinstance(entry.get(name), kinds):
                    got = f"{entry.get(name, 'none')!r} in entry {index}"
                    yield Fault(f"Every entry of '{key}'", f"have a valid '{name}'", got)


def _find_repeated_ids(content: Content, json_file: str) -> Iterator[Fault]:
    for key in ENTRIES:
        if key == "annotations" and "minival" in json_file:  # COCO 2014's are known to repeat ids
            continue

        counts = Counter(entry["id"] for entry in content.get(key, []))
        repeated = [number for number, count in counts.items() if count > 1]
        if repeated:
            yield Fault(f"The ids of '{key}'", "be unique", f"{list_few(repeated)} more than once")


def _find_unknown_images(content: Content, json_file: str) -> Iterator[Fault]:
    images = {image["id"] for image in content["images"]}
    strangers = [each["id"] for each in content.get("annotations", []) if each["image_id"] not in images]
    if strangers:
        yield Fault("Annotations", "belong to an image of the file", f"others: ids {list_few(strangers)}")


def _find_unknown_categories(content: Content, json_file: str) -> Iterator[Fault]:
    categories = {category["id"] for category in content["categories"]}
    others = {each["category_id"] for each in content.get("annotations", [])} - categories
    if others:
        rule = f"be one of the {len(categories)} categories ({list_few(sorted(categories))})"
        yield Fault("The category_id of annotations", rule, list_few(sorted(others)))


def _find_invalid_box(content: Content, json_file: str) -> Iterator[Fault]:
    for annotation in content.get("annotations", []):
        box = annotation["bbox"]
        if len(box) != 4 or not all(isinstance(number, (int, float)) and math.isfinite(number) for number in box):
            got = f"{box} in annotation {annotation['id']}"
            yield Fault("The bbox of annotations", "be four finite numbers", got)


FILE_RULES: tuple[Callable[[Any, str], Iterator[Fault]], ...] = (
    _find_other_format,
    _find_other_lists,
    _find_empty_list,
    _find_invalid_entry,
    _find_repeated_ids,
    _find_unknown_images,
    _find_unknown_categories,
    _find_invalid_box,
)


# The rules of a set: called as rule(dataset, summary), in this order.


def _find_surplus_categories(dataset: CocoSet, summary: Summary) -> Iterator[Fault]:
    number = len(summary.categories)
    if dataset.num_classes is not None and number > dataset.num_classes:
        yield Fault(
            "The categories",
            f"be at most the {dataset.num_classes} classes of the model",
            str(number),
            remedy="Set MODEL.*.NUM_CLASSES of the head in use to the number of categories.",
        )


def _find_other_classes(dataset: CocoSet, summary: Summary) -> Iterator[Fault]:
    known = MetadataCatalog.get(dataset.name).get("thing_classes")
    if known is None or tuple(known) == summary.categories:
        return

    pairs = zip(known, summary.categories, strict=False)
    changed = [f"'{name}' instead of '{known_name}'" for known_name, name in pairs if name != known_name]
    yield Fault(
        "The categories",
        f"be the {len(known)} thing_classes that the set was registered with",
        f"{len(summary.categories)} categories, {list_few(changed) or 'the shared ones equal'}",
        remedy="Register the set without thing_classes, or under a name of its own.",
    )


def _find_lack_of_annotations(dataset: CocoSet, summary: Summary) -> Iterator[Fault]:
    if summary.num_annotations == 0 or (dataset.training and summary.num_annotations is None):
        yield Fault("The annotations", "not be empty", "none")

    if dataset.training and summary.num_boxes == 0:
        got = f"{summary.num_annotations}, all of them crowds or without area"
        yield Fault("The annotations", "leave something to train on", got)


def _find_missing_images(dataset: CocoSet, summary: Summary) -> Iterator[Fault]:
    if not dataset.check_images or "://" in dataset.image_root:
        return

    missing = _list_missing(dataset.image_root, summary.file_names)
    if missing:
        got = f"{len(missing)} of {len(summary.file_names)} missing: {list_few(missing)}"
        yield Fault("The image files", "exist", got, where=dataset.image_root)


def _list_missing(root: str, file_names: Iterable[str]) -> list[str]:
    """Compare with one listing per folder: quicker than asking for each of a hundred thousand files."""
    listed: dict[str, set[str]] = {}
    missing = []

    for file_name in file_names:
        folder, base = os.path.split(os.path.join(root, file_name))
        if folder not in listed:
            try:
                listed[folder] = set(os.listdir(folder or "."))
            except OSError:
                listed[folder] = set()
        if base not in listed[folder]:
            missing.append(file_name)
    return missing


SET_RULES: tuple[Callable[[CocoSet, Summary], Iterator[Fault]], ...] = (
    _find_surplus_categories,
    _find_other_classes,
    _find_lack_of_annotations,
    _find_missing_images,
)
