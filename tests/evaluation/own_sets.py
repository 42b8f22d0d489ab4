"""Small sets of a user's own, without pictures, and a detector that is right about everything in them."""

import contextlib
import copy
import json

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import Boxes, Instances

from tests import tiny

NAMES = ("cat", "dog", "owl")
SIDE = 64


def make_set(seed=0, num_images=4, num_objects=3):
    """A whole annotation file: squares with masks and three keypoints."""
    rng = np.random.default_rng(seed)
    annotations = []

    for image in range(1, num_images + 1):
        for index in range(num_objects):
            x, y, w, h = (int(v) for v in (*rng.integers(2, 30, 2), *rng.integers(16, 30, 2)))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": (image + index) % 3 + 1,
                    "iscrowd": 0,
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
                    "keypoints": [x, y, 2, x + 5, y + 5, 2, x + 9, y + 3, 1],
                    "num_keypoints": 3,
                }
            )

    images = [{"id": i, "file_name": f"{i}.png", "height": SIDE, "width": SIDE} for i in range(1, num_images + 1)]
    categories = [{"id": index + 1, "name": name} for index, name in enumerate(NAMES)]
    return {"images": images, "annotations": annotations, "categories": categories}


@contextlib.contextmanager
def registered(folder, train=None, **sets):
    """Register annotation files, or functions, as own_train and own_<name> in this scope."""
    for split, content in {"train": train or make_set(1), **sets}.items():
        name = f"own_{split}"
        if callable(content):
            DatasetCatalog.register(name, content)
            MetadataCatalog.get(name).set(thing_classes=list(NAMES), evaluator_type="coco")
        else:
            (folder / f"{split}.json").write_text(json.dumps(content))
            register_coco_instances(name, {}, str(folder / f"{split}.json"), str(folder))

    try:
        yield
    finally:
        for split in ("train", *sets):
            DatasetCatalog.remove(f"own_{split}")
            MetadataCatalog.remove(f"own_{split}")


def load(folder, *opts, config=tiny.CONFIG):
    head = "ROI_HEADS" if config == tiny.RCNN else "RETINANET"
    sets = ("DATASETS.TRAIN", "('own_train',)", "DATASETS.TEST", "('own_val',)")
    return tiny.load(folder, *sets, f"MODEL.{head}.NUM_CLASSES", 3, *opts, config=config)


def detect(content, image):
    """The objects of an image, with class indices of the training: those of `NAMES`."""
    objects = [each for each in content["annotations"] if each["image_id"] == image]
    names = {category["id"]: category["name"] for category in content["categories"]}

    corners = torch.tensor([each["bbox"] for each in objects], dtype=torch.float32).reshape(-1, 4)
    corners[:, 2:] += corners[:, :2]
    classes = [NAMES.index(names[each["category_id"]].strip().lower()) for each in objects]
    instances = Instances((SIDE, SIDE), pred_boxes=Boxes(corners), scores=torch.ones(len(objects)))
    instances.pred_classes = torch.tensor(classes, dtype=torch.int64)
    return {"instances": instances}


def evaluate_perfect(evaluator, content):
    """Results of detecting everything in `content`, which says what is right."""
    evaluator.reset()
    for image in content["images"]:
        evaluator.process([{"image_id": image["id"]}], [detect(content, image["id"])])
    return evaluator.evaluate()


def edit(content, **changes):
    """A copy whose annotations have other values; a function is called with number and annotation; None: left out."""
    content = copy.deepcopy(content)
    for number, annotation in enumerate(content["annotations"]):
        for key, value in changes.items():
            if value is None:
                annotation.pop(key)
            else:
                annotation[key] = value(number, annotation) if callable(value) else value
    return content


def renumber(content, numbers, names=NAMES):
    """The same objects under other ids, and perhaps names, of their categories."""
    content = copy.deepcopy(content)
    content["categories"] = [{"id": numbers[index], "name": name} for index, name in enumerate(names)]
    for annotation in content["annotations"]:
        annotation["category_id"] = numbers[annotation["category_id"] - 1]
    return content
