"""Mappers: Detectron2's results with a guarded reader; whatever a mapper raises names the picture."""

import os

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, DatasetMapper
from PIL import Image

from bnext.data.batches import build_evaluation_batches, build_shuffled_batches, build_validation_batches
from bnext.data.loader import build_train_loader
from bnext.data.mapping import CheckedMapper, ImageMapper, build_mapper
from bnext.errors import ConfigError, DatasetError
from bnext.seeding import seeded
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore:The given NumPy array is not writable:UserWarning")


@pytest.mark.parametrize("error", [OSError("truncated"), KeyError("file_name"), ValueError("no\npolygon")])
def test_an_image_that_cannot_be_read_is_named(error):
    def fail(record):
        raise error

    with pytest.raises(DatasetError, match=rf"{type(error).__name__}.*\(a\.png\)"):
        CheckedMapper(fail)({"file_name": "a.png"})
    with pytest.raises(DatasetError, match=r"\(image_id 7, 1 x 3000\)"):
        CheckedMapper(fail)({"image_id": 7, "width": 1, "height": 3000})


@pytest.mark.parametrize("error", [KeyError, AssertionError, NotImplementedError, AttributeError, SyntaxError])
def test_whatever_a_mapper_raises_names_the_image(error):
    def fail(record):
        raise error("broken")

    with pytest.raises(DatasetError, match="a.png"):
        CheckedMapper(fail)({"file_name": "a.png"})


def test_a_refusal_of_a_mapper_is_its_own():
    def refuse(record):
        raise ConfigError("key must be 1; got 2. Set it to 1.")

    with pytest.raises(ConfigError, match="^key must be 1"):
        CheckedMapper(refuse)({"file_name": "a.png"})


def test_a_mapper_of_the_users_own_does_not_wait_for_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(DatasetError, match="a pipe"):
        CheckedMapper(lambda record: Image.open(record["file_name"]))({"file_name": str(tmp_path / "a.png")})


@pytest.mark.parametrize("is_train", [True, False])
@pytest.mark.parametrize("config", [tiny.CONFIG, tiny.RCNN])
def test_the_results_are_those_of_detectron2s_mapper(digits, tmp_path, config, is_train):
    cfg = tiny.load(tmp_path, config=config)
    ours, other = ImageMapper(cfg, is_train), DatasetMapper(cfg, is_train)

    for record in DatasetCatalog.get("digits_val")[:2]:
        with seeded(3):
            mapped = ours(record)
        with seeded(3):
            expected = other(record)

        assert mapped.keys() == expected.keys()
        torch.testing.assert_close(mapped.pop("image"), expected.pop("image"), rtol=0, atol=0)
        if is_train:
            labels, wanted = mapped.pop("instances"), expected.pop("instances")
            assert torch.equal(labels.gt_boxes.tensor, wanted.gt_boxes.tensor)
            assert torch.equal(labels.gt_classes, wanted.gt_classes)
            if cfg.MODEL.MASK_ON:
                assert torch.equal(labels.gt_masks.tensor, wanted.gt_masks.tensor)
        assert mapped == expected


def test_labels_of_semantic_segmentation_are_read_whole(digits, tmp_path):
    record = DatasetCatalog.get("digits_val")[0]
    labels = np.zeros((record["height"], record["width"]), np.uint16)
    labels[3, 4] = 200
    Image.fromarray(labels).save(tmp_path / "labels.png")
    mapper = build_mapper(tiny.load(tmp_path), True, augmentations=[])
    assert mapper({**record, "sem_seg_file_name": str(tmp_path / "labels.png")})["sem_seg"][3, 4] == 200

    labels[3, 4] = 300
    Image.fromarray(labels).save(tmp_path / "labels.png")
    with pytest.raises(DatasetError, match="300"):
        mapper({**record, "sem_seg_file_name": str(tmp_path / "labels.png")})


