"""Records of registered data sets: Detectron2's dictionaries, one for each image. No image is read here."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.build import (
    filter_images_with_few_keypoints,
    filter_images_with_only_crowd_annotations,
    print_instances_class_histogram,
)
from detectron2.data.detection_utils import check_metadata_consistency
from torch.utils.data import Dataset

from bnext.data.classes import are_found_by_name, find_trained_classes, relabel_records
from bnext.data.corrupted_sets import register_variant
from bnext.data.domains import name_source
from bnext.data.listed_sets import register_listed_sets
from bnext.errors import BNextError, DatasetError, Refusal
from bnext.garbage import without_collection
from bnext.text import find_near
from bnext.user_modules import list_imported, mentions

__all__ = [
    "Record",
    "check_records_are_dicts",
    "check_registered",
    "has_labels",
    "load_records",
    "load_train_records",
    "read_registered",
]

Record = dict[str, Any]

_UNKNOWN = Refusal(
    DatasetError,
    "A data set",
    "be registered",
    "Correct DATASETS.TRAIN and DATASETS.TEST, list the set in DATASETS.BNEXT.COCO, or import the module that "
    "registers it: --import MODULE.",
)
_UNKNOWN_AFTER_IMPORT = Refusal(
    DatasetError,
    "A data set",
    "be registered when its module is imported",
    "In {module}, register it at the top level: not inside of a function such as main(), nor under "
    "`if __name__ == '__main__':`, which an import passes over.",
)
_UNKNOWN_TO_MODULES = Refusal(
    DatasetError,
    "A data set",
    "be registered",
    "Correct the name, list the set in DATASETS.BNEXT.COCO, or register it at the top level of {module}: not inside of "
    "a function such as main(), nor under `if __name__ == '__main__':`, which an import passes over.",
)
_UNKNOWN_IN_WORKER = Refusal(
    DatasetError,
    "A data set",
    "be registered in every worker, each of which is a fresh process that imports the program's modules",
    "Register it at the top level of the program's module, or of one that it imports: not inside of a function, nor "
    "under `if __name__ == '__main__':`, where only the call that starts the training belongs.",
)
_UNREADABLE = Refusal(
    DatasetError,
    "Data set {name!r}",
    "be readable",
    "Correct its files, or the function that it was registered with, which raises this.",
)
_EMPTY = Refusal(
    DatasetError,
    "Data set {name!r}",
    "have an image",
    "Correct its files, or the function that it was registered with.",
)
_NO_DICTS = Refusal(
    DatasetError,
    "Data set {name!r}",
    "be a list of records, a dict for each image",
    "Correct the function that it was registered with.",
)
_UNFIT = Refusal(
    DatasetError,
    "The records of {names}",
    "be in detectron2's format, the same for all sets of a training, with proposals where the model wants them",
    "Correct what it speaks of: the records, `thing_classes` of the sets' metadata, or DATASETS.PROPOSAL_FILES_*.",
)
_NOTHING_LEFT = Refusal(
    DatasetError,
    "DATASETS.TRAIN",
    "have at least one image with an object to train on",
    "Add annotations that are no crowds (with a keypoint model: with enough visible keypoints), or set "
    "DATALOADER.FILTER_EMPTY_ANNOTATIONS to False to train on images without objects.",
)


def check_registered(name: str) -> None:
    """Raise DatasetError, with the nearest names, unless a data set of that name is registered, or can be."""
    register_variant(name)
    if name in DatasetCatalog:
        return

    if multiprocessing.parent_process() is not None:  # a worker: a fresh process, which ran no `main()`
        raise _UNKNOWN_IN_WORKER.of("a registration that this worker has not run", where=repr(name))

    near = find_near(name, DatasetCatalog.list(), cutoff=0.5)
    nearest = f"nearest: {', '.join(near)}" if near else "no name is near"
    mentioning = [module for module in list_imported() if mentions(module, name)]
    modules = mentioning or list_imported()
    if modules:
        refusal = _UNKNOWN_AFTER_IMPORT if mentioning else _UNKNOWN_TO_MODULES
        module = " or ".join(modules)
        raise refusal.of(f"'{name}', which is not, after the import of {module}", nearest, module=module)
    raise _UNKNOWN.of(f"'{name}', which is not", nearest)


@without_collection()
def load_records(name: str, cfg: CfgNode) -> list[Record]:
    """The records of one data set, labelled or not.

    Args:
        name: of a registered data set.
        cfg: DATASETS.PROPOSAL_FILES_TEST is read where the model wants proposals.

    Returns:
        Records with `dataset_source` and, where it is known, `domain`: see `name_source`.

    Raises:
        DatasetError: it is unknown, empty, no list of records, or cannot be read.
    """
    register_listed_sets(cfg)
    check_registered(name)
    proposals = _find_proposals(name, cfg) if cfg.MODEL.LOAD_PROPOSALS else None

    try:
        records = list(get_detection_dataset_dicts([name], filter_empty=False, proposal_files=proposals))
    except Exception as error:  # whatever the function that was registered raises
        _refuse_unreadable(name)
        raise _name_error([name], error) from error

    check_records_are_dicts(name, records)
    return name_source(cfg, name, records)


@without_collection()
def read_registered(name: str) -> Any:
    """The answer of the function that a data set was registered with: mostly a list of records.

    Args:
        name: of a registered data set.

    Raises:
        DatasetError: it raises, or gives nothing.
    """
    check_registered(name)
    try:
        records = DatasetCatalog.get(name)
        number = len(records)
    except Exception as error:  # whatever the function raises
        got = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise _UNREADABLE.of(got, name=name) from error

    if not number:
        raise _EMPTY.of("none", name=name)
    return records


def check_records_are_dicts(name: str, records: Sequence[Any]) -> None:
    """Raise DatasetError unless all records of a set are dictionaries."""
    kinds = {type(record).__name__ for record in records if not isinstance(record, dict)}
    if kinds:
        raise _NO_DICTS.of(f"entries of type {', '.join(sorted(kinds))}", name=name)


def _refuse_unreadable(name: str) -> None:
    """Raise DatasetError if the fault is the set's own: its function raises, or gives something else than records."""
    records = read_registered(name)
    if not isinstance(records, Dataset):
        check_records_are_dicts(name, records)


