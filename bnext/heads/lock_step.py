"""Levels go through the tower of a head side by side, so that a norm meets all of them in one call."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor, nn

from bnext.errors import ConfigError
from bnext.layers import LevelBatchNorm2d, NormSpec, build_norm

__all__ = ["looking_up_levels", "make_head_norm", "name_levels", "run_tower"]

HeadNorm = NormSpec | str | Callable[[int], nn.Module]


@contextlib.contextmanager
def looking_up_levels(levels: Sequence[str]) -> Iterator[None]:
    """A level that the backbone has not becomes a ConfigError."""
    try:
        yield
    except KeyError as error:
        if error.args[0] not in levels:
            raise
        raise ConfigError(
            f"MODEL.RETINANET.IN_FEATURES must name features of the backbone; got {error.args[0]!r}. "
            f"A RetinaNet's FPN has p3 to p7; correct the name."
        ) from error


def make_head_norm(norm: HeadNorm, levels: Sequence[str]) -> str | Callable[[int], nn.Module]:
    """What detectron2's `get_norm` takes: a spec becomes a factory of level norms, the rest stays."""
    if norm == "GN":
        return _make_group_norm
    return build_norm(norm, levels) if isinstance(norm, NormSpec) else norm


def _make_group_norm(num_channels: int) -> nn.GroupNorm:
    """Detectron2's "GN". Its 0.6 tries every norm on one channel, which current torch refuses to cut into 32 groups."""
    return nn.GroupNorm(min(32, num_channels), num_channels)


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
