"""Re-estimate population statistics of a trained model on data: no training, no labels.

A layer may be called any number of times; one that is not reached keeps what it has, and is reported.
"""

from __future__ import annotations

import collections
import contextlib
import math
import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from bnext.distributed import unwrap_model
from bnext.errors import StatisticsError
from bnext.layers.shuffled import shares_work
from bnext.scope import use_domain
from bnext.statistics.arguments import check_data, check_how, check_limits, check_momentum, check_source_samples
from bnext.statistics.collector import Collector, make_collectors
from bnext.statistics.estimates import Estimator, estimate_set, measure_errors, put_estimates
from bnext.statistics.kept_state import KeptState, describe_run
from bnext.statistics.layer_by_layer import estimate_layer_by_layer
from bnext.statistics.observe import (
    Selection,
    collect_moments,
    keeping_counters,
    leaving_population_aside,
    restoring,
    select_norms,
)
from bnext.statistics.report import RecomputeReport
from bnext.statistics.rounds import Rounds, count_images, make_bar

__all__ = ["Estimator", "recompute_population_statistics"]

Forward = Callable[[nn.Module, Any], object]
Domain = str | Callable[[Any], str | Sequence[str]]
_WHERE = "recompute_population_statistics"
_FIRST_CHECK, _CHECK_PERIOD = 8, 4  # batches of a worker before and between looks at the standard errors


def recompute_population_statistics(
    model: nn.Module,
    data: Iterable[Any],
    *,
    num_batches: int | None = None,
    num_samples: int | None = None,
    tolerance: float | None = None,
    forward: Forward | None = None,
    layers: Selection | None = None,
    domain: Domain | None = None,
    estimator: Estimator = "pooled",
    momentum: float = 0.1,
    source_samples: float = 0,
    state_file: str | os.PathLike[str] | None = None,
    remove_state: bool = True,
    progress: bool = False,
) -> RecomputeReport:
    """Replace the running statistics of batch norms by the moments of their inputs on `data`.

        mean, var = Chan's merge of the moments of all batches;  running_var has correction 1, as torch's

    Selected norms normalize by mini-batch statistics meanwhile, as in training; everything else of
    the model is in evaluation mode. A norm with statistics per level or domain gets each one's own, one with
    shared statistics those of all together.

    Args:
        model: any torch model; of DistributedDataParallel the module within, by whose paths layers are named.
        data: batches; every worker brings its own share. With norms over all workers the shortest share ends it.
        num_batches: how many to use at most, per worker; None: all.
        num_samples: enough images, over all workers; None: all. The batch that reaches it is the last one.
        tolerance: stop as soon as the standard errors of all reached sets are below it: of the mean in standard
            deviations, of the variance relative to it, 95 % of the channels. For example 0.01. None: never.
        forward: called as forward(model, batch), leaves modes as they are; default model(batch).
        layers: called as layers(path, module) for every batch norm with running statistics; those
            for which it is true are re-estimated. Default: all.
        domain: of all images, or called as domain(batch) for that of a batch or of each image; see `use_domain`.
            None: as the caller or the batch has it.
        estimator: "pooled": the variance of all data, which has the least error. "mean_of_batches": the mean of the
            batches' variances with correction 1, as a moving average has it; differences between batches are not in it,
            and each call of a norm, or each level with statistics of its own, is a mini-batch. "moving_average": what
            `momentum` remembers of the batches, in their order, with weights that no longer change. "layer_by_layer":
            every norm on features that the norms before it have normalized by their new statistics, exact and
            independent of the batch size; as many passes over `data`, which must be a list or a loader, as there are
            norms, and one more. A norm that is called on what comes of its own output has its former statistics
            meanwhile. `tolerance` ends nothing then: it is for the report.
        momentum: of "moving_average", in torch's sense, above 0 and at most 1.
        source_samples: so many images does the former statistic count for: 0 replaces it. Adaptation to little data:
            new = (source_samples * former + n * estimate) / (source_samples + n), n images, of a domain its own.
        state_file: keeps what was collected so far, so that a call that is interrupted goes on from
            there the next time; written every 20 batches of a worker. `data` must give the same batches again, and
            the weights be the same. Not for layer_by_layer.
        remove_state: whether `state_file` is removed at the end; else the caller does it, once the result is safe.
        progress: show a bar where the standard error stream is a terminal.

    Returns:
        The report, equal on every worker.

    Raises:
        StatisticsError: no norm is selected, there is no batch, activations are not finite, another worker failed,
            `state_file` is of another run or cannot be written, or an argument is out of range.
        ConfigError: the estimator is unknown.

    Note:
        Behind another norm a pooled estimate depends on how the data are split into batches, as mini-batches normalize
        there, which is what training sees; "layer_by_layer" does not. After an exception the model is bitwise as it
        was; otherwise only the running statistics of the reached norms differ. Collectives: one per round of batches,
        and two per set at the end and at every look at the errors.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)).eval()
        >>> report = recompute_population_statistics(model, [torch.randn(4, 3, 6, 6) for _ in range(5)])
        >>> report.estimates[0].count
        720

    Source:
        Wu and Johnson, *Rethinking "Batch" in BatchNorm*, 2021, section 3 and appendix A.2, A.3 (PreciseBN); Li et al.,
        *Revisiting Batch Normalization for Practical Domain Adaptation*, 2016 (AdaBN); Schneider et al., *Improving
        robustness against common corruptions by covariate shift adaptation*, 2020 (`source_samples`).
    """
    check_how(estimator, domain, state_file, _WHERE, Estimator)
    check_data(data, estimator, _WHERE)
    check_limits(num_batches, num_samples, tolerance, _WHERE)
    check_momentum(momentum, _WHERE)
    check_source_samples(source_samples, _WHERE)
    model = unwrap_model(model)
    norms = select_norms(model, layers)
    collectors = make_collectors(norms, momentum)
    sets = list(dict.fromkeys(own for by_name in collectors.values() for own in by_name.values()))
    device = sets[0].total.mean.device
    call = _Caller(model, forward, domain, sets)
    names = [own.where for own in sets]
    run = "" if state_file is None else describe_run(model, estimator, momentum, domain)
    kept = KeptState(state_file, names, run)
    with torch.no_grad(), restoring(model), keeping_counters(model), leaving_population_aside(norms):
        model.eval()
        for _, norm in norms:
            norm.train(estimator != "layer_by_layer")
        make_rounds = partial(
            Rounds, data, device, shares_work=shares_work(model), num_batches=num_batches, num_samples=num_samples
        )
        if estimator == "layer_by_layer":
            rounds = estimate_layer_by_layer(model, norms, collectors, make_rounds, call, source_samples)
        else:
            rounds = make_rounds(skip=kept.load(sets))
            with collect_moments(norms, collectors), make_bar(progress, num_batches) as bar:
                _go_through(rounds, call, sets, tolerance, kept, bar)
    found = [own.collect_over_workers() for own in sets]
    rows = [estimate_set(own, every, estimator, source_samples) for own, every in zip(sets, found, strict=True)]
    if all(new is None for _, new in rows):
        count = max(int(every.total.count) for every in found)
        got = f"{count} activations, each a mini-batch of its own" if count else "no activation"
        raise StatisticsError(
            f"data must give at least one batch that reaches a norm; got {rounds.num_batches} batches and {got} "
            f"({_WHERE}). Pass {'larger batches' if count else 'a longer loader'}, or select norms that forward "
            f"reaches."
        )
    put_estimates(sets, [new for _, new in rows], rounds.num_batches)  # after the last collective, which may fail
    if remove_state:
        kept.remove()
    return RecomputeReport(tuple(row for row, _ in rows), rounds.num_batches, rounds.num_samples, tolerance)


