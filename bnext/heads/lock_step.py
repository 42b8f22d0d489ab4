"""Levels go through the tower of a head side by side, so that a norm meets all of them in one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from bnext.errors import ConfigError
from bnext.layers import LevelBatchNorm2d, NormSpec, build_norm

__all__ = ["make_head_norm", "name_levels", "run_tower"]

HeadNorm = NormSpec | str | Callable[[int], nn.Module]


def make_head_norm(norm: HeadNorm, levels: Sequence[str]) -> str | Callable[[int], nn.Module]:
    """What detectron2's `get_norm` takes: a spec becomes a factory of level norms, the rest stays."""
    return build_norm(norm, levels) if isinstance(norm, NormSpec) else norm


def name_levels(levels: Sequence[str], features: Sequence[Tensor]) -> dict[str, Tensor]:
    """Level name -> feature.

    Raises:
        ConfigError: the numbers differ.
    """
    if len(levels) != len(features):
        raise ConfigError(
            f"a head must get one feature per level; got {len(features)} features for the levels {tuple(levels)}. "
            f"Set MODEL.RETINANET.IN_FEATURES to the features that it gets."
        )
    return dict(zip(levels, features, strict=True))


def run_tower(tower: nn.Sequential, features: dict[str, Tensor]) -> dict[str, Tensor]:
    """Apply a tower to every level: a level norm to all at once, every other module to each alone."""
    for module in tower:
        if isinstance(module, LevelBatchNorm2d):
            features = module(features)
        else:
            features = {level: module(feature) for level, feature in features.items()}
    return features
