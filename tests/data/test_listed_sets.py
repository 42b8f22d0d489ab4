"""Data sets that a config lists: checked, found, registered in the place of another config's, and refused."""

import json

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from bnext.data.check_coco import check_datasets
from bnext.data.classes import read_classes
from bnext.data.listed_sets import KEY, check_listed_sets, current_sets, register_sets
from bnext.data.records import load_records
from bnext.errors import BNextError, ConfigError, DatasetError
from tests import tiny
from tests.evaluation.own_sets import NAMES, make_set

ENTRY = {"name": "mine_train", "json": "mine/train.json", "folder": "mine"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with a set of its own; afterwards no config's sets are registered."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "root"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/train.json").write_text(json.dumps(make_set()))
    yield tmp_path
    register_sets([])


def load(folder, *entries, opts=(), config=tiny.CONFIG):
    return tiny.load(folder / "output", KEY, list(entries), *opts, config=config)


@pytest.mark.parametrize(
    ("listed", "words"),
    [
        (["a"], "'a'"),
        ([ENTRY, 3], "entry 2 of 2"),
        ([{**ENTRY, "jsno": "a"}], "Did you mean json?"),
        ([{**ENTRY, "image_root": "a"}], "Did you mean folder?"),
        ([{**ENTRY, "colour": "a"}], "'colour'"),
        ([{"name": "a", "folder": "b"}], "no json"),
        ([{**ENTRY, "json": 3}], "json in"),
        ([{**ENTRY, "name": ""}], "name in"),
        ([{**ENTRY, "domain": None}], "domain in"),
        ([ENTRY, {**ENTRY, "json": "other.json"}], "'mine_train' for two"),
        ([{**ENTRY, "name": "digits_val"}], "'digits_val', which is registered already"),
        ([{**ENTRY, "name": "coco_2017_val"}], "'coco_2017_val', which is registered already"),
    ],
)
def test_a_list_that_names_no_sets_is_refused(folder, listed, words):
    with pytest.raises(ConfigError) as refused:
        load(folder, *listed)
    assert KEY in str(refused.value)
    assert words in str(refused.value)
    assert current_sets() == []


def test_an_equal_entry_may_be_repeated():
    check_listed_sets([ENTRY, dict(ENTRY)])


@pytest.mark.parametrize(
    "value", [f"[{json.dumps(ENTRY)}]", "[{name: mine_train, json: mine/train.json, folder: mine}]"]
)
def test_pairs_of_a_command_line_list_sets_as_python_and_as_yaml_do(folder, value):
    assert tiny.load(folder, KEY, value).DATASETS.BNEXT.COCO == [ENTRY]
    assert read_classes("mine_train") == NAMES
    assert len(load_records("mine_train", load(folder, ENTRY))) == 4


def test_paths_are_those_of_the_working_directory_or_of_all_data_sets(folder):
    (folder / "root/far").mkdir(parents=True)
    (folder / "root/far/train.json").write_text("{}")
    (folder / "root/mine").mkdir()
    load(
        folder, ENTRY, {"name": "far", "json": "far/train.json", "folder": "far"}, {**ENTRY, "name": "no", "json": "a"}
    )

    files = [(entry.json_file, entry.image_root) for entry in current_sets()]
    near, far = folder / "mine", folder / "root/far"
    expected = [(near / "train.json", near), (far / "train.json", far), (folder / "a", near)]
    assert files == [tuple(map(str, pair)) for pair in expected]
    with pytest.raises(DatasetError, match=str(folder / "a")):
        check_datasets(["no"])


def test_a_config_sees_its_own_sets_alone(folder):
    """Also one that is used again after another: with whatever was set of its sets."""
    (folder / "mine/other.json").write_text(json.dumps(make_set(num_images=2)))
    first = load(folder, {**ENTRY, "domain": "day"}, {**ENTRY, "name": "mine_val"})
    MetadataCatalog.get("mine_train").set(mark=7)

    second = load(folder, {**ENTRY, "json": "mine/other.json"})
    assert len(load_records("mine_train", second)) == 2
    assert "mine_val" not in DatasetCatalog
    assert MetadataCatalog.get("mine_train").domain == ""

    assert len(load_records("mine_train", first)) == 4
    metadata = MetadataCatalog.get("mine_train")
    assert (metadata.domain, metadata.mark, metadata.thing_classes) == ("day", 7, list(NAMES))
    with pytest.raises(BNextError, match="mine_val"):
        load_records("mine_val", second)


def test_keypoints_are_named_by_the_file(folder):
    content = make_set()
    content["categories"][0]["keypoints"] = ["nose", "left_eye", "right_eye"]
    (folder / "mine/train.json").write_text(json.dumps(content))
    keys = ("MODEL.KEYPOINT_ON", True, "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 3)
    cfg = load(folder, ENTRY, opts=keys, config=tiny.RCNN)

    assert MetadataCatalog.get("mine_train").keypoint_names == ["nose", "left_eye", "right_eye"]
    assert MetadataCatalog.get("mine_train").keypoint_flip_map == [("left_eye", "right_eye")]
    check_datasets(["mine_train"], cfg=cfg, check_images=False)
