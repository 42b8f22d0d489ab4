"""Matching against pycocotools' own matches, and against the rule written out slowly."""

import contextlib
import io

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from bnext.errors import ConfigError
from bnext.evaluation.matching import BACKGROUND_IOU, OUTCOMES, count_outcomes, match_detections


def overlap(box, other, is_crowd):
    """Intersection over union; of a crowd region over the detection."""
    width = min(box[0] + box[2], other[0] + other[2]) - max(box[0], other[0])
    height = min(box[1] + box[3], other[1] + other[3]) - max(box[1], other[1])
    shared = max(0.0, width) * max(0.0, height)
    area = box[2] * box[3]
    return shared / (area if is_crowd else area + other[2] * other[3] - shared)


def match_slowly(detections, objects, iou, most):
    """The rule: [(outcome of each detection)], {objects that are missed}."""
    free = {number for number, each in enumerate(objects) if not each["iscrowd"]}
    order = sorted(range(len(detections)), key=lambda number: -detections[number]["score"])
    outcomes, seen = {}, []

    for number in order:
        detection = detections[number]
        overlaps = {i: overlap(detection["bbox"], each["bbox"], each["iscrowd"]) for i, each in enumerate(objects)}
        same = [i for i, each in enumerate(objects) if each["category_id"] == detection["category_id"]]
        singles = [i for i, each in enumerate(objects) if not each["iscrowd"]]

        seen.append(detection["category_id"])
        takeable = [i for i in same if i in free and overlaps[i] >= iou]
        if seen.count(detection["category_id"]) > most:
            outcomes[number] = "ignored"
        elif takeable:
            outcomes[number] = "right"
            free.remove(max(takeable, key=lambda index: (overlaps[index], index)))  # of equal ones the last
        elif any(overlaps[i] >= iou for i in same if i not in singles):
            outcomes[number] = "ignored"
        elif any(overlaps[i] >= iou for i in same if i in singles):
            outcomes[number] = "duplicate"
        elif any(overlaps[i] >= iou for i in singles if i not in same):
            outcomes[number] = "wrong_class"
        elif any(overlaps[i] >= BACKGROUND_IOU for i in singles):
            outcomes[number] = "badly_placed"
        else:
            outcomes[number] = "background"
    return tuple(outcomes[number] for number in range(len(detections))), free


def make_image(rng, image):
    """Objects on a coarse grid, some of them twice, and detections near and far, whose scores are often equal."""
    objects, detections = [], []
    for _ in range(rng.integers(0, 6)):
        box = [float(number) for number in (*rng.integers(0, 40, 2), *rng.integers(8, 30, 2))]
        objects.append({"bbox": box, "category_id": int(rng.integers(1, 4)), "iscrowd": int(rng.random() < 0.2)})

    objects += [dict(each) for each in objects if rng.random() < 0.2]  # overlapped alike
    for _ in range(rng.integers(0, 15)):
        box = [float(number) for number in (*rng.integers(0, 60, 2), *rng.integers(8, 30, 2))]
        if objects and rng.random() < 0.7:
            near = objects[rng.integers(len(objects))]["bbox"]
            box = [number + float(shift) for number, shift in zip(near, rng.integers(-3, 4, 4), strict=True)]
        category, score = int(rng.integers(1, 4)), round(float(rng.random()), 1)
        detections.append({"bbox": box, "category_id": category, "score": score})

    for each in (*objects, *detections):
        each |= {"image_id": image, "area": each["bbox"][2] * each["bbox"][3]}
    return objects, detections


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return [make_image(rng, image) for image in range(1, 141)]


def match(objects, detections, iou, most):
    return match_detections(
        np.array([each["bbox"] for each in detections]).reshape(-1, 4),
        np.array([each["category_id"] for each in detections], dtype=int),
        np.array([each["score"] for each in detections]),
        np.array([each["bbox"] for each in objects]).reshape(-1, 4),
        np.array([each["category_id"] for each in objects], dtype=int),
        np.array([each["iscrowd"] for each in objects], dtype=bool),
        iou=iou,
        most=most,
    )