def _name_error(names: Sequence[str], error: Exception) -> BNextError:
    """The error of sets that can be read, each by itself."""
    got = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return _UNFIT.of(got, names=", ".join(repr(name) for name in names))


def _find_proposals(name: str, cfg: CfgNode) -> list[str]:
    """The file of a test set; all files for a set that is not among them."""
    files = cfg.DATASETS.PROPOSAL_FILES_TEST
    pairs = zip(cfg.DATASETS.TEST, files, strict=False)
    return [file for test_name, file in pairs if test_name == name] or list(files)


@without_collection()
def load_train_records(cfg: CfgNode) -> list[Record]:
    """The records of all training sets, without those that nothing can be learned from.

    Args:
        cfg: DATASETS.TRAIN, DATALOADER.FILTER_EMPTY_ANNOTATIONS and the number of keypoints and the proposals that the
            model wants are read.

    Returns:
        Records of one set after the other, with `dataset_source` and, where it is known, `domain`: see `name_source`;
        with the class indices of DATASETS.BNEXT.CLASSES, if the config has them: see `relabel_records`.

    Raises:
        DatasetError: a set is unknown or cannot be read, sets do not fit one another, or no image is left.
    """
    keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0
    proposals = cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None
    names = list(cfg.DATASETS.TRAIN)
    register_listed_sets(cfg)
    for name in names:
        check_registered(name)

    try:
        joined = _join_sets(cfg, names, proposals)
        return _drop_empty(cfg, joined, keypoints)
    except BNextError:
        raise
    except Exception as error:
        for name in names:
            _refuse_unreadable(name)
        raise _name_error(names, error) from error


def _join_sets(cfg: CfgNode, names: Sequence[str], proposals: Sequence[str] | None) -> Any:
    """The records of several sets; of those that are torch's Datasets one that joins them, without sources."""
    joined: list[Record] = []
    for index, name in enumerate(names):
        files = None if proposals is None else [proposals[index]]
        records = get_detection_dataset_dicts([name], filter_empty=False, proposal_files=files, check_consistency=False)
        if isinstance(records, Dataset):
            return get_detection_dataset_dicts(list(names), proposal_files=proposals)
        if are_found_by_name(cfg, is_training=True):
            records = relabel_records(cfg, name, records)
        joined += name_source(cfg, name, records)
    return joined


def _drop_empty(cfg: CfgNode, joined: Any, min_keypoints: int) -> Any:
    """Records that something can be learned from, of sets with the same classes; as Detectron2 does it."""
    if isinstance(joined, Dataset) or "annotations" not in joined[0]:
        return joined

    if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
        joined = filter_images_with_only_crowd_annotations(joined)
    if min_keypoints:
        joined = filter_images_with_few_keypoints(joined, min_keypoints)

    names = list(cfg.DATASETS.TRAIN)
    classes = MetadataCatalog.get(names[0]).get("thing_classes")
    if are_found_by_name(cfg, is_training=True):
        _tell_classes(joined, find_trained_classes(cfg))
    elif classes is not None:
        check_metadata_consistency("thing_classes", names)
        _tell_classes(joined, classes)

    if not joined:
        raise _NOTHING_LEFT.of("none", where=", ".join(names))
    return joined


def _tell_classes(records: Sequence[Record], classes: Any) -> None:
    """Log the objects of each class, as Detectron2 does: of one record with all of them, as it takes 10 us a record."""
    objects = list(chain.from_iterable(record["annotations"] for record in records))
    print_instances_class_histogram([{"annotations": objects}], classes)


def has_labels(records: Iterable[Record], keys: Sequence[str] = ("annotations",)) -> bool:
    """Whether any image has an annotation, of one of several kinds; a list of none, as COCO's reader gives, is none."""
    return any(record.get(key) for record in records for key in keys)
