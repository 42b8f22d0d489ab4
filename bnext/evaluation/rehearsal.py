"""An evaluation tried before it is believed: the ground truth of a test set evaluated as if it had been predicted.

Its AP must be 100. Where it is not, the set or the way it is read is wrong, and every AP that would be measured, too.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import detectron2.evaluation
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from bnext.data.check_coco import EVALUATORS
from bnext.data.check_objects import has_corners
from bnext.data.classes import check_known, find_trained_classes, match_classes
from bnext.data.records import Record, check_registered, load_records
from bnext.errors import BNextError, DatasetError, Refusal, list_few
from bnext.evaluation.coco_evaluator import COCOEvaluator
from bnext.evaluation.ground_truth import draw_mask, is_crowd, join_categories, name_file, read_ground_truth
from bnext.files import read_stamp
from bnext.notices import tell_once
from bnext.progress import track

__all__ = ["rehearse"]

_MOST_IMAGES = 250  # that are tried of a set: of COCO's, which takes longer to read than to evaluate on so many
_WHOLE = 99.95  # what rounds to 100.0
_METRIC_LIMITS = {"bbox": 100, "segm": 100, "keypoints": 20}  # detections of an image and category that COCO takes
_Value = TypeVar("_Value")

_UNUSABLE_IDS = Refusal(
    DatasetError,
    "The records of data set {name!r}",
    "each have an image_id of their own, under which the annotation file lists the image",
    "Correct the function or the file that the set is registered with.",
)
_NO_MASKS = Refusal(
    DatasetError,
    "The objects of data set {name!r}",
    "have masks, as the model's are evaluated (MODEL.MASK_ON)",
    "Evaluate on a set with masks, correct the annotations, or set MODEL.MASK_ON to False.",
)
_OTHER_KEYPOINTS = Refusal(
    DatasetError,
    "The objects of data set {name!r}",
    "have {number} keypoints, as those of the model (MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS)",
    "Correct the key or the annotations; TEST.KEYPOINT_OKS_SIGMAS needs as many numbers.",
)
_OTHER_SIGMAS = Refusal(
    DatasetError,
    "TEST.KEYPOINT_OKS_SIGMAS",
    "have {number} numbers, one for each keypoint, to evaluate data set {name!r}",
    "Write one for each; a larger one forgives more. COCO's 17 are taken if it is empty.",
)
_FAILING = Refusal(
    DatasetError,
    "The evaluation of data set {name!r}",
    "get through the set's own ground truth",
    "Correct the annotations, or the evaluator where that is your own.",
)
_OTHER_NUMBERS = Refusal(
    DatasetError,
    "The evaluation of data set {name!r}",
    "give its own ground truth AP 100, but the set numbers its categories otherwise than the training",
    "Number them alike, or take bnext.evaluation.build_evaluator, which finds them by name.",
)

_rehearsed: dict[Hashable, object] = {}  # what was tried -> the set's function, so that none takes its place in memory


def rehearse(cfg: CfgNode, *, build: Callable[..., DatasetEvaluator]) -> None:
    """Evaluate the ground truth of every test set as if it had been predicted, once in this process for each.

    Args:
        cfg: DATASETS.TEST; what the model predicts follows from DATASETS.TRAIN, MODEL.MASK_ON, MODEL.KEYPOINT_ON and
            TEST.DETECTIONS_PER_IMAGE.
        build: makes the evaluator of a set from config, name and folder.

    Raises:
        DatasetError: the evaluation fails or cannot be right; names set, cause and culprits. A shortfall that lies in
            what COCO's metrics count, or whose cause is not known, is a warning with the AP that can be reached.

    Note:
        A collective. Sets without annotations, and evaluators that cannot be tried, are passed over. Of a large set
        some hundred images are tried. Nothing is written and no random number is drawn.
    """
    for name in cfg.DATASETS.TEST:
        check_registered(name)
        key = _identify(cfg, name, build)
        if key in _rehearsed:
            continue
        _rehearse_set(cfg, name, build)
        _rehearsed[key] = DatasetCatalog[name]


def _identify(cfg: CfgNode, name: str, build: Callable[..., DatasetEvaluator]) -> Hashable:
    """The key of a rehearsal: all that it depends on."""
    json_file, stamp = MetadataCatalog.get(name).get("json_file"), None
    if json_file and os.path.exists(path := PathManager.get_local_path(str(json_file))):
        stamp = read_stamp(path)

    model = (cfg.MODEL.MASK_ON, cfg.MODEL.KEYPOINT_ON, cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS)
    sigmas, limit = tuple(cfg.TEST.KEYPOINT_OKS_SIGMAS), cfg.TEST.DETECTIONS_PER_IMAGE
    return build, name, id(DatasetCatalog[name]), stamp, find_trained_classes(cfg), model, sigmas, limit


@dataclass(frozen=True)
class _TestSet:
    """A test set as it is rehearsed.

    Args:
        name: under which it is registered.
        records: its images, by their ids.
        objects: image id -> annotations that count.
        classes: category id -> class index of the model.
        num_keypoints: of an object; None: the model has none.
        has_masks: whether the model has.
        limit: detections that the model gives for an image.
        num_listed: images in the annotation file, of which the set may have a part.
    """

    name: str
    records: dict[Any, Record]
    objects: dict[Any, list[dict[str, Any]]]
    classes: dict[Any, int]
    num_keypoints: int | None
    has_masks: bool
    limit: int
    num_listed: int


def _rehearse_set(cfg: CfgNode, name: str, build: Callable[..., DatasetEvaluator]) -> None:
    begin = time.perf_counter()
    log = logging.getLogger(__name__)
    is_coco = MetadataCatalog.get(name).get("evaluator_type", "coco") in EVALUATORS

    with _quietly(name), tempfile.TemporaryDirectory() as folder:
        try:
            test_set = _share_failure(name, lambda: _read_set(cfg, name))
        except BNextError as error:
            if is_coco:
                raise
            log.warning("The evaluation of data set '%s' is not tried: %s", name, error)
            return

        evaluator = _share_failure(name, lambda: build(_redirect(cfg, folder), name, folder))
        if test_set is None:
            return
        if not any(test_set.objects.values()):
            message = "Data set '%s' has no object that counts in its evaluation: its AP will not be a number."
            tell_once(log, name, message, name)
            return

        is_known = isinstance(evaluator, detectron2.evaluation.COCOEvaluator)
        sample = _choose_images(test_set)
        if not is_known and len(sample) < len(test_set.records):
            log.warning("The evaluation of data set '%s' is not tried: its evaluator takes no part of a set.", name)
            return

        try:
            results = _share_failure(name, lambda: _evaluate(evaluator, test_set, sample, is_known))
        except BNextError as error:
            if is_known:
                raise
            log.warning("The evaluation of data set '%s' cannot be tried with ground truth: %s", name, error)
            return

    aps = {task: results[task]["AP"] for task in _METRIC_LIMITS if "AP" in (results.get(task) or {})}
    if comm.is_main_process():
        words = ", ".join(f"{task} AP {ap:.1f}" for task, ap in aps.items()) or "no AP"
        message = "The evaluation gives the ground truth of data set '%s' %s (%d of %d images, %.1f s)."
        log.info(message, name, words, len(sample), len(test_set.records), time.perf_counter() - begin)
    takes_part = isinstance(evaluator, COCOEvaluator)
    _share_failure(name, lambda: _say_shortfalls(test_set, sample, aps, takes_part))


def _share_failure(name: str, step: Callable[[], _Value]) -> _Value:
    """Do a step on every worker; what fails on one is raised on each. A collective."""
    failure: BNextError | None = None
    try:
        value = step()
    except BNextError as error:
        failure = error
    except MemoryError:
        raise
    except Exception as error:  # whatever pycocotools, or an evaluator of the user's, says of such a set
        text = " ".join(str(error).split())
        failure = _FAILING.of(f"{type(error).__name__}: {text}", name_file(name), name=name)
        failure.__cause__ = error

    failures = [failure] if comm.get_world_size() == 1 else comm.all_gather(failure)
    for each in failures:
        if each is not None:
            raise failure or each
    return value


def _redirect(cfg: CfgNode, folder: str) -> CfgNode:
    """The config for an evaluator that writes where the config says, not where it is told."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.OUTPUT_DIR = folder
    cfg.freeze()
    return cfg


