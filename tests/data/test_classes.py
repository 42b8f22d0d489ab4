"""Class indices mean the same in training and test, or it is said before a training."""

import pytest

from bnext.data.batches import build_validation_batches
from bnext.data.classes import find_trained_classes, match_classes, place_categories, relabel_records
from bnext.data.records import load_records, load_train_records
from bnext.errors import DatasetError
from tests.evaluation.own_sets import NAMES, load, make_set, registered, renumber

VAL = make_set(2)
NIGHT = renumber(VAL, (3, 1, 2), ("tiger", "dog", "bat"))  # numbered as dog, bat, tiger
JOINED = ("DATASETS.TRAIN", "('own_train', 'own_night')", "DATASETS.BNEXT.CLASSES", "('cat', 'dog', 'owl')")


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


@pytest.mark.parametrize(
    ("mapped", "annotated", "left"),
    [
        ({"tiger": "cat", "bat": "owl"}, None, {0, 1, 2}),
        ({"tiger": "cat", "bat": "cat"}, [0, 1], {0, 1}),
        ({"tiger": "cat", "bat": ""}, [0, 1], {0, 1}),
        ({"tiger": "", "bat": "?"}, [1], {1}),
    ],
)
def test_records_say_which_classes_their_set_annotates(tmp_path, mapped, annotated, left):
    with registered(tmp_path, val=VAL, night=NIGHT):
        cfg = load(tmp_path, *JOINED, "DATASETS.BNEXT.CLASS_MAP", repr([{"own_night": mapped}]))
        before = load_records("own_night", cfg)
        records = [record for record in load_train_records(cfg) if record["dataset_source"] == 1]
        assert place_categories(cfg, "own_night").is_partial == (annotated is not None)

    names = ("dog", "bat", "tiger")
    for old, record in zip(before, records, strict=True):
        kinds = [mapped.get(names[each["category_id"]], "dog") for each in old["annotations"]]
        classes = [NAMES.index(kind) for kind in kinds if kind in NAMES]
        assert [each["category_id"] for each in record["annotations"]] == classes
        assert set(classes) <= left
        assert record.get("annotated_classes") == annotated
        assert len(record.get("ignored_boxes", ())) == kinds.count("?")
    x, y, width, height = next(each["bbox"] for each in before[0]["annotations"] if names[each["category_id"]] == "bat")
    if "?" in mapped.values():
        assert records[0]["ignored_boxes"][0] == [x, y, x + width, y + height]


def test_an_image_that_loses_all_objects_is_none_to_train_on(tmp_path):
    one = {
        **NIGHT,
        "annotations": [each for each in NIGHT["annotations"] if each["id"] % 3 == 1 or each["image_id"] > 1],
    }
    lost = {1: "dog", 2: "bat", 3: "tiger"}[one["annotations"][0]["category_id"]]
    mapped = {"tiger": "cat", "bat": "owl", "dog": "dog", lost: ""}
    with registered(tmp_path, val=VAL, night=one):
        cfg = load(tmp_path, *JOINED, "DATASETS.BNEXT.CLASS_MAP", repr([{"own_night": mapped}]))
        assert [each["image_id"] for each in load_train_records(cfg) if each["dataset_source"] == 1] == [2, 3, 4]


def test_a_records_own_classes_are_those_of_its_set(tmp_path):
    records = [{"image_id": 1, "annotated_classes": [0, 2], "ignored_boxes": [[1, 2, 3, 4]], "annotations": []}]
    with registered(tmp_path, val=VAL, night=NIGHT):
        cfg = load(tmp_path, *JOINED, "DATASETS.BNEXT.CLASS_MAP", "[{own_night: {tiger: cat, bat: owl}}]")
        (record,) = relabel_records(cfg, "own_night", records)  # its dog and its tiger
    assert record["annotated_classes"] == [0, 1]
    assert record["ignored_boxes"] == [[1, 2, 3, 4]]
