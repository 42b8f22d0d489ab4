"""The evaluator of sets with COCO's metrics: what detectors predict, and the ground truth that it is compared with."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import itertools
import json
import logging
import math
import os
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import detectron2.evaluation
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from bnext.data.classes import check_known, find_trained_classes, match_classes
from bnext.data.records import load_records
from bnext.evaluation.coco_engine import can_measure, find_fast_engine, measure
from bnext.evaluation.ground_truth import convert_records, is_crowd, join_categories, mend
from bnext.files import replace_file
from bnext.garbage import without_collection
from bnext.notices import tell_once

__all__ = ["COCOEvaluator"]

_DETECTIONS = "coco_instances_results.json"  # in the folder of an evaluation, as detectron2 names it
# The numbers of pycocotools' summary that detectron2's results leave out, by their places in it.
_RECALLS = {"AR1": 6, "AR10": 7, "AR100": 8, "ARs": 9, "ARm": 10, "ARl": 11}
_TASKS = ("bbox", "segm", "keypoints")
_KEYPOINT_RECALLS = {"AR": 5, "AR50": 6, "AR75": 7, "ARm": 8, "ARl": 9}


class COCOEvaluator(detectron2.evaluation.COCOEvaluator):
    """Detectron2's evaluator on ground truth that pycocotools reads right, with categories that are found by name.

    The class indices of a model are those of its training set. They become the categories of the same names, however
    the evaluated set numbers them; detections of classes that it does not list do not count, as on any image whose
    objects of a class are not annotated. The ground truth is a mended copy, see `bnext.evaluation.ground_truth`.

    Args:
        cfg: DATASETS.TRAIN, the head's NUM_CLASSES, TEST.BNEXT.FAST_EVAL, and of a keypoint model
            TEST.KEYPOINT_OKS_SIGMAS are read.
        dataset_name: a registered set with a file in COCO's format, or a function that gives Detectron2's records,
            which are converted each time anew.
        output_dir: for the detections.

    Raises:
        DatasetError: an annotation cannot be evaluated, or is of a class that the training does not have.

    Attributes:
        image_ids: of the images that the set has, where its file may list more; None: all.
        parts: name -> ids of images that are evaluated by themselves, too, from the same detections.
        results_of_parts: name -> task -> name -> number, 0 to 100, without categories, of the last evaluation.
        recalls: task -> name -> average recall, 0 to 100, of the last evaluation; NaN where there is no object.
        engine: the library that computed it.
    """

    @without_collection()
    def __init__(self, cfg: CfgNode, dataset_name: str, output_dir: str) -> None:
        self.image_ids: list[Any] | None = None
        self.parts: Mapping[str, Sequence[Any]] = {}
        self.results_of_parts: dict[str, dict[str, dict[str, float]]] = {}
        self.recalls: dict[str, dict[str, float]] = {}
        self.engine = "pycocotools"
        self._name = dataset_name
        self._fast_engine = find_fast_engine() if cfg.TEST.BNEXT.FAST_EVAL else None
        has_fast = cfg.TEST.BNEXT.FAST_EVAL and importlib.util.find_spec("detectron2._C") is not None
        options: dict[str, Any] = {"output_dir": output_dir, "use_fast_impl": has_fast}
        if cfg.MODEL.KEYPOINT_ON:
            options["kpt_oks_sigmas"] = list(cfg.TEST.KEYPOINT_OKS_SIGMAS)

        # Under a name of its own: the set's metadata stay as they are.
        alias = f"{dataset_name} as it is evaluated"
        MetadataCatalog.pop(alias, None)
        try:
            with _provide_file(cfg, dataset_name) as json_file:
                MetadataCatalog.get(alias).json_file = json_file
                super().__init__(alias, **options)
        finally:
            MetadataCatalog.pop(alias, None)

        content = self._coco_api.dataset
        names = join_categories(cfg, dataset_name, content)
        mend(
            dataset_name,
            content,
            keypoints=cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS if cfg.MODEL.KEYPOINT_ON else None,
        )
        with contextlib.redirect_stdout(io.StringIO()):
            self._coco_api.createIndex()

        self._metadata.thing_classes = list(names.values())
        self._metadata.thing_dataset_id_to_contiguous_id = {number: index for index, number in enumerate(names)}
        self._places = _find_places(cfg, dataset_name, names, content)

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        images = [{"image_id": _to_plain(record["image_id"])} for record in inputs]
        super().process(images, [self._translate(output) for output in outputs])

    def _translate(self, output: dict[str, Any]) -> dict[str, Any]:
        """The output with the set's class indices, without detections of classes that it does not list."""
        if "instances" not in output:
            return output

        instances = output["instances"].to("cpu")
        classes, number = instances.pred_classes, len(self._places)
        if len(classes) and int(classes.max()) >= number:
            message = "The model detects class %d, but its training has %d: detections of the surplus do not count."
            tell_once(logging.getLogger(__name__), self._name, message, int(classes.max()), number)

        places = torch.cat([self._places, self._places.new_full((1,), -1)])[classes.clamp(max=number)]
        if torch.equal(places, classes):
            return {**output, "instances": instances}
        listed = instances[places >= 0]
        listed.pred_classes = places[places >= 0]
        return {**output, "instances": listed}

    @without_collection()
    def evaluate(self, img_ids: list[Any] | None = None) -> dict[str, Any]:
        if img_ids is None and self.image_ids is not None and len(set(self.image_ids)) < self.num_listed:
            img_ids = self.image_ids
        self.recalls, self.results_of_parts = {}, {}
        self.engine = "detectron2's C++" if self._use_fast_impl else "pycocotools"
        return super().evaluate(img_ids=img_ids)

    def _eval_predictions(self, predictions: list[dict[str, Any]], img_ids: list[Any] | None = None) -> None:
        detections = [detection for prediction in predictions for detection in prediction["instances"]]
        is_fast = self._fast_engine is not None and self._do_evaluation and bool(detections)
        if is_fast and can_measure(self._coco_api, detections):
            self._eval_fast(detections, img_ids)
        else:
            super()._eval_predictions(predictions, img_ids=img_ids)
        if self._do_evaluation:
            self._eval_parts(detections)

    def _eval_fast(self, detections: list[dict[str, Any]], img_ids: list[Any] | None) -> None:
        """Detectron2's evaluation by faster-coco-eval."""
        numbers = list(self._metadata.thing_dataset_id_to_contiguous_id)
        for detection in detections:
            detection["category_id"] = numbers[detection["category_id"]]
        if self._output_dir:
            text = json.dumps(detections)
            replace_file(os.path.join(self._output_dir, _DETECTIONS), lambda file: file.write(text.encode()))

        self.engine = "faster-coco-eval"
        for task in self._tasks_from_predictions(detections):
            evaluation = measure(
                self._coco_api,
                detections,
                task,
                engine=self._fast_engine,
                images=img_ids,
                sigmas=self._kpt_oks_sigmas,
            )
            self._results[task] = self._derive_coco_results(evaluation, task, class_names=self._metadata.thing_classes)

    def _eval_parts(self, detections: list[dict[str, Any]]) -> None:
        """The metrics of each part, from detections with the set's category ids, as both evaluations leave them."""
        tasks = [task for task in self._results if task in _TASKS]
        for name, images in self.parts.items():
            self.results_of_parts[name] = {task: self._measure_part(detections, task, images) for task in tasks}

    def _measure_part(self, detections: list[dict[str, Any]], task: str, images: Sequence[Any]) -> dict[str, float]:
        if not detections:  # nor anything in the whole set
            return dict.fromkeys(self._results[task], math.nan)

        engine = self._fast_engine if self.engine == "faster-coco-eval" else None
        evaluation = measure(
            self._coco_api, detections, task, engine=engine, images=images, sigmas=self._kpt_oks_sigmas
        )
        metrics: dict[str, float] = super()._derive_coco_results(evaluation, task)
        return metrics

    def has_objects(self, image_ids: Collection[Any]) -> bool:
        """Whether any of these images has an object that counts."""
        annotations = itertools.chain.from_iterable(self._coco_api.imgToAnns.get(each, ()) for each in image_ids)
        return any(not is_crowd(each) for each in annotations)

    def _derive_coco_results(self, coco_eval: Any, iou_type: str, class_names: Any = None) -> dict[str, float]:
        if coco_eval is not None:
            places = _KEYPOINT_RECALLS if iou_type == "keypoints" else _RECALLS
            values = {name: float(coco_eval.stats[place]) for name, place in places.items()}
            self.recalls[iou_type] = {name: 100 * ar if ar >= 0 else math.nan for name, ar in values.items()}
        return super()._derive_coco_results(coco_eval, iou_type, class_names=class_names)

    @property
    def num_listed(self) -> int:
        """Images in the annotation file."""
        return len(self._coco_api.imgs)


