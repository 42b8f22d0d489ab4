"""Detections of a model on a set, image by image, matched with the objects that the evaluation compares them with."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.structures import BoxMode, Instances
from torch import nn

from bnext.data.batches import build_evaluation_batches
from bnext.data.classes import find_trained_classes
from bnext.data.records import Record, has_labels, load_records
from bnext.errors import ConfigError
from bnext.evaluation.coco import flatten_metrics
from bnext.evaluation.coco_evaluator import COCOEvaluator
from bnext.evaluation.matching import OUTCOMES, Matches, count_outcomes, match_detections
from bnext.layers.single_element import explaining_single_values
from bnext.progress import showing_progress
from bnext.scope.model import setting
from bnext.seeding import seeded

__all__ = ["Detected", "Examined", "Objects", "choose_images", "examine"]


@dataclass(frozen=True)
class Objects:
    """The objects of an image.

    Args:
        boxes [M, 4]: x, y, width, height in pixels of the image.
        classes [M]: indices of `Examined.names`.
        is_crowd [M]: regions of many objects.
    """

    boxes: np.ndarray
    classes: np.ndarray
    is_crowd: np.ndarray


@dataclass(frozen=True)
class Detected:
    """Detections of a model in an image, with the form of `Objects` and a score for each."""

    boxes: np.ndarray
    classes: np.ndarray
    scores: np.ndarray

    def select(self, score: float) -> Detected:
        """The detections of that score or more."""
        kept = self.scores >= score
        return Detected(self.boxes[kept], self.classes[kept], self.scores[kept])


@dataclass(frozen=True)
class Examined:
    """Detections of a model in images of a set, and whether they are right.

    Args:
        title: of the model.
        names: of the classes.
        detected: image_id -> detections.
        objects: image_id -> objects; empty: the set has no annotations.
        matches: image_id -> what each detection is; empty: the set has no annotations.
        metrics: COCO's by name, AP and AR of boxes from 0 to 100; empty unless all images of an annotated set were
            examined.
    """

    title: str
    names: tuple[str, ...]
    detected: Mapping[Any, Detected]
    objects: Mapping[Any, Objects] = field(default_factory=dict)
    matches: Mapping[Any, Matches] = field(default_factory=dict)
    metrics: Mapping[str, float | None] = field(default_factory=dict)

    def count(self) -> dict[str, int]:
        """The number of detections of each outcome, and of missed objects; see `OUTCOMES`."""
        return count_outcomes(list(self.matches.values()))


def examine(
    cfg: CfgNode,
    model: nn.Module,
    records: Sequence[Record] | None = None,
    *,
    title: str = "",
    score: float = 0.5,
    iou: float = 0.5,
    images_per_batch: int = 1,
) -> Examined:
    """Detect in images of the first set of DATASETS.TEST, and match with its objects as the evaluation does.

    Args:
        cfg: DATASETS.TEST[0], INPUT.* and what `COCOEvaluator` reads.
        model: a detector; its modes are put back afterwards.
        records: of the set; None: all, which are evaluated, too.
        title: of the model.
        score: detections below are left out, of the matches as well; the metrics count all.
        iou: from which on a detection is right; see `match_detections`.
        images_per_batch: that are given to the model together.

    Raises:
        ConfigError: the model detects no boxes.
        DatasetError: see `COCOEvaluator`; an image cannot be read.
    """
    name = cfg.DATASETS.TEST[0]
    every = load_records(name, cfg)
    chosen = every if records is None else records
    evaluator = _Collector(cfg, name, "") if has_labels(every) else None  # "": it writes no files

    detected: dict[Any, Detected] = {}

    def remember(batch: Sequence[Record], outputs: Sequence[Mapping[str, Any]]) -> None:
        for record, output in zip(batch, outputs, strict=True):
            detected[record["image_id"]] = _to_arrays(output).select(score)

    if evaluator is not None:
        evaluator.reset()
    _detect(cfg, model, chosen, title, images_per_batch, remember if evaluator is None else evaluator.process)
    if evaluator is None:
        return Examined(title, _name_classes(cfg, detected.values()), detected)

    detected = {number: each.select(score) for number, each in evaluator.detected.items()}
    objects = {number: evaluator.find_objects(number) for number in detected}
    matches = {}
    for number, kept in detected.items():
        truth = objects[number]
        matches[number] = match_detections(
            kept.boxes, kept.classes, kept.scores, truth.boxes, truth.classes, truth.is_crowd, iou=iou
        )

    metrics: dict[str, float | None] = {}
    if records is None:
        evaluator.image_ids = [record["image_id"] for record in every]
        with contextlib.redirect_stdout(io.StringIO()):
            metrics = flatten_metrics(evaluator.evaluate() or {})
        recalls = evaluator.recalls.get("bbox", {})
        metrics |= {f"bbox/{key}": None if math.isnan(value) else value for key, value in recalls.items()}
    return Examined(title, tuple(evaluator.names), detected, objects, matches, metrics)


def _detect(
    cfg: CfgNode,
    model: nn.Module,
    records: Sequence[Record],
    title: str,
    images_per_batch: int,
    take: Callable[[Any, Any], object],
) -> None:
    """Give each batch, and the model's outputs of it, to `take`."""
    loader = build_evaluation_batches(cfg, records, range(len(records)), images_per_batch)
    where = cfg.DATASETS.TEST[0]

    with (
        torch.no_grad(),
        seeded(max(cfg.SEED, 0)),
        setting(model.modules(), training=False),
        explaining_single_values(where),
        showing_progress(title or "detecting", len(records), "image") as bar,
    ):
        for batch in loader:
            outputs = model(batch)
            if not all(isinstance(output, Mapping) and "instances" in output for output in outputs):
                rule, remedy = "detect instances, whose boxes are drawn", "Take the config of a detector."
                got = f"outputs of {type(model).__name__} without them"
                raise ConfigError.of("The model", rule, got=got, remedy=remedy)
            take(batch, outputs)
            bar.update(len(batch))


