"""Levels of a head of others: a re-estimated file has statistics for each, which the model of its config does not know.

Such a file says which norms they are, and with what a forward begins (`bnext reestimate --population per_level`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from bnext.errors import CheckpointError, Refusal
from bnext.layers.cycle_batch_norm import SizeRatios
from bnext.layers.walk import replace_modules
from bnext.repair.levels import LevelPlan, NormPlan, give_levels
from bnext.scope.forward import count_levels

__all__ = ["describe_levels", "giving_levels"]

NO_LEVELS = Refusal(
    CheckpointError,
    "What a checkpoint says of its levels",
    "name norms and the levels of each",
    "Re-estimate it again with --population per_level.",
)


def describe_levels(levels: Mapping[str, tuple[str, ...]], entry: tuple[str, ...]) -> dict[str, Any]:
    """The entries of a file about its norms.

    Args:
        levels: path of each norm -> names of its levels.
        entry: see `bnext.count_levels`.
    """
    return {"levels": {path: list(names) for path, names in levels.items()}, "entry": list(entry)}


@contextlib.contextmanager
def giving_levels(model: nn.Module, said: Any, where: str) -> Iterator[None]:
    """Put norms with a population for each level into a model, to stay, unless something goes wrong in the block.

    Args:
        model: norms that have a population for each level already stay as they are.
        said: what the file says of itself.
        where: the file, for errors.

    Raises:
        CheckpointError: it says something else.
    """
    plans = _find_plans(model, said, where)
    if not plans:
        yield
        return

    _, replaced = give_levels(model, LevelPlan(plans, {}))
    counted = count_levels(model, said["entry"])
    try:
        yield
    except BaseException:
        counted.remove()
        replace_modules(model, {new: old for old, new in replaced.items()})
        raise


def _find_plans(model: nn.Module, said: Any, where: str) -> dict[str, NormPlan]:
    """The norms that have one population where the file has one for each level."""
    levels = said.get("levels", {}) if isinstance(said, Mapping) else {}
    if not levels:
        return {}
    if not isinstance(levels, Mapping) or not all(_is_names(names) for names in (*levels.values(), said.get("entry"))):
        raise NO_LEVELS.of(repr(levels), where)

    entries = model.state_dict().keys()
    plans = {}
    for path, names in levels.items():
        if f"{path}.running_mean" in entries:
            plans[path] = NormPlan(tuple(names), SizeRatios())
    return plans


def _is_names(names: object) -> bool:
    return isinstance(names, (list, tuple)) and bool(names) and all(isinstance(name, str) for name in names)
