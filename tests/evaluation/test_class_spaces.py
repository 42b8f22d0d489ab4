"""The AP of a set is that of its own classes, whatever others the model detects."""

import copy
import math

import pytest
import torch
from detectron2.structures import Boxes, Instances

from bnext.errors import DatasetError
from bnext.evaluation import build_evaluator
from bnext.evaluation.rehearsal import rehearse
from tests.evaluation.own_sets import NAMES, SIDE, load, make_set, registered, renumber

# Numbered as dog, bat, tiger: of the model's classes it has the dog alone, unless the config says more.
NIGHT = renumber(make_set(2), (3, 1, 2), ("tiger", "dog", "bat"))
JOINED = ("DATASETS.BNEXT.CLASSES", "('cat', 'dog', 'owl')", "DATASETS.TEST", "('own_night',)")


def evaluate(cfg, tmp_path, kinds, extra=()):
    """The AP of detecting the objects of the set as the classes that `kinds` has, and an image-wide box of others."""
    names = {each["id"]: each["name"] for each in NIGHT["categories"]}
    evaluator = build_evaluator(cfg, "own_night", str(tmp_path))
    evaluator.reset()
    for image in NIGHT["images"]:
        objects = [each for each in NIGHT["annotations"] if each["image_id"] == image["id"]]
        objects = [each for each in objects if kinds.get(names[each["category_id"]])]
        boxes = [[each["bbox"][0], each["bbox"][1], *each["bbox"][2:]] for each in objects] + [[0, 0, 9, 9]] * len(
            extra
        )
        classes = [NAMES.index(kinds[names[each["category_id"]]]) for each in objects] + list(extra)

        corners = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]
        instances = Instances((SIDE, SIDE), pred_boxes=Boxes(corners), pred_classes=torch.tensor(classes))
        instances.scores = torch.ones(len(classes))
        evaluator.process([{"image_id": image["id"]}], [{"instances": instances}])
    return evaluator.evaluate()["bbox"]


@pytest.mark.parametrize(
    ("mapped", "kinds", "classes"),
    [
        ({"tiger": "cat", "bat": "owl"}, {"tiger": "cat", "bat": "owl", "dog": "dog"}, {"cat", "dog", "owl"}),
        ({"tiger": "cat", "bat": "cat"}, {"tiger": "cat", "bat": "cat", "dog": "dog"}, {"cat", "dog"}),
        ({"tiger": "cat", "bat": ""}, {"tiger": "cat", "dog": "dog"}, {"cat", "dog"}),
        ({"tiger": "cat", "bat": "?"}, {"tiger": "cat", "bat": "dog", "dog": "dog"}, {"cat", "dog"}),
    ],
)
def test_categories_are_evaluated_as_the_classes_that_they_are(tmp_path, mapped, kinds, classes):
    with registered(tmp_path, night=NIGHT):
        cfg = load(tmp_path, *JOINED, "DATASETS.BNEXT.CLASS_MAP", repr([{"own_night": mapped}]))
        rehearse(cfg, build=build_evaluator)
        unlisted = [index for index, name in enumerate(NAMES) if name not in classes]
        results = evaluate(cfg, tmp_path, kinds, extra=unlisted)

    assert results["AP"] == pytest.approx(100)
    assert {name for name in results if name.startswith("AP-")} == {f"AP-{name}" for name in classes}
    assert not any(math.isnan(results[f"AP-{name}"]) for name in classes)


def test_what_is_none_of_the_classes_is_a_false_positive_and_what_is_undecided_is_not(tmp_path):
    kinds = {"tiger": "cat", "bat": "cat", "dog": "dog"}
    with registered(tmp_path, night=NIGHT):
        aps = []
        for answer in ("", "?"):
            mapped = repr([{"own_night": {"tiger": "cat", "bat": answer}}])
            cfg = load(tmp_path, *JOINED, "DATASETS.BNEXT.CLASS_MAP", mapped)
            aps.append(evaluate(cfg, tmp_path, kinds)["AP-cat"])
    assert aps[0] < aps[1] == pytest.approx(100)


def test_objects_that_are_not_mapped_are_refused(tmp_path):
    before = copy.deepcopy(NIGHT)
    with registered(tmp_path, night=NIGHT), pytest.raises(DatasetError, match="'bat', 'tiger'"):
        build_evaluator(load(tmp_path, *JOINED), "own_night", str(tmp_path))
    assert before == NIGHT
