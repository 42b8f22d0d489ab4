"""Exact population statistics: every norm on features that the norms before it have normalized by theirs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnext.errors import StatisticsError
from bnext.statistics.observe import Collector, collect_moments
from bnext.statistics.rounds import Rounds

__all__ = ["estimate_layer_by_layer"]

Norms = list[tuple[str, _BatchNorm]]


class _Reached(Exception):
    """Nothing after a norm matters to its statistics."""


def estimate_layer_by_layer(
    norms: Norms,
    collectors: Mapping[str, Mapping[str, Collector]],
    make_rounds: Callable[[], Rounds],
    call: Callable[[Any], None],
    data: Iterable[Any],
) -> Rounds:
    """One pass over the data for each norm, in the order in which they are called, after one that finds the order.

    Args:
        norms: of a model in evaluation mode; their buffers hold the estimates afterwards.
        collectors: by path.
        make_rounds: a new pass.
        call: runs a batch through the model.
        data: what the passes are over.

    Returns:
        The last pass.

    Raises:
        StatisticsError: the data can be gone through once only.

    Source:
        Wu and Johnson, *Rethinking "Batch" in BatchNorm*, 2021, appendix A.3.
    """
    if iter(data) is data:
        raise StatisticsError(
            "data must be a list or a loader that can be gone through again for estimator='layer_by_layer'; got an "
            f"iterator ({type(data).__name__}). Make a list of its batches."
        )
    calls = _count_calls(norms, make_rounds(), call)
    rounds = make_rounds()
    for path, norm in sorted(norms, key=lambda named: list(calls).index(named[0]) if named[0] in calls else len(calls)):
        if path not in calls:
            continue
        rounds = make_rounds()
        norm.train()
        handle = norm.register_forward_hook(_stop) if calls[path] == 1 else None
        try:
            with collect_moments([(path, norm)], collectors):
                _pass(rounds, call, collectors[path])
        finally:
            if handle is not None:
                handle.remove()
            norm.eval()
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
            rounds.run(partial(_call_until_reached, call, batch))
        for own in dict.fromkeys(collectors.values()):
            own.end_batch()
    rounds.finish()


def _call_until_reached(call: Callable[[Any], None], batch: Any) -> None:
    with contextlib.suppress(_Reached):
        call(batch)


def _count_calls(norms: Norms, rounds: Rounds, call: Callable[[Any], None]) -> dict[str, int]:
    """Path -> most calls in a batch, in the order of the first call."""
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
    return most
