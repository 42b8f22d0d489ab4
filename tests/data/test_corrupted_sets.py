"""Corrupted sets: listed by a config or named as variants; the same pictures whenever and wherever they are read."""

import json
import shutil

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data import transforms as T
from PIL import Image

from bnext.data.check_coco import check_datasets
from bnext.data.listed_sets import KEY, register_sets
from bnext.data.loader import build_train_loader
from bnext.data.mapping import CheckedMapper, ImageMapper
from bnext.data.read_image import read_image, read_picture
from bnext.data.records import load_records, load_train_records
from bnext.errors import BNextError, ConfigError, DatasetError
from tests import tiny
from tests.evaluation.own_sets import NAMES, SIDE, make_set

FOGGY = {"corruption": "fog", "severity": 3}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with a set of its own: four pictures of noise."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    content = make_set()
    (tmp_path / "mine/train.json").write_text(json.dumps(content))
    for image in content["images"]:
        pixels = np.random.default_rng(image["id"]).integers(60, 200, (SIDE, SIDE, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "mine" / image["file_name"])
    yield tmp_path

    register_sets([])
    for name in [name for name in DatasetCatalog if "@" in name]:
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name, None)


def list_set(name="mine", **fields):
    return {"name": name, "json": "mine/train.json", "folder": "mine", **fields}


def load(folder, *entries, train=("mine",), test=(), opts=()):
    sets = ("DATASETS.TRAIN", train, "DATASETS.TEST", test, "MODEL.RETINANET.NUM_CLASSES", 3)
    return tiny.load(folder / "output", KEY, list(entries), *sets, *opts)


def map_plainly(records, image_format="BGR"):
    mapper = CheckedMapper(ImageMapper(is_train=False, augmentations=[], image_format=image_format))
    return [mapper(record)["image"].numpy().transpose(1, 2, 0) for record in records]


def test_one_training_on_clean_foggy_and_inverted_pictures(folder):
    """A listed set and a variant of it; boxes and classes are those of the clean set."""
    entries = [list_set(), list_set("foggy", domain="fog", **FOGGY)]
    cfg = load(folder, *entries, train=("mine", "foggy", "mine@invert_5"), test=("mine@fog_3",))
    check_datasets(cfg.DATASETS.TRAIN, cfg=cfg)

    records = load_train_records(cfg)
    assert [record.get("corruption") for record in records] == [None] * 4 + ["fog"] * 4 + ["invert"] * 4
    clean, foggy, inverted = records[:4], records[4:8], records[8:]
    assert [each["annotations"] for each in foggy] == [each["annotations"] for each in clean]
    pixels = [read_image(record["file_name"], "RGB") for record in clean]

    for number, image in enumerate(map_plainly(inverted)):
        assert (image == 255 - pixels[number][:, :, ::-1]).all()
    fog = map_plainly(foggy, "RGB")
    assert all((image != pixels[number]).any() for number, image in enumerate(fog))

    assert MetadataCatalog.get("foggy").domain == "fog"
    assert MetadataCatalog.get("mine@invert_5").thing_classes == list(NAMES)
    for index, image in enumerate(map_plainly(load_records("mine@fog_3", cfg), "RGB")):
        assert (image == fog[index]).all()
    assert len(next(iter(build_train_loader(cfg)))) == 4


def test_a_picture_is_corrupted_alike_in_another_folder_and_in_every_format(folder):
    shutil.copy("mine/1.png", "1.png")
    here, there = {"file_name": "1.png", **FOGGY}, {"file_name": "mine/1.png", **FOGGY}
    foggy = read_picture(here, "RGB")

    assert (foggy == read_picture(there, "RGB")).all()
    assert (foggy[:, :, ::-1] == read_picture(here, "BGR")).all()
    grey = np.asarray(Image.fromarray(foggy).convert("L"))
    assert (grey[:, :, None] == read_picture(here, "L")).all()
    assert (foggy != read_picture({**here, "severity": 4}, "RGB")).any()


def test_a_variant_follows_its_base(folder):
    first = load(folder, list_set(), test=("mine@fog_3",))
    (folder / "mine/other.json").write_text(json.dumps(make_set(num_images=2)))
    second = load(folder, {**list_set(), "json": "mine/other.json"}, test=("mine@fog_3",))

    assert len(load_records("mine@fog_3", second)) == 2
    assert MetadataCatalog.get("mine@fog_3").json_file.endswith("other.json")
    assert len(load_records("mine@fog_3", first)) == 4


def test_a_set_of_code_whose_name_has_the_sign_is_left_alone(folder):
    load(folder, list_set())
    DatasetCatalog.register("mine@home", lambda: [{"file_name": "a"}])
    records = load_records("mine@home", load(folder, list_set(), test=("mine@home",)))
    assert records == [{"file_name": "a", "dataset_source": 0}]
    assert [record["file_name"] for record in records] == ["a"]
    assert "corruption" not in records[0]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mine@fgo_3", "'fog'"),
        ("mine@fog_6", "6"),
        ("mine@fog", "mine@fog_3"),
        ("mine@snow_hard", "mine@snow_3"),
        ("mien@fog_3", "mine"),
    ],
)
def test_a_variant_that_there_is_not_is_refused(folder, name, words):
    with pytest.raises(BNextError) as refused:
        load_records(name, load(folder, list_set()))
    assert name in str(refused.value)
    assert words in str(refused.value)


def test_pictures_too_small_for_a_corruption_are_refused_before_training(folder):
    content = make_set()
    content["images"][2]["height"] = 31
    content["annotations"] = [each for each in content["annotations"] if each["image_id"] != 3]
    (folder / "mine/train.json").write_text(json.dumps(content))
    load(folder, list_set(), list_set("foggy", **FOGGY), list_set("negative", corruption="invert", severity=5))

    check_datasets(["mine", "negative"], check_images=False)
    for name in ("foggy", "mine@fog_3"):
        with pytest.raises(DatasetError, match=r"64 x 31 in 1 of 4: 3\.png"):
            check_datasets([name], check_images=False)


def test_a_picture_too_small_or_broken_is_named(folder):
    Image.new("RGB", (31, 40)).save("small.png")
    (folder / "broken.png").write_bytes(b"no picture")
    for name in ("small.png", "broken.png"):
        with pytest.raises(DatasetError, match=name):
            read_picture({"file_name": name, **FOGGY}, "RGB")


def test_a_mapper_that_would_leave_pictures_clean_is_refused(folder):
    mapper = CheckedMapper(DatasetMapper(is_train=False, augmentations=[T.NoOpTransform()], image_format="BGR"))
    record = load_records("mine", load(folder, list_set()))[0]
    assert "image" in mapper(record)
    with pytest.raises(DatasetError, match="ImageMapper"):
        mapper({**record, **FOGGY})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"corruption": "fog", "severity": 6}, "6"),
        ({"corruption": "fog", "severity": "3"}, "'3'"),
        ({"corruption": "gausian_noise", "severity": 3}, "'gaussian_noise'"),
        ({"corruption": "fog"}, "corruption alone"),
        ({"severity": 3}, "severity alone"),
        ({"corruption": 3, "severity": 3}, "corruption in"),
    ],
)
def test_a_listed_corruption_that_there_is_not_is_refused(folder, fields, words):
    with pytest.raises(ConfigError) as refused:
        load(folder, list_set(**fields))
    assert KEY in str(refused.value)
    assert words in str(refused.value)
