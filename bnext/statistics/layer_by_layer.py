"""Exact population statistics: every norm on features that the norms before it have normalized by theirs."""

from __future__ import annotations

import contextlib
import graphlib
import itertools
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnext.distributed import LockStep, resolve_group
from bnext.distributed.collectives import all_gather_objects
from bnext.errors import StatisticsError
from bnext.progress import track
from bnext.scope.model import restoring
from bnext.statistics.collector import Collector
from bnext.statistics.data_pass import DataPass, collecting, note_dependence
from bnext.statistics.observe import watching

__all__ = ["estimate_layer_by_layer"]


class _Reached(Exception):
    """Nothing after a norm matters to its statistics."""


def estimate_layer_by_layer(
    data_pass: DataPass,
    norms: Mapping[str, _BatchNorm],
    collectors: Mapping[Any, Collector],
    source_samples: float,
    *,
    is_finite: bool = False,
    progress: bool = False,
) -> LockStep:
    """One pass over the data for each norm, in the order in which they are called, after one that finds the order.

    Args:
        data_pass: of a model in evaluation mode; its data must be the same ones each time.
        norms: of the model, by path; their buffers hold the estimates afterwards.
        collectors: by state.
        source_samples: images that the former statistics count for.
        is_finite: whether the data are a finite population; collectors learn then what depends on batches.
        progress: whether this worker shows a bar on its terminal.

    Returns:
        The last pass.

    Raises:
        StatisticsError: a pass has fewer batches than the first one.

    Source:
        Wu and Johnson, *Rethinking "Batch" in BatchNorm*, 2021, appendix A.3.
    """

    def run_until_reached(batch: Any) -> None:
        # A module may count its calls, as detectron2's CycleBatchNormList does; broken off, it would be wrong for ever.
        with restoring(data_pass.model), contextlib.suppress(_Reached):
            data_pass.run(batch)

    def note(batch: Any) -> None:
        if is_finite:
            note_dependence(data_pass, norms, collectors, batch, training=False)

    first, calls = _count_calls(data_pass, norms, note)
    rounds = first
    for path, number in track(calls.items(), "re-estimating", unit="norm", is_wanted=progress):
        norm, of_norm = norms[path], [collector for collector in collectors.values() if collector.path == path]
        stopping = norm.register_forward_hook(_stop) if number == 1 else contextlib.nullcontext()
        with stopping, collecting({path: norm}, collectors, training=False):
            rounds = data_pass.go(of_norm, call=run_until_reached)

        if rounds.num_batches < first.num_batches:
            rule = "give the same batches in every pass for estimator='layer_by_layer'"
            got = f"{first.num_batches} in the first, and then {rounds.num_batches}"
            raise StatisticsError.of("data", rule, got=got, where=path, remedy="Pass a list of batches.")
        for collector in of_norm:
            _, new = collector.merge_over_workers().estimate("layer_by_layer", source_samples)
            collector.write(new, rounds.num_batches)

    return rounds


def _stop(module: nn.Module, args: Any, output: Any) -> None:
    raise _Reached


def _count_calls(
    data_pass: DataPass, norms: Mapping[str, _BatchNorm], note: Callable[[Any], None]
) -> tuple[LockStep, dict[str, int]]:
    """A pass; path -> most calls in a batch of any worker, in an order that holds in all batches. A collective.

    The first batch is noted, too.
    """
    paths = list(norms)
    notes = [note]
    most = [0] * len(paths)
    follows: set[tuple[int, int]] = set()
    now: list[int] = []

    def end_batch(rounds: LockStep) -> bool:
        most[:] = [max(number, now.count(index)) for index, number in enumerate(most)]
        follows.update(itertools.pairwise(dict.fromkeys(now)))
        now.clear()
        return False

    def run(batch: Any) -> None:
        while notes:
            notes.pop()(batch)
            now.clear()  # these were no calls of the pass
        data_pass.run(batch)

    with watching(norms, lambda path, norm, features: now.append(paths.index(path))):
        rounds = data_pass.go([], call=run, is_enough=end_batch)

    every = all_gather_objects((most, sorted(follows)), resolve_group("all"), "layer_by_layer")
    before: dict[int, set[int]] = {index: set() for index in range(len(paths))}
    for _, pairs in every:
        for earlier, later in pairs:
            before[later].add(earlier)

    most = [max(numbers) for numbers in zip(*(numbers for numbers, _ in every), strict=True)]
    return rounds, {paths[index]: most[index] for index in _sort(before) if most[index]}


def _sort(before: Mapping[int, set[int]]) -> list[int]:
    """Every norm after those that were called before it; in the order of the model where batches contradict."""
    try:
        return list(graphlib.TopologicalSorter(before).static_order())
    except graphlib.CycleError:
        return list(before)
