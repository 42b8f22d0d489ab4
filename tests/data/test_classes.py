"""Class indices mean the same in training and test, or it is said before a training."""

import pytest

from bnext.data.batches import build_validation_batches
from bnext.data.classes import find_trained_classes, match_classes, relabel_records
from bnext.data.records import load_records
from bnext.errors import DatasetError
from tests.evaluation.own_sets import NAMES, load, make_set, registered, renumber

VAL = make_set(2)


def test_names_are_matched_one_by_one():
    assert match_classes(NAMES, NAMES) == [0, 1, 2]
    assert match_classes(("a", "a", "b"), ("a", "a", "b")) == [0, 1, 2], "as they are, if they are equal"
    assert match_classes(("a", "a", "b"), ("b", "a")) == [2, None], "two of one name cannot be told apart"
    assert match_classes(("Cat", "cat"), ("cat", "CAT")) == [1, None]


def test_the_classes_of_another_set_than_the_trained_one_are_not_the_models(tmp_path):
    with registered(tmp_path, val=VAL):
        assert find_trained_classes(load(tmp_path)) == NAMES
        assert find_trained_classes(load(tmp_path, "MODEL.RETINANET.NUM_CLASSES", 2)) is None
        assert find_trained_classes(load(tmp_path, "DATASETS.TRAIN", "('not_registered',)")) is None
        assert find_trained_classes(load(tmp_path, "DATASETS.TRAIN", "()")) is None


def test_a_validation_loss_has_the_class_indices_of_the_training(tmp_path):
    with registered(tmp_path, val=renumber(VAL, (3, 1, 2)), same=VAL, other=renumber(VAL, (1, 2, 3), ("a", "b", "c"))):
        cfg = load(tmp_path)
        records = load_records("own_val", cfg)
        before = [each["category_id"] for each in records[0]["annotations"]]
        relabelled = relabel_records(cfg, "own_val", records)
        labels = [each["category_id"] for each in relabelled[0]["annotations"]]
        assert labels == [each["category_id"] - 1 for each in VAL["annotations"][:3]] != before
        assert [each["category_id"] for each in records[0]["annotations"]] == before

        same = load_records("own_same", cfg)
        assert relabel_records(cfg, "own_same", same) is same
        with pytest.raises(DatasetError, match="own_other"):
            build_validation_batches(cfg, "own_other")
