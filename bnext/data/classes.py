"""The classes of a model, and which of them the categories of a data set are.

A detector predicts indices. Their names are those of DATASETS.BNEXT.CLASSES or, without it, of the first training set.
The categories of any set are found among them by name, however its file numbers them, or as the config maps them:

    DATASETS:
      BNEXT:
        CLASSES: [person, car, bicycle]
        CLASS_MAP:
          - my_night_train: {pedestrian: person, tram: "", rider: "?"}

A set annotates the classes that its categories reach; its images say nothing of the others. Mapped to "" a category is
none of the classes, and its objects are background; mapped to "?" they may be of any class, and are ignored. Checks of
whole configs are in `check_classes`; the ignore mask in the losses is in `bnext.heads.class_masks`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from bnext.data.categories import read_categories
from bnext.data.corrupted_sets import find_base
from bnext.errors import DatasetError, Refusal, list_few
from bnext.lazy_config import is_lazy

__all__ = [
    "CLASSES",
    "CLASS_MAP",
    "IGNORED",
    "LEFT_OUT",
    "UNKNOWN_CLASSES",
    "SetClasses",
    "are_found_by_name",
    "check_known",
    "count_classes",
    "find_partial_sets",
    "find_trained_classes",
    "match_classes",
    "place_categories",
    "read_class_map",
    "read_classes",
    "relabel_records",
    "rename_categories",
]

CLASSES, CLASS_MAP = "DATASETS.BNEXT.CLASSES", "DATASETS.BNEXT.CLASS_MAP"
# In the place of a class: none of them, and perhaps one of them.
LEFT_OUT, IGNORED = "", "?"

Record = dict[str, Any]

UNKNOWN_CLASSES = Refusal(
    DatasetError,
    "The categories of data set {name!r}",
    "be among the classes of the training, which are found by name ({trained})",
    f"Give a category the same name in both sets, or name its class in {CLASS_MAP}: "
    '[{{{name}: {{{category}: a class, "" for none of them, or "?" for perhaps one of them}}}}]; or name in '
    "DATASETS.TRAIN the set that the weights were trained on.",
)


@dataclass(frozen=True)
class SetClasses:
    """The categories of a data set among the classes of a model.

    Args:
        trained: names of the model's classes, by their index.
        names: of the categories, as the set has them.
        classes: of each category the name of its class, as the config maps it or else its own name; `LEFT_OUT` and
            `IGNORED`: of none.
        places: of each category the class index; None: of none.
    """

    trained: tuple[str, ...]
    names: tuple[str, ...]
    classes: tuple[str, ...]
    places: tuple[int | None, ...]

    @property
    def annotated(self) -> tuple[int, ...]:
        """The class indices that the set annotates, in their order."""
        return tuple(sorted({place for place in self.places if place is not None}))

    @property
    def is_partial(self) -> bool:
        """Whether there are classes that the set does not annotate."""
        return len(self.annotated) < len(self.trained)

    @property
    def unknown(self) -> tuple[str, ...]:
        """Names of categories that are neither found among the classes nor mapped."""
        triples = zip(self.names, self.classes, self.places, strict=True)
        return tuple(name for name, kind, place in triples if place is None and kind not in (LEFT_OUT, IGNORED))


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
    """The name of each class index of the model: those of the config or of the training set; None: they are not known.

    Args:
        cfg: DATASETS.BNEXT.CLASSES, DATASETS.TRAIN and the head's NUM_CLASSES are read. A training set with more
            classes than the model is not what it was trained on, as in an evaluation whose config has DATASETS.TRAIN
            from its base.
    """
    joint = _read_node(cfg).get("CLASSES")
    if joint:
        return tuple(joint)

    trained = next(filter(None, (read_classes(name) for name in cfg.DATASETS.TRAIN)), None)
    number = count_classes(cfg)
    return None if trained is None or (number is not None and len(trained) > number[1]) else trained


def are_found_by_name(cfg: CfgNode, *, is_training: bool) -> bool:
    """Whether the categories of a set are found by name, so that it may have more of them than the model has classes.

    Args:
        cfg: see `find_trained_classes`.
        is_training: whether the set is trained on; then its indices are those of the model unless the config names
            the classes.
    """
    return bool(_read_node(cfg).get("CLASSES")) or (not is_training and find_trained_classes(cfg) is not None)


def _read_node(cfg: CfgNode) -> Mapping[str, Any]:
    return cfg.DATASETS.get("BNEXT") or {}


def read_class_map(cfg: CfgNode, name: str) -> dict[str, str]:
    """Category -> class of a set, as the config maps them; of a corrupted variant those of its base."""
    name = find_base(name)

    mapped: dict[str, str] = {}
    for entry in _read_node(cfg).get("CLASS_MAP", ()):
        mapped |= entry.get(name, {})
    return mapped


def rename_categories(cfg: CfgNode, name: str, names: Iterable[str]) -> tuple[str, ...]:
    """The names of a set's categories as the config maps them; `LEFT_OUT` and `IGNORED` are of no class."""
    mapped = read_class_map(cfg, name)
    return tuple(mapped.get(each, each) for each in names)


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


