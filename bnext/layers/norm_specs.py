"""What a checkpoint should say of its norms beside their state: how mini-batch statistics were computed.

The keys of rows 1 and 3 of Table 5 are the same, and those of rows 2 and 4; only the training differs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from bnext.layers.convert import Change
from bnext.layers.level_norm import LevelBatchNorm2d

__all__ = ["collect_norm_specs", "compare_norm_specs"]

OTHER_STATISTICS = (
    "in training the mini-batch statistics were {stored}, the model's are {own}; the population statistics "
    "describe the former, re-estimate them with recompute_population_statistics"
)
UNKNOWN_STATISTICS = (
    "the checkpoint does not say whether its mini-batch statistics were shared by the levels or per level; "
    "taken for {own}, as the model's are"
)


def collect_norm_specs(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Path -> fields of its `NormSpec`, for every level norm of a model."""
    return {
        path: dataclasses.asdict(module.spec)
        for path, module in model.named_modules()
        if isinstance(module, LevelBatchNorm2d)
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
    for path, spec in collect_norm_specs(model).items():
        if not any(owner == path or owner.startswith(f"{path}.") for owner in owners):
            continue
        own = spec["statistics"]
        before = "per_level" if f"{path}.0" in owners else (stored or {}).get(path, {}).get("statistics")
        if before is None:
            changes.append(Change(path, UNKNOWN_STATISTICS.format(own=own)))
        elif before != own:
            changes.append(Change(path, OTHER_STATISTICS.format(stored=before, own=own)))
    return changes
