"""Things that there have to be in a fresh process before it is given code or data of the user's.

Workers are such processes, and the processes that load their images: they know neither the modules that a command has
imported (`--import`) nor the sets that a config lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils.data import Dataset

from bnext.data.listed_sets import ListedSet, current_sets, register_sets
from bnext.user_modules import import_modules, list_imported

__all__ = ["Surroundings", "TravellingDataset"]


class Surroundings:
    """The modules and sets of this process; whoever unpickles them has them from then on.

    Example:
        >>> text = pickle.dumps((Surroundings(), mapper))  # doctest: +SKIP
        >>> _, mapper = pickle.loads(text)  # doctest: +SKIP
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (list_imported(), current_sets())


def _restore(modules: Sequence[str], sets: Sequence[ListedSet]) -> Surroundings:
    import_modules(modules)
    register_sets(sets)
    return Surroundings()


class TravellingDataset(Dataset[Any]):
    """A dataset that finds in the process that it is sent to what its mapper may ask for there."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: Any) -> Any:
        return self._dataset[index]

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrive, (Surroundings(), self._dataset)  # unpickled in this order


def _arrive(surroundings: Surroundings, dataset: Dataset[Any]) -> Dataset[Any]:
    return dataset
