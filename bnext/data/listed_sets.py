"""Sets that a config lists (DATASETS.BNEXT.COCO): checked, and registered with Detectron2's catalogs.

    {name: my_train, json: my/train.json, folder: my/train, domain: day}
    {name: my_fog, json: my/train.json, folder: my/train, domain: fog, corruption: fog, severity: 3}

The catalogs are of the process, a list is of a config: whoever uses a config calls `register_listed_sets`, which puts
its sets in the place of those that another config has listed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata

from bnext.data.catalog import CocoSet, datasets_root
from bnext.data.categories import read_categories
from bnext.data.corrupted_sets import mark_corrupted, register_variant
from bnext.data.corruptions.names import check_corruption
from bnext.errors import ConfigError, Refusal, list_few
from bnext.lazy_config import copy_node, is_lazy
from bnext.text import find_near

__all__ = [
    "KEY",
    "ListedSet",
    "check_listed_sets",
    "current_sets",
    "is_listed",
    "register_listed_sets",
    "register_sets",
]

KEY = "DATASETS.BNEXT.COCO"
_FIELDS = ("name", "json", "folder", "domain", "corruption", "severity")
_NEEDED = ("name", "json", "folder")
# As other programs call them.
_OTHER_WORDS = {"json_file": "json", "ann_file": "json", "annotations": "json"}
_OTHER_WORDS |= {"image_root": "folder", "images": "folder", "img_dir": "folder", "root": "folder"}
_FORM = "{{name: my_train, json: my/train.json, folder: my/train}}"

_NO_MAPPING = Refusal(
    ConfigError, KEY, "be a list of mappings, one for each data set", f"Write them as [{_FORM}], or [] for none."
)
_UNKNOWN = Refusal(ConfigError, f"The fields of {KEY}", f"be some of {', '.join(_FIELDS)}", "{remedy}")
_MISSING = Refusal(ConfigError, f"Every entry of {KEY}", f"have {', '.join(_NEEDED)}", f"Write it as {_FORM}.")
_NO_TEXT = Refusal(ConfigError, "{field} in " + KEY, "be text, and not empty", "Write it in quotes.")
_HALF = Refusal(
    ConfigError,
    f"corruption and severity in {KEY}",
    "be given together",
    "Write both, such as corruption: fog, severity: 3, or none.",
)
_TWICE = Refusal(
    ConfigError, f"The names in {KEY}", "be given to one data set each", "Give each set a name of its own."
)
_TAKEN = Refusal(
    ConfigError,
    f"The names in {KEY}",
    "be new",
    "Give the set another name, here and in DATASETS.TRAIN and TEST, or leave it out of the key where it is "
    "registered elsewhere, too.",
)


@dataclass(frozen=True)
class ListedSet(CocoSet):
    """A COCO-format set of a config.

    Args:
        domain: of its images; "": none is given.
        corruption, severity: of its pictures, whenever they are read; "" and 0: they are as they are.
    """

    domain: str = ""
    corruption: str = ""
    severity: int = 0

    def __call__(self) -> list[dict[str, Any]]:
        records = super().__call__()
        return mark_corrupted(records, self.corruption, self.severity) if self.corruption else records


_shelf: dict[ListedSet, Metadata] = {}  # of sets that other configs list: whatever was set comes back with them


def check_listed_sets(listed: Any) -> None:
    """Refuse a value of the key that lists no sets.

    Args:
        listed: the value of DATASETS.BNEXT.COCO.

    Raises:
        ConfigError: names the entry and the field.
    """
    if not isinstance(listed, (list, tuple)):
        raise _NO_MAPPING.of(repr(listed))

    first: dict[str, Mapping[str, Any]] = {}
    for place, entry in enumerate(listed):
        _check_entry(entry, f"entry {place + 1} of {len(listed)}")
        before = first.setdefault(entry["name"], entry)
        if dict(before) != dict(entry):
            raise _TWICE.of(f"{entry['name']!r} for two", f"{dict(before)} and {dict(entry)}")


def _check_entry(entry: Any, where: str) -> None:
    if not isinstance(entry, Mapping):
        raise _NO_MAPPING.of(repr(entry), where)

    for field, value in entry.items():
        if field not in _FIELDS:
            meant = _OTHER_WORDS.get(str(field).casefold())
            near = [meant] if meant else find_near(field, _FIELDS, most=1)
            remedy = f"Did you mean {near[0]}?" if near else "Leave it out."
            raise _UNKNOWN.of(repr(field), where, remedy=remedy)
        is_text = isinstance(value, str) and "\0" not in value and bool(value or field not in _NEEDED)
        if field != "severity" and not is_text:
            raise _NO_TEXT.of(repr(value), where, field=field)

    missing = [field for field in _NEEDED if field not in entry]
    if missing:
        raise _MISSING.of(f"no {' and no '.join(missing)}", f"{where}: {list_few(map(repr, entry.values()))}")

    given = [field for field in ("corruption", "severity") if field in entry]
    if len(given) == 1:
        raise _HALF.of(f"{given[0]} alone", where)
    if given:
        check_corruption(entry["corruption"], entry["severity"], f"{KEY}, {where}")


def register_listed_sets(cfg: CfgNode) -> None:
    """Register the sets that a config lists, and forget those that another config has listed.

    Args:
        cfg: DATASETS.BNEXT.COCO is read; a config without that key changes none of these. Relative paths are looked for
            in the working directory, and then in the folder of all data sets (DETECTRON2_DATASETS). Corrupted variants
            in DATASETS.TRAIN and TEST are registered as well.

    Raises:
        ConfigError: the list is none, a name of it is registered by somebody else, or a variant has no such corruption.

    Note:
        Nothing is read from disk before a set is used, but the names of keypoints where MODEL.KEYPOINT_ON is True.
    """
    if is_lazy(cfg):
        copy_node(cfg)  # runs the file in a worker: it may register sets as well

    node = cfg.DATASETS.get("BNEXT") or {}
    if "COCO" in node:
        check_listed_sets(node["COCO"])
        register_sets([_resolve(entry) for entry in node["COCO"]])
        for entry in current_sets() if cfg.MODEL.KEYPOINT_ON else ():
            _name_keypoints(entry)

    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        register_variant(name)


def current_sets() -> list[ListedSet]:
    """The sets that are registered from a config at present; picklable, for `register_sets` in another process."""
    entries = [DatasetCatalog[name] for name in DatasetCatalog]
    return [entry for entry in entries if isinstance(entry, ListedSet)]


def is_listed(name: str) -> bool:
    """Whether a registered set is one that a config lists."""
    return isinstance(DatasetCatalog[name], ListedSet)


def register_sets(sets: Sequence[ListedSet]) -> None:
    """Register sets, in the place of all that were registered so before.

    Raises:
        ConfigError: a name is registered by somebody else.
    """
    for entry in sets:
        if entry.name in DatasetCatalog and not isinstance(DatasetCatalog[entry.name], ListedSet):
            file = MetadataCatalog.get(entry.name).get("json_file")
            got = f"{entry.name!r}, which is registered already"
            raise _TAKEN.of(got, f"with {file}" if file else "by code")

    for present in current_sets():
        if present not in sets:
            DatasetCatalog.remove(present.name)
            _shelf[present] = MetadataCatalog.pop(present.name)

    for entry in sets:
        if entry.name not in DatasetCatalog:
            _register(entry)


def _register(entry: ListedSet) -> None:
    if entry in _shelf:
        MetadataCatalog[entry.name] = _shelf.pop(entry)

    DatasetCatalog.register(entry.name, entry)
    MetadataCatalog.get(entry.name).set(
        json_file=entry.json_file,
        image_root=entry.image_root,
        evaluator_type="coco",
        domain=entry.domain,
    )


def _resolve(entry: Mapping[str, Any]) -> ListedSet:
    json_file, folder = (_find_path(entry[field]) for field in ("json", "folder"))
    others = {field: entry[field] for field in ("domain", "corruption", "severity") if field in entry}
    return ListedSet(entry["name"], json_file, folder, **others)


def _find_path(given: str) -> str:
    """A whole path: below the working directory, or below the folder of all data sets if it is there."""
    path = os.path.expanduser(given)
    if "://" in path:
        return path

    here, there = os.path.abspath(path), os.path.abspath(datasets_root() / path)
    return there if not os.path.exists(here) and os.path.exists(there) else here


def _name_keypoints(entry: ListedSet) -> None:
    """The names of a set's keypoints, and which change places in a mirror, as the categories of its file have them."""
    metadata = MetadataCatalog.get(entry.name)
    categories = read_categories(entry.json_file) or ()
    names = next((each["keypoints"] for each in categories if each.get("keypoints")), None)

    is_named = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if names is None or not is_named or metadata.get("keypoint_names") is not None:
        return
    pairs = [(name, name.replace("left", "right", 1)) for name in names]
    flips = [pair for pair in pairs if pair[0] != pair[1] and pair[1] in names]
    metadata.set(keypoint_names=names, keypoint_flip_map=flips)
