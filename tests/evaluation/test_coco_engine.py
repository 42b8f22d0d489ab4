"""faster-coco-eval against pycocotools: the same numbers on whatever is drawn, or it is not used."""

import copy
import importlib
import json
import logging
import sys

import numpy as np
import pycocotools.mask as coco_mask
import pytest
import torch
from detectron2.structures import Instances
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO

from bnext.config.keys import KEYS
from bnext.evaluation import build_evaluator
from bnext.evaluation import coco_engine as engines
from bnext.evaluation.coco_engine import can_measure, find_fast_engine, measure
from tests.evaluation.own_sets import SIDE, detect, edit, evaluate_perfect, load, make_set, registered

FAST = find_fast_engine()
pytestmark = pytest.mark.skipif(FAST is None, reason="faster-coco-eval is not installed")
SAME = 1e-12  # of numbers from 0 to 1: pycocotools adds 2e-16 to the denominators of precision

# On a grid overlaps are often equal, or exactly a threshold.
coordinates = st.integers(0, 12).map(lambda value: 4.0 * value) | st.floats(0, 48, width=32)
sizes = st.integers(0, 10).map(lambda value: 4.0 * value) | st.floats(0, 40, width=32)
boxes = st.tuples(coordinates, coordinates, sizes, sizes)
scores = st.sampled_from([0.0, 0.25, 0.5, 1.0]) | st.floats(0, 1, width=32)
areas = st.sampled_from([0.0, 1024.0, 9216.0, 1e6]) | st.floats(0, 2e4, width=32)
points = st.lists(st.tuples(coordinates, coordinates, st.integers(0, 2)), min_size=3, max_size=3)


def draw_box(box):
    x, y, w, h = box
    return [x, y, x + w, y, x + w, y + h, x, y + h]


@st.composite
def masks(draw):
    """Polygons, or pixels as run lengths in one of both forms."""
    if draw(st.booleans()):
        return [draw_box(box) for box in draw(st.lists(boxes, min_size=1, max_size=2))]

    pixels = np.zeros((SIDE, SIDE), np.uint8)
    for x, y, w, h in draw(st.lists(boxes, min_size=1, max_size=2)):
        pixels[int(y) : int(y + h), int(x) : int(x + w)] = 1
    code = coco_mask.encode(np.asfortranarray(pixels))
    if draw(st.booleans()):
        return {"size": [SIDE, SIDE], "counts": code["counts"].decode()}
    return {"size": [SIDE, SIDE], "counts": count_runs(pixels.flatten("F"))}


def count_runs(pixels):
    """Run lengths of 0 and 1 in turn, the first of 0."""
    ends = np.flatnonzero(np.diff(pixels, prepend=0, append=2))
    return np.diff(ends, prepend=0).tolist()


def compress(mask):
    """A mask in the only form that detections have."""
    code = mask
    if isinstance(mask, list):
        code = coco_mask.merge(coco_mask.frPyObjects(mask, SIDE, SIDE))
    elif isinstance(mask["counts"], list):
        code = coco_mask.frPyObjects(mask, SIDE, SIDE)
    counts = code["counts"]
    return {"size": [SIDE, SIDE], "counts": counts if isinstance(counts, str) else counts.decode()}


