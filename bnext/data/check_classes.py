"""Checks of the classes of a config before a training: a class index has one meaning in all sets and in the model."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog

from bnext.data.classes import (
    CLASS_MAP,
    CLASSES,
    IGNORED,
    LEFT_OUT,
    SetClasses,
    count_classes,
    find_trained_classes,
    place_categories,
    read_class_map,
    read_classes,
)
from bnext.data.records import check_registered
from bnext.errors import ConfigError, DatasetError, Refusal, list_few
from bnext.notices import tell_once
from bnext.text import suggest

__all__ = ["check_class_keys", "check_class_map", "check_classes"]

log = logging.getLogger(__name__)

_FORM = '[{{my_night_train: {{pedestrian: person, tram: ""}}}}]'

_ODD_CLASSES = Refusal(
    ConfigError, CLASSES, "be names of classes, each once", 'Write them as ["person", "car"], numbers in quotes.'
)
_TAKEN_NAME = Refusal(
    ConfigError,
    CLASSES,
    f"hold no class by a name that {CLASS_MAP} has another use for",
    "Give the class another name, and map the categories to it.",
)
_ODD_MAP = Refusal(
    ConfigError,
    CLASS_MAP,
    "be a list of mappings: a data set, and for its categories the names of classes",
    f"Write it as {_FORM}, names in quotes where YAML would take them for numbers.",
)
_MAPPED_TWICE = Refusal(ConfigError, CLASS_MAP, "map each category of a set once", "Keep one entry for each data set.")
_WITHOUT_CLASSES = Refusal(
    ConfigError,
    CLASS_MAP,
    f"speak of no set of DATASETS.TRAIN unless {CLASSES} names the classes of the model",
    f"Write {CLASSES}: [...], or leave the set out of the map.",
)
_UNKNOWN_SET = Refusal(ConfigError, f"The data sets in {CLASS_MAP}", "be registered", "{remedy}")
_UNKNOWN_CATEGORY = Refusal(ConfigError, f"The categories of {{name!r}} in {CLASS_MAP}", "be some of it", "{remedy}")
_UNKNOWN_TARGET = Refusal(
    ConfigError, f"The classes in {CLASS_MAP}", f'be of the model, or "{LEFT_OUT}" or "{IGNORED}"', "{remedy}"
)
_UNNAMED = Refusal(
    DatasetError,
    "Data set {name!r}",
    f"name its categories where {CLASSES} joins those of several sets",
    "Write MetadataCatalog.get({name!r}).thing_classes = [...] where it is registered.",
)
_UNPLACED = Refusal(
    ConfigError,
    f"The categories of training sets that {CLASSES} joins",
    "each be a class or be mapped to one",
    f"Add a class of that name to {CLASSES} or, for each, say in {CLASS_MAP} which class it is, that it is none of "
    'them (""), or that its objects may be of any ("?"): {form}.',
)
_DIFFERENT = Refusal(
    ConfigError,
    "DATASETS.TRAIN",
    f"name sets with the same categories in the same order unless {CLASSES} joins them, as a class index has one "
    "meaning in a training",
    f"Write {CLASSES}: {{classes}} and {{key}}: {{number}}. Where two names mean one class, leave one of them out and "
    f"map it: {CLASS_MAP}: {_FORM}.",
)
_UNSEEN = (
    "No set of DATASETS.TRAIN annotates the classes %s of DATASETS.BNEXT.CLASSES: the training leaves them as they are."
)


# ---- the keys themselves


def check_class_keys(classes: Any, class_map: Any) -> None:
    """Refuse values of DATASETS.BNEXT.CLASSES and CLASS_MAP that have another form, whatever sets there are.

    Args:
        classes, class_map: the values.

    Raises:
        ConfigError: names the value.
    """
    if not isinstance(classes, (list, tuple)) or not all(isinstance(name, str) for name in classes):
        raise _ODD_CLASSES.of(repr(classes))
    repeated = [name for name in dict.fromkeys(classes) if classes.count(name) > 1]
    if repeated:
        raise _ODD_CLASSES.of(f"{list_few(map(repr, repeated))} more than once")
    if {LEFT_OUT, IGNORED} & set(classes):
        raise _TAKEN_NAME.of(f"{next(name for name in classes if name in (LEFT_OUT, IGNORED))!r}")

    if not isinstance(class_map, (list, tuple)):
        raise _ODD_MAP.of(repr(class_map))
    seen: set[tuple[str, str]] = set()
    for entry in class_map:
        for name, category in _list_pairs(entry):
            if (name, category) in seen:
                raise _MAPPED_TWICE.of(f"{category!r} of {name!r} twice")
            seen.add((name, category))


def _list_pairs(entry: Any) -> list[tuple[str, str]]:
    """Data set and category of everything that an entry of the map maps."""
    if not isinstance(entry, Mapping):
        raise _ODD_MAP.of(repr(entry))

    pairs = []
    for name, mapped in entry.items():
        if not isinstance(name, str) or not isinstance(mapped, Mapping):
            raise _ODD_MAP.of(repr({name: mapped}))
        for category, kind in mapped.items():
            if not isinstance(category, str) or not isinstance(kind, str):
                raise _ODD_MAP.of(repr({category: kind}), name)
            pairs.append((name, category))
    return pairs


# ---- the keys, the sets and the model


def check_classes(cfg: CfgNode, *, is_new: bool = True) -> None:
    """Compare the classes of the training sets with one another and with the model.

    Args:
        cfg: DATASETS.TRAIN, DATASETS.BNEXT.CLASSES and CLASS_MAP, and the head's NUM_CLASSES are read.
        is_new: whether a training begins; one that goes on keeps the classes that its checkpoint has.

    Raises:
        ConfigError: names the sets and their classes, or the key and the value to write.
        DatasetError: a set does not name its categories where several are joined.
    """
    check_class_map(cfg)
    for name in cfg.DATASETS.TRAIN:
        check_registered(name)

    if cfg.DATASETS.BNEXT.CLASSES:
        _check_joined(cfg)
    elif cfg.DATASETS.TRAIN:
        _check_equal(cfg, is_new)


def check_class_map(cfg: CfgNode) -> None:
    """Refuse a map that speaks of what is not there, and a head of another size than DATASETS.BNEXT.CLASSES.

    Args:
        cfg: see `check_classes`; also for an evaluation.

    Raises:
        ConfigError: names the set, the category or the class, and the nearest.
    """
    joint, number = cfg.DATASETS.BNEXT.CLASSES, count_classes(cfg)
    if joint and number is not None and number[1] != len(joint):
        raise _name_number(number[0], number[1], joint, f"of classes in {CLASSES}")

    trained = find_trained_classes(cfg)
    for name in dict.fromkeys(chain.from_iterable(cfg.DATASETS.BNEXT.CLASS_MAP)):
        if name not in DatasetCatalog:
            remedy = suggest(name, DatasetCatalog.list(), "Correct the name, or leave it out.")
            raise _UNKNOWN_SET.of(repr(name), remedy=remedy)
        if name in cfg.DATASETS.TRAIN and not joint:
            raise _WITHOUT_CLASSES.of(repr(name))
        _check_mapping(name, read_class_map(cfg, name), read_classes(name), trained)


def _check_mapping(
    name: str, mapped: Mapping[str, str], categories: Sequence[str] | None, trained: Sequence[str] | None
) -> None:
    for category, kind in mapped.items():
        if categories is not None and category not in categories:
            remedy = suggest(category, categories, f"It has {list_few(map(repr, categories), 8)}.")
            raise _UNKNOWN_CATEGORY.of(repr(category), name=name, remedy=remedy)
        if trained is not None and kind not in (*trained, LEFT_OUT, IGNORED):
            otherwise = f"Add it to {CLASSES}, or choose one of {list_few(map(repr, trained), 8)}."
            remedy = suggest(kind, trained, otherwise)
            raise _UNKNOWN_TARGET.of(repr(kind), f"{category!r} of {name!r}", remedy=remedy)


def _check_joined(cfg: CfgNode) -> None:
    """Every category of a training set is a class, or mapped."""
    placed: dict[str, SetClasses] = {}
    for name in cfg.DATASETS.TRAIN:
        classes = place_categories(cfg, name)
        if classes is None:
            raise _UNNAMED.of("none", name=name)
        placed[name] = classes

    unknown = {name: classes.unknown for name, classes in placed.items() if classes.unknown}
    if unknown:
        got = "; ".join(f"{', '.join(map(repr, names))} in {name!r}" for name, names in unknown.items())
        name, names = next(iter(unknown.items()))
        raise _UNPLACED.of(got, form=f'[{{{name}: {{{names[0]!r}: ""}}}}]')

    annotated = set(chain.from_iterable(classes.annotated for classes in placed.values()))
    unseen = [repr(name) for index, name in enumerate(cfg.DATASETS.BNEXT.CLASSES) if index not in annotated]
    if unseen and placed:
        tell_once(log, tuple(unseen), _UNSEEN, list_few(unseen, 8))


def _check_equal(cfg: CfgNode, is_new: bool) -> None:
    """Without joint classes all training sets have those of the first."""
    first = cfg.DATASETS.TRAIN[0]
    classes, number = read_classes(first), count_classes(cfg)
    if classes is None:
        return

    others = {name: read_classes(name) for name in cfg.DATASETS.TRAIN[1:]}
    different = {name: names for name, names in others.items() if names is not None and names != classes}
    if different:
        got = "; ".join(_describe_difference(first, classes, name, names) for name, names in different.items())
        joint = list(dict.fromkeys(chain(classes, *different.values())))
        key = number[0] if number is not None else "NUM_CLASSES"
        raise _DIFFERENT.of(got, key=key, classes=f"[{', '.join(map(repr, joint))}]", number=len(joint))

    if number is not None and number[1] != len(classes) and is_new:
        raise _name_number(number[0], number[1], classes, f"of categories of training set {first!r}")


def _describe_difference(one: str, names: Sequence[str], other: str, other_names: Sequence[str]) -> str:
    """All categories that one of two sets has alone, or that their order differs."""
    parts = []
    for alone, name in ((_subtract(names, other_names), one), (_subtract(other_names, names), other)):
        if alone:
            parts.append(f"only in {name!r}: {', '.join(map(repr, alone))}")

    shared = [[each for each in order if each in names and each in other_names] for order in (names, other_names)]
    if shared[0] != shared[1]:
        orders = " and ".join(", ".join(map(repr, order)) for order in shared)
        parts.append(f"another order in {one!r} than in {other!r}: {orders}")
    return "; ".join(parts) or f"other categories in {one!r} than in {other!r}"


def _subtract(names: Sequence[str], others: Iterable[str]) -> list[str]:
    rest = set(others)
    return [name for name in names if name not in rest]


def _name_number(key: str, value: int, classes: Sequence[str], of: str) -> ConfigError:
    rule = f"be {len(classes)}, the number {of} ({list_few(classes)})"
    return ConfigError.of(key, rule, got=value, remedy=f"Write {key}: {len(classes)}.")
