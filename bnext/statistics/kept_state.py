"""What a re-estimation has collected so far, in a file, so that an interrupted one goes on."""

from __future__ import annotations

import logging
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
from bnext.statistics.collector import Collector

__all__ = ["KeptState", "describe_run"]

_PERIOD = 20  # rounds between writes
_FAILED = -1


def describe_run(model: nn.Module, estimator: str, momentum: float, domain: object) -> str:
    """What an interrupted run and the one that goes on must have in common: the weights, and what is collected."""
    everyone = resolve_group("all")
    num_workers = 1 if everyone is None else everyone.size()
    checksum = 0
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, Tensor):
            data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            checksum = zlib.crc32(data.data, zlib.crc32(name.encode(), checksum))
    how = f"{estimator}, momentum {momentum}" if estimator == "moving_average" else estimator
    where = f", domain {domain}" if isinstance(domain, str) else ""
    return f"weights {checksum:08x}, estimator {how}, {num_workers} worker(s){where}"


class KeptState:
    """A file of this worker, and the one before it, PATH.previous; without a path nothing is kept.

    No worker begins a file before all have written that of the round before: whenever they are ended, there is a
    round of which each has a file.

    Args:
        path: of the file; with several workers each appends its rank.
        names: of the sets, which must be those of the file.
        run: see `describe_run`; must be that of the file.
    """

    def __init__(self, path: str | os.PathLike[str] | None, names: Sequence[str], run: str) -> None:
        everyone = resolve_group("all")
        suffix = f".{get_rank(everyone)}" if everyone is not None else ""
        own = "" if path is None else f"{os.fspath(path)}{suffix}"
        self._files = [Path(own), Path(f"{own}.previous")] if own else []
        self._names, self._run = list(names), run
        self._done = 0

    def load(self, sets: Sequence[Collector]) -> int:
        """Fill the collectors from the last round that every worker has; the number of rounds. A collective."""
        states, failure = {0: [own.state_dict() for own in sets]}, None
        try:
            files = self._read_files(sets)
            states.update({done: state for done, (_, state) in files.items()})
        except StatisticsError as error:
            failure = error
        rounds = [_FAILED] * 2 if failure is not None else [*sorted(states, reverse=True), 0][:2]
        device = sets[0].total.mean.device
        every = all_gather_numbers(rounds, resolve_group("all"), device, "state_file")
        if failure is not None:
            raise failure
        self._done = self._choose_round(every)
        for own, state in zip(sets, states[self._done], strict=True):
            own.load_state_dict(state)
        if self._done > 0 and files[self._done][0] != self._files[0]:
            os.replace(*reversed(self._files))  # else the next write would replace what the others go on from
        return self._done

    def _choose_round(self, every: list[list[int]]) -> int:
        """The last one of which every worker has a file; 0: all begin anew."""
        if [_FAILED] * 2 in every:
            raise StatisticsError(
                f"state_file must be readable on every worker; got a failure on worker {every.index([_FAILED] * 2)} "
                f"({self._files[0]}). Its own message says why."
            )
        without = [rank for rank, rounds in enumerate(every) if not any(rounds)]
        if without:
            if len(without) < len(every) and get_rank(resolve_group("all")) == 0:
                logging.getLogger(__name__).warning(
                    "state_file: worker %d has none (%s); all begin anew.", without[0], self._files[0]
                )
            return 0
        common = set.intersection(*map(set, every)) - {0}
        if not common:
            raise StatisticsError(
                f"state_file must be of a common round on every worker; got {every} ({self._files[0]}). Remove the "
                f"files of all workers to begin anew."
            )
        return max(common)

    def _read_files(self, sets: Sequence[Collector]) -> dict[int, tuple[Path, list[dict[str, Any]]]]:
        """The round of each file that is there, its path, and what it holds."""
        if not self._files:
            return {}
        path, _ = self._files
        if path.is_dir() or not path.parent.is_dir():
            found = "a folder" if path.is_dir() else "a folder that does not exist"
            raise StatisticsError(f"state_file must be a file in a folder that exists; got {found} ({path}). Make it.")
        states: dict[int, tuple[Path, list[dict[str, Any]]]] = {}
        fault = None
        for file in reversed(self._files):
            try:
                states.update({done: (file, state) for done, state in self._read(file, sets)})
            except StatisticsError as error:
                fault = error
        if fault is not None and not states:
            raise fault
        return states

    def _read(self, path: Path, sets: Sequence[Collector]) -> list[tuple[int, list[dict[str, Any]]]]:
        """The round and the collectors' states of a file; nothing if there is no file."""
        if not path.exists():
            return []
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            if state["names"] != self._names:
                raise StatisticsError(f"{len(state['names'])} sets, {state['names'][:1]} first")
            if state["run"] != self._run:
                raise StatisticsError(f"{state['run']!r} instead of {self._run!r}")
            if not (isinstance(state["done"], int) and state["done"] > 0):
                raise StatisticsError(f"{state['done']!r} rounds")
            for own, collected in zip(sets, state["sets"], strict=True):
                own.load_state_dict(collected)
            return [(int(state["done"]), state["sets"])]
        except Exception as error:
            found = str(error) if isinstance(error, StatisticsError) else f"{type(error).__name__}: {error}"
            raise StatisticsError(
                f"state_file must be of an interrupted run for the same model, estimator and {len(self._names)} sets "
                f"of statistics; got {found} ({path}). {self._say_remedy()}, or name another."
            ) from error

    def is_due(self, done: int) -> bool:
        """Whether this round is one after which the file is written: every twentieth."""
        return bool(self._files) and done % _PERIOD == 0

    def save(self, done: int, sets: Sequence[Collector]) -> None:
        """Write the file; that of the round before is kept beside it.

        Raises:
            StatisticsError: it cannot be written.
        """
        if not self._files:
            return
        path, previous = self._files
        state = {"names": self._names, "run": self._run, "done": done, "sets": [own.state_dict() for own in sets]}
        try:
            replace_file(path, lambda file: torch.save(state, file), previous)
        except OSError as error:
            raise StatisticsError(
                f"state_file must be in a folder that can be written to, on a disk with room; got "
                f"{type(error).__name__}: {error} ({path}). Mend it; the same call goes on from what was kept before."
            ) from error

    def check_used(self, done: int) -> None:
        """Raise StatisticsError if this run has ended before the batches that the file was made of."""
        if done < self._done:
            raise StatisticsError(
                f"state_file must be of no more batches than there are; got {self._done} of {done} "
                f"({self._files[0]}). {self._say_remedy()}, or pass as many batches as before."
            )

    def _say_remedy(self) -> str:
        return f"Remove {' and '.join(str(file) for file in self._files if file.exists())} to begin anew"

    def remove(self) -> None:
        """The run is over."""
        for file in self._files:
            file.unlink(missing_ok=True)
