"""A config as it differs from its base: what a person looks for at the start of a run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode, get_cfg

from bnext.config.check import flatten
from bnext.config.keys import add_bnext_config
from bnext.config.merge import merge_values
from bnext.config.read import read_bases
from bnext.errors import BNextError, list_few
from bnext.lazy_config import is_lazy
from bnext.tables import format_rows
from bnext.text import flatten_text

__all__ = ["describe_differences", "find_differences"]

_DEFAULTS = "Detectron2's defaults"
_MOST_ROWS = 20
_MOST_LETTERS = 60  # of a value


def find_differences(cfg: CfgNode, config_file: str = "") -> tuple[str, dict[str, tuple[Any, Any]]]:
    """The keys whose values are not those of the base.

    Args:
        cfg: a whole config.
        config_file: YAML, whose `_BASE_` is the base; "", or one without: Detectron2's defaults, and bnext's. Of a
            LazyConfig there are its overrides, too.

    Returns:
        The base in words, and key -> (value, value in the base).
    """
    base = get_cfg()
    add_bnext_config(base)
    words = _DEFAULTS
    try:
        paths, values = read_bases(config_file) if config_file.endswith((".yaml", ".yml")) else ([], {})
        if paths:
            merged = base.clone()
            merge_values(merged, values, base, paths[0])
            base, words = merged, list_few(map(os.path.normpath, paths))
    except BNextError:
        pass  # of another version of Detectron2's keys, which the defaults tell as well

    before = flatten(base)
    differences: dict[str, tuple[Any, Any]] = {}
    for word in cfg.LAZY.OVERRIDES if is_lazy(cfg) else ():
        name, _, value = word.partition("=")
        differences[name] = value, "as the file has it"

    for key, value in flatten(cfg).items():
        if is_lazy(cfg) and key.startswith("LAZY."):
            continue
        if key not in before or not _is_equal(value, before[key]):
            differences[key] = value, before.get(key)
    return words, differences


def _is_equal(value: Any, other: Any) -> bool:
    """Lists of a file and tuples of a default are alike."""
    return (list(value) if isinstance(value, tuple) else value) == (list(other) if isinstance(other, tuple) else other)


def describe_differences(cfg: CfgNode, config_file: str = "", first: Sequence[str] = (), most: int = _MOST_ROWS) -> str:
    """The differences as a table, with the number of those that are left out.

    Args:
        cfg, config_file: see `find_differences`.
        first: keys that come first, such as those of the command line.
        most: rows.
    """
    base, differences = find_differences(cfg, config_file)
    name = f"Config {config_file}" if config_file else "Config"
    if not differences:
        return f"{name} is {base}."

    rows = []
    keys = sorted(differences, key=lambda key: key not in first)
    for key in keys[:most]:
        value, before = differences[key]
        rows.append([key, _show(value), _show(before)])
    table = format_rows(rows, ["key", "value", "in the base"], num_texts=3)
    number = len(differences)
    part = f" (the first {most} of {number} keys)" if number > most else ""
    return f"{name}, as it differs from {base}{part}:\n{table}"


def _show(value: Any) -> str:
    return flatten_text(repr(value) if not isinstance(value, str) or not value else value, most=_MOST_LETTERS)
