"""Batches that go once through data sets: which images come together, in which order, on which worker."""

import copy
import json

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from bnext.data.batches import (
    build_evaluation_batches,
    build_shuffled_batches,
    build_validation_batches,
    limit_loader_workers,
)
from bnext.data.records import load_records
from bnext.errors import ConfigError
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore:The given NumPy array is not writable:UserWarning")
ON = ("TEST.BNEXT.VALIDATION_LOSS.PERIOD", 2)


def list_files(loader):
    return [[record["file_name"] for record in batch] for batch in loader]


def strip(records):
    return [{key: value for key, value in record.items() if key != "annotations"} for record in records]


def test_shuffled_batches_are_of_one_data_set_in_an_order_that_is_always_the_same(digits, tmp_path):
    cfg = tiny.load(tmp_path, "SOLVER.IMS_PER_BATCH", 8)
    loader = build_shuffled_batches(cfg, ["digits_train", "digits_val"], domains=["a", "b"])
    batches = list_files(loader)
    assert batches == list_files(build_shuffled_batches(cfg, ["digits_train", "digits_val"]))

    assert [len(batch) for batch in batches] == [6, 4, 6]
    assert all("/val/" in name for name in batches[1])
    assert [batch[0]["domain"] for batch in loader] == ["a", "b", "a"]
    assert sorted(batches[0] + batches[2]) == sorted(r["file_name"] for r in DatasetCatalog.get("digits_train"))
    assert batches[0] != sorted(batches[0])


@pytest.mark.parametrize(("size", "sizes"), [(4, [4, 4, 4]), (11, [6, 6]), (5, [4, 4, 4]), (100, [12])])
def test_shuffled_batches_are_nearly_equal_and_the_last_is_no_single_image(digits, tmp_path, size, sizes):
    batches = list(build_shuffled_batches(tiny.load(tmp_path, "SOLVER.IMS_PER_BATCH", size), ["digits_train"]))
    assert [len(batch) for batch in batches] == sizes
    assert len({record["image_id"] for batch in batches for record in batch}) == 12


def test_shuffled_batches_of_several_data_sets_alternate_in_proportion(digits, tmp_path):
    loader = build_shuffled_batches(tiny.load(tmp_path, "SOLVER.IMS_PER_BATCH", 2), ["digits_train", "digits_val"])
    sets = ["val" if "/val/" in batch[0] else "train" for batch in list_files(loader)]
    assert sets == ["train", "val", "train", "train", "train", "val", "train", "train"]


def test_validation_batches_are_all_of_the_set_in_order_and_without_random_augmentation(digits, tmp_path):
    cfg = tiny.load(tmp_path, *ON, "SOLVER.IMS_PER_BATCH", 3, "INPUT.CROP.ENABLED", True)
    loader = build_validation_batches(cfg, "digits_val")
    first, again = list(loader), list(loader)
    assert [len(batch) for batch in first] == [3, 1]
    names = [record["file_name"] for batch in first for record in batch]
    assert names == [record["file_name"] for record in DatasetCatalog.get("digits_val")]
    for batch, other in zip(first, again, strict=True):
        assert all(torch.equal(a["image"], b["image"]) for a, b in zip(batch, other, strict=True))
        assert all(len(record["instances"]) for record in batch)

    cfg = tiny.load(tmp_path, *ON, "SOLVER.IMS_PER_BATCH", 2, "TEST.BNEXT.VALIDATION_LOSS.NUM_BATCHES", 1)
    assert list_files(build_validation_batches(cfg, "digits_val")) == [names[:2]]


def test_a_validation_loss_counts_objects_whose_iscrowd_is_null(digits, tmp_path):
    records = copy.deepcopy(DatasetCatalog.get("digits_val"))
    numbers = [len(record["annotations"]) for record in records]
    for record in records:
        for annotation in record["annotations"]:
            annotation["iscrowd"] = None

    DatasetCatalog.register("digits_null", lambda: records)
    try:
        batches = list(build_validation_batches(tiny.load(tmp_path), "digits_null"))
    finally:
        DatasetCatalog.remove("digits_null")
    assert [len(record["instances"]) for batch in batches for record in batch] == numbers
    assert all(each["iscrowd"] is None for each in records[0]["annotations"])