@contextlib.contextmanager
def _quietly(name: str) -> Iterator[None]:
    """A scope whose evaluation is no result: its tables are not shown, and the set's metadata stay as they are."""
    metadata = MetadataCatalog.get(name)
    had_file, level = metadata.get("json_file") is not None, logging.root.manager.disable

    logging.disable(max(level, logging.INFO))
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(level)
        if not had_file:
            vars(metadata).pop("json_file", None)  # of detectron2's evaluator, which writes one into its folder


def _read_set(cfg: CfgNode, name: str) -> _TestSet | None:
    """The set, if it has annotations; what cannot be evaluated is refused."""
    records = load_records(name, cfg)
    content = read_ground_truth(name, records)
    if "annotations" not in content:
        return None

    by_id = {record.get("image_id"): record for record in records}
    _refuse_unusable_ids(name, records, {image["id"] for image in content["images"]})

    names = join_categories(cfg, name, content)
    trained = find_trained_classes(cfg)
    matches = match_classes(trained if trained is not None else list(names.values()), list(names.values()))
    classes = {number: match for number, match in zip(names, matches, strict=True) if match is not None}

    objects: dict[Any, list[dict[str, Any]]] = {number: [] for number in by_id}
    unknown: dict[str, None] = {}
    for annotation in content["annotations"]:
        if annotation["image_id"] not in objects or is_crowd(annotation):
            continue
        objects[annotation["image_id"]].append(annotation)
        if annotation["category_id"] not in classes:
            unknown[names.get(annotation["category_id"], repr(annotation["category_id"]))] = None
    check_known(name, trained or (), unknown)

    test_set = _TestSet(
        name=name,
        records=by_id,
        objects=objects,
        classes=classes,
        num_keypoints=cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS if cfg.MODEL.KEYPOINT_ON else None,
        has_masks=cfg.MODEL.MASK_ON,
        limit=cfg.TEST.DETECTIONS_PER_IMAGE,
        num_listed=len(content["images"]),
    )
    _refuse_lacking(test_set, content, len(cfg.TEST.KEYPOINT_OKS_SIGMAS))
    return test_set


