"""The classes of a config are checked before a training: each fault names the key, the set and the category."""

import pytest

from bnext.data.check_classes import check_class_map, check_classes
from bnext.errors import BNextError, ConfigError, DatasetError
from tests.evaluation.own_sets import load, make_set, registered, renumber

VAL = make_set(2)
NIGHT = renumber(VAL, (3, 1, 2), ("tiger", "dog", "bat"))
BOTH = ("DATASETS.TRAIN", "('own_train', 'own_night')")
JOINED = (*BOTH, "DATASETS.BNEXT.CLASSES", "('cat', 'dog', 'owl')")


def map_night(**mapped):
    return ("DATASETS.BNEXT.CLASS_MAP", repr([{"own_night": mapped}]))


@pytest.mark.parametrize(("number", "kind"), [(10, ConfigError), (2, BNextError)])
def test_the_number_of_classes_is_the_trainings(tmp_path, number, kind):
    with registered(tmp_path, val=VAL):
        cfg = load(tmp_path, "MODEL.RETINANET.NUM_CLASSES", number)
        with pytest.raises(kind, match="NUM_CLASSES must be 3"):
            check_classes(cfg)
        check_classes(cfg, is_new=False)


def test_the_number_of_joint_classes_is_the_models(tmp_path):
    with registered(tmp_path, val=VAL):
        cfg = load(tmp_path, "DATASETS.BNEXT.CLASSES", "('cat', 'dog', 'owl', 'bat')")
        for check in (check_classes, check_class_map):  # of a training, of an evaluation
            with pytest.raises(ConfigError, match="NUM_CLASSES must be 4"):
                check(cfg)


def test_without_joint_classes_the_whole_difference_is_listed(tmp_path):
    with registered(tmp_path, val=VAL, night=NIGHT, other=renumber(VAL, (3, 1, 2))):
        with pytest.raises(ConfigError, match=r"CLASSES: \['cat', 'dog', 'owl', 'bat', 'tiger'\]") as error:
            check_classes(load(tmp_path, *BOTH))
        assert "only in 'own_train': 'cat', 'owl'; only in 'own_night': 'bat', 'tiger'" in str(error.value)

        order = load(tmp_path, "DATASETS.TRAIN", "('own_train', 'own_other')")
        with pytest.raises(ConfigError, match="another order in 'own_train' than in 'own_other'"):
            check_classes(order)
        check_classes(load(tmp_path, "DATASETS.TRAIN", "('own_train', 'own_val')"))
        check_classes(load(tmp_path, "DATASETS.TRAIN", "('own_train', 'own_other')", *JOINED[2:]))


def test_every_category_is_a_class_or_mapped(tmp_path):
    with registered(tmp_path, val=VAL, night=NIGHT):
        with pytest.raises(ConfigError, match="'bat', 'tiger' in 'own_night'"):
            check_classes(load(tmp_path, *JOINED))
        with pytest.raises(ConfigError, match="'bat' in 'own_night'"):
            check_classes(load(tmp_path, *JOINED, *map_night(tiger="cat")))
        check_classes(load(tmp_path, *JOINED, *map_night(tiger="cat", bat="")))
        check_classes(load(tmp_path, *JOINED, *map_night(tiger="cat", bat="?")))


@pytest.mark.parametrize(
    ("mapped", "named", "nearest"),
    [({"tigre": "cat"}, "tigre", "tiger"), ({"tiger": "kat"}, "kat", "cat"), ({"tiger": "whale"}, "whale", "")],
)
def test_a_slip_in_the_map_is_told_with_the_nearest_name(tmp_path, mapped, named, nearest):
    with registered(tmp_path, val=VAL, night=NIGHT), pytest.raises(ConfigError, match=named) as error:
        check_class_map(load(tmp_path, *JOINED, *map_night(**mapped)))
    assert nearest in str(error.value)


def test_a_set_in_the_map_is_registered(tmp_path):
    with registered(tmp_path, val=VAL, night=NIGHT), pytest.raises(ConfigError, match="own_nihgt"):
        check_class_map(load(tmp_path, *JOINED, "DATASETS.BNEXT.CLASS_MAP", "[{own_nihgt: {tiger: cat}}]"))


def test_a_set_without_names_cannot_be_joined(tmp_path):
    from detectron2.data import MetadataCatalog

    with registered(tmp_path, val=VAL, night=lambda: []):
        del MetadataCatalog.get("own_night").thing_classes
        with pytest.raises(DatasetError, match="own_night"):
            check_classes(load(tmp_path, *JOINED))


def test_a_class_that_no_set_annotates_is_said(tmp_path, bnext_log):
    with registered(tmp_path, val=VAL):
        check_classes(load(tmp_path, *JOINED[2:3], "('cat', 'dog', 'owl', 'yak')", "MODEL.RETINANET.NUM_CLASSES", 4))
    assert "'yak'" in bnext_log.text


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("CLASSES", "[1, 2, 3]"),
        ("CLASSES", "['a', 'b', 'a']"),
        ("CLASSES", "['a', '?']"),
        ("CLASS_MAP", "[1]"),
        ("CLASS_MAP", "[{own_night: tiger}]"),
        ("CLASS_MAP", "[{own_night: {1: cat}}]"),
        ("CLASS_MAP", "[{own_night: {tiger: null}}]"),
        ("CLASS_MAP", "[{own_night: {tiger: cat}}, {own_night: {tiger: dog}}]"),
    ],
)
def test_a_value_of_another_form_is_refused(tmp_path, key, value):
    with pytest.raises(ConfigError, match=f"DATASETS.BNEXT.{key} must"):
        load(tmp_path, f"DATASETS.BNEXT.{key}", value)
