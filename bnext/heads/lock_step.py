"""Levels go through the tower of a head side by side, so that a norm meets all of them in one call.

Where norms share statistics with other workers, so do the towers: norms of equal depth then ask the others at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from bnext.distributed import get_world_size, resolve_group
from bnext.errors import ConfigError
from bnext.layers import (
    NAMED_NORMS,
    CycleBatchNormList,
    FoldedNorm,
    LevelBatchNorm2d,
    NormSpec,
    build_norm,
    make_named_norm,
    normalize_together,
)

__all__ = ["SEEING_LEVELS", "looking_up_levels", "make_head_norm", "name_levels", "run_tower", "run_towers"]

# They get all levels by name; a folded norm refuses those that it was not folded for.
SEEING_LEVELS = (LevelBatchNorm2d, FoldedNorm)
# Their forward waits for that of others; a class with one of its own may not.
_WAITING = (LevelBatchNorm2d.forward, CycleBatchNormList.forward)
HeadNorm = NormSpec | str | Callable[[int], nn.Module]
Levels = dict[str, Tensor]


@contextlib.contextmanager
def looking_up_levels(levels: Sequence[str]) -> Iterator[None]:
    """A level that the backbone has not becomes a ConfigError."""
    try:
        yield
    except KeyError as error:
        level = error.args[0]
        if level not in levels:
            raise
        raise ConfigError.of(
            "MODEL.RETINANET.IN_FEATURES",
            "name features of the backbone",
            got=repr(level),
            remedy="A RetinaNet's FPN has p3 to p7; correct the name.",
        ) from error


def make_head_norm(norm: HeadNorm, levels: Sequence[str] | None) -> str | Callable[[int], nn.Module | None]:
    """A norm as detectron2's `get_norm` takes it: a spec becomes a factory, with levels of level norms.

    A name means the same with every version of detectron2: "GN" can be tried on one channel, "LN" is there,
    "BN" and "SyncBN" are bnext's; of several levels each has its own statistics, as in detectron2's RetinaNet.
    A factory, and any other name, stays.
    """
    if isinstance(norm, str) and norm in ("BN", "SyncBN"):
        norm = NAMED_NORMS[norm]
        if levels is not None:
            norm = norm.replace(statistics="per_level", population="per_level")

    if isinstance(norm, NormSpec):
        return build_norm(norm, levels)
    return partial(_make_named_norm, norm) if isinstance(norm, str) and norm in ("GN", "LN") else norm


def _make_named_norm(name: str, num_channels: int) -> nn.Module | None:
    try:
        return make_named_norm(name, num_channels)
    except ValueError as error:
        raise ConfigError.of(
            "a norm",
            "fit the channels of its layer",
            got=f"{name!r} for {num_channels}",
            where=str(error),
            remedy="Use a multiple of 32 channels, or another norm for this place.",
        ) from error


def name_levels(levels: Sequence[str], features: Sequence[Tensor]) -> Levels:
    """Level name -> feature.

    Raises:
        ConfigError: the numbers differ.
    """
    if len(levels) != len(features):
        raise ConfigError.of(
            "a head",
            "get one feature per level",
            got=f"{len(features)} features for the levels {tuple(levels)}",
            remedy="Set the head's IN_FEATURES to the features that it gets.",
        )
    return dict(zip(levels, features, strict=True))


def run_tower(tower: Iterable[nn.Module], features: Levels) -> Levels:
    """Apply a tower to every level: a level norm to all at once, every other module to each alone."""
    for module in tower:
        features = _apply(module, features)
    return features


def run_towers(head: Any, names: Sequence[str], features: Sequence[Tensor]) -> dict[str, list[Tensor]]:
    """Apply towers of a head with `levels` to every level.

    One tower after the other; but side by side, depth by depth, where norms share statistics with other workers in
    training. Norms of equal depth then share one collective forward and one backward.
    """
    by_level = name_levels(head.levels, features)
    towers = [list(getattr(head, name)) for name in names]

    if _can_share_collectives(towers):
        outputs = _run_side_by_side(towers, by_level)
    else:
        outputs = [run_tower(tower, by_level) for tower in towers]
    return {name: list(output.values()) for name, output in zip(names, outputs, strict=True)}


def _apply(module: nn.Module, features: Levels) -> Levels:
    if isinstance(module, SEEING_LEVELS):
        return module(features)
    return {level: module(feature) for level, feature in features.items()}


def _can_share_collectives(towers: Sequence[Sequence[nn.Module]]) -> bool:
    """Whether some depth has norms that can; the same on all workers, and in a forward that is computed again."""
    if get_world_size() == 1 or len({len(tower) for tower in towers}) != 1:
        return False
    return any(_are_sharing(modules) for modules in zip(*towers, strict=True))


def _are_sharing(modules: Sequence[nn.Module]) -> bool:
    """Whether modules are norms, distinct ones, that share mini-batches with other workers in training."""
    for module in modules:
        if not isinstance(module, LevelBatchNorm2d) or type(module).forward not in _WAITING:
            return False
        if not module.training or resolve_group(module.spec.workers) is None:
            return False
    return len(set(modules)) == len(modules)


def _run_side_by_side(towers: Sequence[Sequence[nn.Module]], features: Levels) -> list[Levels]:
    outputs = [features] * len(towers)

    for modules in zip(*towers, strict=True):
        if _are_sharing(modules):
            outputs = normalize_together(modules, outputs)
        else:
            outputs = [_apply(module, output) for module, output in zip(modules, outputs, strict=True)]
    return outputs
