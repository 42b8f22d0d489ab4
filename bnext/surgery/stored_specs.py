"""What a checkpoint should say of its norms beside their state: how mini-batch statistics were computed, and eps.

The keys of rows 1 and 3 of Table 5 are the same, and those of rows 2 and 4; only the training differs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from bnext.layers.batch_norm import BatchNorm2d
from bnext.layers.level_norm import LevelBatchNorm2d
from bnext.surgery.convert_state import Change

__all__ = ["collect_norm_specs", "compare_norm_specs"]

OTHER_STATISTICS = (
    "in training the mini-batch statistics were {stored}, the model's are {own}; the population statistics "
    "describe the former, re-estimate them with recompute_population_statistics"
)
UNKNOWN_STATISTICS = (
    "the checkpoint does not say whether its mini-batch statistics were shared or {per}; "
    "taken for {own}, as the model's are"
)
OTHER_EPS = "eps was {stored}, the model's is {own}; outputs change, most where the variance is small"


def collect_norm_specs(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Path -> fields of its `NormSpec`, for every norm of bnext in a model."""
    return {
        path: dataclasses.asdict(module.spec)
        for path, module in model.named_modules()
        if isinstance(module, BatchNorm2d)
    }


def compare_norm_specs(
    stored: Mapping[str, Mapping[str, Any]] | None, keys: Iterable[str], model: nn.Module
) -> list[Change]:
    """What the mini-batch statistics of a checkpoint mean for the model that loads it.

    Args:
        stored: from `collect_norm_specs` when it was saved; None: the checkpoint does not have it.
        keys: of its state dict, as it was saved; a norm that it does not hold is passed over. Numbered levels
            are detectron2's `CycleBatchNormList`, whose statistics are always per level.
        model: loads it.
    """
    owners = {key.rpartition(".")[0] for key in keys}
    changes = []
    for path, module in model.named_modules():
        if isinstance(module, BatchNorm2d) and any(owner == path or owner.startswith(f"{path}.") for owner in owners):
            before = dict((stored or {}).get(path, {}))
            if f"{path}.0" in owners and "0" not in module.domains:
                before["statistics"] = "per_level"
            changes += [Change(path, *found) for found in _compare(before, module)]
    return changes


def _compare(before: Mapping[str, Any], module: BatchNorm2d) -> list[tuple[str, bool]]:
    """What to say of one norm, and whether its outputs stay what they were."""
    spec, found = module.spec, []
    if "statistics" in before and before["statistics"] != spec.statistics:
        text = OTHER_STATISTICS.format(stored=before["statistics"], own=spec.statistics)
        found.append((text, True))
    elif "statistics" not in before and (isinstance(module, LevelBatchNorm2d) or spec.statistics != "shared"):
        per = "per_level" if isinstance(module, LevelBatchNorm2d) else "per_domain"
        found.append((UNKNOWN_STATISTICS.format(own=spec.statistics, per=per), True))
    if before.get("eps", spec.eps) != spec.eps:
        found.append((OTHER_EPS.format(stored=before["eps"], own=spec.eps), False))
    return found