@st.composite
def problems(draw, task):
    """Ground truth and one or more detections; images and categories without either, and crowds, are among them."""
    images = [{"id": number, "height": SIDE, "width": SIDE} for number in draw(st.permutations([1, 2, 9, 400]))]
    categories = [{"id": number, "name": str(number)} for number in (1, 7, 90)]
    places = st.tuples(st.sampled_from([1, 2, 9]), st.sampled_from([1, 7]))

    annotations = []
    for (image, category), box in draw(st.lists(st.tuples(places, boxes), min_size=task == "keypoints", max_size=12)):
        annotation = {"id": len(annotations) + 1, "image_id": image, "category_id": category, "bbox": list(box)}
        annotation |= {"iscrowd": int(draw(st.integers(0, 5)) == 0), "area": draw(areas)}
        if task == "segm":
            annotation["segmentation"] = draw(masks())
        if task == "keypoints":
            triples = draw(points)
            annotation["keypoints"] = [float(value) for triple in triples for value in triple]
            annotation["num_keypoints"] = sum(visible > 0 for _, _, visible in triples)
        annotations.append(annotation)

    most = draw(st.sampled_from([1, 8, 130]))  # more than the 100 that count
    detections = []
    for number in range(draw(st.integers(1, most))):
        image, category = (9, 7) if most > 100 else draw(places)
        truth = annotations[number % len(annotations)] if annotations and draw(st.booleans()) else None
        detection = {"image_id": image, "category_id": category, "score": draw(scores)}
        if task == "segm":
            detection["segmentation"] = compress(truth["segmentation"] if truth else draw(masks()))
        else:
            detection["bbox"] = list(truth["bbox"]) if truth else list(draw(boxes))
        if task == "keypoints":
            values = truth["keypoints"] if truth else [float(value) for triple in draw(points) for value in triple]
            detection["keypoints"] = list(values)
        detections.append(detection)

    images_of = draw(st.none() | st.lists(st.sampled_from([1, 2, 9, 400]), min_size=1, unique=True))
    content = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
    return content, detections, images_of


def index(content):
    truth = COCO()
    truth.dataset = copy.deepcopy(content)
    truth.createIndex()
    return truth


@pytest.mark.parametrize("task", ["bbox", "segm", "keypoints"])
def test_every_number_is_that_of_pycocotools(task, capsys):
    sigmas = (0.05, 0.1, 0.2) if task == "keypoints" else ()

    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(problems(task))
    def check(problem):
        content, detections, images = problem
        before = copy.deepcopy(detections)
        right = measure(index(content), detections, task, images=images, sigmas=sigmas)
        fast = measure(index(content), detections, task, images=images, sigmas=sigmas, engine=FAST)

        for name in ("precision", "recall"):  # of every threshold, category, size and number of detections
            values = np.asarray(fast.eval[name])
            assert values.shape == right.eval[name].shape
            assert np.abs(values - right.eval[name]).max() <= SAME
        assert np.allclose(fast.stats[: len(right.stats)], right.stats, rtol=0, atol=SAME)
        assert detections == before

    check()
    capsys.readouterr()


# ---- the evaluator


def evaluate(folder, content, *opts):
    with registered(folder, val=content):
        evaluator = build_evaluator(load(folder, *opts), "own_val")
        results = evaluate_perfect(evaluator, edit(content, bbox=shift))
    return evaluator, results


def shift(number, annotation):
    """Every third object is found a little beside its place."""
    x, y, w, h = annotation["bbox"]
    return [x + 3 * (number % 3 == 0), y, w, h]


def test_the_evaluator_takes_it_and_a_key_switches_it_off(tmp_path):
    content = edit(make_set(2), iscrowd=lambda number, each: int(number % 5 == 0))
    fast, results = evaluate(tmp_path, content)
    saved = json.loads((tmp_path / "inference/coco_instances_results.json").read_text())
    slow, right = evaluate(tmp_path, content, "TEST.BNEXT.FAST_EVAL", False)

    assert (fast.engine, slow.engine) == ("faster-coco-eval", "pycocotools")
    assert KEYS["TEST.BNEXT.FAST_EVAL"].default is True
    assert results["bbox"].keys() == right["bbox"].keys()
    for name, value in right["bbox"].items():
        assert results["bbox"][name] == pytest.approx(value, abs=100 * SAME, nan_ok=True)
    assert 0 < right["bbox"]["AP"] < 100
    assert fast.recalls["bbox"] == pytest.approx(slow.recalls["bbox"], abs=100 * SAME, nan_ok=True)
    assert json.loads((tmp_path / "inference/coco_instances_results.json").read_text()) == saved