def _refuse_unusable_ids(name: str, records: Sequence[Record], listed: set[Any]) -> None:
    missing = [str(record.get("file_name")) for record in records if record.get("image_id") is None]
    counts = Counter(record.get("image_id") for record in records)
    repeated = [number for number, count in counts.items() if count > 1]
    strangers = [number for number in counts if number not in listed]

    where = name_file(name)
    if missing:
        raise _UNUSABLE_IDS.of(f"no image_id: {list_few(missing)}", where, name=name)
    if repeated:
        raise _UNUSABLE_IDS.of(f"image_id {list_few(repeated)} more than once", where, name=name)
    if strangers:
        raise _UNUSABLE_IDS.of(f"image_id {list_few(strangers)}, which the file does not list", where, name=name)
    if len({isinstance(number, str) for number in counts}) > 1:
        raise _UNUSABLE_IDS.of("numbers and words", where, name=name)


def _refuse_lacking(test_set: _TestSet, content: dict[str, Any], num_sigmas: int) -> None:
    """Refuse a set whose objects lack what the model is evaluated by."""
    name, number = test_set.name, test_set.num_keypoints
    annotations = [each for each in content["annotations"] if each["image_id"] in test_set.objects]

    if test_set.has_masks:
        lacking = [str(each.get("id")) for each in annotations if not _has_mask(each)]
        if lacking:
            got = f"{len(lacking)} of {len(annotations)} annotations without: ids {list_few(lacking)}"
            raise _NO_MASKS.of(got, name_file(name), name=name)

    if number is not None:
        if number != (num_sigmas or 17):
            got = f"{num_sigmas}" if num_sigmas else "COCO's 17"
            raise _OTHER_SIGMAS.of(got, number=number, name=name)
        others = [each for each in annotations if each.get("keypoints") and len(each["keypoints"]) != 3 * number]
        if others:
            first = others[0]
            got = f"{len(first['keypoints']) / 3:g} in {len(others)} annotations such as {first.get('id')!r}"
            raise _OTHER_KEYPOINTS.of(got, name_file(name), name=name, number=number)


def _has_mask(annotation: dict[str, Any]) -> bool:
    """Whether pycocotools makes pixels of it: run lengths, or polygons of 3 corners or more."""
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, dict):
        return "counts" in segmentation and "size" in segmentation
    if not isinstance(segmentation, list) or not segmentation:
        return False
    return all(isinstance(part, list) and has_corners(part) for part in segmentation)


