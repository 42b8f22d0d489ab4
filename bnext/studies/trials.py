"""Runs the trials of a study: each with every seed, one after the other; results.json, resuming, values over seeds.

A trial is a setting of something that is trained and measured in Python. Rows of detectors, which have configs and
folders of their own, are run by `bnext.studies.runner`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from bnext.errors import ConfigError
from bnext.progress import showing_progress
from bnext.seeding import Purpose, derive_seed, seeded
from bnext.studies.results_file import keeping_results, read_results

__all__ = ["collect", "run_trials", "using_threads"]

Trial = Callable[[int], Mapping[str, Any]]

logger = logging.getLogger(__name__)


def run_trials(
    trials: Mapping[str, Trial],
    output: str,
    *,
    seeds: Sequence[int] = (1, 2, 3),
    setting: object = None,
    resume: bool = False,
    num_threads: int | None = 1,
) -> dict[str, Any]:
    """Run trials, seed by seed, and write `output`/results.json after each of them.

    Args:
        trials: name -> function of the seed, which gives numbers: a mapping, in which mappings and lists may be.
        output: folder of the study, made when it is missing.
        seeds: of the trials.
        setting: what the trials have in common, a dataclass; it is kept with the results.
        resume: keep the trials that are there; they must be of the same setting.
        num_threads: of torch, as their number changes how it rounds; None: all that there are.

    Returns:
        What results.json holds: {"setting": {...}, "trials": {name: {seed: numbers}}, "seconds": {name: {seed: s}}}; a
        number that is not finite is None.

    Raises:
        ConfigError: what is there is of another setting.
        LaunchError: the folder cannot be written, or another run holds it.

    Note:
        Within a trial the global random numbers are those of its seed.
    """
    empty: dict[str, Any] = {"setting": _describe(setting), "trials": {}, "seconds": {}}
    with keeping_results(output, empty, resume=resume) as results:
        _check_setting(empty["setting"], results.content["setting"], str(results.path))
        todo = _list_todo(trials, seeds, results.content["trials"])
        num_kept = len(trials) * len(seeds) - len(todo)
        logger.info("%d trials%s.", len(todo), f", {num_kept} are there" if num_kept else "")
        results.write()

        with showing_progress("trials", len(todo), "trial", delay=0) as bar:
            for name, seed in todo:
                start = time.perf_counter()
                with using_threads(num_threads), seeded(derive_seed(seed, Purpose.STEP)):
                    numbers = trials[name](seed)

                seconds = round(time.perf_counter() - start, 1)
                results.content["trials"].setdefault(name, {})[str(seed)] = numbers
                results.content["seconds"].setdefault(name, {})[str(seed)] = seconds
                results.write()
                logger.info("%s, seed %d: %s, %.0f s.", name, seed, _show(numbers), seconds)
                bar.update()
    return read_results(results.path)


def _describe(setting: object) -> dict[str, Any]:
    """The setting as JSON holds it."""
    if setting is None:
        return {}
    fields = dataclasses.asdict(setting) if dataclasses.is_dataclass(setting) else dict(setting)  # type: ignore
    return {key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()}


def _check_setting(wanted: Mapping[str, Any], there: Mapping[str, Any], where: str) -> None:
    different = []
    for key in {**there, **wanted}:
        if key not in ("root", "device") and there.get(key) != wanted.get(key):
            different.append(f"{key} {there.get(key)!r} there, {wanted.get(key)!r} now")

    if different:
        rule = "be of the same setting, to be gone on with"
        remedy = "Repeat the setting, leave --resume away, or choose another --output."
        raise ConfigError.of("The results", rule, got=", ".join(different), where=where, remedy=remedy)


def _list_todo(
    trials: Mapping[str, Trial], seeds: Sequence[int], there: Mapping[str, Mapping[str, Any]]
) -> list[tuple[str, int]]:
    """Trials that are not there, seed by seed: an interrupted study has something of everything."""
    todo = []
    for seed in seeds:
        todo += [(name, seed) for name in trials if str(seed) not in there.get(name, {})]
    return todo


def _show(numbers: Mapping[str, Any], most: int = 6) -> str:
    """The first plain numbers of a trial in words."""
    plain = [(key, value) for key, value in numbers.items() if isinstance(value, int | float)]
    return ", ".join(f"{key} {value:.4g}" for key, value in plain[:most]) or "done"


@contextlib.contextmanager
def using_threads(number: int | None) -> Iterator[None]:
    """Within the block torch has so many threads; None: as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def collect(results: Mapping[str, Any], name: str, key: str, seeds: Sequence[int] | None = None) -> list[float]:
    """Values of a trial over its seeds, in their order.

    Args:
        results: of `run_trials`.
        name: of the trial; one that is not there has no values.
        key: of the number; "a/b" is that of b in a, and the place in a list is a number.
        seeds: some of them; None: all that are there.

    Returns:
        A value for each seed; NaN where it is missing or was not finite.

    Example:
        >>> collect({"trials": {"plain": {"1": {"error": {"population": 7.5}}}}}, "plain", "error/population")
        [7.5]
    """
    by_seed = results["trials"].get(name, {})
    chosen = sorted(map(int, by_seed)) if seeds is None else seeds

    values = []
    for seed in chosen:
        value: Any = by_seed.get(str(seed))
        for part in key.split("/"):
            if isinstance(value, list):
                value = value[int(part)] if int(part) < len(value) else None
            else:
                value = (value or {}).get(part)
        values.append(math.nan if value is None else float(value))
    return values
