"""The classes of data sets: what each class index of a model means, and whether training and test agree on it.

A detector predicts indices; their names come from the sets that it was trained on. The categories of any other set are
found by name, however its file numbers them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from bnext.data.categories import read_categories
from bnext.data.records import Record, check_registered
from bnext.errors import ConfigError, DatasetError, Refusal, list_few
from bnext.lazy_config import is_lazy

__all__ = [
    "UNKNOWN_CLASSES",
    "check_classes",
    "count_classes",
    "find_trained_classes",
    "match_classes",
    "read_classes",
    "relabel_records",
]

UNKNOWN_CLASSES = Refusal(
    DatasetError,
    "The categories of data set {name!r}",
    "be among the classes of the training, which are found by name ({trained})",
    "Give a category the same name in both sets, name in DATASETS.TRAIN the set that the weights were trained on, or "
    "leave the objects of other classes out.",
)


def count_classes(cfg: CfgNode) -> tuple[str, int] | None:
    """The key of the classes that the model's head predicts, and its value; None: the architecture is not known."""
    architecture = cfg.MODEL.META_ARCHITECTURE
    if is_lazy(cfg):
        return tuple(cfg.LAZY.CLASSES) or None

    if architecture.endswith(("RetinaNet", "FCOS")):
        return "MODEL.RETINANET.NUM_CLASSES", int(cfg.MODEL.RETINANET.NUM_CLASSES)
    if architecture.endswith(("RCNN", "PanopticFPN")):
        return "MODEL.ROI_HEADS.NUM_CLASSES", int(cfg.MODEL.ROI_HEADS.NUM_CLASSES)
    return None


def read_classes(name: str) -> tuple[str, ...] | None:
    """The names of a registered set's classes by their index; None: they are not known.

    Args:
        name: of a set that may not have been loaded yet: then the categories of its annotation file are read.
    """
    if name not in DatasetCatalog:
        return None

    metadata = MetadataCatalog.get(name)
    if metadata.get("thing_classes") is not None:
        return tuple(str(each) for each in metadata.thing_classes)

    json_file = metadata.get("json_file")
    categories = read_categories(str(json_file)) if json_file else None
    return None if categories is None else tuple(category["name"] for category in categories)


def find_trained_classes(cfg: CfgNode) -> tuple[str, ...] | None:
    """The name of each class index of the model: those of the training set; None: they are not known.

    Args:
        cfg: DATASETS.TRAIN and the head's NUM_CLASSES are read. A training set with more classes than the model is not
            what it was trained on, as in an evaluation whose config has DATASETS.TRAIN from its base.
    """
    trained = next(filter(None, (read_classes(name) for name in cfg.DATASETS.TRAIN)), None)
    number = count_classes(cfg)
    return None if trained is None or (number is not None and len(trained) > number[1]) else trained


def match_classes(trained: Sequence[str], names: Sequence[str]) -> list[int | None]:
    """For each name the index of the class in the training that has it; None: there is none, or not one alone.

    Names that are equal but for case and spaces are one, unless that would join two classes.

    Example:
        >>> match_classes(["cat", "dog", "owl"], ["owl", "Cat ", "car"])
        [2, 0, None]
    """
    if tuple(trained) == tuple(names):
        return list(range(len(names)))

    for simplify in (str, _simplify):
        known, wanted = [simplify(name) for name in trained], [simplify(name) for name in names]
        if simplify is _simplify and (len(set(known)) < len(known) or len(set(wanted)) < len(wanted)):
            break
        places = [known.index(name) if known.count(name) == wanted.count(name) == 1 else None for name in wanted]
        if None not in places:
            break
    return places


def _simplify(name: str) -> str:
    return " ".join(name.split()).casefold()


def check_classes(cfg: CfgNode, *, is_new: bool = True) -> None:
    """Compare the classes of the training sets with one another and with the model.

    Args:
        cfg: DATASETS.TRAIN and the head's NUM_CLASSES are read.
        is_new: whether a training begins; one that goes on keeps the classes that its checkpoint has.

    Raises:
        ConfigError: names the sets and their classes, or the key and the value to write.
    """
    if not cfg.DATASETS.TRAIN:
        return
    first, *others = cfg.DATASETS.TRAIN
    check_registered(first)
    classes = read_classes(first)

    for name in others:
        check_registered(name)
        names = read_classes(name)
        if classes is not None and names is not None and names != classes:
            raise ConfigError.of(
                "DATASETS.TRAIN",
                "name sets with the same categories in the same order, as a class index has one meaning in a training",
                got=f"{_describe_difference(classes, names)} in {first!r} and {name!r}",
                remedy="Write the same categories into both files.",
            )

    number = count_classes(cfg)
    if classes is None or number is None or number[1] == len(classes) or not is_new:
        return
    key, value = number
    rule = f"be {len(classes)}, the number of categories of training set {first!r} ({list_few(classes)})"
    raise ConfigError.of(key, rule, got=value, remedy=f"Write {key}: {len(classes)}.")


def _describe_difference(one: Sequence[str], other: Sequence[str]) -> str:
    for index, (name, other_name) in enumerate(zip(one, other, strict=False)):
        if name != other_name:
            return f"{name!r} and {other_name!r} as category {index + 1}"
    return f"{len(one)} and {len(other)} categories"


def relabel_records(cfg: CfgNode, name: str, records: list[Record]) -> list[Record]:
    """The records of a set with the class indices of the training, where its own are others.

    Args:
        cfg: see `find_trained_classes`.
        name: of the set.
        records: as Detectron2 gives them; left as they are.

    Raises:
        DatasetError: objects are of classes that the training does not have.
    """
    trained, names = find_trained_classes(cfg), read_classes(name)
    if trained is None or names is None or names == trained:
        return records

    places = match_classes(trained, names)
    relabelled = []
    unknown: dict[str, None] = {}
    for record in records:
        annotations = []
        for annotation in record.get("annotations", ()):
            place = places[annotation["category_id"]]
            if place is None and not annotation.get("iscrowd"):  # of which nothing is learned
                unknown[names[annotation["category_id"]]] = None
            annotations.append({**annotation, "category_id": place})
        relabelled.append({**record, "annotations": annotations} if "annotations" in record else record)

    check_known(name, trained, unknown)
    return relabelled


def check_known(name: str, trained: Iterable[str], unknown: Iterable[str]) -> None:
    """Raise DatasetError if objects of a set are of classes that the training does not have."""
    unknown = [repr(each) for each in unknown]
    if unknown:
        shown = list_few([repr(each) for each in trained], 5)
        raise UNKNOWN_CLASSES.of(list_few(unknown, 5), "objects of the set", name=name, trained=shown)