class _Collector(COCOEvaluator):
    """The evaluator, which remembers the detections as it counts them."""

    def reset(self) -> None:
        super().reset()
        self.detected: dict[Any, Detected] = {}

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        super().process(inputs, outputs)
        for record, output in zip(inputs, outputs, strict=True):
            self.detected[record["image_id"]] = _to_arrays(self._translate(output))

    @property
    def names(self) -> list[str]:
        """The names of the set's classes."""
        return list(self._metadata.thing_classes)

    def find_objects(self, image_id: Any) -> Objects:
        """The objects of an image in the mended ground truth."""
        places = self._metadata.thing_dataset_id_to_contiguous_id
        annotations = self._coco_api.imgToAnns.get(image_id, [])

        boxes = np.array([each["bbox"] for each in annotations], dtype=np.float64).reshape(-1, 4)
        classes = np.array([places[each["category_id"]] for each in annotations], dtype=np.int64)
        return Objects(boxes, classes, np.array([bool(each["iscrowd"]) for each in annotations], dtype=bool))


def _to_arrays(output: Mapping[str, Any]) -> Detected:
    instances: Instances = output["instances"].to("cpu")
    corners = instances.pred_boxes.tensor.reshape(-1, 4)
    boxes = BoxMode.convert(corners, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)  # in float32, as the evaluation does
    classes = instances.pred_classes.numpy().astype(np.int64)
    return Detected(boxes.double().numpy(), classes, instances.scores.double().numpy())


def _name_classes(cfg: CfgNode, detected: Any) -> tuple[str, ...]:
    """Names for a set without annotations: those of the training or, where they are not known, their numbers."""
    names = list(find_trained_classes(cfg) or ())
    largest = max((int(each.classes.max()) for each in detected if len(each.classes)), default=-1)
    names += [f"class {index}" for index in range(len(names), largest + 1)]
    return tuple(names)


def choose_images(
    records: Sequence[Record],
    number: int,
    *,
    names: Sequence[str] = (),
    seed: int | None = None,
    columns: Sequence[Examined] = (),
) -> list[Record]:
    """The images to draw, in the order of the set.

    Args:
        records: of the set.
        number: at most.
        names: ids or file names of those that are wanted, in this order; then the others do not matter.
        seed: of a random choice; None: evenly from all.
        columns: examined models: then those images in whose number of errors they differ most; of a single one those
            with most errors.

    Raises:
        ConfigError: an image is not in the set.
    """
    if names:
        return [_find_image(records, name) for name in names]

    number = min(number, len(records))
    if columns:
        errors = np.array([[_count_errors(column, record) for column in columns] for record in records])
        weights = errors.max(axis=1) - errors.min(axis=1) if len(columns) > 1 else errors[:, 0]
        chosen = np.argsort(-weights, kind="stable")[:number]
    elif seed is not None:
        chosen = np.random.default_rng(seed).permutation(len(records))[:number]
    else:
        chosen = np.linspace(0, len(records) - 1, number).round().astype(int)
    return [records[index] for index in sorted(chosen)]


def _count_errors(column: Examined, record: Record) -> int:
    counts = count_outcomes([column.matches[record["image_id"]]])
    return sum(counts[outcome] for outcome in OUTCOMES if outcome != "right")


def _find_image(records: Sequence[Record], name: str) -> Record:
    for record in records:
        file = str(record["file_name"])
        if name in (str(record["image_id"]), file) or file.endswith(f"/{name}"):
            return record

    first = records[0]
    got = f"{name!r}, which is none of its {len(records)}"
    remedy = f"Give ids or file names, such as {first['image_id']} or {str(first['file_name']).rpartition('/')[2]}."
    raise ConfigError.of("--images", "be images of the set", got=got, remedy=remedy)
