"""Sets that are registered as a function: their records are checked as a file of annotations is."""

import copy

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from bnext.data.check_coco import check_datasets
from bnext.errors import DatasetError
from tests import tiny

NAME = "bnext_test_function"


@pytest.fixture
def check(digits, tmp_path):
    """Called with a change of the records, which may give others, and options of check_datasets."""
    records = copy.deepcopy(DatasetCatalog.get("digits_val"))

    def change_and_check(change, **options):
        changed = change(records)
        DatasetCatalog.register(NAME, lambda: records if changed is None else changed)
        check_datasets([NAME], num_classes=10, cfg=tiny.load(tmp_path, config=tiny.RCNN), **options)

    yield change_and_check
    DatasetCatalog.remove(NAME)
    MetadataCatalog.pop(NAME, None)


def first(**values):
    def change(records):
        records[0]["annotations"][0].update(values)

    return change


def drop(key):
    def change(records):
        del records[0]["annotations"][0][key]

    return change


def drop_all(key):
    def change(records):
        for record in records:
            del record[key]

    return change


def to_corners(records):
    for record in records:
        for annotation in record["annotations"]:
            x, y, width, height = annotation["bbox"]
            annotation.update(bbox=np.array([x, y, x + width, y + height]), bbox_mode=BoxMode.XYXY_ABS)


def leave(records):
    return None


@pytest.mark.parametrize("change", [leave, to_corners, first(bbox_mode=1), first(category_id=np.int64(9))])
def test_whole_records_pass(check, change):
    check(change)


REFUSED = {
    "nothing": (lambda records: [], "have an image"),
    "words": (lambda records: ["a"], "a dict for each image"),
    "no box": (drop("bbox"), "no bbox in annotation 0 of .*000001"),
    "no mode": (drop("bbox_mode"), "no bbox_mode"),
    "no class": (drop("category_id"), "no category_id"),
    "another mode": (first(bbox_mode=BoxMode.XYXY_REL), "XYXY_REL"),
    "a mode in words": (first(bbox_mode="XYXY"), "'XYXY'"),
    "a class too many": (first(category_id=10), "0 to 9.*got 10"),
    "a class in words": (first(category_id="1"), "got '1'"),
    "a box in words": (first(bbox=["1", 2, 3, 4]), "'1'"),
    "negative size": (first(bbox=[9, 9, -3, 3]), "negative size"),
    "a far polygon": (first(segmentation=[[0, 0, 1e9, 0, 9, 9]]), "far outside"),
    "no masks": (first(segmentation=None), "have a segmentation"),
    "a crowd in words": (first(iscrowd="0"), "iscrowd"),
    "no annotations": (drop_all("annotations"), "list `annotations`"),
    "annotations of one missing": (lambda records: records[1].pop("annotations") and None, "in 1 of 4"),
    "no file name in one": (lambda records: records[1].pop("file_name") and None, "have a file_name"),
    "a missing file": (lambda records: records[1].update(file_name="/nope/a.png"), "/nope/a.png"),
    "a width in words": (lambda records: records[1].update(width="64"), "width '64'"),
    "another size": (lambda records: records[1].update(width=63), "of another size"),
}


@pytest.mark.parametrize(("change", "message"), [pytest.param(*value, id=key) for key, value in REFUSED.items()])
def test_what_nothing_right_can_follow_from_is_refused(check, change, message):
    with pytest.raises(DatasetError, match=message) as caught:
        check(change)
    assert NAME in str(caught.value)


def test_classes_are_numbered_below_those_of_the_metadata(check):
    MetadataCatalog.get(NAME).thing_classes = ["a"]
    with pytest.raises(DatasetError, match="below the 1 of `thing_classes`"):
        check(first(category_id=1))


def test_a_test_set_needs_no_annotations_and_a_users_own_mapper_no_file_names(check):
    check(drop_all("annotations"), training=False)


def test_records_of_a_users_own_mapper_need_no_file_names(check):
    check(drop_all("file_name"))


def test_a_torch_data_set_is_passed_over(check):
    check(lambda records: torch.utils.data.TensorDataset(torch.zeros(3)))
