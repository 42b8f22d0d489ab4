"""Checks data sets before training starts: what is missing, broken, contradicts itself or does not fit the model.

    COCO file  --FILE_RULES-->  Summary  --SET_RULES-->  the set as it is registered and will be used
    records of a function       (check_records)

A rule is a function that gives the faults it finds, and a row of a table. An annotation file is read once per process
for each task; its objects and pictures are checked in `check_objects` and `check_images`, as those of records are.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

from bnext.data.catalog import datasets_root, is_coco_entry
from bnext.data.categories import keep_categories
from bnext.data.check_images import Pictures, check_files, check_sizes, read_side
from bnext.data.check_objects import Fault, Notice, Objects, Task, check_objects, read_boxes
from bnext.data.check_records import check_records
from bnext.data.classes import are_found_by_name
from bnext.data.corrupted_sets import find_base, find_corruption
from bnext.data.digits import FOLDER
from bnext.data.listed_sets import KEY, is_listed
from bnext.data.records import check_registered
from bnext.errors import DatasetError, list_few
from bnext.files import read_stamp
from bnext.garbage import without_collection
from bnext.notices import tell_once

__all__ = ["EVALUATORS", "RegisteredSet", "check_datasets", "examine_dataset"]

EVALUATORS = ("coco", "coco_panoptic_seg")  # whose files are COCO's; LVIS, Cityscapes have their own
FILE = "The annotation file"
Content = dict[str, list[dict[str, Any]]]  # of an annotation file: images, annotations, categories
ENTRIES: dict[str, dict[str, tuple[type, ...]]] = {
    "images": {"id": (int, str), "file_name": (str,), "height": (int, float), "width": (int, float)},
    "annotations": {"id": (int, str), "image_id": (int, str), "category_id": (int, str), "bbox": (list,)},
    "categories": {"id": (int, str), "name": (str,)},
}


@dataclass(frozen=True)
class Summary:
    """Contents of an annotation file that is consistent in itself, as far as they are needed later."""

    categories: tuple[str, ...]
    pictures: Pictures  # without their folder
    num_annotations: int | None  # None: the file has no list of annotations, as those of test sets
    notices: tuple[Notice, ...]


@dataclass(frozen=True)
class RegisteredSet:
    """A set as it is registered and will be used."""

    name: str
    json_file: str  # "": there is none
    image_root: str
    check_images: bool
    task: Task

    def error(self, fault: Fault) -> DatasetError:
        return DatasetError.of(
            f"{fault.thing} of data set '{self.name}'",
            fault.rule,
            got=fault.got,
            where=fault.where or self.json_file,
            remedy=fault.remedy or self._remedy(),
        )

    def tell(self, notice: Notice) -> None:
        """Say it once for the set and its file."""
        words = f"{notice.count} of {notice.total} {notice.things} of data set '{self.name}' {notice.words}"
        place = f" ({self.json_file})" if self.json_file else ""
        text = f"{words}{place}."
        tell_once(logging.getLogger(__name__), (self.name, text), "%s", text)

    def _remedy(self) -> str:
        if not self.json_file:
            return "Correct the function that the set was registered with, or what it reads."

        folder = os.path.dirname(os.path.dirname(self.json_file))
        if self.name.startswith("digits_") and os.path.basename(folder) == FOLDER:
            root = os.path.dirname(folder) or "."
            overwrite = " --overwrite" if os.path.lexists(folder) else ""
            return f"Run `python datasets/prepare_digits.py {root}{overwrite}`."

        if is_listed(self.name):
            return (
                f"Correct the file, or `json` and `folder` of the set in {KEY}; relative paths are looked for in the "
                f"working directory and in {datasets_root().absolute()}."
            )
        if "coco" in self.name:
            return "Download it again or set DETECTRON2_DATASETS to the folder of `coco`; see datasets/README.md."
        return "Correct the file, or the path that the set was registered with."


def check_datasets(
    names: Sequence[str],
    *,
    num_classes: int | None = None,
    check_images: bool = True,
    training: bool = True,
    cfg: CfgNode | None = None,
) -> None:
    """Check that registered sets are there, whole, and fit the model.

    Args:
        names: names of registered sets; those of formats that are neither COCO's nor a function of the user's that
            returns records are passed over.
        num_classes: classes that the model's head predicts; None leaves the number of categories unchecked. Sets may
            list more where their categories are found by name: see `are_found_by_name`.
        check_images: look for every image file as well, and into the headers of up to 5,000 of them.
        training: the sets are trained on, so at least one annotation has to be left after Detectron2's filtering.
        cfg: says what the model learns from annotations (MODEL.MASK_ON, INPUT.MASK_FORMAT, MODEL.KEYPOINT_ON,
            TEST.BNEXT.VALIDATION_LOSS) and how images are resized; None: boxes.

    Raises:
        DatasetError: names the set, the file and the remedy.

    Note:
        What Detectron2 leaves out or cuts off is counted and said once for each set.
        One worker is enough to check. COCO 2017's training set takes about as long as parsing its 450 MB of JSON.
    """
    if cfg is not None and are_found_by_name(cfg, is_training=training):
        num_classes = None
    task = Task.of(cfg, num_classes=num_classes, is_training=training)

    for name in names:
        for dataset, finding in examine_dataset(name, task, check_images=check_images):
            if isinstance(finding, Fault):
                raise dataset.error(finding)
            dataset.tell(finding)


def examine_dataset(
    name: str, task: Task, *, check_images: bool = True
) -> Iterator[tuple[RegisteredSet, Fault | Notice]]:
    """Faults and notices of a registered set, each with the set as it was read.

    Args:
        name: of the set.
        task: what a model wants of it.
        check_images: look for its pictures, too.

    Raises:
        DatasetError: it is not registered, or cannot be read.

    Note:
        A rule relies on those before: what follows a fault may follow from it, and whoever goes on after one has to
        expect any exception.
    """
    check_registered(name)
    task = replace(task, corruption=find_corruption(name))
    name = find_base(name)  # which has its file and records

    metadata = MetadataCatalog.get(name)
    json_file, image_root = str(metadata.get("json_file") or ""), str(metadata.get("image_root") or "")
    dataset = RegisteredSet(name, json_file, image_root, check_images, task)

    if json_file and metadata.get("evaluator_type") in EVALUATORS:
        findings = _check_file(dataset)
        while (finding := _take_next(findings)) is not None:
            yield dataset, finding

    if not is_coco_entry(name) and not _is_of_detectron2(name):
        dataset = RegisteredSet(name, "", "", check_images, task)
        for finding in check_records(name, task, check_images=check_images):
            yield dataset, finding

    if task.num_keypoints is not None and task.is_training:
        for finding in _find_lack_of_keypoint_names(name, task):
            yield dataset, finding


@without_collection()
def _take_next(findings: Iterator[Fault | Notice]) -> Fault | Notice | None:
    """The next finding; collection rests while a rule is at work, and not while the caller is."""
    return next(findings, None)


def _is_of_detectron2(name: str) -> bool:
    """Whether Detectron2's own functions registered it: what they give is what its files say."""
    module = getattr(DatasetCatalog[name], "__module__", None) or ""
    return module.startswith("detectron2.")