@pytest.fixture(params=["no key", "a COCO file"])
def no_labels(request, digits, tmp_path):
    """A registered data set, in whose records nothing is said of annotations, or that there are none."""
    records, name = strip(DatasetCatalog.get("digits_val")), "digits_no_labels"
    if request.param == "no key":
        DatasetCatalog.register(name, lambda: records)
    else:
        images = [{**record, "id": number} for number, record in enumerate(records)]
        content = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "0"}]}
        (tmp_path / "coco.json").write_text(json.dumps(content))
        register_coco_instances(name, {}, str(tmp_path / "coco.json"), "")
        assert all(record["annotations"] == [] for record in DatasetCatalog.get(name))

    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.pop(name, None)


def test_images_without_labels_are_refused_where_labels_are_needed(no_labels, tmp_path):
    with pytest.raises(ConfigError, match="got 'digits_no_labels'"):
        build_validation_batches(tiny.load(tmp_path, *ON), no_labels)
    with pytest.raises(ConfigError, match=r"got 'digits_no_labels'.*PRECISE_BN\.ROIS"):
        build_shuffled_batches(tiny.load(tmp_path), [no_labels], labelled=True)


def test_images_for_semantic_segmentation_are_labelled(digits, tmp_path):
    records = [{**record, "sem_seg_file_name": "0.png"} for record in strip(DatasetCatalog.get("digits_val"))]
    DatasetCatalog.register("digits_semantic", lambda: records)
    try:
        assert build_validation_batches(tiny.load(tmp_path, *ON), "digits_semantic")
    finally:
        DatasetCatalog.remove("digits_semantic")


@pytest.mark.parametrize(
    ("number", "images_per_batch", "sizes"), [(5, 2, [1, 2, 2]), (4, 4, [4]), (3, 1, [1, 1, 1]), (0, 2, [])]
)
def test_evaluation_batches_are_a_workers_share_in_order(digits, tmp_path, number, images_per_batch, sizes):
    cfg = tiny.load(tmp_path)
    records = load_records("digits_train", cfg)
    loader = build_evaluation_batches(cfg, records, range(1, 2 * number, 2), images_per_batch)
    batches = list_files(loader)
    assert [len(batch) for batch in batches] == sizes
    assert len(loader) == len(sizes)
    assert sum(batches, []) == [record["file_name"] for record in records[1 : 2 * number : 2]]


def test_loaders_leave_the_global_random_numbers_alone(digits, tmp_path):
    cfg = tiny.load(tmp_path)
    before = torch.get_rng_state()
    list(build_shuffled_batches(cfg, ["digits_val"]))
    assert torch.equal(torch.get_rng_state(), before)


def test_loading_processes_share_the_cores(monkeypatch):
    monkeypatch.setattr("bnext.data.batches.count_cores", lambda: 8)
    monkeypatch.setattr("bnext.data.batches.comm.get_local_size", lambda: 3)
    assert [limit_loader_workers(wanted) for wanted in (0, 1, 4)] == [0, 1, 2]


def test_workers_share_each_batch_and_none_is_without(digits, tmp_path, monkeypatch):
    cfg = tiny.load(tmp_path, *ON, "SOLVER.IMS_PER_BATCH", 11)
    alone = list_files(build_validation_batches(cfg, "digits_train"))
    monkeypatch.setattr("bnext.data.batches.comm.get_world_size", lambda: 2)
    shuffled, validation = [], []
    for rank in range(2):
        monkeypatch.setattr("bnext.data.batches.comm.get_rank", lambda rank=rank: rank)
        shuffled.append(list_files(build_shuffled_batches(cfg, ["digits_train"])))
        validation.append(list_files(build_validation_batches(cfg, "digits_train")))

    assert [[len(batch) for batch in batches] for batches in shuffled] == [[6], [5]]  # the twelfth image is left out
    assert [[len(batch) for batch in batches] for batches in validation] == [[6, 1], [5]]
    assert sorted(validation[0][0] + validation[1][0]) == alone[0]