def test_a_box_may_be_an_array(digits, tmp_path):
    record = DatasetCatalog.get("digits_val")[0]
    mapper = build_mapper(tiny.load(tmp_path), True, augmentations=[])
    arrays = [{**each, "bbox": np.array(each["bbox"])} for each in record["annotations"]]
    boxes = mapper({**record, "annotations": arrays})["instances"].gt_boxes.tensor
    assert torch.equal(boxes, mapper(record)["instances"].gt_boxes.tensor)


@pytest.mark.parametrize("mask", [[[0, 0, 1e9, 0, 1e9, 1e9]], [[0, 0, float("nan"), 0, 5, 5]], {"size": [9, 9]}])
def test_masks_that_do_not_lie_on_their_picture_are_refused_before_they_are_drawn(digits, tmp_path, mask):
    record = DatasetCatalog.get("digits_val")[0]
    annotation = {**record["annotations"][0], "segmentation": mask}
    mapper = build_mapper(tiny.load(tmp_path, config=tiny.RCNN), True)
    with pytest.raises(DatasetError, match="A segmentation.*000001.png"):
        mapper({**record, "annotations": [annotation]})


@pytest.mark.parametrize("reader", ["training", "evaluation", "validation loss", "re-estimation", "comparison"])
def test_all_readers_name_a_broken_picture(digits, tmp_path, reader):
    """Comparison reads as the others do: its losses by the validation's batches, its AP by the evaluation's."""
    (tmp_path / "0.png").write_bytes(b"")
    record = {**DatasetCatalog.get("digits_val")[0], "file_name": str(tmp_path / "0.png")}
    DatasetCatalog.register("digits_broken", lambda: [record])
    cfg = tiny.load(tmp_path, "DATASETS.TRAIN", ("digits_broken",), "SOLVER.IMS_PER_BATCH", 1)
    builders = {
        "training": lambda: build_train_loader(cfg),
        "evaluation": lambda: build_evaluation_batches(cfg, [record], [0]),
        "validation loss": lambda: build_validation_batches(cfg, "digits_broken"),
        "re-estimation": lambda: build_shuffled_batches(cfg, ["digits_broken"]),
        "comparison": lambda: build_evaluation_batches(cfg, [record], [0], images_per_batch=2),
    }

    try:
        with pytest.raises(DatasetError, match=r"an empty file \(.*0\.png\)"):
            next(iter(builders[reader]()))
    finally:
        DatasetCatalog.remove("digits_broken")


def test_ignored_boxes_move_with_their_picture(digits, tmp_path):
    record = dict(DatasetCatalog.get("digits_train")[0])
    box = record["annotations"][0]["bbox"]
    corners = [box[0], box[1], box[0] + box[2], box[1] + box[3]]
    cfg = tiny.load(tmp_path, "INPUT.MIN_SIZE_TRAIN", "(96,)", "INPUT.MAX_SIZE_TRAIN", 96)

    mapper, turned = build_mapper(cfg, True), 0
    for seed in range(4):
        with seeded(seed):
            mapped = mapper({**record, "ignored_boxes": [corners]})
        assert torch.allclose(mapped["ignored_boxes"], mapped["instances"].gt_boxes.tensor[:1], atol=1e-4)
        turned += mapped["ignored_boxes"][0, 0] != 1.5 * corners[0]
    assert 0 < turned < 4


def test_what_is_said_of_an_image_outlives_a_mapper_of_the_users_own():
    record = {"image_id": 3, "domain": "night", "dataset_source": 1, "annotated_classes": [0]}
    mapped = CheckedMapper(lambda record: {"image": 1, "domain": "day"})(record)
    assert mapped == {"image": 1, "domain": "day", "dataset_source": 1, "annotated_classes": [0]}
    with pytest.raises(DatasetError, match="ignored_boxes"):
        CheckedMapper(lambda record: {"image": 1})({**record, "ignored_boxes": [[0, 0, 4, 4]]})
