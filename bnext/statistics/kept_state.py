"""What a re-estimation has collected so far, in a file, so that an interrupted one goes on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bnext.distributed import all_gather_numbers, get_rank, resolve_group
from bnext.errors import StatisticsError
from bnext.files import replace_file
from bnext.statistics.observe import Collector

__all__ = ["KeptState"]

_PERIOD = 20  # rounds between writes


class KeptState:
    """A file of this worker; without a path nothing is kept.

    Args:
        path: of the file; with several workers each appends its rank.
        names: of the sets, which must be those of the file.
    """

    def __init__(self, path: str | os.PathLike[str] | None, names: Sequence[str]) -> None:
        everyone = resolve_group("all")
        suffix = f".{get_rank(everyone)}" if everyone is not None else ""
        self._path = None if path is None else Path(f"{os.fspath(path)}{suffix}")
        self._names = list(names)

    def load(self, sets: Sequence[Collector]) -> int:
        """Fill the collectors; the number of rounds that they have seen. A collective."""
        done = 0
        if self._path is not None and self._path.exists():
            state = self._read(self._path)
            for own, collected in zip(sets, state["sets"], strict=True):
                own.load_state_dict(collected)
            done = state["done"]
        device = sets[0].total.mean.device
        every = [number for (number,) in all_gather_numbers([done], resolve_group("all"), device, "state_file")]
        if len(set(every)) > 1:
            raise StatisticsError(
                f"state_file must be of the same round on every worker; got {every} ({self._path}). Remove the files "
                f"to begin anew."
            )
        return done

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            state: dict[str, Any] = torch.load(path, weights_only=True)
            if state["names"] == self._names:
                return state
            found = f"that of {len(state['names'])} sets, {state['names'][:1]} first"
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
        raise StatisticsError(
            f"state_file must be of an interrupted run for the same {len(self._names)} sets of statistics; got {found} "
            f"({path}). Remove it to begin anew, or name another."
        )

    def save_now_and_then(self, done: int, sets: Sequence[Collector]) -> None:
        """Write the file in every twentieth round."""
        if self._path is not None and done % _PERIOD == 0:
            state = {"names": self._names, "done": done, "sets": [own.state_dict() for own in sets]}
            replace_file(self._path, lambda file: torch.save(state, file))

    def remove(self) -> None:
        """The run is over."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