@contextlib.contextmanager
def _provide_file(cfg: CfgNode, name: str) -> Iterator[str]:
    """The annotation file of a set; of one that has none a temporary one, so that no older one is taken for it."""
    json_file = MetadataCatalog.get(name).get("json_file")
    if json_file:
        yield str(json_file)
        return

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "annotations.json")
        with open(path, "w", encoding="utf-8") as file:
            json.dump(convert_records(name, load_records(name, cfg)), file, default=_decode)
        yield path


def _decode(value: Any) -> Any:
    """Values that JSON does not know: NumPy's numbers and arrays, and the bytes of run lengths."""
    return value.decode("ascii") if isinstance(value, bytes) else value.tolist()


def _to_plain(number: Any) -> Any:
    """An id that the file of detections takes, as a function of the user's may give NumPy's numbers."""
    return number.item() if isinstance(number, np.generic) else number


def _find_places(cfg: CfgNode, name: str, names: Mapping[Any, str], content: Mapping[str, Any]) -> torch.Tensor:
    """For each class index of the model that of the set; -1: the set does not list the class."""
    trained = find_trained_classes(cfg)
    if trained is None:
        message = (
            "DATASETS.TRAIN does not tell the names of the model's classes: those of data set '%s' are taken for them."
        )
        tell_once(logging.getLogger(__name__), name, message, name)
        return torch.arange(len(names))

    matches = dict(zip(names, match_classes(trained, list(names.values())), strict=True))
    unknown = {number: names[number] for number, match in matches.items() if match is None}
    annotated = {each["category_id"] for each in content.get("annotations", ()) if not is_crowd(each)}
    check_known(name, trained, [each for number, each in unknown.items() if number in annotated])

    places = torch.full((len(trained),), -1)
    for index, match in enumerate(matches.values()):
        if match is not None:
            places[match] = index
    if not torch.equal(places, torch.arange(len(trained))):
        message = "The categories of data set '%s' are not numbered as in training: they are found by their names."
        tell_once(logging.getLogger(__name__), name, message, name)
    return places
