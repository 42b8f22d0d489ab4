"""BN011: statistics or an affine with which nobody can normalize: not finite, a negative variance, one of zero."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from bnext.diagnostics.facts import Facts, NormFacts
from bnext.diagnostics.findings import Check, Evidence, Remedy, Severity
from bnext.diagnostics.measures.channels import find_dead_channels
from bnext.diagnostics.measures.initial_state import get_affine
from bnext.diagnostics.re_estimation import advise_reestimation

__all__ = ["CHECK"]

# A few channels of a trained network are often constant; with half of them something has gone wrong.
_MANY_CONSTANT = 0.5

_Seen = dict[str, tuple[str, int, float]]  # path -> which of its vectors, channel, value


def _examine(facts: Facts) -> Iterator[Evidence]:
    statistics, affines = _find_invalid(facts, "statistics"), _find_invalid(facts, "affine")
    number = len(facts.batch_norms)

    if statistics:
        text = f"{len(statistics)} of {number} norms normalize to NaN, or to nothing: {_describe(statistics)}."
        remedy = advise_reestimation(facts, statistics)
        yield Evidence("error", tuple(statistics), text, remedy, {"norms": float(len(statistics))})

    if affines:
        text = f"The affine of {len(affines)} of {number} norms is not finite: {_describe(affines)}."
        remedy = Remedy(
            "Use an earlier checkpoint, or another one: the training had diverged, and no statistic mends that."
        )
        yield Evidence("error", tuple(affines), text, remedy, {"norms": float(len(affines))})

    yield from _examine_zeros(facts, set(statistics))


def _find_invalid(facts: Facts, kind: str) -> _Seen:
    seen: _Seen = {}
    for norm in facts.batch_norms:
        for name, values in _list_vectors(norm, kind):
            wrong = ~torch.isfinite(values)
            if name.endswith("running_var"):
                wrong |= values < 0
            if bool(wrong.any()) and norm.path not in seen:
                channel = int(wrong.nonzero()[0])
                seen[norm.path] = name, channel, float(values[channel])
    return seen


def _list_vectors(norm: NormFacts, kind: str) -> Iterator[tuple[str, Tensor]]:
    sets: list[tuple[str, dict[str, Tensor | None]]]
    if kind == "statistics":
        sets = [(one.owner, {"running_mean": one.mean, "running_var": one.var}) for one in norm.populations]
    else:
        sets = [(affine.owner, {"weight": affine.weight, "bias": affine.bias}) for affine in norm.affines]

    for owner, vectors in sets:
        for name, values in vectors.items():
            if values is not None:
                yield f"{owner}.{name}" if owner else name, values


def _describe(seen: Mapping[str, tuple[str, int, float]]) -> str:
    path, (name, channel, value) = next(iter(seen.items()))
    return f"{name} is {value:g} in channel {channel} of {path or 'the norm'}"


def _examine_zeros(facts: Facts, passed_over: set[str]) -> Iterator[Evidence]:
    """Channels whose running variance is exactly 0, by their share in the norm; those without a scale do nothing."""
    shares: dict[Severity, dict[str, float]] = {"error": {}, "warning": {}, "note": {}}
    for norm in facts.batch_norms:
        share = max((_count_zeros(norm, one.owner, one.var) for one in norm.populations if len(one.var)), default=0.0)
        if not share or norm.path in passed_over:
            continue
        severity: Severity = "note" if share < _MANY_CONSTANT else "warning"
        shares["error" if share == 1 else severity][norm.path] = share

    for severity, seen in shares.items():
        if not seen:
            continue
        largest = max(seen.values())
        text = (
            f"In {len(seen)} of {len(facts.batch_norms)} norms the running variance of up to {largest:.0%} of the "
            "channels is 0: whatever differs from the running mean there is divided by the square root of eps alone."
        )
        numbers = {"norms": float(len(seen)), "share": largest}
        yield Evidence(severity, tuple(seen), text, advise_reestimation(facts, seen), numbers)


def _count_zeros(norm: NormFacts, owner: str, var: Tensor) -> float:
    affine = get_affine(norm, owner)
    dead = find_dead_channels(None if affine is None else affine.weight, len(var))
    return float(((var == 0) & (~dead | bool((var == 0).all()))).double().mean())


CHECK = Check(
    code="BN011",
    name="invalid-statistics",
    title="statistics that cannot be: not finite, a variance below zero or of zero",
    explanation=(
        "A running variance that is negative or NaN makes every output NaN, an infinite one makes it a constant; such "
        "values come from a training that diverged, a half-precision sum, or a conversion. A variance of exactly zero "
        "is that of a channel that never changed (a dead filter), or of a norm that a re-estimation did not reach. A "
        "few dead channels are common in trained networks, and a note."
    ),
    cost="every output is NaN",
    source="detectron2#2413",
    depth="static",
    examine=_examine,
    points=30.0,  # nothing is left of a detector
)
