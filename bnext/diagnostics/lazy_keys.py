"""Remedies for a LazyConfig, which takes keys of its own in the place of MODEL's."""

from __future__ import annotations

import dataclasses

from bnext.diagnostics.facts import Facts
from bnext.diagnostics.findings import Evidence

__all__ = ["suit_config"]

_ARCHITECTURE = "BNextLazyModel"
_NODE = "MODEL.BNEXT."
_NAMES = {f"MODEL.{place}.NORM": f"norms.{place}.NORM" for place in ("RETINANET", "RPN")}  # whose heads bnext puts in


def suit_config(facts: Facts, evidence: Evidence) -> Evidence:
    """Evidence whose remedy has keys that the config of the facts takes: as it is, unless it is a LazyConfig."""
    if facts.get_config("MODEL.META_ARCHITECTURE") != _ARCHITECTURE:
        return evidence

    keys: dict[str, object] = {}
    has_others = False
    for key, value in evidence.remedy.keys.items():
        if key.startswith(_NODE):
            keys[f"norms.{key.removeprefix(_NODE)}"] = value
        elif key in _NAMES or not key.startswith("MODEL."):
            keys[_NAMES.get(key, key)] = value
        else:
            has_others = True

    text = evidence.remedy.text + (" The norm of a part is said in its call in `model`." if has_others else "")
    return dataclasses.replace(evidence, remedy=dataclasses.replace(evidence.remedy, text=text, keys=keys))
