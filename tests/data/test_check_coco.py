"""What is wrong with a data set is named before training: the thing, the file, the remedy."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

import bnext.data.check_coco
from bnext.config import add_bnext_config
from bnext.data.catalog import register_datasets
from bnext.data.check_coco import check_datasets
from bnext.data.digits import prepare_digits
from bnext.data.digits_images import DigitsRecipe
from bnext.errors import DatasetError

Edit = Callable[[dict], object]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_digits(tmp_path_factory.mktemp("datasets"), DigitsRecipe(num_train=6, num_val=3), progress=False)


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "digits"))


@pytest.fixture(autouse=True)
def registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """digits_* under this test's folder; `own` is the same files as a user registers them."""
    with monkeypatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(tmp_path))
        register_datasets()
        annotations = tmp_path / "digits" / "annotations" / "instances_train.json"
        register_coco_instances("own", {}, str(annotations), str(tmp_path / "digits" / "train"))
        yield

    DatasetCatalog.remove("own")
    MetadataCatalog.remove("own")
    register_datasets()


def edit(folder: Path, change: Edit) -> Path:
    """Apply `change` to the training annotations; their file."""
    path = folder / "annotations" / "instances_train.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return path


def test_whole_sets_pass(folder: Path) -> None:
    check_datasets(["digits_train", "digits_val", "own"], num_classes=10)
    check_datasets(["digits_val"], num_classes=80, training=False)


def test_a_name_that_is_not_registered() -> None:
    with pytest.raises(DatasetError, match=r"'digits_trian'.*nearest: digits_train"):
        check_datasets(["digits_trian"])


def test_sets_of_other_kinds_are_passed_over() -> None:
    check_datasets(["lvis_v1_val", "cityscapes_fine_instance_seg_train"])


def test_missing_sets_name_how_to_get_them(tmp_path: Path) -> None:
    command = f"python datasets/prepare_digits.py {tmp_path}`"
    with pytest.raises(DatasetError, match=re.escape(command)):
        check_datasets(["digits_train"])
    with pytest.raises(DatasetError, match=r"instances_val2017\.json\).*datasets/README\.md"):
        check_datasets(["coco_2017_val"])


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_set_that_lost_its_annotations_is_made_anew_with_overwrite(folder: Path, split: str) -> None:
    path = folder / "annotations" / f"instances_{split}.json"
    path.unlink()
    with pytest.raises(DatasetError, match=f"{re.escape(str(path))}.*--overwrite"):
        check_datasets([f"digits_{split}"])


@pytest.mark.parametrize("share", [0, 0.5, 0.999])
def test_truncated_annotations_name_the_place(folder: Path, share: float) -> None:
    path = folder / "annotations" / "instances_train.json"
    whole = path.read_text().rstrip()
    path.write_text(whole[: int(len(whole) * share)])
    with pytest.raises(DatasetError, match=rf"line \d+ column \d+.*{re.escape(str(path))}"):
        check_datasets(["digits_train"])


