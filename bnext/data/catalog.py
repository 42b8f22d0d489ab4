"""Registers the digits set with Detectron2's catalogs, and makes it on first use.

The sets lie under the environment variable DETECTRON2_DATASETS ("datasets" when unset), as Detectron2's own.
It is read when `register_datasets` is called: at the import of bnext, and whenever a program that has changed
the variable calls it again.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from bnext.data.digits import CLASSES, FOLDER, has_digits, prepare_digits
from bnext.data.digits_images import SPLITS

if TYPE_CHECKING:
    from bnext.data.records import Record  # which registers sets that a config lists

__all__ = ["CocoSet", "datasets_root", "ensure_digits", "is_coco_entry", "register_datasets"]


@dataclass(frozen=True)
class CocoSet:
    """A COCO-format set, loaded when the catalog asks; its type tells our entries from the user's."""

    name: str
    json_file: str
    image_root: str

    def __call__(self) -> list[Record]:
        return load_coco_json(self.json_file, self.image_root, self.name)


def datasets_root() -> Path:
    """The folder of all data sets: DETECTRON2_DATASETS as it is now, "datasets" when unset."""
    return Path(os.path.expanduser(os.environ.get("DETECTRON2_DATASETS", "datasets")))


def register_datasets() -> None:
    """Register `digits_train` and `digits_val` under the present DETECTRON2_DATASETS.

    Note:
        Nothing is read from disk before a set is used. A second call with the same variable changes nothing; with
        another one it moves the entries there (a `Metadata` object got before keeps the old paths). A name that
        somebody else has registered is left alone.
    """
    folder = datasets_root() / FOLDER
    for split in SPLITS:
        name = f"digits_{split}"
        entry = CocoSet(name, str(folder / "annotations" / f"instances_{split}.json"), str(folder / split))

        if name in DatasetCatalog:
            present = DatasetCatalog[name]
            if type(present) is not CocoSet or present == entry:
                continue
            DatasetCatalog.remove(name)
            MetadataCatalog.pop(name, None)  # its attributes cannot be changed, only made anew

        DatasetCatalog.register(name, entry)
        MetadataCatalog.get(name).set(
            json_file=entry.json_file,
            image_root=entry.image_root,
            evaluator_type="coco",
            thing_classes=list(CLASSES),
        )


def is_coco_entry(name: str) -> bool:
    """Whether a registered set is one of ours: its records are what its annotation file says."""
    return isinstance(DatasetCatalog[name], CocoSet)


def ensure_digits(*, progress: bool = True) -> Path:
    """Make the digits set under DETECTRON2_DATASETS if it is not there, and register it.

    Args:
        progress: show a progress bar when the standard error stream is a terminal.

    Returns:
        The folder of the set. A whole set made with other arguments than the defaults is used as it is.

    Raises:
        DatasetError: the folder holds something else or a damaged set, or cannot be written.
    """
    root = datasets_root()
    if not has_digits(root):
        prepare_digits(root, progress=progress)
    register_datasets()
    return root / FOLDER
