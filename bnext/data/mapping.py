"""Mappers: a record becomes the model's input, or an error that names its picture.

    record  --ImageMapper-->  record with "image" and, for a training, "instances"

All batches of bnext, of a training as of everything else, are mapped here; a mapper of the user's own takes the place
of `ImageMapper` inside of `CheckedMapper`.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, instantiate
from detectron2.data import DatasetMapper, detection_utils
from detectron2.data import transforms as T

from bnext.data.check_objects import FAR
from bnext.data.read_image import read_image, read_picture, refuse_endless_file
from bnext.data.records import Record
from bnext.errors import BNextError, DatasetError, Refusal
from bnext.lazy_config import copy_node, find_target, is_lazy
from bnext.notices import tell_once

__all__ = ["CheckedMapper", "ImageMapper", "Mapper", "build_mapper"]

Mapper = Callable[[Record], Record | None]

_NOT_IGNORED = Refusal(
    DatasetError,
    "A mapper of a set whose objects may be of any class",
    "move `ignored_boxes` with the picture, as `bnext.data.mapping.ImageMapper` does",
    'Derive the mapper from it; or map these categories to "" in DATASETS.BNEXT.CLASS_MAP.',
)
# What a record says of its image, however it is augmented; a mapper of the user's own may leave it out.
_OF_IMAGES = ("dataset_source", "domain", "annotated_classes")
_NOT_CORRUPTED = Refusal(
    DatasetError,
    "The mapper of a set with a corruption",
    "be an `ImageMapper` of bnext.data.mapping, which corrupts what it reads",
    "Derive yours from it, or write the corrupted pictures once with `bnext corrupt` and use them as a set.",
)
_OTHER_MASK = Refusal(
    DatasetError,
    "A segmentation",
    "lie on its picture of height {height} and width {width}",
    "Correct or remove it.",
)


class ImageMapper(DatasetMapper):
    """Detectron2's mapper with the reader of `read_picture`, from the same config and with the same results.

    Raises:
        DatasetError: on a call, see `read_picture`.
    """

    def __call__(self, dataset_dict: Record) -> Record:
        record = copy.deepcopy(dataset_dict)
        image = read_picture(record, self.image_format)
        record.setdefault("width", image.shape[1])
        record.setdefault("height", image.shape[0])

        labels = None
        if "sem_seg_file_name" in record:
            labels = read_image(record.pop("sem_seg_file_name"), "L")[:, :, 0]

        inputs = T.AugInput(image, sem_seg=labels)
        transforms = self.augmentations(inputs)
        shape = inputs.image.shape[:2]

        record["image"] = _to_tensor(inputs.image.transpose(2, 0, 1))
        if inputs.sem_seg is not None:
            record["sem_seg"] = _to_tensor(inputs.sem_seg).long()
        if self.proposal_topk is not None:
            detection_utils.transform_proposals(record, shape, transforms, proposal_topk=self.proposal_topk)

        if "ignored_boxes" in record:
            boxes = np.array(record["ignored_boxes"], dtype=np.float64).reshape(-1, 4)
            record["ignored_boxes"] = torch.as_tensor(transforms.apply_box(boxes), dtype=torch.float32)

        if not self.is_train:
            record.pop("annotations", None)
        elif "annotations" in record:
            if self.use_instance_mask:
                _check_masks(record, image.shape[:2])
            for annotation in record["annotations"]:
                annotation["bbox"] = list(annotation["bbox"])  # BoxMode takes arrays for tables of boxes
            self._transform_annotations(record, transforms, shape)
        return record


def _check_masks(record: Record, shape: tuple[int, int]) -> None:
    """Refuse masks that would be stretched, or that take memory without end, also of sets that nobody checked."""
    farthest = FAR * max(shape)

    for annotation in record["annotations"]:
        mask = annotation.get("segmentation")
        if isinstance(mask, dict) and tuple(mask["size"]) != shape:
            got = f"run lengths of height and width {tuple(mask['size'])}"
            raise _OTHER_MASK.of(got, record["file_name"], height=shape[0], width=shape[1])

        for polygon in mask if isinstance(mask, list) else ():
            if len(polygon) and not -farthest <= min(polygon) <= max(polygon) <= farthest or math.isnan(sum(polygon)):
                got = f"corners from {min(polygon):g} to {max(polygon):g}"
                raise _OTHER_MASK.of(got, record["file_name"], height=shape[0], width=shape[1])


def _to_tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(array, order="C"))  # a copy: Pillow's pixels cannot be written to


class CheckedMapper:
    """A mapper; an image or record that it cannot read is a fault of the data set.

    Args:
        mapper: turns a record into the model's input, e.g. `ImageMapper(cfg, True)`.

    Raises:
        DatasetError: on a call, names the image.

    Note:
        What a record says of its image whatever the augmentation stays, also where a mapper leaves it out: its
        `dataset_source`, `domain` and `annotated_classes`.
    """

    def __init__(self, mapper: Mapper) -> None:
        self._mapper: Mapper = mapper._mapper if isinstance(mapper, CheckedMapper) else mapper

    def __call__(self, record: Record) -> Record | None:
        name = record.get("file_name")
        if not isinstance(self._mapper, ImageMapper):
            refuse_endless_file(name)
            if record.get("corruption"):
                raise _NOT_CORRUPTED.of(type(self._mapper).__name__, f"{name}: {record['corruption']}")
            if len(record.get("ignored_boxes", ())):
                raise _NOT_IGNORED.of(type(self._mapper).__name__, str(name))

        try:
            mapped = self._mapper(record)
        except (BNextError, MemoryError):
            raise
        except Exception as error:  # whatever a mapper raises
            place = str(name) if name else f"image_id {record.get('image_id')}"
            if "width" in record and "height" in record:
                place += f", {record['width']} x {record['height']}"

            raise DatasetError.of(
                "An image",
                "be readable and as its record says",
                got=f"{type(error).__name__}: {' '.join(str(error).split())}",
                where=place,
                remedy="Restore the file, correct or remove its record, or mend the mapper where that is your own.",
            ) from error

        if isinstance(mapped, dict):
            kept = {key: record[key] for key in _OF_IMAGES if key in record}
            return {**kept, **mapped}
        return mapped


def build_mapper(cfg: CfgNode, is_train: bool, *, as_test: bool = False, **options: Any) -> CheckedMapper:
    """The mapper of a config.

    Args:
        cfg: INPUT.* and the kinds of labels that the model wants are read; of a LazyConfig its mappers.
        is_train: whether labels are given.
        as_test: whether images are augmented as in a test, with labels or without.
        options: of Detectron2's DatasetMapper, in place of the config's.
    """
    if is_lazy(cfg):
        return CheckedMapper(_build_lazy_mapper(cfg, is_train, as_test=as_test, **options))
    if as_test and is_train:
        options["augmentations"] = detection_utils.build_augmentation(cfg, False)
    return CheckedMapper(ImageMapper(cfg, is_train, **options))


def _build_lazy_mapper(cfg: CfgNode, is_train: bool, *, as_test: bool, **options: Any) -> Mapper:
    """The mapper of a LazyConfig; detectron2's own reads images as `ImageMapper` does."""
    part = "train" if is_train else "test"
    node = copy_node(cfg, f"dataloader.{part}.mapper", "for images to be read", "L(DatasetMapper)(...)")
    values = {key: instantiate(value) for key, value in node.items() if key != "_target_"}

    if as_test and is_train:
        test = copy_node(cfg, "dataloader.test.mapper.augmentations")
        if test is not None and "augmentations" in values:
            values["augmentations"] = instantiate(test)
        else:
            message = (
                "dataloader.train.mapper, or that of the test, has no augmentations by that name: labelled images "
            )
            message += "are augmented as in training, where they should be as in a test."
            tell_once(logging.getLogger(__name__), cfg.LAZY.FILE, message)

    target = find_target(node)
    if target is DatasetMapper:
        target = ImageMapper
        values["augmentations"] = list(values.get("augmentations", ()))
    return target(**{**values, **options})  # type: ignore[misc]