def place_categories(cfg: CfgNode, name: str) -> SetClasses | None:
    """The categories of a registered set among the classes of the model; None: names of one of them are not known.

    Args:
        cfg: see `find_trained_classes`; DATASETS.BNEXT.CLASS_MAP says which categories have other names.
        name: of the set.
    """
    trained, names = find_trained_classes(cfg), read_classes(name)
    if trained is None or names is None:
        return None

    mapped = read_class_map(cfg, name)
    matches = iter(match_classes(trained, [each for each in names if each not in mapped]))
    places: list[int | None] = []
    for each in names:
        if each not in mapped:
            places.append(next(matches))
        else:
            places.append(trained.index(mapped[each]) if mapped[each] in trained else None)

    return SetClasses(trained, names, rename_categories(cfg, name, names), tuple(places))


def find_partial_sets(cfg: CfgNode) -> list[str]:
    """The training sets that do not annotate all classes of the model."""
    placed = {name: place_categories(cfg, name) for name in cfg.DATASETS.TRAIN}
    return [name for name, classes in placed.items() if classes is not None and classes.is_partial]


def relabel_records(cfg: CfgNode, name: str, records: list[Record]) -> list[Record]:
    """The records of a set with the class indices of the model, and what its images say nothing of.

    Args:
        cfg: see `place_categories`.
        name: of the set.
        records: as Detectron2 gives them; left as they are.

    Returns:
        Records with `annotated_classes`, the class indices that are annotated, where these are not all, and
        `ignored_boxes`, [x0, y0, x1, y1] in pixels of objects that may be of any class, where there are some. Those
        that records bring along count, too. The same list where categories and classes are the same.

    Raises:
        DatasetError: objects are of classes that the model does not have.
    """
    classes = place_categories(cfg, name)
    if classes is None or classes.places == tuple(range(len(classes.trained))):
        return records

    unknown: dict[str, None] = {}
    relabelled = []
    for record in records:
        relabelled.append(_relabel(record, classes))
        for annotation in record.get("annotations", ()):
            category = classes.names[annotation["category_id"]]
            if category in classes.unknown and not annotation.get("iscrowd"):  # of which nothing is learned
                unknown[category] = None

    check_known(name, classes.trained, unknown)
    return relabelled


def _relabel(record: Record, classes: SetClasses) -> Record:
    annotated = classes.annotated
    if record.get("annotated_classes") is not None:
        places = {classes.places[index] for index in record["annotated_classes"]}
        annotated = tuple(sorted(place for place in places if place is not None))

    annotations = []
    ignored = [list(box) for box in record.get("ignored_boxes", ())]
    for annotation in record.get("annotations", ()):
        kind = classes.classes[annotation["category_id"]]
        if kind == IGNORED:
            ignored.append(list(BoxMode.convert(list(annotation["bbox"]), annotation["bbox_mode"], BoxMode.XYXY_ABS)))
        elif kind != LEFT_OUT:
            annotations.append({**annotation, "category_id": classes.places[annotation["category_id"]]})

    relabelled = {**record, "annotations": annotations} if "annotations" in record else dict(record)
    if len(annotated) < len(classes.trained):
        relabelled["annotated_classes"] = list(annotated)
    if ignored:
        relabelled["ignored_boxes"] = ignored
    return relabelled


def check_known(name: str, trained: Iterable[str], unknown: Iterable[str]) -> None:
    """Raise DatasetError if objects of a set are of classes that the training does not have."""
    unknown = [repr(each) for each in unknown]
    if unknown:
        shown = list_few([repr(each) for each in trained], 5)
        raise UNKNOWN_CLASSES.of(
            list_few(unknown, 5), "objects of the set", name=name, trained=shown, category=unknown[0]
        )
