"""Exact population statistics: every norm on features that the norms before it have normalized by theirs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnext.distributed import all_gather_numbers, resolve_group
from bnext.statistics.observe import Collector, collect_moments, keeping_counters
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
    call: Callable[[Any], None],
) -> Rounds:
    """One pass over the data for each norm, in the order in which they are called, after one that finds the order.

    Args:
        model: in evaluation mode.
        norms: of the model; their buffers hold the estimates afterwards.
        collectors: by path.
        make_rounds: a new pass over the data, which must be the same ones each time.
        call: runs a batch through the model.

    Returns:
        The last pass.

    Source:
        Wu and Johnson, *Rethinking "Batch" in BatchNorm*, 2021, appendix A.3.
    """
    rounds = make_rounds()
    calls = _count_calls(norms, rounds, call)
    for path, norm in sorted((named for named in norms if named[0] in calls), key=lambda named: calls[named[0]][0]):
        rounds = make_rounds()
        handle = norm.register_forward_hook(_stop) if calls[path][1] == 1 else None
        try:
            with collect_moments([(path, norm)], collectors):
                _pass(rounds, partial(_call_until_reached, model, call), collectors[path])
        finally:
            if handle is not None:
                handle.remove()
        for own in dict.fromkeys(collectors[path].values()):
            total, _, _ = own.merged_over_workers()
            if total.count >= 2:
                own.state.running_mean.copy_(total.mean)
                own.state.running_var.copy_(total.unbiased_var())
    return rounds


def _stop(module: nn.Module, args: Any, output: Any) -> None:
    raise _Reached


def _pass(rounds: Rounds, call: Callable[[Any], None], collectors: Mapping[str, Collector]) -> None:
    for batch in rounds:
        if batch is not None:
            rounds.run(partial(call, batch))
        for own in dict.fromkeys(collectors.values()):
            own.end_batch()
    rounds.finish()


def _call_until_reached(model: nn.Module, call: Callable[[Any], None], batch: Any) -> None:
    with keeping_counters(model), contextlib.suppress(_Reached):
        call(batch)


def _count_calls(norms: Norms, rounds: Rounds, call: Callable[[Any], None]) -> dict[str, tuple[int, int]]:
    """Path -> when it is first called, and most calls in a batch; over all workers. A collective."""
    most: dict[str, int] = {}
    now: dict[str, int] = {}

    def count(path: str) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, args: Any) -> None:
            now[path] = now.get(path, 0) + 1

        return hook

    handles = [norm.register_forward_pre_hook(count(path)) for path, norm in norms]
    try:
        for batch in rounds:
            now.clear()
            if batch is not None:
                rounds.run(partial(call, batch))
            most.update({path: max(number, most.get(path, 0)) for path, number in now.items()})
        rounds.finish()
    finally:
        for handle in handles:
            handle.remove()
    return _agree(norms, most)


def _agree(norms: Norms, most: dict[str, int]) -> dict[str, tuple[int, int]]:
    """A worker without data, or whose images do not reach every norm, takes part in the passes of the others."""
    order, late = list(most), len(norms)
    device = next(buffer.device for _, norm in norms for buffer in norm.buffers())  # of its running statistics
    numbers = [(order.index(path) if path in most else late, most.get(path, 0)) for path, _ in norms]
    every = all_gather_numbers([n for pair in numbers for n in pair], resolve_group("all"), device, "layer_by_layer")
    first = [min(row[2 * i] for row in every) for i in range(len(norms))]
    number = [max(row[2 * i + 1] for row in every) for i in range(len(norms))]
    return {path: (first[i], number[i]) for i, (path, _) in enumerate(norms) if number[i]}
