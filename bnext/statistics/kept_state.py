"""What a re-estimation has collected so far, in a file, so that an interrupted one goes on."""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bnext.distributed import all_gather_numbers, get_rank, resolve_group
from bnext.errors import StatisticsError
from bnext.files import replace_file
from bnext.statistics.observe import Collector

__all__ = ["KeptState", "describe_run"]

_PERIOD = 20  # rounds between writes
_FAILED = -1


def describe_run(model: nn.Module, estimator: str, momentum: float) -> str:
    """What an interrupted run and the one that goes on must have in common: the weights, and what is collected."""
    checksum = 0
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, Tensor):
            data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            checksum = zlib.crc32(data.data, zlib.crc32(name.encode(), checksum))
    how = f"{estimator}, momentum {momentum}" if estimator == "moving_average" else estimator
    return f"weights {checksum:08x}, estimator {how}"


class KeptState:
    """A file of this worker; without a path nothing is kept.

    Args:
        path: of the file; with several workers each appends its rank.
        names: of the sets, which must be those of the file.
        run: see `describe_run`; must be that of the file.
    """

    def __init__(self, path: str | os.PathLike[str] | None, names: Sequence[str], run: str) -> None:
        everyone = resolve_group("all")
        suffix = f".{get_rank(everyone)}" if everyone is not None else ""
        self._path = None if path is None else Path(f"{os.fspath(path)}{suffix}")
        self._names, self._run = list(names), run
        self._done = 0

    def load(self, sets: Sequence[Collector]) -> int:
        """Fill the collectors; the number of rounds that they have seen. A collective."""
        failure = None
        if self._path is not None:
            try:
                self._done = self._read(self._path, sets)
            except StatisticsError as error:
                self._done, failure = _FAILED, error
        device = sets[0].total.mean.device
        every = [done for (done,) in all_gather_numbers([self._done], resolve_group("all"), device, "state_file")]
        if failure is not None:
            raise failure
        if _FAILED in every:
            raise StatisticsError(
                f"state_file must be readable on every worker; got a failure on worker {every.index(_FAILED)} "
                f"({self._path}). Its own message says why."
            )
        if len(set(every)) > 1:
            raise StatisticsError(
                f"state_file must be of the same round on every worker; got {every} ({self._path}). Remove the files "
                f"to begin anew."
            )
        return self._done

    def _read(self, path: Path, sets: Sequence[Collector]) -> int:
        if path.is_dir() or not path.parent.is_dir():
            found = "a folder" if path.is_dir() else "a folder that does not exist"
            raise StatisticsError(f"state_file must be a file in a folder that exists; got {found} ({path}). Make it.")
        if not path.exists():
            return 0
        try:
            state: dict[str, Any] = torch.load(path, weights_only=True)
            if state["names"] != self._names:
                raise StatisticsError(f"{len(state['names'])} sets, {state['names'][:1]} first")
            if state["run"] != self._run:
                raise StatisticsError(f"{state['run']!r} instead of {self._run!r}")
            for own, collected in zip(sets, state["sets"], strict=True):
                own.load_state_dict(collected)
            return int(state["done"])
        except Exception as error:
            found = str(error) if isinstance(error, StatisticsError) else f"{type(error).__name__}: {error}"
            raise StatisticsError(
                f"state_file must be of an interrupted run for the same model, estimator and {len(self._names)} sets "
                f"of statistics; got {found} ({path}). Remove it to begin anew, or name another."
            ) from error

    def is_due(self, done: int) -> bool:
        """Whether this round is one after which the file is written: every twentieth."""
        return self._path is not None and done % _PERIOD == 0

    def save(self, done: int, sets: Sequence[Collector]) -> None:
        """Write the file."""
        if self._path is not None:
            state = {"names": self._names, "run": self._run, "done": done, "sets": [own.state_dict() for own in sets]}
            replace_file(self._path, lambda file: torch.save(state, file))

    def check_used(self, done: int) -> None:
        """Raise StatisticsError if this run has ended before the batches that the file was made of."""
        if done < self._done:
            raise StatisticsError(
                f"state_file must be of no more batches than there are; got {self._done} of {done} ({self._path}). "
                f"Remove it to begin anew, or pass as many batches as before."
            )

    def remove(self) -> None:
        """The run is over."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
