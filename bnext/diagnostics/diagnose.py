"""The doctor of any torch model: facts are collected, checks read them, a diagnosis says what is wrong."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from bnext.diagnostics.collecting.depths import Statistics, examine_population, observe_batches, observe_images
from bnext.diagnostics.collecting.read_norms import find_folded, read_norms
from bnext.diagnostics.collecting.read_state import collect_state_facts
from bnext.diagnostics.collecting.worker_differences import compare_workers
from bnext.diagnostics.facts import Facts, NormFacts, TrainingFacts
from bnext.diagnostics.findings import SEVERITIES, Depth, Finding, Severity
from bnext.diagnostics.inventory import NormGroup, group_norms
from bnext.diagnostics.recommend import Advice, recommend
from bnext.diagnostics.registry import run_checks
from bnext.distributed import count_images, get_world_size, unwrap_model
from bnext.errors import ConfigError, check_choice
from bnext.scope.model import restoring
from bnext.scope.statistics import as_in_training
from bnext.statistics import recompute_population_statistics
from bnext.statistics.arguments import check_data
from bnext.statistics.data_pass import Domain, Forward

__all__ = ["Diagnosis", "collect_facts", "diagnose", "examine_facts", "read_weight_decay"]

DiagnoseDepth = Literal["static", "forward", "full"]
Loss = Callable[[nn.Module, Any], Any]
_SCRIPTED = "The norms of what is scripted or traced are not seen: give the model that it was made from."
_SEED = 0  # of what a pass over the data draws


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Diagnosis:
    """The doctor's report on a model: print it, or take `as_dict()`, whose form is stable.

    Args:
        facts: that were read.
        findings: worst first.
        failures: what could not be found out, and why, in sentences.
    """

    facts: Facts
    findings: tuple[Finding, ...]
    failures: tuple[str, ...] = ()

    def select(self, severity: Severity) -> tuple[Finding, ...]:
        """The findings that are at least as bad.

        Args:
            severity: "error", "warning" (and errors), or "note" (all).
        """
        worst = SEVERITIES[: SEVERITIES.index(severity) + 1]
        return tuple(finding for finding in self.findings if finding.severity in worst)

    @property
    def depth(self) -> Depth:
        """The depth of the facts: the model alone, some batches, a pass over the data, or a running training."""
        if self.facts.steps is not None:
            return "training"
        if self.facts.population or self.facts.evaluation is not None:
            return "full"
        return "forward" if any(not forward.is_noise for forward in self.facts.forwards) else "static"

    @property
    def groups(self) -> list[NormGroup]:
        """The inventory: the norms, those together that give the same answers."""
        return group_norms(norm.record for norm in self.facts.norms)

    @property
    def advice(self) -> tuple[Advice, ...]:
        """Norms for this batch, these workers, this data."""
        return recommend(self.facts)

    def as_dict(self) -> dict[str, Any]:
        """All of it as dictionaries, lists, strings and numbers, in the form of `doctor.schema.json`."""
        from bnext.diagnostics.reports.report_json import describe_diagnosis

        return describe_diagnosis(self)

    def __str__(self) -> str:
        from bnext.diagnostics.reports.report_text import format_text

        return format_text(self)

    def __repr__(self) -> str:
        from bnext.diagnostics.reports.report_text import summarize

        return f"<Diagnosis of {summarize(self)}>"


def diagnose(
    model: nn.Module | Mapping[str, Tensor],
    data: Iterable[Any] | None = None,
    *,
    depth: DiagnoseDepth = "forward",
    forward: Forward | None = None,
    num_batches: int = 4,
    domain: Domain | None = None,
    domains: Mapping[str, Iterable[Any]] | None = None,
    test_data: Iterable[Any] | None = None,
    loss: Loss | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    optimizer: Optimizer | None = None,
    averaged: nn.Module | None = None,
    before: nn.Module | None = None,
) -> Diagnosis:
    """Find what is wrong with the batch norms of a model, before, during or after its training.

    Args:
        model: any torch model, also in DistributedDataParallel. Its norms and modes say what a training would do. Or a
            state dict alone, of which everything else is passed over.
        data: batches like those of its training; None: the model is not run.
        depth: how much of the data is used: "static": none; "forward": a few batches; "full": all of them, for
            population statistics that those of the model are compared with.
        forward: called as forward(model, batch), leaves modes as they are; default model(batch). Of (inputs, labels) it
            takes the inputs: forward=lambda model, batch: model(batch[0]).
        num_batches: of `data`, of each of `domains` and of `test_data` that are run or looked at, at most.
        domain: of all images, or called as domain(batch) for that of a batch or of each image; see `use_domain`.
        domains: name -> batches of this domain alone, instead of `data` or besides it.
        test_data: batches as the model gets them at inference, whose pixels are compared with those of `data`.
        loss: called as loss(model, batch) at depth "full", on batches of `data`; the model is in training mode, without
            dropout, its norms as `Facts.evaluation` says.
        evaluate: called as evaluate(model) at depth "full", gives accuracy or AP from 0 to 100.
        optimizer: that trains the model.
        averaged: a model with the averaged weights of this one: EMA, SWA, a teacher.
        before: the model before a conversion.

    Returns:
        The findings, worst first; print it.

    Raises:
        ConfigError: another depth, another kind of model, no batches to run.
        StatisticsError: `data`, or another of these, gives no batches.

    Note:
        Nothing of the model changes: modes, buffers, attributes and random numbers are bit by bit as before, also
        where a forward fails; that is then one of the `failures`. Every worker sees its own share of the data. Where
        several workers run, all must call it: their running statistics are compared, which is a collective. Of an
        iterator no more batches are taken than are used.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8, momentum=0.9))
        >>> [finding.code for finding in diagnose(model).findings]
        ['BN017']
    """
    check_choice("depth", depth, get_args(DiagnoseDepth), where="diagnose")
    if not isinstance(model, (nn.Module, Mapping)):
        kind = type(model).__name__
        remedy = "Load a file first, or run bnext doctor on it."
        raise ConfigError.of("model", "be a module or a state dict", got=kind, where="diagnose", remedy=remedy)
    if num_batches < 1:
        remedy = 'For none, depth="static".'
        raise ConfigError.of("num_batches", "be at least 1", got=num_batches, where="diagnose", remedy=remedy)
    if isinstance(model, Mapping):
        return examine_facts(collect_state_facts(model))
    facts = collect_facts(model, optimizer=optimizer, averaged=averaged, before=before)
    facts = dataclasses.replace(facts, worker_differences=compare_workers(facts.norms))
    if depth == "static":
        return examine_facts(facts)

    for name, batches in {"data": data, "test_data": test_data, **(domains or {})}.items():
        if batches is not None:
            check_data(batches, "diagnose", name)
    is_run = data is not None or bool(domains)
    failure = _explain_not_run(model)
    if is_run and failure:
        return examine_facts(dataclasses.replace(facts, failures=(*facts.failures, failure)))

    few, every = _open(data, num_batches, depth)
    run = partial(observe_batches, model=model, forward=forward, num_batches=num_batches)
    if few is not None:
        facts = run(facts, data=few, domain=domain)
    for name, of_domain in (domains or {}).items():
        facts = run(facts, data=of_domain, domain=name)
    if test_data is not None:
        facts = observe_images(facts, "test", itertools.islice(test_data, num_batches))

    if depth == "full" and few is not None and every is not None:
        options: dict[str, Any] = {"forward": forward, "domain": domain, "seed": _SEED, "progress": True}
        recompute = partial(recompute_population_statistics, data=every, **options)
        measure = None if loss is None else partial(_measure_loss, loss, few)
        score = None if evaluate is None else (lambda model, statistics: evaluate(model))
        facts = examine_population(facts, model, recompute, loss=measure, score=score)
    return examine_facts(facts)


def _explain_not_run(model: nn.Module) -> str:
    """Why a model cannot be run; "": it can."""
    tensors = list(itertools.chain(model.parameters(), model.buffers()))
    if any(map(is_lazy, tensors)):
        return "The model is lazy and was not run, which would initialize it: run a batch through it first."
    if any(tensor.is_meta for tensor in tensors):
        return "The model is on the meta device, without values, and was not run: build it on another one first."
    return ""


def _open(
    data: Iterable[Any] | None, num_batches: int, depth: DiagnoseDepth
) -> tuple[Iterable[Any] | None, Iterable[Any] | None]:
    """The batches that are run, and all of them; those of an iterator are kept as they are taken."""
    if data is None or not isinstance(data, Iterator) or depth == "forward":
        return data, data
    few = list(itertools.islice(data, num_batches))
    return few, itertools.chain(few, data)


def _measure_loss(loss: Loss, batches: Iterable[Any], model: nn.Module, statistics: Statistics) -> float:
    """Mean over images."""
    total, number = 0.0, 0
    with torch.no_grad(), as_in_training(model, by_population=statistics == "population"):
        for batch in batches:
            with restoring(model, seed=_SEED):
                total += count_images(batch) * float(loss(model, batch))
            number += count_images(batch)
    return total / max(number, 1)


def examine_facts(facts: Facts) -> Diagnosis:
    """Run all checks on facts that were collected elsewhere."""
    findings, failures = run_checks(facts)
    return Diagnosis(facts, tuple(findings), (*facts.failures, *failures))


# ---- facts of a torch model


def collect_facts(
    model: nn.Module,
    *,
    optimizer: Optimizer | None = None,
    averaged: nn.Module | None = None,
    before: nn.Module | None = None,
    with_layers: bool = True,
) -> Facts:
    """Facts of a model that is not run; arguments as in `diagnose`, and of `read_norms`.

    No collective: one worker may call it alone.
    """
    ddp = _read_ddp(model)
    model = unwrap_model(model)
    norms = read_norms(model, with_layers=with_layers)

    parameters = [parameter for parameter in model.parameters() if not is_lazy(parameter)]
    is_scripted = any(isinstance(module, torch.jit.ScriptModule) for module in model.modules())
    failures = (_SCRIPTED,) if is_scripted else ()
    num_workers = get_world_size()
    return Facts(
        norms=norms,
        model_name=type(model).__name__,
        is_training=model.training,
        num_parameters=sum(parameter.numel() for parameter in parameters),
        training=TrainingFacts(
            num_workers=num_workers if num_workers > 1 else None,
            weight_decay={} if optimizer is None else read_weight_decay(model, norms, optimizer.param_groups),
            ddp=ddp,
        ),
        averaged=None if averaged is None else read_norms(unwrap_model(averaged)),
        before=None if before is None else read_norms(unwrap_model(before)),
        num_trained=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        folded=find_folded(model, None if before is None else unwrap_model(before)),
        failures=failures,
    )


def _read_ddp(model: nn.Module) -> dict[str, bool] | None:
    if not isinstance(model, DistributedDataParallel):
        return None
    names = ("broadcast_buffers", "find_unused_parameters", "static_graph")
    return {name: bool(getattr(model, name)) for name in names}


def read_weight_decay(
    model: nn.Module, norms: Iterable[NormFacts], groups: Iterable[Mapping[str, Any]]
) -> dict[str, float]:
    """Path of each norm -> weight decay of its affine; norms that nobody trains are absent.

    Args:
        model: see `collect_facts`.
        norms: of the model.
        groups: "params" and "weight_decay" of each, as in the `param_groups` of an optimizer.
    """
    decays = {parameter: float(group.get("weight_decay", 0.0)) for group in groups for parameter in group["params"]}
    of_norms: dict[str, float] = {}
    for norm in norms:
        parameters = [parameter for parameter in model.get_submodule(norm.path).parameters() if parameter in decays]
        if parameters:
            of_norms[norm.path] = max(decays[parameter] for parameter in parameters)
    return of_norms
