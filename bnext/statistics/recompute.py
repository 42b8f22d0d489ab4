"""Re-estimate population statistics of a trained model on data: no training, no labels.

A layer may be called any number of times; one that is not reached keeps what it has, and is reported.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, get_args

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnext.distributed import LockStep, get_rank, resolve_group, unwrap_model
from bnext.errors import StatisticsError, check_choice
from bnext.layers.batch_norm import BatchNorm2d
from bnext.layers.counts import not_counting_domains
from bnext.layers.walk import Selection
from bnext.progress import showing_progress
from bnext.scope.model import restoring
from bnext.scope.record import Scope
from bnext.scope.statistics import answering
from bnext.statistics.arguments import check_data, check_fits_population, check_numbers
from bnext.statistics.collector import Collector, Estimator, make_collectors
from bnext.statistics.data_pass import DataPass, Domain, Forward, collecting, note_dependence
from bnext.statistics.layer_by_layer import estimate_layer_by_layer
from bnext.statistics.observe import select_norms
from bnext.statistics.report import RecomputeReport
from bnext.statistics.stop_rule import StopRule

__all__ = ["Estimator", "recompute_population_statistics"]

_WHERE = "recompute_population_statistics"


def recompute_population_statistics(
    model: nn.Module,
    data: Iterable[Any],
    *,
    num_batches: int | None = None,
    num_samples: int | None = None,
    tolerance: float | None = None,
    population_size: int | None = None,
    forward: Forward | None = None,
    layers: Selection | None = None,
    domain: Domain | None = None,
    estimator: Estimator = "pooled",
    momentum: float = 0.1,
    source_samples: float = 0,
    seed: int | None = None,
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
            deviations, of the variance relative to it, 95 % of the channels. For example 0.01. None: never. A forward
            may leave out, from then on, what only norms need that are below it.
        population_size: number of images of a finite set that the statistics are to be of, such as the training set;
            `data` gives them in a random order, each once before any comes again, and always alike: not padded to the
            largest image of a batch either. Standard errors then fall to 0 when all were seen, except for norms behind
            others, as mini-batches could fall otherwise, and on random features. The first batch is run three times
            more, to know which they are. Data that say how many they are hold one pass at most. Only "pooled" and
            "layer_by_layer" heed it. None: errors are of what the images are drawn from, and an image that comes again
            counts as a new one.
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
        seed: random numbers that `forward` draws start from it and the batch's number, so that they are the same in
            every pass and do not depend on what was run before; None: they go on as the caller's.
        progress: show a bar where the standard error stream is a terminal.

    Returns:
        The report, equal on every worker.

    Raises:
        StatisticsError: no norm is selected, there is no batch, activations are not finite, another worker failed, an
            argument is out of range, or data of known length hold more images than `population_size`.
        ConfigError: the estimator is unknown.

    Note:
        Behind another norm a pooled estimate depends on how the data are split into batches, as mini-batches normalize
        there, which is what training sees; "layer_by_layer" does not. After an exception the model is bitwise as it
        was; otherwise only the running statistics of the reached norms differ. Collectives: one per round of batches,
        and one per set at the end and at every look at the errors.

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
    check_choice("estimator", estimator, get_args(Estimator), where=_WHERE)
    check_data(data, _WHERE, many_passes=estimator == "layer_by_layer")
    limits: dict[str, float | None] = {"num_batches": num_batches, "num_samples": num_samples, "seed": seed}
    limits |= {"tolerance": tolerance, "population_size": population_size}
    limits = {name: value for name, value in limits.items() if value is not None}
    check_numbers(_WHERE, momentum=momentum, source_samples=source_samples, **limits)
    if not (domain is None or isinstance(domain, str) or callable(domain)):
        rule = "be the name of a domain, or a function that is called with a batch"
        remedy = "For the domains of a batch's images use domain=lambda batch: [...]."
        raise StatisticsError.of("domain", rule, got=repr(domain), where=_WHERE, remedy=remedy)

    if population_size is not None:
        check_fits_population(data, population_size, _WHERE)
    if estimator in ("moving_average", "mean_of_batches"):
        population_size = None  # one forgets, the other's mini-batches could fall otherwise: no error falls to 0

    model = unwrap_model(model)
    norms = select_norms(model, layers)
    collectors = make_collectors(norms, momentum if estimator == "moving_average" else None)
    sets = list(collectors.values())
    rule = StopRule(norms, collectors, tolerance, population_size)
    data_pass = DataPass(
        model=model,
        device=sets[0].former.device,
        data=data,
        forward=forward,
        domain=domain,
        num_batches=num_batches,
        num_samples=num_samples,
        seed=seed,
    )

    is_shown = progress and get_rank(resolve_group("all")) == 0  # of the first worker's terminal
    # With renorm, or training="population", features would depend on the statistics that are to be replaced.
    ours = [norm for norm in norms.values() if isinstance(norm, BatchNorm2d)]
    answers = answering(ours, training="mini_batch")
    with torch.no_grad(), restoring(model), not_counting_domains(ours), answers:
        model.eval()
        for norm in norms.values():
            norm.train(estimator != "layer_by_layer")
        if estimator == "layer_by_layer":
            is_finite = population_size is not None
            rounds = estimate_layer_by_layer(
                data_pass, norms, collectors, source_samples, is_finite=is_finite, progress=is_shown
            )
        else:
            bar_of_rounds = showing_progress("re-estimating", num_batches, "batch", is_wanted=is_shown)
            with bar_of_rounds as bar:
                rounds = data_pass.go(
                    sets,
                    call=partial(_run, data_pass, norms, collectors, rule, population_size is not None),
                    is_enough=lambda rounds: rule.is_enough(rounds, bar),
                )

    merged = rule.merge_over_workers(rounds)
    estimates = [collector.estimate(estimator, source_samples) for collector in merged]
    if all(new is None for _, new in estimates):
        raise _nothing_is_reached(rounds, merged)

    for collector, (_, new) in zip(sets, estimates, strict=True):  # after the last collective, which may fail
        collector.write(new, rounds.num_batches)
    rows = tuple(row for row, _ in estimates)
    return RecomputeReport(rows, rounds.num_batches, rounds.num_images, tolerance, population_size)


def _run(
    data_pass: DataPass,
    norms: Mapping[str, _BatchNorm],
    collectors: Mapping[Any, Collector],
    rule: StopRule,
    is_finite: bool,
    batch: Any,
) -> None:
    """Run a batch for the norms that need it; of a finite population, try first which ones depend on batches."""
    is_first = all(collector.num_batches == 0 for collector in collectors.values())
    if is_finite and is_first:
        note_dependence(data_pass, norms, collectors, batch)

    with collecting(norms, collectors), Scope(wanted=rule.wanted):
        data_pass.run(batch)


def _nothing_is_reached(rounds: LockStep, merged: Sequence[Collector]) -> StatisticsError:
    count = max(int(collector.total.count) for collector in merged)
    activations = f"{count} activations, each a mini-batch of its own" if count else "no activation"
    wanted = "larger batches" if count else "a longer loader"

    rule, got = "give at least one batch that reaches a norm", f"{rounds.num_batches} batches and {activations}"
    remedy = f"Pass {wanted}, or select norms that forward reaches."
    return StatisticsError.of("data", rule, got=got, where=_WHERE, remedy=remedy)