def _find_lack_of_keypoint_names(name: str, task: Task) -> Iterator[Fault]:
    metadata = MetadataCatalog.get(name)
    names = metadata.get("keypoint_names")

    if names is None or len(names) != task.num_keypoints or metadata.get("keypoint_flip_map") is None:
        yield Fault(
            "The metadata",
            f"have keypoint_names of {task.num_keypoints} keypoints, and keypoint_flip_map",
            "none of them" if names is None else f"{len(names)} names",
            where="MODEL.KEYPOINT_ON is True",
            remedy=f"Set them where the set is registered: `MetadataCatalog.get({name!r}).set(keypoint_names=[...], "
            "keypoint_flip_map=[(left, right), ...])`, and MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS to their number.",
        )


# ---- COCO's annotation files


def _check_file(dataset: RegisteredSet) -> Iterator[Fault | Notice]:
    summary = yield from _summarize_file(dataset)
    for rule in SET_RULES:
        yield from rule(dataset, summary)


_summaries: dict[tuple[str, int, int, Task], Summary] = {}  # by path, time and size of the annotation file, and task


def _summarize_file(dataset: RegisteredSet) -> Generator[Fault, None, Summary]:
    """The summary of an annotation file that keeps all rules, made once until the file changes."""
    path = PathManager.get_local_path(dataset.json_file)
    try:
        stamp = read_stamp(path)
        key = (*stamp, replace(dataset.task, num_classes=None))
        if key in _summaries:
            return _summaries[key]

        if not os.path.isfile(path):
            yield Fault(FILE, "be readable", "no regular file")
        content = _load_json(path)
    except FileNotFoundError:
        yield Fault(FILE, "exist", "no such file")
    except json.JSONDecodeError as error:
        place = f"{error.msg} at line {error.lineno} column {error.colno}, character {error.pos} of {len(error.doc)}"
        is_marked = error.doc.startswith("\ufeff")
        remedy = "Save it as UTF-8 without a byte order mark, which detectron2 cannot read." if is_marked else ""
        yield Fault(FILE, "be whole JSON", place, remedy=remedy)
    except UnicodeDecodeError as error:
        yield Fault(FILE, "be JSON in UTF-8", f"another byte at {error.start}")
    except OSError as error:
        yield Fault(FILE, "be readable", error.strerror or str(error))
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, a thousand brackets
        yield Fault(FILE, "be JSON that can be read", f"{type(error).__name__}: {error}")

    notices: list[Notice] = []
    is_whole = True
    for rule in FILE_RULES:
        for fault in rule(content, dataset.json_file):
            is_whole = False
            yield fault
    pictures = _list_pictures(content)
    for finding in _check_contents(content, pictures, dataset.task):
        if isinstance(finding, Fault):
            is_whole = False
            yield finding
        else:
            notices.append(finding)

    categories = {category["id"]: category["name"] for category in content["categories"]}
    summary = Summary(
        categories=tuple(categories[key] for key in sorted(categories)),
        pictures=pictures,
        num_annotations=len(content["annotations"]) if "annotations" in content else None,
        notices=tuple(notices),
    )
    if is_whole:  # whoever goes on after a fault asks again
        _summaries[key] = summary
        keep_categories(stamp, content["categories"])
    return summary


