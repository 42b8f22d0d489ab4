"""Repair of a detector whose head has one batch norm for several levels: statistics of each, estimated anew.

In three steps: which norms of the model see levels, by their calls in the first forwards; norms with a population for
each level in their place; and their statistics, on data.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from bnext.distributed import resolve_group
from bnext.distributed.collectives import all_gather_objects
from bnext.errors import ConfigError, Refusal, StatisticsError, WorkerError, list_few
from bnext.layers.batch_norm import BatchNorm2d
from bnext.layers.cycle_batch_norm import CycleBatchNormList, SizeRatios, write_sizes
from bnext.layers.forms import NormForm, TreatAs, find_forms
from bnext.layers.level_norm import LevelBatchNorm2d
from bnext.layers.norm_state import COPIED_POPULATION
from bnext.layers.sources import add_levels, is_per_level
from bnext.layers.spec import NormSpec
from bnext.layers.walk import Selection, replace_modules
from bnext.repair.observe_calls import NUM_OBSERVED, ObservedCalls, observe_calls, peek
from bnext.scope.forward import count_levels
from bnext.statistics import RecomputeReport, recompute_population_statistics
from bnext.statistics.arguments import check_data
from bnext.statistics.collector import Estimator
from bnext.statistics.data_pass import Domain, Forward, explain_batch
from bnext.surgery import convert_norm
from bnext.surgery.convert_state import ConversionReport

__all__ = ["LevelPlan", "NormPlan", "RepairReport", "find_levels", "give_levels", "has_levels", "repair"]

log = logging.getLogger(__name__)

_WHERE = "repair"

NO_LEVELS = Refusal(
    StatisticsError,
    "model",
    "have a batch norm with running statistics that is called on several levels in one forward",
    "For norms that see one feature map use recompute_population_statistics(model, data); select others that are "
    "called several times with layers=.",
)
OTHER_NUMBER = Refusal(
    StatisticsError,
    "a head's norm",
    "be called equally often in every forward",
    "Let the head go through all levels, empty ones too; or let it name them: with bnext.use_level('p3'); or leave "
    "the norm out by layers=. Nothing was changed.",
)
OTHER_SIZES = Refusal(
    StatisticsError,
    "features of a head",
    "come in one order of the levels in every forward",
    "Let the head go through all levels in one order; or let it name them: with bnext.use_level('p3'); or leave the "
    "norm out by layers=. Nothing was changed.",
)
OUTSIDE = Refusal(
    StatisticsError,
    "a norm that is called on several levels",
    "be called within a forward of the model",
    "Name what is called from outside, a method or a module: entry='inference', entry='head'. Nothing was changed.",
)
OTHER_LEVELS = Refusal(
    ConfigError, "levels", "be names of the levels, one for each call", "Name each once, in the order of the calls."
)
NO_BATCH = Refusal(
    StatisticsError, "data", "give at least one batch on every worker", "Pass a loader or a list of batches."
)
OTHER_WORKERS = Refusal(
    WorkerError, "workers", "see the same calls of the norms", "Let every worker have the same model and full batches."
)


@dataclasses.dataclass(frozen=True)
class NormPlan:
    """One norm that is to have statistics for each level.

    Args:
        levels: their names.
        ratios: relative sizes of their features.
        is_called_once: it gets all levels in one call, by name.
    """

    levels: tuple[str, ...]
    ratios: SizeRatios
    is_called_once: bool = False


@dataclasses.dataclass(frozen=True)
class LevelPlan:
    """The norms that see several levels, by path, and those that are called several times and stay: path -> why."""

    norms: Mapping[str, NormPlan]
    left: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class RepairReport:
    """Work that `repair` has done. `str(report)` is the text to log.

    Args:
        levels: path of each norm -> names of its levels.
        statistics: how they were estimated.
        conversion: how the norms' state was carried over.
        left: path of each norm that is called several times and stays as it was -> why.
    """

    levels: Mapping[str, tuple[str, ...]]
    statistics: RecomputeReport
    conversion: ConversionReport
    left: Mapping[str, str]

    def __str__(self) -> str:
        by_levels: dict[tuple[str, ...], list[str]] = {}
        for path, names in self.levels.items():
            by_levels.setdefault(names, []).append(path)

        lines = []
        for names, paths in by_levels.items():
            lines.append(f"{len(paths)} norms have statistics for each of {', '.join(names)}: {list_few(paths)}.")
        others = [change for change in self.conversion.changes if change.text != COPIED_POPULATION]
        if others:
            lines.append(str(dataclasses.replace(self.conversion, changes=others)))
        lines += [f"Left as it was: {path}, {reason}." for path, reason in self.left.items()]
        return "\n".join([*lines, str(self.statistics)])


def repair(
    model: nn.Module,
    data: Iterable[Any],
    *,
    levels: Sequence[str] | None = None,
    entry: str | Sequence[str] = "forward",
    layers: Selection | None = None,
    forward: Forward | None = None,
    num_batches: int | None = None,
    num_samples: int | None = None,
    tolerance: float | None = None,
    domain: Domain | None = None,
    estimator: Estimator = "pooled",
    source_samples: float = 0,
    seed: int | None = None,
    progress: bool = False,
    treat_as: TreatAs | None = None,
) -> RepairReport:
    """Give the batch norms of a head that all levels share statistics for each level, estimated on data. In place.

    Norms that are called several times in one forward, with features of different sizes, become `CycleBatchNormList`s
    whose levels are the calls, in their order; affine, eps, momentum and workers stay. Detectron2's class of that name
    becomes ours, a `LevelBatchNorm2d` gets population="per_level". No weight is trained.

    Args:
        model: any torch detector, with weights that were trained; not wrapped, not compiled.
        data: batches like those of the training, see `recompute_population_statistics`; no labels are needed, unless
            the model needs them.
        levels: names of the levels, in the order of the calls, such as ("p3", "p4"); None: what the head says by
            `use_level`, else "0", "1", ..., which detectron2's class can load.
        entry: what is called from outside, see `count_levels`: "forward"; ("forward", "inference"); "head".
        layers: called as layers(path, norm), says which norms; they need not see different sizes then.
        forward: called as forward(model, batch), leaves modes as they are; default model(batch).
        num_batches, num_samples, tolerance, domain, estimator, source_samples, seed, progress: see
            `recompute_population_statistics`.
        treat_as: see `convert_norm`.

    Returns:
        What was done; print it.

    Raises:
        StatisticsError: no norm sees levels; a head whose calls change from forward to forward, in number or in the
            relative sizes of their features; calls outside of the entry; and what the estimation refuses.
        ConfigError: a wrong name or number of levels, an unknown entry, a norm that cannot be converted.

    Note:
        Every forward from now on is compared with the first ones: one with other calls is an error. After an exception
        the model is as it was. Parameters are new ones: build the optimizer afterwards. The state dict holds
        `<norm>.<level>.running_mean`, ...; to load it elsewhere, put `CycleBatchNormList`s into the model by
        `convert_norm`, and call `count_levels`. A collective, see `recompute_population_statistics`.

    Example:
        >>> import torch
        >>> class Head(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.tower = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        ...     def forward(self, features):
        ...         return [self.tower(feature) for feature in features]
        >>> data = [[torch.randn(2, 3, 8, 8), torch.randn(2, 3, 4, 4)] for _ in range(3)]
        >>> print(repair(Head(), data, levels=("p3", "p4")).levels)
        {'tower.1': ('p3', 'p4')}

    Source:
        Wu and Johnson, *Rethinking "Batch" in BatchNorm*, 2021, section 5.3 and Table 5.
    """
    check_data(data, _WHERE, many_passes=estimator == "layer_by_layer")
    counted = count_levels(model, entry)
    replaced: dict[nn.Module, nn.Module] = {}

    try:
        first, data = peek(data, NUM_OBSERVED if num_batches is None else min(num_batches, NUM_OBSERVED))
        plan = find_levels(model, first, levels=levels, layers=layers, forward=forward, treat_as=treat_as)
        conversion, replaced = give_levels(model, plan, treat_as)
        statistics = recompute_population_statistics(
            model,
            data,
            layers=lambda path, norm: path in plan.norms,
            forward=forward,
            num_batches=num_batches,
            num_samples=num_samples,
            tolerance=tolerance,
            domain=domain,
            estimator=estimator,
            source_samples=source_samples,
            seed=seed,
            progress=progress,
        )
    except BaseException:
        replace_modules(model, {new: old for old, new in replaced.items()})
        counted.remove()
        raise

    names = {path: norm.levels for path, norm in plan.norms.items()}
    report = RepairReport(names, statistics, conversion, plan.left)
    log.info("%s", report)
    return report


# ---- which norms see levels


def find_levels(
    model: nn.Module,
    batches: Sequence[Any],
    *,
    levels: Sequence[str] | None = None,
    layers: Selection | None = None,
    forward: Forward | None = None,
    treat_as: TreatAs | None = None,
) -> LevelPlan:
    """The norms of a model that see several levels in one forward, and how their features' sizes go together.

    Args:
        model: whose forwards were told by `count_levels`; it is as it was afterwards.
        batches: some.
        levels, layers, forward, treat_as: see `repair`.

    Raises:
        StatisticsError, ConfigError: see `repair`.
    """
    candidates = _find_candidates(model, layers, treat_as)
    norms = {path: norm for path, (norm, _) in candidates.items()}

    with _on_every_worker() as agree:
        if not batches:
            raise NO_BATCH.of("none", _WHERE)
        observed = observe_calls(model, batches, norms, _run if forward is None else forward)
        plan = _plan(candidates, observed, levels, layers)
        if not plan.norms:
            got = ", ".join(f"{path}: {reason}" for path, reason in list(plan.left.items())[:3])
            raise NO_LEVELS.of(got or _describe_frozen(model, treat_as) or "none", type(model).__name__)
        agree({path: norm.levels for path, norm in plan.norms.items()})
    return plan


def _describe_frozen(model: nn.Module, treat_as: TreatAs | None) -> str:
    """The norms that are passed over, as frozen statistics normalize in training as they do at inference."""
    forms = find_forms(model, treat_as)
    paths = dict.fromkeys(path for path, _, form in forms if form.is_batch_norm and form.is_frozen)
    return f"none, and frozen ones that were passed over ({list_few(paths)})" if paths else ""


def _run(model: nn.Module, batch: Any) -> None:
    try:
        model(batch)
    except (TypeError, AttributeError) as error:
        raise explain_batch(batch, error, _WHERE) from error


def _find_candidates(
    model: nn.Module, layers: Selection | None, treat_as: TreatAs | None
) -> dict[str, tuple[nn.Module, NormForm]]:
    """Batch norms with running statistics that are not frozen, each by its first path."""
    candidates: dict[str, tuple[nn.Module, NormForm]] = {}
    seen: set[nn.Module] = set()

    for path, norm, form in find_forms(model, treat_as):
        is_chosen = layers is None or layers(path, norm)
        has_population = form.population != "none" and form.is_batch_norm and not form.is_frozen
        if norm not in seen and is_chosen and has_population:
            candidates[path] = norm, form
        seen.add(norm)
    return candidates


def _plan(
    candidates: Mapping[str, tuple[nn.Module, NormForm]],
    observed: Mapping[str, ObservedCalls],
    levels: Sequence[str] | None,
    layers: Selection | None,
) -> LevelPlan:
    norms: dict[str, NormPlan] = {}
    left: dict[str, str] = {}

    for path, (norm, form) in candidates.items():
        if isinstance(norm, LevelBatchNorm2d) and not isinstance(norm, CycleBatchNormList):
            norms[path] = NormPlan(norm.levels, SizeRatios(), is_called_once=True)
            continue

        calls = observed.get(path)
        if calls is None or not (calls.is_repeated or calls.levels):
            continue
        if not (calls.sees_sizes or calls.levels or layers is not None or form.owners):
            number = max(map(len, calls.forwards))
            left[path] = f"called {number} times in a forward with features of one size (name it by layers=)"
            continue
        norms[path] = _plan_norm(path, norm, form, calls, levels)

    return LevelPlan(norms, left)


def _plan_norm(
    path: str, norm: nn.Module, form: NormForm, calls: ObservedCalls, levels: Sequence[str] | None
) -> NormPlan:
    """The levels of one norm, and what their sizes have in common."""
    ratios = SizeRatios()
    if calls.is_outside:
        raise OUTSIDE.of("calls outside of one", path)
    if calls.levels:
        return NormPlan(_name_levels(path, levels or tuple(calls.levels), len(calls.levels)), ratios)

    numbers = [len(sizes) for sizes in calls.forwards]
    if len(set(numbers)) > 1:
        raise OTHER_NUMBER.of(f"{list_few(numbers, 8)} calls", path)
    if form.is_numbered and form.population == "per_level" and numbers[0] != len(form.owners):
        raise OTHER_NUMBER.of(f"{numbers[0]} calls of a {type(norm).__name__} of {len(form.owners)} norms", path)

    for sizes in calls.forwards:
        for index, size in enumerate(sizes):
            if not ratios.fits(index, sizes[0], size):
                raise OTHER_SIZES.of(f"{write_sizes(sizes)} after {write_sizes(calls.forwards[0])}", path)
        ratios.take_in(sizes)

    names = tuple(str(index) for index in range(numbers[0])) if levels is None else tuple(levels)
    if levels is None and isinstance(norm, CycleBatchNormList):
        names = norm.levels
    return NormPlan(_name_levels(path, names, numbers[0]), ratios)


def _name_levels(path: str, levels: Sequence[str], number: int) -> tuple[str, ...]:
    names = () if isinstance(levels, str) else tuple(levels)
    if len(names) != number or len(set(names)) != number:
        raise OTHER_LEVELS.of(f"{levels!r} for {number} calls", path)
    return names


@contextlib.contextmanager
def _on_every_worker() -> Iterator[Callable[[object], None]]:
    """A scope that fails on all workers if it fails on one; what is said in it must be the same on all."""
    said: list[object] = []
    failure: BaseException | None = None
    try:
        yield said.append
    except Exception as error:
        failure = error

    every = all_gather_objects((str(failure or ""), said), resolve_group("all"), _WHERE)
    if failure is not None:
        raise failure
    for rank, (reason, others) in enumerate(every):
        if reason:
            raise WorkerError(f"Worker {rank} has failed: {reason}")
        if others != said:
            raise OTHER_WORKERS.of(f"{others} on worker {rank} and {said} here", _WHERE)


# ---- norms in their place


def give_levels(
    model: nn.Module, plan: LevelPlan, treat_as: TreatAs | None = None
) -> tuple[ConversionReport, dict[nn.Module, nn.Module]]:
    """Put norms with a population for each level into their places; and which are in whose.

    Args:
        model: that of the plan, or a copy of it.
        plan: see `find_levels`.
        treat_as: see `convert_norm`.

    Raises:
        ConfigError: a norm cannot be converted. The model is then as it was.
    """
    makers: dict[nn.Module, Any] = {}
    choices: dict[str, Any] = {}
    for path, norm, form in find_forms(model, treat_as):
        if path in plan.norms and not has_levels(norm, plan.norms[path]):
            makers[norm] = _choose_norm(norm, form, plan.norms[path])
        if norm in makers:
            choices[path] = makers[norm]

    before = {path: model.get_submodule(path) for path in choices}
    report = convert_norm(model, choices, treat_as=treat_as) if choices else ConversionReport(title="No norm converted")
    replaced = {norm: model.get_submodule(path) for path, norm in before.items()}

    for path, norm_plan in plan.norms.items():
        new_norm = model.get_submodule(path)
        if isinstance(new_norm, CycleBatchNormList):
            new_norm.ratios = norm_plan.ratios
    return report, replaced


def has_levels(norm: nn.Module, plan: NormPlan) -> bool:
    """Whether a norm has a population for each level already, and counts them safely."""
    return isinstance(norm, LevelBatchNorm2d) and is_per_level(norm.spec.population) and norm.levels == plan.levels


def _choose_norm(norm: Any, form: NormForm, plan: NormPlan) -> NormSpec | Callable[[int], nn.Module]:
    """A spec, or what makes the new norm, as `convert_norm` takes it."""
    if plan.is_called_once:
        spec: NormSpec = norm.spec.replace(population=add_levels(norm.spec.population))
        return spec

    answers: dict[str, Any]
    if isinstance(norm, BatchNorm2d):
        answers = {name: add_levels(getattr(norm.spec, name)) for name in ("statistics", "population")}
        spec = norm.spec.replace(**answers)
    else:
        answers = {"statistics": "per_level", "population": "per_level"}
        is_synchronized = any(isinstance(part, nn.SyncBatchNorm) for part in norm.modules())
        answers["affine"] = form.affine
        spec = NormSpec(workers="all" if is_synchronized else "one", **answers)
    return partial(_make_norm, levels=plan.levels, spec=spec)


def _make_norm(num_features: int, levels: tuple[str, ...], spec: NormSpec) -> CycleBatchNormList:
    return CycleBatchNormList(num_features=num_features, levels=levels, spec=spec)