def _choose_images(test_set: _TestSet) -> list[Any]:
    """Ids of images in equal distances: most with objects, and some without."""
    if len(test_set.records) <= _MOST_IMAGES:
        return list(test_set.records)

    full = [number for number, objects in test_set.objects.items() if objects]
    empty = [number for number, objects in test_set.objects.items() if not objects]
    num_empty = min(len(empty), _MOST_IMAGES // 10)

    chosen = []
    for numbers, share in ((full, _MOST_IMAGES - num_empty), (empty, num_empty)):
        places = np.linspace(0, len(numbers) - 1, min(share, len(numbers))).round().astype(int)
        chosen += [numbers[place] for place in places]
    return chosen


def _evaluate(evaluator: DatasetEvaluator, test_set: _TestSet, sample: Sequence[Any], is_known: bool) -> dict[str, Any]:
    """Results of the ground truth as predictions, on the main process."""
    evaluator.reset()
    if isinstance(evaluator, COCOEvaluator):
        evaluator.image_ids = list(sample)

    if comm.is_main_process():
        for number in track(sample, f"trying the evaluation of {test_set.name}", unit="image"):
            record = test_set.records[number]
            evaluator.process([record], [{"instances": _predict(test_set, record)}])

    is_part = is_known and len(sample) < len(test_set.records) and not isinstance(evaluator, COCOEvaluator)
    results = evaluator.evaluate(img_ids=list(sample)) if is_part else evaluator.evaluate()
    return results or {}


def _predict(test_set: _TestSet, record: Record) -> Instances:
    """Finds of a faultless detector in an image: at most as many objects as the model gives, in its picture."""
    height, width = int(record["height"]), int(record["width"])
    annotations = test_set.objects[record["image_id"]]

    corners = np.array([each["bbox"] for each in annotations], dtype=np.float64).reshape(-1, 4)
    corners[:, 2:] += corners[:, :2]
    boxes = Boxes(torch.from_numpy(corners).float())
    boxes.clip((height, width))
    kept = boxes.nonempty().nonzero()[: test_set.limit, 0].tolist()

    instances = Instances((height, width))
    instances.pred_boxes = boxes[kept] if kept else Boxes(torch.zeros(0, 4))
    instances.scores = torch.ones(len(kept))
    instances.pred_classes = torch.tensor([test_set.classes[annotations[k]["category_id"]] for k in kept]).long()
    if test_set.has_masks:
        masks = [torch.from_numpy(draw_mask(annotations[k], height, width)).bool() for k in kept]
        instances.pred_masks = torch.stack(masks) if masks else torch.zeros(0, height, width, dtype=torch.bool)
    if test_set.num_keypoints is not None:
        points = [_place_keypoints(annotations[k], test_set.num_keypoints) for k in kept]
        instances.pred_keypoints = torch.tensor(points).reshape(-1, test_set.num_keypoints, 3)
    return instances


def _place_keypoints(annotation: dict[str, Any], number: int) -> list[list[float]]:
    """The keypoints of an object; of one without any that are visible the middle of its box, which does not count."""
    values = annotation.get("keypoints") or [0] * (3 * number)
    points = [values[start : start + 3] for start in range(0, 3 * number, 3)]
    if any(visible > 0 for _, _, visible in points):
        return [[x + 0.5, y + 0.5, 1.0] for x, y, _ in points]  # pixels -> their middle, as the model's

    left, top, width, height = annotation["bbox"]
    return [[left + width / 2 + 0.5, top + height / 2 + 0.5, 1.0]] * number


def _say_shortfalls(test_set: _TestSet, sample: Sequence[Any], aps: dict[str, float], takes_part: bool) -> None:
    """Say which AP can be reached where it is not 100; an evaluator that numbers categories otherwise is refused."""
    short = {task: ap for task, ap in aps.items() if not ap >= _WHOLE}
    if not short:
        return

    causes = _find_causes(test_set, sample, short)
    if test_set.num_listed > len(test_set.records) and not takes_part:
        causes.append(f"the set has {len(test_set.records)} of the {test_set.num_listed} images of its annotation file")
    if not causes and list(test_set.classes.values()) != list(range(len(test_set.classes))):
        got = ", ".join(f"{task} AP {ap:.1f}" for task, ap in short.items())
        raise _OTHER_NUMBERS.of(got, name_file(test_set.name), name=test_set.name)

    words = "; ".join(causes) or "no cause is known, and every AP on the set is to be doubted"
    for task, ap in short.items():
        message = "No detector can reach more than %s AP %.1f on data set '%s': %s."
        tell_once(logging.getLogger(__name__), (test_set.name, task, words), message, task, ap, test_set.name, words)


def _find_causes(test_set: _TestSet, sample: Sequence[Any], tasks: dict[str, float]) -> list[str]:
    """Why objects of the ground truth cannot be found, in words."""
    crowded: dict[str, list[Any]] = {}
    outside = invisible = 0

    for number in sample:
        objects, record = test_set.objects[number], test_set.records[number]
        if len(objects) > test_set.limit:
            crowded.setdefault(f"{test_set.limit} that the model gives (TEST.DETECTIONS_PER_IMAGE)", []).append(number)
        most = max(Counter(each["category_id"] for each in objects).values(), default=0)
        for taken in sorted({_METRIC_LIMITS[task] for task in tasks}):
            if most > taken:
                crowded.setdefault(f"{taken} of a category that COCO's metric takes", []).append(number)
        outside += sum(_reaches_outside(each["bbox"], record) for each in objects)
        if "segm" in tasks:
            size = int(record["height"]), int(record["width"])
            invisible += sum(not draw_mask(each, *size).any() for each in objects)

    causes = []
    for limit, numbers in crowded.items():
        causes.append(f"images with more objects than the {limit}: {len(numbers)}, ids {list_few(numbers)}")
    if outside:
        causes.append(f"boxes without area or that reach out of their picture: {outside}")
    if invisible:
        causes.append(f"masks without a pixel in their picture: {invisible}")
    return causes


def _reaches_outside(box: Sequence[float], record: Record) -> bool:
    left, top, width, height = box
    is_flat = width <= 0 or height <= 0
    return is_flat or left < 0 or top < 0 or left + width > record["width"] or top + height > record["height"]
