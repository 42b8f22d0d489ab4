"""The engine of COCO's metrics: pycocotools, or faster-coco-eval where it is installed and gives the same numbers.

Both take pycocotools' objects of ground truth and detections. Precision differs by the 2e-16 that pycocotools adds to
its denominators; recall, matches and everything else are equal (`tests/evaluation/test_coco_engine.py`).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import logging
import math
import random
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pycocotools.mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from bnext.notices import tell_once

__all__ = ["can_measure", "find_fast_engine", "measure"]

Detection = dict[str, Any]

_PACKAGE = "faster_coco_eval"
_SAME = 1e-12  # of numbers from 0 to 1
_MAX_DETECTIONS = [1, 10, 100]  # of an image and category, where AR1, AR10 and all else are computed
_FAILING = "faster-coco-eval is installed but cannot be used (%s): pycocotools computes COCO's metrics, more slowly."
_DIFFERENT = (
    "The installed faster-coco-eval does not give pycocotools' numbers in a trial (%s): pycocotools computes COCO's "
    "metrics, more slowly."
)


@functools.cache
def find_fast_engine() -> type | None:
    """The evaluation class of faster-coco-eval; None: it is not installed, fails, or gives other numbers in a trial.

    Note:
        It is tried once in a process, which takes some milliseconds. Failures are said once.
    """
    log = logging.getLogger(__name__)
    try:
        engine: type = importlib.import_module(_PACKAGE).COCOeval_faster
        difference = _try_engine(engine)
    except ModuleNotFoundError as error:
        if error.name != _PACKAGE:
            tell_once(log, _PACKAGE, _FAILING, f"{type(error).__name__}: {error}")
        return None
    except Exception as error:  # a library that does not fit the machine, another interface
        tell_once(log, _PACKAGE, _FAILING, f"{type(error).__name__}: {error}")
        return None

    if difference:
        tell_once(log, _PACKAGE, _DIFFERENT, difference)
        return None
    return engine


def can_measure(truth: COCO, detections: Iterable[Detection]) -> bool:
    """Whether faster-coco-eval takes the ids of a set and the scores of its detections; pycocotools takes others, too.

    Args:
        truth: the set.
        detections: in COCO's format.
    """
    numbers = [*truth.imgs, *truth.cats, *truth.anns]
    if not all(type(number) is int and abs(number) < 2**53 for number in numbers):
        return False
    return all(math.isfinite(each["score"]) for each in detections)


def measure(
    truth: COCO,
    detections: Sequence[Detection],
    task: str,
    *,
    engine: type | None = None,
    images: Sequence[Any] | None = None,
    sigmas: Sequence[float] = (),
) -> Any:
    """COCO's metrics of detections.

    Args:
        truth: the set.
        detections: one or more, in COCO's format, with its category ids; left as they are.
        task: "bbox", "segm" or "keypoints".
        engine: of `find_fast_engine`; None: pycocotools.
        images: ids of those that are evaluated; None: all.
        sigmas: of keypoints; (): COCO's.

    Returns:
        The evaluation, with its `stats` and `eval`.
    """
    left_out = "bbox" if task == "segm" else ""  # else the size of a mask would be that of its box
    entries = [{key: value for key, value in each.items() if key != left_out} for each in detections]
    results = truth.loadRes(entries)

    if engine is None:
        evaluation = COCOeval(truth, results, task)
    else:
        evaluation = engine(iouType=task, print_function=print)
        evaluation.cocoGt, evaluation.cocoDt = truth, results

    parameters = evaluation.params
    parameters.imgIds = sorted(truth.getImgIds()) if images is None else list(images)
    parameters.catIds = sorted(truth.getCatIds())
    if task != "keypoints":
        parameters.maxDets = list(_MAX_DETECTIONS)
    elif sigmas:
        parameters.kpt_oks_sigmas = np.array(sigmas)

    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation


# ---- the trial


def _try_engine(engine: type) -> str:
    """The difference of an engine's numbers from those of pycocotools on a small set, in words; "": none."""
    for task in ("bbox", "segm"):
        truth, detections = _draw_trial()
        with contextlib.redirect_stdout(io.StringIO()):
            right, tried = measure(truth, detections, task), measure(truth, detections, task, engine=engine)

        for name in ("precision", "recall"):
            difference = float(np.abs(right.eval[name] - np.asarray(tried.eval[name])).max())
            if not difference <= _SAME:
                return f"{name} of {task} by {difference:.3g}"
        if not np.allclose(right.stats, tried.stats[: len(right.stats)], rtol=0, atol=_SAME):
            return f"summary of {task}"
    return ""


def _draw_trial() -> tuple[COCO, list[Detection]]:
    """A set with crowds, sizes of all classes, empty images, and equal scores and overlaps on the thresholds."""
    draw = random.Random(0)
    images = [{"id": number, "height": 64, "width": 64} for number in range(1, 6)]
    annotations, detections = [], []

    for number in range(1, 25):
        box = [float(4 * draw.randrange(8)) for _ in range(2)] + [float(4 * draw.randrange(1, 8)) for _ in range(2)]
        place = {"image_id": draw.randrange(1, 5), "category_id": draw.choice((3, 7))}
        area = draw.choice((box[2] * box[3], 1024.0, 9216.0, 12000.0))
        shared = {"id": number, "iscrowd": int(number % 8 == 0), "bbox": box, "area": area}
        annotations.append({**place, **shared, "segmentation": _draw_box(box)})

        for shift in (0, 2, 4, 30):
            moved = [box[0] + shift, box[1], box[2], box[3]]
            score = draw.choice((0.25, 0.5, 0.75))
            detections.append({**place, "bbox": moved, "score": score, "segmentation": _draw_box(moved)})

    truth = COCO()
    categories = [{"id": 3, "name": "a"}, {"id": 7, "name": "b"}, {"id": 9, "name": "without objects"}]
    truth.dataset = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    return truth, detections


def _draw_box(box: Sequence[float]) -> dict[str, Any]:
    left, top, width, height = box
    corners = [left, top, left + width, top, left + width, top + height, left, top + height]
    return dict(coco_mask.frPyObjects([corners], 64, 64)[0])