@pytest.mark.parametrize("name", [str, lambda number: 2**60 + number])
def test_ids_that_it_does_not_take_are_left_to_pycocotools(name, tmp_path):
    content = copy.deepcopy(make_set(2))
    for image in content["images"]:
        image["id"] = name(image["id"])
    content = edit(content, image_id=lambda number, each: name(each["image_id"]))
    evaluator, results = evaluate(tmp_path, content)
    assert evaluator.engine == "pycocotools"
    assert results["bbox"]["AP"] > 0


def test_a_score_that_is_no_number_is_left_to_pycocotools():
    truth = index(make_set(2))
    assert can_measure(truth, [{"score": 0.5}])
    assert not can_measure(truth, [{"score": 0.5}, {"score": float("nan")}])


# ---- where it cannot be used


@pytest.fixture
def other_package(monkeypatch, tmp_path):
    """Another package of that name, and what is said of it."""

    monkeypatch.setattr("bnext.notices._told_names", set())  # what other tests were told is no matter here

    def install(text):
        (tmp_path / "faster_coco_eval.py").write_text(text)
        for name in [name for name in sys.modules if name.partition(".")[0] == "faster_coco_eval"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.syspath_prepend(str(tmp_path))
        importlib.invalidate_caches()
        return find_fast_engine.__wrapped__()

    return install


FAULTS = {
    "another library is missing": ("import a_library_that_is_missing", "a_library_that_is_missing"),
    "the machine's library does not fit": ("raise OSError('libc.so.6: version not found')", "libc.so.6"),
    "another interface": ("COCOeval = object", "COCOeval_faster"),
    "another interface of the class": ("COCOeval_faster = object", "object()"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_one_that_cannot_be_used_is_said_once(fault, other_package, bnext_log):
    text, word = FAULTS[fault]
    for _ in range(2):
        assert other_package(text) is None
    (record,) = set(bnext_log.records)
    assert record.levelno == logging.WARNING
    assert word in record.getMessage()


def test_one_that_is_not_installed_is_no_notice(monkeypatch, bnext_log):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    assert find_fast_engine.__wrapped__() is None
    assert not bnext_log.records


def test_one_with_other_numbers_is_not_used():
    class Careless(FAST):
        """Counts crowds as objects."""

        def _prepare(self):
            for annotation in self.cocoGt.anns.values():
                annotation["iscrowd"] = 0
            super()._prepare()

    assert engines._try_engine(FAST) == ""
    assert "bbox" in engines._try_engine(Careless)


def test_the_size_of_a_mask_is_not_that_of_its_box(tmp_path):
    """A false mask that is small, in a box of medium size, does not count among the medium ones."""
    content = edit(make_set(2, num_objects=1), bbox=[4, 4, 40, 40], area=1600)
    content = edit(content, segmentation=[draw_box([4, 4, 40, 40])])
    masks = torch.zeros(2, SIDE, SIDE, dtype=torch.bool)
    masks[0, 4:44, 4:44] = masks[1, 4:44, 4:14] = True

    results = []
    for is_fast in (True, False):
        with registered(tmp_path, val=content):
            evaluator = build_evaluator(load(tmp_path, "TEST.BNEXT.FAST_EVAL", is_fast), "own_val")
            evaluator.reset()
            for image in content["images"]:
                (found,) = detect(content, image["id"]).values()
                both = Instances.cat([found, found])
                both.pred_masks, both.scores = masks, torch.tensor([0.5, 0.9])
                evaluator.process([{"image_id": image["id"]}], [{"instances": both}])
            results.append(evaluator.evaluate()["segm"])

    assert results[0] == pytest.approx(results[1], abs=100 * SAME, nan_ok=True)
    assert results[0]["APm"] > 99
    assert results[0]["AP"] < 99
