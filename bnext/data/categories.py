"""The categories of an annotation file, without parsing the rest of it where that is possible."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from detectron2.utils.file_io import PathManager

from bnext.files import read_stamp

__all__ = ["keep_categories", "read_categories"]

_CATEGORIES = re.compile(r'"categories"\s*:\s*(?=\[)')
Stamp = tuple[str, int, int]  # of the annotation file: path, time and size
_read: dict[Stamp, tuple[dict[str, Any], ...]] = {}


def read_categories(json_file: str) -> tuple[dict[str, Any], ...] | None:
    """The categories of a file in the order of their ids; None: there are none, and whoever loads the set says why."""
    try:
        path = PathManager.get_local_path(json_file)
        key = read_stamp(path)
        if key in _read:
            return _read[key]

        text = Path(path).read_text(encoding="utf-8-sig")
        starts = [match.end() for match in _CATEGORIES.finditer(text)]
        if len(starts) == 1:
            categories, _ = json.JSONDecoder().raw_decode(text, starts[0])
        else:
            categories = json.loads(text)["categories"]

        keep_categories(key, categories)
    except (OSError, ValueError, KeyError, TypeError):
        return None

    return _read[key]


def keep_categories(key: Stamp, categories: Iterable[Mapping[str, Any]]) -> None:
    """Remember the categories of a file, which somebody has parsed.

    Args:
        key: `read_stamp` of the file, from before it was read.
        categories: as they are in it, in any order.
    """
    by_id = {category["id"]: {**category, "name": str(category["name"])} for category in categories}
    _read[key] = tuple(by_id[number] for number in sorted(by_id))
