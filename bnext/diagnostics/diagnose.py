"""The doctor of any torch model: facts are collected, checks read them, a diagnosis says what is wrong."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from bnext.diagnostics.facts import Facts, ForwardFacts, NormFacts, TrainingFacts
from bnext.diagnostics.findings import SEVERITIES, Finding, Severity
from bnext.diagnostics.inventory import NormGroup, group_norms
from bnext.diagnostics.observe import observe_forward
from bnext.diagnostics.read_norms import read_norms
from bnext.diagnostics.recommend import Advice, recommend
from bnext.diagnostics.registry import run_checks
from bnext.diagnostics.worker_differences import compare_workers
from bnext.distributed import count_images, get_world_size, unwrap_model
from bnext.statistics.data_pass import Forward

__all__ = ["Diagnosis", "collect_facts", "diagnose", "examine_facts", "observe_batches"]


@dataclasses.dataclass(frozen=True, eq=False)
class Diagnosis:
    """What the doctor found. `str(diagnosis)` is the text for a terminal.

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
    def groups(self) -> list[NormGroup]:
        """The inventory: the norms, those together that give the same answers."""
        return group_norms(norm.record for norm in self.facts.norms)

    @property
    def advice(self) -> tuple[Advice, ...]:
        """Norms for this batch, these workers, this data."""
        return recommend(self.facts)

    def __str__(self) -> str:
        from bnext.diagnostics.report_text import format_text

        return format_text(self)


def diagnose(
    model: nn.Module,
    data: Iterable[Any] | None = None,
    *,
    forward: Forward | None = None,
    num_batches: int = 4,
    domain: str | None = None,
    optimizer: Optimizer | None = None,
    averaged: nn.Module | None = None,
    before: nn.Module | None = None,
) -> Diagnosis:
    """Find what is wrong with the batch norms of a model, before, during or after its training.

    Args:
        model: any torch model, also in DistributedDataParallel. Its norms and modes say what a training would do.
        data: batches like those of its training; None: the model is not run.
        forward: called as forward(model, batch), leaves modes as they are; default model(batch).
        num_batches: of `data` that are used at most.
        domain: of all images, where norms have domains; see `use_domain`.
        optimizer: that trains the model.
        averaged: a model with the averaged weights of this one: EMA, SWA, a teacher.
        before: the model before a conversion.

    Returns:
        The findings, worst first; print it.

    Note:
        Nothing of the model changes: modes, buffers, attributes and random numbers are bit by bit as before, also
        where a forward fails; that is then one of the `failures`. Every worker sees its own share of the data. Where
        several workers run, all must call it: their running statistics are compared, which is a collective.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8, momentum=0.9))
        >>> [finding.code for finding in diagnose(model).findings]
        ['BN017']
    """
    facts = collect_facts(model, optimizer=optimizer, averaged=averaged, before=before)
    if data is not None:
        facts = observe_batches(facts, model, data, forward=forward, num_batches=num_batches, domain=domain)
    return examine_facts(facts)


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
) -> Facts:
    """What a model says without being run; arguments as in `diagnose`. A collective where several workers run."""
    ddp = _read_ddp(model)
    model = unwrap_model(model)
    norms = read_norms(model)
    decay, decay_of_others = _read_decay(model, norms, optimizer) if optimizer is not None else ({}, None)

    num_workers = get_world_size()
    return Facts(
        norms=norms,
        model_name=type(model).__name__,
        is_training=model.training,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        training=TrainingFacts(
            num_workers=num_workers if num_workers > 1 else None,
            weight_decay=decay,
            decay_of_others=decay_of_others,
            ddp=ddp,
        ),
        worker_differences=compare_workers(norms),
        averaged=None if averaged is None else read_norms(unwrap_model(averaged)),
        before=None if before is None else read_norms(unwrap_model(before)),
    )


def _read_ddp(model: nn.Module) -> dict[str, bool] | None:
    if not isinstance(model, DistributedDataParallel):
        return None
    names = ("broadcast_buffers", "find_unused_parameters", "static_graph")
    return {name: bool(getattr(model, name)) for name in names}


def _read_decay(
    model: nn.Module, norms: Iterable[NormFacts], optimizer: Optimizer
) -> tuple[dict[str, float], float | None]:
    """Weight decay of the affine of each norm, and the largest of other weights."""
    decays = {
        parameter: float(group.get("weight_decay", 0.0))
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    of_norms: dict[str, float] = {}
    affines: set[nn.Parameter] = set()
    for norm in norms:
        parameters = [parameter for parameter in model.get_submodule(norm.path).parameters() if parameter in decays]
        affines.update(parameters)
        if parameters:
            of_norms[norm.path] = max(decays[parameter] for parameter in parameters)

    others = [decay for parameter, decay in decays.items() if parameter not in affines and parameter.dim() > 1]
    return of_norms, max(others, default=None)


def observe_batches(
    facts: Facts,
    model: nn.Module,
    data: Iterable[Any],
    *,
    forward: Forward | None = None,
    num_batches: int = 4,
    domain: str | None = None,
) -> Facts:
    """Facts with what a few batches show, each by population and by mini-batch statistics; see `diagnose`."""
    model = unwrap_model(model)
    norms: Mapping[str, nn.Module] = {norm.path: model.get_submodule(norm.path) for norm in facts.norms}
    forwards: list[ForwardFacts] = []
    failures: list[str] = []
    images: list[int] = []

    for batch in itertools.islice(data, num_batches):
        images.append(count_images(batch))
        for kind in ("population", "mini_batch"):
            options: dict[str, Any] = {"normalized_by": kind, "num_images": images[-1], "domain": domain}
            try:
                forwards.append(observe_forward(model, batch, norms, forward=forward, **options))
            except Exception as error:
                reason = str(error).splitlines()[0] if str(error) else "no message"
                failures.append(f"A forward by {kind} statistics failed: {type(error).__name__}: {reason}")
        if failures:
            break

    training = facts.training or TrainingFacts()
    if training.images_per_worker is None and images:
        training = dataclasses.replace(training, images_per_worker=max(images) or None)
    if not images:
        failures.append("There was no batch in the data.")
    return dataclasses.replace(
        facts,
        forwards=(*facts.forwards, *forwards),
        training=training,
        failures=(*facts.failures, *failures),
    )