@pytest.mark.parametrize(("iou", "most"), [(0.5, 100), (0.75, 100), (0.5, 2)])
def test_matches_are_those_of_the_rule(images, iou, most):
    seen = set()
    for objects, detections in images:
        matches = match(objects, detections, iou, most)
        outcomes, missed = match_slowly(detections, objects, iou, most)
        assert matches.outcomes == outcomes
        assert set(np.flatnonzero(matches.missed)) == missed
        seen.update(outcomes)
    assert seen == {*OUTCOMES, "ignored"} - {"missed"}, "every kind occurs"


@pytest.mark.parametrize(("iou", "most"), [(0.5, 100), (0.75, 100), (0.5, 2)])
def test_matches_are_those_of_pycocotools(images, iou, most):
    evaluation = evaluate(images, iou, most)
    for image, (objects, detections) in enumerate(images, start=1):
        matches = match(objects, detections, iou, most)
        found, missed, ignored = set(), set(), set()
        for result in evaluation:
            if result is None or result["image_id"] != image:
                continue
            ids, taken = result["dtIds"], result["dtMatches"][0]
            is_ignored = result["dtIgnore"][0].astype(bool)
            found |= {(i, int(t)) for i, t, is_out in zip(ids, taken, is_ignored, strict=True) if t and not is_out}
            ignored |= {i for i, is_out in zip(ids, is_ignored, strict=True) if is_out}
            free = (result["gtMatches"][0] == 0) & (np.array(result["gtIgnore"]) == 0)
            missed |= {number for number, is_free in zip(result["gtIds"], free, strict=True) if is_free}

        places = {outcome: _list(matches.outcomes, outcome) for outcome in ("right", "ignored")}
        pairs = {(detections[i]["id"], objects[matches.objects[i]]["id"]) for i in places["right"]}
        assert pairs == found
        assert {objects[i]["id"] for i in np.flatnonzero(matches.missed)} == missed
        if most == 100:
            assert {detections[i]["id"] for i in places["ignored"]} == ignored


def _list(outcomes, outcome):
    return [index for index, each in enumerate(outcomes) if each == outcome]


def evaluate(images, iou, most):
    """pycocotools' result of each image and class."""
    content = {"images": [{"id": image} for image in range(1, len(images) + 1)], "info": {}}
    content["categories"] = [{"id": number} for number in (1, 2, 3)]
    content["annotations"] = [each for objects, _ in images for each in objects]
    for kind in (content["annotations"], [each for _, detections in images for each in detections]):
        for number, each in enumerate(kind, start=1):
            each["id"] = number

    with contextlib.redirect_stdout(io.StringIO()):
        truth, found = COCO(), COCO()
        truth.dataset = content
        found.dataset = {**content, "annotations": [each for _, detections in images for each in detections]}
        truth.createIndex()
        found.createIndex()
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.params.iouThrs, evaluation.params.areaRng = np.array([iou]), [[0, 1e10]]
        evaluation.params.maxDets = [most]
        evaluation.evaluate()
    return evaluation.evalImgs


def test_detections_below_a_score_change_nothing_of_those_above(images):
    for objects, detections in images:
        outcomes = match(objects, detections, 0.5, 100).outcomes
        kept = [number for number, each in enumerate(detections) if each["score"] >= 0.5]
        fewer = match(objects, [detections[number] for number in kept], 0.5, 100).outcomes
        assert fewer == tuple(outcomes[number] for number in kept)


def test_outcomes_are_counted(images):
    every = [match(*image, 0.5, 100) for image in images]
    counts = count_outcomes(every)
    num_objects = sum(not each["iscrowd"] for objects, _ in images for each in objects)
    assert counts["right"] + counts["missed"] == num_objects
    num_ignored = sum(len(_list(each.outcomes, "ignored")) for each in every)
    num_detections = sum(len(detections) for _, detections in images)
    assert sum(counts.values()) - counts["missed"] + num_ignored == num_detections


@pytest.mark.parametrize("iou", [0, -0.5, 1.01, float("nan")])
def test_an_overlap_that_none_can_have_is_refused(images, iou):
    with pytest.raises(ConfigError, match="iou"):
        match(*images[0], iou, 100)