class _Caller:
    """Runs a batch through the model, in its domain.

    Attributes:
        images: domain -> images of the last batch; "": not known here.
    """

    def __init__(
        self, model: nn.Module, forward: Forward | None, domain: Domain | None, sets: Sequence[Collector]
    ) -> None:
        self._model, self._forward, self._domain, self._sets = model, forward, domain, sets
        self.images: dict[str, int] = {}

    def __call__(self, batch: Any) -> None:
        name = self._domain(batch) if callable(self._domain) else self._domain
        is_one = name is None or isinstance(name, str)
        self.images = {str(name or ""): count_images(batch)} if is_one else dict(collections.Counter(name))
        with contextlib.nullcontext() if name is None else use_domain(name):
            self._run(batch)

    def _run(self, batch: Any) -> None:
        if self._forward is not None:
            self._forward(self._model, batch)
            return
        try:
            self._model(batch)
        except (TypeError, AttributeError) as error:
            if any(own.is_reached for own in self._sets):
                raise  # the model has taken the batch
            raise StatisticsError(
                f"forward must say how the model takes a batch, as model(batch) fails; got a batch of type "
                f"{type(batch).__name__} and {type(error).__name__}: {str(error).splitlines()[0]} ({_WHERE}). For "
                f"(inputs, labels) use forward=lambda model, batch: model(batch[0])."
            ) from error


def _go_through(
    rounds: Rounds,
    call: _Caller,
    sets: Sequence[Collector],
    tolerance: float | None,
    kept: KeptState,
    bar: Any,
) -> None:
    """Collect until the data end, or the errors are small enough."""
    for batch in rounds:
        if batch is not None:
            rounds.run(partial(call, batch))
        for own in sets:
            own.end_batch(call.images)
        bar.update()
        if tolerance is not None and rounds.done >= _FIRST_CHECK and rounds.done % _CHECK_PERIOD == 0:
            rounds.finish()  # whoever has failed does not come to the look
            error = _find_largest_error(sets)
            bar.set_postfix_str(f"standard error {100 * error:.2g} %", refresh=False)
            if error <= tolerance:
                break
        if kept.is_due(rounds.done):
            rounds.finish()  # what a worker has of a batch that failed is not to be kept
            rounds.run(partial(kept.save, rounds.done, sets))
    rounds.finish()
    kept.check_used(rounds.done)


def _find_largest_error(sets: Sequence[Collector]) -> float:
    """Of the reached sets, over all workers. A collective."""
    found = [own.collect_over_workers() for own in sets]
    reached = [(own, every) for own, every in zip(sets, found, strict=True) if every.total.count > 0]
    return max((max(measure_errors(own, every)) for own, every in reached), default=math.inf)