def _load_json(path: str) -> Any:
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def _list_pictures(content: Content) -> Pictures:
    images = content["images"]
    sizes = np.array([(read_side(image["width"]), read_side(image["height"])) for image in images])
    return Pictures("", tuple(image["file_name"] for image in images), sizes)


def _check_contents(content: Content, pictures: Pictures, task: Task) -> Iterator[Fault | Notice]:
    """Pictures and objects of a file whose entries are whole."""
    unknown = np.flatnonzero(np.isnan(pictures.sizes).any(axis=1)).tolist()
    if unknown:
        yield Fault("The width and height of images", "be numbers", f"NaN in {pictures.file_names[unknown[0]]}")
    yield from check_sizes(pictures, task)

    annotations = content.get("annotations", [])
    if not annotations:
        return

    ids = [annotation["id"] for annotation in annotations]
    boxes = read_boxes([annotation["bbox"] for annotation in annotations], ids)
    if isinstance(boxes, Fault):
        yield boxes
        return

    places = {image["id"]: index for index, image in enumerate(content["images"])}
    objects = Objects(
        ids=ids,
        pictures=np.array([places[annotation["image_id"]] for annotation in annotations]),
        sizes=pictures.sizes,
        boxes=boxes,
        is_xywh=True,
        is_filtered=True,
        iscrowd=[annotation.get("iscrowd", 0) for annotation in annotations],
        segmentations=[annotation.get("segmentation") for annotation in annotations],
        keypoints=[annotation.get("keypoints") for annotation in annotations],
    )
    yield from check_objects(objects, task)


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
            values = [entry.get(name) for entry in content.get(key, [])]
            if set(map(type, values)) <= set(kinds):
                continue

            index = next(index for index, value in enumerate(values) if type(value) not in kinds)
            got = f"{content[key][index].get(name, 'none')!r} in entry {index}"
            yield Fault(f"Every entry of '{key}'", f"have a valid '{name}'", got)


def _find_mixed_ids(content: Content, json_file: str) -> Iterator[Fault]:
    """Detectron2 sorts them, and 1 is not "1"."""
    for key in ("images", "categories"):
        by_kind = {type(entry["id"]): entry["id"] for entry in content[key]}
        if len(by_kind) > 1:
            got = " and ".join(repr(value) for value in by_kind.values())
            yield Fault(f"The ids of '{key}'", "be all numbers, or all words", got)