def test_annotations_that_cannot_be_read(folder: Path) -> None:
    path = folder / "annotations" / "instances_train.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DatasetError, match="JSON in UTF-8"):
        check_datasets(["own"])
    path.unlink()
    path.mkdir()
    with pytest.raises(DatasetError, match="be readable"):
        check_datasets(["own"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("images"), "'images'"),
        (lambda c: c.update(images={}), "list of objects 'images'"),
        (lambda c: c.update(annotations=[1, 2]), "list of objects 'annotations'"),
        (lambda c: c.update(images=[], annotations=[]), "images and categories"),
        (lambda c: c["images"][2].pop("file_name"), "'file_name'.*entry 2"),
        (lambda c: c["images"][0].update(height="128"), "'height'.*entry 0"),
        (lambda c: c["annotations"][1].update(image_id=[1]), r"'image_id'; got \[1\] in entry 1"),
        (lambda c: c["annotations"][3].update(image_id=777), "image of the file.*ids 4 "),
        (lambda c: c["annotations"][0].update(category_id=11), "category_id.*got 11 "),
        (lambda c: c["annotations"][0].update(category_id="1"), "category_id.*got '1' "),
        (lambda c: c["annotations"][0].update(ignore=1), "'ignore'.*ids 1 "),
        (lambda c: c["categories"][1].update(name="0"), "'0' more than once"),
        (lambda c: c["images"][0].update(id="1"), "all numbers, or all words|image of the file"),
        (lambda c: c["images"][0].update(width=float("nan")), "width.*NaN in 000001.png"),
        (lambda c: c["images"][0].update(width=10**400), "width and height.*inf"),
        (lambda c: c["images"][0].update(width=-1), "width and height"),
        (lambda c: c["annotations"][0].update(bbox=[5, 5, -3, 9]), "negative size"),
        (lambda c: c["annotations"][0].update(iscrowd="0"), "iscrowd.*'0' in 1 of"),
        (lambda c: c["categories"].pop(c["annotations"][0]["category_id"] - 1), "one of the 9 categories"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, 3]), r"bbox.*got \[1, 2, 3\] in annotation 1"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, 3, float("nan")]), "bbox"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, "3", 4]), "bbox"),
        (lambda c: c["annotations"][1].update(id=1), "ids of 'annotations'.*got 1 "),
        (lambda c: c["images"][1].update(id=1), "ids of 'images'"),
        (lambda c: c.update(annotations=[]), "must not be empty"),
        (lambda c: c.pop("annotations"), "must not be empty"),
        (lambda c: [a.update(iscrowd=1) for a in c["annotations"]], "to train on"),
        (lambda c: [a.update(bbox=[5, 5, 0, 9]) for a in c["annotations"]], "to train on"),
    ],
)
def test_contents_that_contradict_themselves(folder: Path, change: Edit, message: str) -> None:
    path = edit(folder, change)
    with pytest.raises(DatasetError, match=message) as caught:
        check_datasets(["own"])
    assert "'own'" in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_file_that_is_no_object(folder: Path) -> None:
    (folder / "annotations" / "instances_train.json").write_text("[1]")
    with pytest.raises(DatasetError, match="COCO format"):
        check_datasets(["own"])


@pytest.mark.parametrize(
    ("text", "message"),
    [("\ufeff{}", "without a byte order mark"), ("[" * 100_000, "RecursionError"), (f"[{'9' * 5000}]", "ValueError")],
)
def test_json_that_cannot_be_parsed(folder: Path, text: str, message: str) -> None:
    (folder / "annotations" / "instances_train.json").write_text(text)
    with pytest.raises(DatasetError, match=message):
        check_datasets(["own"])


def test_a_pipe_is_not_waited_for(folder: Path) -> None:
    path = folder / "annotations" / "instances_train.json"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DatasetError, match="no regular file"):
        check_datasets(["own"])


def test_ids_may_be_words(folder: Path) -> None:
    def name(content: dict) -> None:
        for image in content["images"]:
            image["id"] = f"image {image['id']}"
        for category in content["categories"]:
            category["id"] = str(category["id"])
        for annotation in content["annotations"]:
            annotation["image_id"] = f"image {annotation['image_id']}"
            annotation["category_id"] = str(annotation["category_id"])

    edit(folder, name)
    check_datasets(["own"])


def test_what_the_evaluators_copy_mends_is_not_refused_in_a_test_set(folder: Path) -> None:
    def spoil(content: dict) -> None:
        for number, annotation in enumerate(content["annotations"]):
            annotation.pop("area") if number % 2 else annotation.update(area=None, iscrowd=None)

    edit(folder, spoil)
    check_datasets(["own"], training=False)
    with pytest.raises(DatasetError, match="iscrowd.*got None"):
        check_datasets(["own"])


