"""Specs that a checkpoint holds beside the state of its norms: how mini-batch statistics were computed, and eps.

The keys of rows 1 and 3 of Table 5 are the same, and those of rows 2 and 4; only the training differs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from bnext.layers.level_norm import LevelBatchNorm2d
from bnext.layers.walk import find_bnext_norms
from bnext.surgery.convert_state import Change

__all__ = ["collect_norm_specs", "compare_norm_specs"]

OTHER_STATISTICS = (
    "in training the mini-batch statistics were {stored}, the model's are {expected}; the population statistics "
    "describe the former, re-estimate them with recompute_population_statistics"
)
UNKNOWN_STATISTICS = (
    "the checkpoint does not say whether its mini-batch statistics were shared or {per}; "
    "taken for {expected}, as the model's are"
)
OTHER_EPS = "eps was {stored}, the model's is {expected}; outputs change, most where the variance is small"


def collect_norm_specs(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Path -> fields of its `NormSpec`, for every norm of bnext in a model."""
    return {path: dataclasses.asdict(norm.spec) for path, norm in find_bnext_norms(model).items()}


def compare_norm_specs(
    stored: Mapping[str, Mapping[str, Any]] | None, keys: Iterable[str], model: nn.Module
) -> list[Change]:
    """Differences between the mini-batch statistics of a checkpoint and those of the model that loads it.

    Args:
        stored: from `collect_norm_specs` when it was saved; None: the checkpoint does not have it.
        keys: of its state dict, as it was saved; a norm that it does not hold is passed over. Numbered levels
            are detectron2's `CycleBatchNormList`, whose statistics are always per level.
        model: loads it.
    """
    owners = {key.rpartition(".")[0] for key in keys}
    changes = []

    for path, norm in find_bnext_norms(model).items():
        if not any(owner == path or owner.startswith(f"{path}.") for owner in owners):
            continue
        before = dict((stored or {}).get(path, {}))
        if f"{path}.0" in owners and "0" not in norm.domains:
            before["statistics"] = "per_level"

        spec, per = norm.spec, "per_level" if isinstance(norm, LevelBatchNorm2d) else "per_domain"
        statistics = before.get("statistics")
        if statistics is None and (per == "per_level" or spec.statistics != "shared"):
            changes.append(Change(path, UNKNOWN_STATISTICS.format(expected=spec.statistics, per=per)))
        elif statistics not in (None, spec.statistics):
            changes.append(Change(path, OTHER_STATISTICS.format(stored=statistics, expected=spec.statistics)))

        if before.get("eps", spec.eps) != spec.eps:
            text = OTHER_EPS.format(stored=before["eps"], expected=spec.eps)
            changes.append(Change(path, text, keeps_outputs=False))

    return changes
