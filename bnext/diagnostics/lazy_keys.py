"""Keys of a LazyConfig, which has names of its own in the place of MODEL's."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bnext.diagnostics.facts import Facts
    from bnext.diagnostics.findings import Evidence

__all__ = ["name_keys", "name_lazily", "suit_config"]

_ARCHITECTURE = "BNextLazyModel"
_NODE = "MODEL.BNEXT."
_NAMES = {f"MODEL.{place}.NORM": f"norms.{place}.NORM" for place in ("RETINANET", "RPN")}  # whose heads bnext puts in


def name_lazily(key: str) -> str:
    """The name that a key has in a LazyConfig; "" where it has none.

    Example:
        >>> name_lazily("MODEL.BNEXT.FPN.WORKERS"), name_lazily("SOLVER.MAX_ITER"), name_lazily("MODEL.FPN.NORM")
        ('norms.FPN.WORKERS', 'SOLVER.MAX_ITER', '')
    """
    if key.startswith(_NODE):
        return f"norms.{key.removeprefix(_NODE)}"
    return key if not key.startswith("MODEL.") else _NAMES.get(key, "")


def name_keys(facts: Facts, keys: Mapping[str, object]) -> dict[str, object]:
    """Keys as the config of the facts has them; those that a LazyConfig has not are left out."""
    if facts.get_config("MODEL.META_ARCHITECTURE") != _ARCHITECTURE:
        return dict(keys)

    named = {name_lazily(key): value for key, value in keys.items()}
    named.pop("", None)
    return named


def suit_config(facts: Facts, evidence: Evidence) -> Evidence:
    """Evidence whose remedy has keys that the config of the facts takes: as it is, unless it is a LazyConfig."""
    remedy = evidence.remedy
    keys = name_keys(facts, remedy.keys)
    is_whole = len(keys) == len(remedy.keys)

    text = remedy.text if is_whole else f"{remedy.text} The norm of a part is said in its call in `model`."
    return dataclasses.replace(evidence, remedy=dataclasses.replace(remedy, text=text, keys=keys))