def test_notices_are_said_once_for_each_set(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit(folder, lambda c: c["annotations"][2].update(bbox=[100, 3, 60, 9]))
    with caplog.at_level(logging.WARNING, logger="bnext.data.check_coco"):
        for name in ("own", "own", "digits_train"):
            check_datasets([name])
    said = [record.getMessage() for record in caplog.records if "reach beyond" in record.getMessage()]
    assert len(said) == 2
    assert "annotations 3 " in said[0]


def test_keypoints_need_names_in_the_metadata(folder: Path) -> None:
    cfg = get_cfg()
    add_bnext_config(cfg)
    cfg.MODEL.KEYPOINT_ON, cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = True, 2
    edit(folder, lambda c: [a.update(keypoints=[1, 2, 2, 3, 4, 2]) for a in c["annotations"]])
    with pytest.raises(DatasetError, match="keypoint_names"):
        check_datasets(["own"], cfg=cfg)
    MetadataCatalog.get("own").set(keypoint_names=["a", "b"], keypoint_flip_map=[("a", "b")])
    check_datasets(["own"], cfg=cfg)


def test_a_broken_picture_is_named(folder: Path) -> None:
    path = folder / "train" / "000002.png"
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(DatasetError, match=re.escape(str(path))):
        check_datasets(["own"])
    check_datasets(["own"], check_images=False)


def test_annotations_may_be_absent_from_a_test_set_only(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit(folder, lambda c: c.pop("annotations"))
    with caplog.at_level(logging.WARNING, logger="bnext.data.check_coco"):
        check_datasets(["own"], training=False)
    assert "6 of 6 images of data set 'own' have no annotations" in caplog.text
    edit(folder, lambda c: c.update(annotations=[]))
    with pytest.raises(DatasetError, match="must not be empty"):
        check_datasets(["own"], training=False)


def test_boxes_without_area_are_reported(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit(folder, lambda c: c["annotations"][2].update(bbox=[3, 3, 1.03, 0]))
    with caplog.at_level(logging.WARNING, logger="bnext.data.check_coco"):
        check_datasets(["own"])
    assert re.search(r"1 of \d+ boxes of data set 'own' have no area.*annotation ids 3 ", caplog.text)


def test_more_categories_than_the_head_has_classes(folder: Path) -> None:
    with pytest.raises(DatasetError, match=r"NUM_CLASSES"):
        check_datasets(["digits_train"], num_classes=9)


def test_a_test_set_may_list_more_categories_as_they_are_found_by_name(folder: Path) -> None:
    cfg = get_cfg()
    add_bnext_config(cfg)
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.RETINANET.NUM_CLASSES = "RetinaNet", 10
    cfg.DATASETS.TRAIN = ("digits_val",)
    edit(folder, lambda c: c["categories"].append({"id": 99, "name": "letters"}))

    check_datasets(["own"], num_classes=10, training=False, cfg=cfg)
    with pytest.raises(DatasetError, match="at most the 10 classes"):
        check_datasets(["own"], num_classes=10, cfg=cfg)

    cfg.DATASETS.TRAIN = ()  # nobody knows the names of the model's classes
    with pytest.raises(DatasetError, match="at most the 10 classes"):
        check_datasets(["own"], num_classes=10, training=False, cfg=cfg)


def test_categories_unlike_those_registered(folder: Path) -> None:
    edit(folder, lambda c: c["categories"][7].update(name="seven"))
    with pytest.raises(DatasetError, match="'seven' instead of '7'"):
        check_datasets(["digits_train"])
    check_datasets(["own"])  # registered without thing_classes: any will do


def test_missing_pictures_are_counted_and_named(folder: Path) -> None:
    for index in (1, 2, 4, 6):
        (folder / "train" / f"{index:06d}.png").unlink()
    message = "4 of 6 missing: 000001.png, 000002.png, 000004.png and 1 more"
    with pytest.raises(DatasetError, match=f"{message}.*{re.escape(str(folder / 'train'))}.*--overwrite"):
        check_datasets(["digits_train"])
    check_datasets(["digits_train"], check_images=False)

    shutil.rmtree(folder / "train")
    with pytest.raises(DatasetError, match="6 of 6 missing"):
        check_datasets(["own"])


def test_pictures_in_subfolders(folder: Path) -> None:
    (folder / "train" / "night").mkdir()
    os.rename(folder / "train" / "000001.png", folder / "train" / "night" / "a.png")
    edit(folder, lambda c: c["images"][0].update(file_name="night/a.png"))
    check_datasets(["own"])
    edit(folder, lambda c: c["images"][0].update(file_name="day/a.png"))
    with pytest.raises(DatasetError, match="1 of 6 missing: day/a.png"):
        check_datasets(["own"])


def test_a_file_is_parsed_once_until_it_changes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = []
    load = json.load
    monkeypatch.setattr(bnext.data.check_coco.json, "load", lambda file: parsed.append(file.name) or load(file))
    check_datasets(["own", "digits_train"])
    check_datasets(["own"], num_classes=10)
    assert len(parsed) == 1

    edit(folder, lambda c: c["annotations"].pop())
    check_datasets(["own"])
    assert len(parsed) == 2
