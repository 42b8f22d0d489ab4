"""The catalog entries of the digits set, and its preparation on first use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from bnext.data.catalog import datasets_root, ensure_digits, register_datasets
from bnext.data.digits import CLASSES, prepare_digits
from bnext.data.digits_images import DigitsRecipe
from bnext.errors import DatasetError

NAMES = ("digits_train", "digits_val")
SMALL = DigitsRecipe(num_train=5, num_val=2)


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """DETECTRON2_DATASETS is an empty folder; afterwards the entries are where they were."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    register_datasets()
    yield tmp_path
    monkeypatch.undo()  # what the test has set, too
    register_datasets()


def test_root_is_detectron2s(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert datasets_root() == root
    monkeypatch.setenv("DETECTRON2_DATASETS", "~/sets")
    assert datasets_root() == Path.home() / "sets"
    monkeypatch.delenv("DETECTRON2_DATASETS")
    assert datasets_root() == Path("datasets")


def test_metadata_is_known_before_the_set_is_there(root: Path) -> None:
    for name, split in zip(NAMES, ("train", "val"), strict=True):
        metadata = MetadataCatalog.get(name)
        assert metadata.thing_classes == list(CLASSES)
        assert metadata.evaluator_type == "coco"
        assert metadata.json_file == str(root / "digits" / "annotations" / f"instances_{split}.json")
        assert metadata.image_root == str(root / "digits" / split)


def test_entries_follow_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = MetadataCatalog.get("digits_val")
    register_datasets()
    assert MetadataCatalog.get("digits_val") is metadata  # the second call changes nothing
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "elsewhere"))
    register_datasets()
    assert MetadataCatalog.get("digits_val").json_file.startswith(str(tmp_path / "elsewhere"))
    prepare_digits(tmp_path / "elsewhere", SMALL, progress=False)
    assert len(DatasetCatalog.get("digits_val")) == 2


def test_a_users_entry_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = DatasetCatalog.pop("digits_val"), MetadataCatalog.pop("digits_val")
    try:
        DatasetCatalog.register("digits_val", list)
        MetadataCatalog.get("digits_val").set(thing_classes=["mine"])

        register_datasets()
        assert DatasetCatalog["digits_val"] is list
        assert MetadataCatalog.get("digits_val").thing_classes == ["mine"]
    finally:
        DatasetCatalog["digits_val"], MetadataCatalog["digits_val"] = ours


def test_detectron2_loads_the_set(root: Path) -> None:
    prepare_digits(root, SMALL, progress=False)
    records = DatasetCatalog.get("digits_train")

    assert [record["image_id"] for record in records] == [1, 2, 3, 4, 5]
    for record in records:
        assert os.path.isfile(record["file_name"])
        assert (record["height"], record["width"]) == (128, 128)
        assert record["annotations"]
        assert all(0 <= a["category_id"] < 10 for a in record["annotations"])
    assert MetadataCatalog.get("digits_train").thing_dataset_id_to_contiguous_id == {k + 1: k for k in range(10)}


def test_ensure_digits_uses_what_is_there_and_refuses_what_is_broken(root: Path) -> None:
    folder = prepare_digits(root, SMALL, progress=False)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert ensure_digits(progress=False) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    (folder / "val" / "000002.png").unlink()
    with pytest.raises(DatasetError, match="--overwrite"):
        ensure_digits(progress=False)


def test_ensure_digits_makes_the_set_and_moves_the_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "new"))
    assert ensure_digits(progress=False) == tmp_path / "new" / "digits"
    assert len(DatasetCatalog.get("digits_train")) == 1000
    assert len(DatasetCatalog.get("digits_val")) == 200
