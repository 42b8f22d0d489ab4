"""Records of registered data sets: Detectron2's dictionaries, one for each image. No image is read here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, get_detection_dataset_dicts

from bnext.errors import DatasetError
from bnext.text import find_near

__all__ = ["Record", "check_registered", "has_labels", "load_records", "load_train_records"]

Record = dict[str, Any]


def check_registered(name: str) -> None:
    """Raise DatasetError, with the nearest names, unless a data set of that name is registered."""
    if name in DatasetCatalog:
        return

    near = find_near(name, DatasetCatalog.list(), cutoff=0.5)
    raise DatasetError.of(
        "A data set",
        "be registered",
        got=f"'{name}', which is not",
        where=f"nearest: {', '.join(near)}" if near else "no name is near",
        remedy="Correct DATASETS.TRAIN and DATASETS.TEST, or import the module that registers it.",
    )


def load_records(name: str, cfg: CfgNode) -> list[Record]:
    """The records of one data set, labelled or not.

    Args:
        name: of a registered data set.
        cfg: DATASETS.PROPOSAL_FILES_TEST is read where the model wants proposals.

    Raises:
        DatasetError: it is unknown, empty, no list of records, or cannot be read.
    """
    check_registered(name)
    proposals = _find_proposals(name, cfg) if cfg.MODEL.LOAD_PROPOSALS else None

    try:
        records = list(get_detection_dataset_dicts([name], filter_empty=False, proposal_files=proposals))
    except Exception as error:  # whatever the function that was registered raises
        raise DatasetError.of(
            f"Data set {name!r}",
            "be readable and have an image",
            got=f"{type(error).__name__}: {error}",
            remedy="Correct its files, or what it was registered with.",
        ) from error

    kinds = {type(record).__name__ for record in records if not isinstance(record, dict)}
    if kinds:
        raise DatasetError.of(
            f"Data set {name!r}",
            "be a list of records, a dict for each image",
            got=f"entries of type {', '.join(sorted(kinds))}",
            remedy="Correct the function that it was registered with.",
        )
    return records


def _find_proposals(name: str, cfg: CfgNode) -> list[str]:
    """The file of a test set; all files for a set that is not among them."""
    files = cfg.DATASETS.PROPOSAL_FILES_TEST
    pairs = zip(cfg.DATASETS.TEST, files, strict=False)
    return [file for test_name, file in pairs if test_name == name] or list(files)


def load_train_records(cfg: CfgNode) -> list[Record]:
    """The records of all training sets, without those that nothing can be learned from.

    Args:
        cfg: DATASETS.TRAIN, DATALOADER.FILTER_EMPTY_ANNOTATIONS and the number of keypoints and the proposals that the
            model wants are read.

    Raises:
        DatasetError: no image is left.
    """
    keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0
    proposals = cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None

    try:
        return get_detection_dataset_dicts(
            cfg.DATASETS.TRAIN,
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            min_keypoints=keypoints,
            proposal_files=proposals,
        )
    except AssertionError as error:  # how Detectron2 says that nothing is left
        raise DatasetError.of(
            "DATASETS.TRAIN",
            "have at least one usable image",
            got="none",
            where=str(error or list(cfg.DATASETS.TRAIN)),
            remedy="Check the annotations, or set DATALOADER.FILTER_EMPTY_ANNOTATIONS to False.",
        ) from error


def has_labels(records: Iterable[Record], keys: Sequence[str] = ("annotations",)) -> bool:
    """Whether any image has an annotation, of one of several kinds; a list of none, as COCO's reader gives, is none."""
    return any(record.get(key) for record in records for key in keys)
