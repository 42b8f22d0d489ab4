"""Data sets as exporters, editors and disks leave them, trained and evaluated.

A set is refused or told before the first iteration, or trains, and then a detector that is right about everything
gets an AP of 100 on it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import Boxes, Instances
from PIL import Image

from bnext.errors import BNextError
from bnext.evaluation.coco import evaluate_model
from tests import tiny
from tests.faults import use
from tests.faults.attempt import Attempt, Outcome, Verdict

__all__ = ["make_attempts"]

Draw = np.random.Generator
Content = dict[str, list[dict[str, Any]]]
SPLITS = ("train", "val")


@dataclasses.dataclass(frozen=True)
class Fault:
    """A fault of one set.

    Args:
        name: in words.
        edit: changes the annotations in place, or gives others, or the text of the file.
        damage: one picture; gives nothing.
        splits: where it is tried.
        must_be_told: nothing right follows from it.
        mask: it is tried with a model of masks.
        words: of which a message names one, besides those of every set.
    """

    name: str
    edit: Callable[[Content, Draw], Any] = lambda content, draw: None
    damage: Callable[[Path], object] | None = None
    splits: tuple[str, ...] = SPLITS
    must_be_told: bool = False
    mask: bool = False
    words: tuple[str, ...] = ()
    changes_truth: bool = False  # the boxes of the file are not those of the pictures, and yet may be meant


def _one(draw: Draw, entries: list[dict[str, Any]]) -> dict[str, Any]:
    return entries[int(draw.integers(len(entries)))]


def _every(key: str, value: object, of: str = "annotations") -> Callable[[Content, Draw], None]:
    """A key of all entries: set, computed from the entry, or, as DROP, taken away."""

    def edit(content: Content, draw: Draw) -> None:
        for entry in content[of]:
            _write(entry, key, value)

    return edit


def _some(key: str, value: object, of: str = "annotations") -> Callable[[Content, Draw], None]:
    return lambda content, draw: _write(_one(draw, content[of]), key, value)


DROP = object()


def _write(entry: dict[str, Any], key: str, value: object) -> None:
    if value is DROP:
        entry.pop(key)
    else:
        entry[key] = value(entry) if callable(value) else value


def _corners(annotation: dict[str, Any]) -> list[float]:
    x, y, w, h = annotation["bbox"]
    return [x, y, x + w, y + h]


def _box(change: Callable[[float, float, float, float], list[float]]) -> Callable[[dict[str, Any]], list[float]]:
    return lambda annotation: change(*annotation["bbox"])


def _polygon(annotation: dict[str, Any]) -> list[list[float]]:
    x, y, w, h = annotation["bbox"]
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def _renumber(order: Callable[[int], int]) -> Callable[[Content, Draw], None]:
    def edit(content: Content, draw: Draw) -> None:
        for category in content["categories"]:
            category["id"] = order(category["id"])
        for annotation in content["annotations"]:
            annotation["category_id"] = order(annotation["category_id"])

    return edit


def _keep_used(content: Content, draw: Draw) -> None:
    used = {annotation["category_id"] for annotation in content["annotations"]}
    content["categories"] = [category for category in content["categories"] if category["id"] in used]


def _rename(content: Content, draw: Draw) -> None:
    for category in content["categories"]:
        category["name"] = f"thing {category['name']}"


def _double(of: str) -> Callable[[Content, Draw], None]:
    return lambda content, draw: content[of].append(dict(_one(draw, content[of])))


def _same_picture(content: Content, draw: Draw) -> None:
    first, second = content["images"][:2]
    second["file_name"] = first["file_name"]


def _same_name(content: Content, draw: Draw) -> None:
    content["categories"][1]["name"] = content["categories"][0]["name"]


def _empty(of: str) -> Callable[[Content, Draw], None]:
    return lambda content, draw: content[of].clear()


def _without(of: str) -> Callable[[Content, Draw], None]:
    def edit(content: Content, draw: Draw) -> None:
        del content[of]

    return edit


def _ids(of: str, key: str, change: Callable[[Any], Any]) -> Callable[[Content, Draw], None]:
    def edit(content: Content, draw: Draw) -> None:
        for entry in content[of]:
            entry[key] = change(entry[key])

    return edit


def _image_ids_as_words(content: Content, draw: Draw) -> None:
    _ids("images", "id", lambda value: f"im{value}")(content, draw)
    _ids("annotations", "image_id", lambda value: f"im{value}")(content, draw)


def _paint(mode: str, save: str = "PNG", **options: object) -> Callable[[Path], object]:
    return lambda path: Image.open(path).convert(mode).save(path, save, **options)


def _deep(path: Path) -> None:
    grey = np.asarray(Image.open(path).convert("L")).astype(np.uint16) * 257
    Image.fromarray(grey).save(path)


def _float(path: Path) -> None:
    grey = np.asarray(Image.open(path).convert("L")).astype(np.float32) / 255
    Image.fromarray(grey).save(path, "TIFF")


def _rotated(path: Path) -> None:
    image = Image.open(path).convert("RGB")
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(path, "JPEG", exif=exif)


def _resized(path: Path) -> None:
    Image.open(path).resize((40, 90)).save(path)


def _replaced(make: Callable[[Path], object]) -> Callable[[Path], object]:
    def damage(path: Path) -> None:
        path.unlink()
        make(path)

    return damage


NAN = float("nan")
FAULTS = (
    Fault("whole"),
    Fault("no area", _every("area", DROP)),
    Fault("one area null", _some("area", None)),
    Fault("an area in words", _some("area", "large")),
    Fault("no iscrowd", _every("iscrowd", DROP)),
    Fault("iscrowd null", _every("iscrowd", None)),
    Fault("iscrowd a word", _some("iscrowd", "no")),
    Fault("iscrowd '0'", _every("iscrowd", "0")),
    Fault("iscrowd true", _some("iscrowd", True)),
    Fault("all crowds", _every("iscrowd", 1), changes_truth=True),
    Fault("ignore 1", _every("ignore", 1)),
    Fault("ignore on one", _some("ignore", True)),
    Fault("annotation ids from 0", _ids("annotations", "id", lambda value: value - 1)),
    Fault("annotation ids words", _ids("annotations", "id", lambda value: f"a{value}")),
    Fault("annotation ids digits in words", _ids("annotations", "id", str)),
    Fault("annotation ids missing", _every("id", DROP)),
    Fault("annotation ids all 1", _every("id", 1)),
    Fault("annotation ids floats", _ids("annotations", "id", float)),
    Fault("image ids words", _image_ids_as_words),
    Fault("image ids words on one side", _ids("images", "id", str), must_be_told=True),
    Fault("category ids from 0", _renumber(lambda value: value - 1)),
    Fault("category ids with gaps", _renumber(lambda value: value * 7)),
    Fault("category ids reversed", _renumber(lambda value: 11 - value)),
    Fault("category ids words", _ids("annotations", "category_id", str), must_be_told=True),
    Fault("used categories alone", _keep_used),
    Fault("other category names", _rename, must_be_told=True),
    Fault("two categories of one name", _same_name, must_be_told=True),
    Fault("names with signs", _some("name", "$^{a_b}$ %s {}", of="categories")),
    Fault("an empty name", _some("name", "", of="categories")),
    Fault("categories reversed", lambda content, draw: content["categories"].reverse()),
    Fault("boxes as corners", _every("bbox", _corners), must_be_told=True),
    Fault("one box as corners", _some("bbox", _corners), changes_truth=True),
    Fault(
        "normalized boxes", _every("bbox", _box(lambda x, y, w, h: [x / 64, y / 64, w / 64, h / 64])), must_be_told=True
    ),
    Fault("negative width", _some("bbox", _box(lambda x, y, w, h: [x + w, y, -w, h])), must_be_told=True),
    Fault("zero width", _some("bbox", _box(lambda x, y, w, h: [x, y, 0, h]))),
    Fault("beside the picture", _some("bbox", [900, 900, 20, 20]), must_be_told=True),
    Fault("over the edge", _some("bbox", _box(lambda x, y, w, h: [x - 5, y, w + 5, h])), changes_truth=True),
    Fault("NaN in a box", _some("bbox", [1, 1, NAN, 5]), must_be_told=True),
    Fault("three numbers", _some("bbox", [1, 1, 5]), must_be_told=True),
    Fault("words in a box", _some("bbox", ["1", "1", "5", "5"]), must_be_told=True),
    Fault("a box missing", _some("bbox", DROP), must_be_told=True),
    Fault("a huge box", _some("bbox", [0, 0, 1e12, 1e12]), must_be_told=True),
    Fault("unknown category", _some("category_id", 99), must_be_told=True),
    Fault("unknown image", _some("image_id", 99), must_be_told=True),
    Fault("an image twice", _double("images"), must_be_told=True),
    Fault("the same picture twice", _same_picture, must_be_told=True),
    Fault("an annotation twice", _double("annotations"), must_be_told=True),
    Fault("no images", _empty("images"), must_be_told=True),
    Fault("no annotations", _empty("annotations"), must_be_told=True),
    Fault("without the list of annotations", _without("annotations"), must_be_told=True, changes_truth=True),
    Fault("no categories", _empty("categories"), must_be_told=True),
    Fault("without info", _without("info")),
    Fault(
        "size swapped",
        lambda content, draw: [image.update(width=128) for image in content["images"]],
        must_be_told=True,
    ),
    Fault("width -1", _some("width", -1, of="images"), must_be_told=True),
    Fault("height in words", _some("height", "64", of="images"), must_be_told=True),
    Fault("no height", _every("height", DROP, of="images"), must_be_told=True),
    Fault("a file name missing", _some("file_name", DROP, of="images"), must_be_told=True),
    Fault("a picture that is not there", _some("file_name", "gone.png", of="images"), must_be_told=True),
    Fault("a list", lambda content, draw: "[]", must_be_told=True),
    Fault("torn", lambda content, draw: json.dumps(content)[:-40], must_be_told=True),
    Fault("a byte order mark", lambda content, draw: "\ufeff" + json.dumps(content)),
    Fault("an empty file", lambda content, draw: "", must_be_told=True),
    Fault("one image", lambda content, draw: content["images"].__delitem__(slice(1, None)), must_be_told=True),
    Fault("polygons", _every("segmentation", _polygon), mask=True),
    Fault("no masks", _every("segmentation", DROP), mask=True, must_be_told=True),
    Fault("one mask missing", _some("segmentation", DROP), mask=True, must_be_told=True),
    Fault("an empty mask", _some("segmentation", []), mask=True, must_be_told=True),
    Fault("two corners", _some("segmentation", [[1, 1, 9, 9]]), mask=True, must_be_told=True),
    Fault("an odd number", _some("segmentation", [[1, 1, 9, 9, 5, 2, 3]]), mask=True, must_be_told=True),
    Fault("NaN in a polygon", _some("segmentation", [[1, 1, NAN, 9, 5, 2]]), mask=True, must_be_told=True),
    Fault("a far polygon", _some("segmentation", [[1, 1, 3e7, 9, 5, 3e7]]), mask=True, must_be_told=True),
    Fault(
        "a mask of another size",
        _some("segmentation", {"size": [9, 9], "counts": [40, 20, 21]}),
        mask=True,
        must_be_told=True,
    ),
    Fault(
        "a mask of words",
        _some("segmentation", {"size": [64, 64], "counts": "not a mask"}),
        mask=True,
        must_be_told=True,
    ),
    Fault("a mask as a number", _some("segmentation", 7), mask=True, must_be_told=True),
    Fault("grey picture", damage=_paint("L")),
    Fault("with alpha", damage=_paint("RGBA")),
    Fault("palette", damage=_paint("P")),
    Fault("one bit", damage=_paint("1")),
    Fault("CMYK as JPEG in .png", damage=_paint("CMYK", "JPEG")),
    Fault("16 bits", damage=_deep),
    Fault("floats", damage=_float),
    Fault("rotated by EXIF", damage=_rotated, must_be_told=False),
    Fault("another size", damage=_resized, must_be_told=True),
    Fault("truncated", damage=lambda path: path.write_bytes(path.read_bytes()[:-200]), must_be_told=True),
    Fault("an empty picture", damage=lambda path: path.write_bytes(b""), must_be_told=True),
    Fault("a text as picture", damage=lambda path: path.write_text("picture"), must_be_told=True),
    Fault("a folder as picture", damage=_replaced(Path.mkdir), must_be_told=True),
    Fault("a pipe as picture", damage=_replaced(os.mkfifo), must_be_told=True),
    Fault("a link loop", damage=_replaced(lambda path: path.symlink_to(path)), must_be_told=True),
    Fault("a dangling link", damage=_replaced(lambda path: path.symlink_to("gone")), must_be_told=True),
)


def make_attempts(count: int, seed: int) -> list[Attempt]:
    """Every fault in every split in turn; what is drawn is which entry has it."""
    pairs = [(fault, split) for fault in FAULTS for split in fault.splits]
    attempts = []
    for index in range(count):
        fault, split = pairs[index % len(pairs)]
        run = partial(_use, fault, split, seed * 1000 + index)
        attempts.append(Attempt(f"{split}: {fault.name}", run))
    return attempts


def _use(fault: Fault, split: str, seed: int, folder: Path) -> Outcome:
    truth = _make_sets(fault, split, seed, folder)
    config = str(tiny.RCNN if fault.mask else tiny.CONFIG)
    sets = ("DATASETS.TRAIN", "('own_train',)", "DATASETS.TEST", "('own_val',)")

    run = use.train(folder / "output", *sets, config=config)
    words = (f"own_{split}", "annot", "categor", "picture", "image", "box", "mask", *fault.words)
    outcome = use.judge(run, folder / "output", words, must_be_told=fault.must_be_told)
    if outcome.verdict not in (Verdict.RIGHT, Verdict.SAID):
        return outcome

    if fault.mask or split == "train" or fault.changes_truth:
        return outcome
    return _judge_evaluation(folder, sets, truth, outcome)


def _make_sets(fault: Fault, split: str, seed: int, folder: Path) -> Content:
    """Write and register both sets, one with the fault; the true annotations of the test set."""
    tiny.prepare(folder / "data")
    digits = folder / "data" / "digits"
    truth: Content = {}

    for name in SPLITS:
        file, pictures = digits / "annotations" / f"instances_{name}.json", digits / name
        content = json.loads(file.read_text())
        content["annotations"] = [a for a in content["annotations"] if a["iscrowd"] == 0]
        if name == "val":
            truth = json.loads(json.dumps(content))
        if name == split:
            if fault.damage is not None:
                fault.damage(pictures / content["images"][0]["file_name"])
            edited = fault.edit(content, np.random.default_rng(seed))
            file.write_text(edited if isinstance(edited, str) else json.dumps(content))
        else:
            file.write_text(json.dumps(content))
        register_coco_instances(f"own_{name}", {}, str(file), str(pictures))
    return truth


def _judge_evaluation(folder: Path, sets: tuple[str, ...], truth: Content, outcome: Outcome) -> Outcome:
    """A perfect detector has an AP of 100, or it is known why not."""
    cfg = tiny.load(folder / "perfect", *sets)
    silence = io.StringIO()
    try:
        with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
            results = evaluate_model(cfg, PerfectDetector(truth))
    except BNextError as error:
        return Outcome(Verdict.TRACEBACK, f"the evaluation refuses what was trained: {error}")

    ap = results["bbox"]["AP"]
    if ap > 99.9 or outcome.verdict == Verdict.SAID:
        return outcome
    return Outcome(Verdict.WRONG, f"AP {ap:.1f} of a perfect detector")


class PerfectDetector(torch.nn.Module):
    """Detects what is annotated: by file name, with the class numbers of the training set."""

    def __init__(self, truth: Content) -> None:
        super().__init__()
        names = {image["id"]: image["file_name"] for image in truth["images"]}
        self.annotations: dict[str, list[dict[str, Any]]] = {name: [] for name in names.values()}
        for annotation in truth["annotations"]:
            self.annotations[names[annotation["image_id"]]].append(annotation)

    def forward(self, batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{"instances": self._detect(record)} for record in batch]

    def _detect(self, record: dict[str, Any]) -> Instances:
        annotations = self.annotations[os.path.basename(record["file_name"])]
        corners = torch.tensor([_corners(each) for each in annotations], dtype=torch.float32)

        instances = Instances((record["height"], record["width"]))
        instances.pred_boxes = Boxes(corners.reshape(-1, 4))
        instances.scores = torch.linspace(0.9, 0.8, len(annotations))
        instances.pred_classes = torch.tensor([each["category_id"] - 1 for each in annotations], dtype=torch.int64)
        return instances