def _find_repeated_ids(content: Content, json_file: str) -> Iterator[Fault]:
    for key in ENTRIES:
        if key == "annotations" and "minival" in json_file:  # COCO 2014's are known to repeat ids
            continue

        ids = [entry["id"] for entry in content.get(key, [])]
        if len(set(ids)) < len(ids):
            repeated = [number for number, count in Counter(ids).items() if count > 1]
            yield Fault(f"The ids of '{key}'", "be unique", f"{list_few(repeated)} more than once")


def _find_repeated_names(content: Content, json_file: str) -> Iterator[Fault]:
    counts = Counter(category["name"] for category in content["categories"])
    repeated = [repr(name) for name, count in counts.items() if count > 1]
    if repeated:
        yield Fault(
            "The names of categories",
            "be unique",
            f"{list_few(repeated)} more than once",
            remedy="Rename or merge them: results by class, and the classes of two sets, are told by their names.",
        )


def _find_ignored(content: Content, json_file: str) -> Iterator[Fault]:
    """Detectron2's reader asserts that there is none, whoever reads."""
    annotations = content.get("annotations", [])
    ignored = [each["id"] for each in annotations if "ignore" in each and each["ignore"] != 0]
    if ignored:
        yield Fault(
            "The annotations",
            "not be marked by 'ignore', which detectron2 refuses to read",
            f"{len(ignored)} of {len(annotations)} with a value other than 0: ids {list_few(ignored)}",
            remedy="Remove the key; mark what is to be neither learned nor counted by iscrowd: 1, or remove it.",
        )


def _find_unknown_images(content: Content, json_file: str) -> Iterator[Fault]:
    images = {image["id"] for image in content["images"]}
    strangers = [each["id"] for each in content.get("annotations", []) if each["image_id"] not in images]
    if strangers:
        yield Fault("Annotations", "belong to an image of the file", f"others: ids {list_few(strangers)}")


def _find_unknown_categories(content: Content, json_file: str) -> Iterator[Fault]:
    categories = {category["id"] for category in content["categories"]}
    others = {each["category_id"] for each in content.get("annotations", [])} - categories
    if others:
        rule = f"be one of the {len(categories)} categories ({list_few(map(repr, sorted(categories)))})"
        yield Fault("The category_id of annotations", rule, list_few(sorted(map(repr, others))))


FILE_RULES: tuple[Callable[[Any, str], Iterator[Fault]], ...] = (
    _find_other_format,
    _find_other_lists,
    _find_empty_list,
    _find_invalid_entry,
    _find_mixed_ids,
    _find_repeated_ids,
    _find_repeated_names,
    _find_unknown_images,
    _find_unknown_categories,
    _find_ignored,
)


# The rules of a set: called as rule(dataset, summary), in this order.


def _find_surplus_categories(dataset: RegisteredSet, summary: Summary) -> Iterator[Fault]:
    number = len(summary.categories)
    num_classes = dataset.task.num_classes
    if num_classes is not None and number > num_classes:
        yield Fault(
            "The categories",
            f"be at most the {num_classes} classes of the model",
            str(number),
            remedy="Set MODEL.*.NUM_CLASSES of the head in use to the number of categories.",
        )


def _find_other_classes(dataset: RegisteredSet, summary: Summary) -> Iterator[Fault]:
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


def _find_lack_of_annotations(dataset: RegisteredSet, summary: Summary) -> Iterator[Fault | Notice]:
    if summary.num_annotations == 0 or (dataset.task.is_training and summary.num_annotations is None):
        yield Fault("The annotations", "not be empty", "none")

    if summary.num_annotations is None:
        number = len(summary.pictures.file_names)
        words = "have no annotations, as the file has no list of them: detections are written, but no AP is computed"
        yield Notice(number, number, "images", words)


def _repeat_notices(dataset: RegisteredSet, summary: Summary) -> Iterator[Notice]:
    yield from summary.notices


def _look_at_pictures(dataset: RegisteredSet, summary: Summary) -> Iterator[Fault | Notice]:
    if dataset.check_images and "://" not in dataset.image_root:
        pictures = replace(summary.pictures, root=dataset.image_root)
        yield from check_files(pictures, dataset.task)


SET_RULES: tuple[Callable[[RegisteredSet, Summary], Iterator[Fault | Notice]], ...] = (
    _find_surplus_categories,
    _find_other_classes,
    _find_lack_of_annotations,
    _repeat_notices,
    _look_at_pictures,
)
