"""The labelled batches of a validation loss: which images, in which order; data sets without labels are refused."""

import json

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from bnext.engine.validation_hook import build_validation_loss
from bnext.errors import ConfigError
from bnext.evaluation.validation_batches import build_validation_batches
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore:The given NumPy array is not writable:UserWarning")
LOSS = "TEST.BNEXT.VALIDATION_LOSS"
ON = (f"{LOSS}.PERIOD", 2)


def test_images_are_all_of_the_set_in_order_and_without_random_augmentation(digits, tmp_path):
    cfg = tiny.load(tmp_path, *ON, "SOLVER.IMS_PER_BATCH", 3, "INPUT.CROP.ENABLED", True)
    loader = build_validation_batches(cfg, "digits_val")
    first, again = list(loader), list(loader)
    assert [len(batch) for batch in first] == [3, 1]
    names = [record["file_name"] for batch in first for record in batch]
    assert names == [record["file_name"] for record in DatasetCatalog.get("digits_val")]
    for batch, other in zip(first, again, strict=True):
        assert all(torch.equal(a["image"], b["image"]) for a, b in zip(batch, other, strict=True))
        assert all(len(record["instances"]) for record in batch)
    short = build_validation_batches(
        tiny.load(tmp_path, *ON, "SOLVER.IMS_PER_BATCH", 2, f"{LOSS}.NUM_BATCHES", 1), "digits_val"
    )
    assert [[record["file_name"] for record in batch] for batch in short] == [names[:2]]


def strip(records):
    return [{key: value for key, value in record.items() if key != "annotations"} for record in records]


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


def test_images_without_labels_are_refused_before_training(no_labels, tmp_path):
    with pytest.raises(ConfigError, match=r"got 'digits_no_labels', whose records have no annotations"):
        build_validation_loss(tiny.load(tmp_path, *ON, "DATASETS.TEST", (no_labels,)))


def test_images_for_semantic_segmentation_are_labelled(digits, tmp_path):
    records = [{**record, "sem_seg_file_name": "0.png"} for record in strip(DatasetCatalog.get("digits_val"))]
    DatasetCatalog.register("digits_semantic", lambda: records)
    try:
        assert build_validation_batches(tiny.load(tmp_path, *ON), "digits_semantic")
    finally:
        DatasetCatalog.remove("digits_semantic")
