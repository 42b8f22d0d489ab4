"""Exact population statistics: every norm on features that the norms before it have normalized by theirs."""

from __future__ import annotations

import contextlib
import graphlib
import itertools
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnext.distributed import all_gather_numbers, resolve_group
from bnext.errors import StatisticsError
from bnext.statistics.collector import Collector
from bnext.statistics.estimates import estimate_set, put_estimates
from bnext.statistics.observe import collect_moments, keeping_counters
from bnext.statistics.rounds import Rounds

__all__ = ["estimate_layer_by_layer"]

Norms = list[tuple[str, _BatchNorm]]


class _Reached(Exception):
    """Nothing after a norm matters to its statistics."""


def estimate_layer_by_layer(
    model: nn.Module,
    norms: Norms,
    collectors: Mapping[str, Mapping[str, Collector]],
    make_rounds: Callable[[], Rounds],
    call: Any,
    source_samples: float,
) -> Rounds:
    """One pass over the data for each norm, in the order in which they are called, after one that finds the order.

    Args:
        model: in evaluation mode.
        norms: of the model; their buffers hold the estimates afterwards.
        collectors: by path.
        make_rounds: a new pass over the data, which must be the same ones each time.
        call: runs a batch through the model; call.images: domain -> images of the last one.
        source_samples: images that the former statistics count for.

    Returns:
        The last pass.

    Raises:
        StatisticsError: a pass has fewer batches than the first one.

    Source:
        Wu and Johnson, *Rethinking "Batch" in BatchNorm*, 2021, appendix A.3.
    """
    rounds = first = make_rounds()
    modules = dict(norms)
    for path, number in _count_calls(norms, rounds, call).items():
        norm, rounds = modules[path], make_rounds()
        handle = norm.register_forward_hook(_stop) if number == 1 else None
        try:
            with collect_moments([(path, norm)], collectors, training=False):
                _pass(rounds, model, call, collectors[path])
        finally:
            if handle is not None:
                handle.remove()
        if rounds.num_batches < first.num_batches:
            raise StatisticsError(
                f"data must give the same batches in every pass for estimator='layer_by_layer'; got "
                f"{first.num_batches} in the first, and then {rounds.num_batches} ({path}). Pass a list of batches."
            )
        for own in dict.fromkeys(collectors[path].values()):
            _, new = estimate_set(own, own.collect_over_workers(), "layer_by_layer", source_samples)
            put_estimates([own], [new], rounds.num_batches)
    return rounds


def _stop(module: nn.Module, args: Any, output: Any) -> None:
    raise _Reached


def _pass(rounds: Rounds, model: nn.Module, call: Any, collectors: Mapping[str, Collector]) -> None:
    for batch in rounds:
        if batch is not None:
            rounds.run(partial(_call_until_reached, model, call, batch))
        for own in dict.fromkeys(collectors.values()):
            own.end_batch(call.images)
    rounds.finish()


def _call_until_reached(model: nn.Module, call: Callable[[Any], None], batch: Any) -> None:
    with keeping_counters(model), contextlib.suppress(_Reached):
        call(batch)


def _count_calls(norms: Norms, rounds: Rounds, call: Callable[[Any], None]) -> dict[str, int]:
    """Path -> most calls in a batch of any worker, in an order that holds in all batches. A collective."""
    paths = [path for path, _ in norms]
    most, follows = [0] * len(paths), [[0] * len(paths) for _ in paths]
    now: list[int] = []
    handles = [
        norm.register_forward_pre_hook(lambda module, args, index=index: now.append(index))
        for index, (_, norm) in enumerate(norms)
    ]
    try:
        for batch in rounds:
            now.clear()
            if batch is not None:
                rounds.run(partial(call, batch))
            first = list(dict.fromkeys(now))
            for before, after in itertools.pairwise(first):
                follows[after][before] = 1
            most = [max(number, now.count(index)) for index, number in enumerate(most)]
        rounds.finish()
    finally:
        for handle in handles:
            handle.remove()
    device = next(buffer.device for _, norm in norms for buffer in norm.buffers())  # of its running statistics
    every = all_gather_numbers([*most, *itertools.chain(*follows)], resolve_group("all"), device, "layer_by_layer")
    numbers = [max(column) for column in zip(*every, strict=True)]
    most, seen = numbers[: len(paths)], numbers[len(paths) :]
    order = _sort([{b for b in range(len(paths)) if seen[a * len(paths) + b]} for a in range(len(paths))])
    return {paths[index]: most[index] for index in order if most[index]}


def _sort(before: list[set[int]]) -> list[int]:
    """Every norm after those that were called before it; in the order of the model where batches contradict."""
    try:
        return list(graphlib.TopologicalSorter(dict(enumerate(before))).static_order())
    except graphlib.CycleError:
        return list(range(len(before)))
