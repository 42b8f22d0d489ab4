"""Records of registered data sets; a set that cannot be used is named."""

import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog

from bnext.data import records
from bnext.data.records import check_registered, load_records, load_train_records
from bnext.errors import DatasetError

RECORDS = [{"file_name": "a.png", "image_id": 1}]


@pytest.fixture
def register():
    names = []

    def add(name, load):
        DatasetCatalog.register(name, load)
        names.append(name)

    yield add
    for name in names:
        DatasetCatalog.remove(name)


def divide_by_zero():
    return 1 / 0


@pytest.mark.parametrize(
    ("load", "message"),
    [(list, "have an image"), (divide_by_zero, "ZeroDivisionError"), (lambda: ["a.png"], "entries of type str")],
)
def test_a_set_that_gives_no_records_is_refused(register, load, message):
    register("bnext_test_odd", load)
    with pytest.raises(DatasetError, match=f"'bnext_test_odd'.*{message}"):
        load_records("bnext_test_odd", get_cfg())


def raise_key_error():
    raise KeyError("label\nmap")


@pytest.mark.parametrize("load", [lambda cfg: load_records(cfg.DATASETS.TRAIN[0], cfg), load_train_records])
def test_a_set_whose_function_raises_is_named_with_what_it_raises(register, load):
    register("bnext_test_odd", raise_key_error)
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = ("bnext_test_odd",)
    with pytest.raises(DatasetError, match=r"'bnext_test_odd' must be readable; got KeyError.*the function"):
        load(cfg)


def test_sets_whose_classes_differ_are_not_said_to_be_empty(register):
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = ("bnext_test_cats", "bnext_test_dogs")
    for name in cfg.DATASETS.TRAIN:
        register(name, lambda: [{**RECORDS[0], "annotations": [{"category_id": 0}]}])
        MetadataCatalog.get(name).thing_classes = [name]

    try:
        with pytest.raises(
            DatasetError, match=r"'bnext_test_cats', 'bnext_test_dogs'.*the same for all.*thing_classes"
        ):
            load_train_records(cfg)
    finally:
        for name in cfg.DATASETS.TRAIN:
            MetadataCatalog.remove(name)


def test_a_worker_is_told_where_to_register(monkeypatch):
    monkeypatch.setattr("multiprocessing.parent_process", lambda: "the launcher")
    with pytest.raises(DatasetError, match=r"'bnext_test_odd'.*top level.*__main__"):
        check_registered("bnext_test_odd")


@pytest.mark.parametrize("is_mentioned", [True, False])
def test_a_typo_is_not_taken_for_a_registration_in_main(monkeypatch, is_mentioned):
    monkeypatch.setattr(records, "list_imported", lambda: ["my_module"])
    monkeypatch.setattr(records, "mentions", lambda module, name: is_mentioned)
    with pytest.raises(DatasetError, match="after the import of my_module") as caught:
        check_registered("bnext_test_odd")
    assert ("Correct the name" in str(caught.value)) != is_mentioned


def test_a_name_that_is_not_registered_is_refused():
    with pytest.raises(DatasetError, match="be registered; got 'bnext_test_odd'"):
        load_records("bnext_test_odd", get_cfg())


def test_each_test_set_has_proposals_of_its_own(register, monkeypatch):
    names, seen = ("bnext_test_first", "bnext_test_second"), []
    for name in names:
        register(name, lambda: RECORDS)
    monkeypatch.setattr(records, "get_detection_dataset_dicts", lambda *_, **options: seen.append(options) or RECORDS)
    cfg = get_cfg()
    cfg.MODEL.LOAD_PROPOSALS, cfg.DATASETS.TEST, cfg.DATASETS.PROPOSAL_FILES_TEST = True, names, ("1.pkl", "2.pkl")

    for name in names:
        load_records(name, cfg)
    assert [options["proposal_files"] for options in seen] == [["1.pkl"], ["2.pkl"]]
