"""BN014: running statistics that are far from those of the training images."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch

from bnext.diagnostics.facts import Facts, NormFacts, Population, StandardErrors
from bnext.diagnostics.findings import Check, Evidence, Remedy, Severity
from bnext.diagnostics.measures.gaps import find_gap
from bnext.diagnostics.measures.initial_state import drop_initial, is_young, weigh_initial
from bnext.diagnostics.re_estimation import advise_precise_statistics
from bnext.functional import Moments

__all__ = ["CHECK"]

# Standard deviations of what is normalized. A quarter shifts every tenth ReLU; converged models are below 0.1.
_FAR, _WRONG = 0.25, 1.0
_FAR_RATIO, _WRONG_RATIO = math.log(1.5), math.log(4)  # of variances
# Times the noise that the moving average must have. At 4 the norms of a ResNet together give no false alarm, although
# channels are correlated.
_LEAST_Z = 4.0
_LEAST_SHARE = 0.05  # of initial values in a moving average, to be told
_MILD = 2.0  # times the least that matters, which weights give that have just begun to change
_MOSTLY = 0.5  # of them, from which on nothing else can be seen


@dataclasses.dataclass(frozen=True)
class _Distance:
    """Distance of the running statistics of one set from the population.

    Args:
        mean: absolute, mean over channels, in standard deviations.
        log_ratio: of variances, likewise.
        z: the larger of both in units of what the noise of mini-batches explains.
        is_young: whether a training that has just begun explains it.
    """

    mean: float
    log_ratio: float
    z: float
    is_young: bool = False

    @property
    def size(self) -> float:
        """Times the least that matters."""
        return max(self.mean / _FAR, self.log_ratio / _FAR_RATIO)

    @property
    def is_wrong(self) -> bool:
        return self.mean >= _WRONG or self.log_ratio >= _WRONG_RATIO


def _examine(facts: Facts) -> Iterator[Evidence]:
    repeated = _find_repeated(facts)
    distances: dict[str, _Distance] = {}
    number = 0

    for norm in facts.batch_norms:
        if not facts.is_trained or not norm.is_by_mini_batch or norm.path in repeated:
            continue
        for population in norm.populations:
            now = facts.population.get((norm.path, population.owner))
            errors = facts.population_errors.get((norm.path, population.owner))
            if now is None or errors is None or not math.isfinite(errors.mean):
                continue
            number += 1
            distance = _measure(norm, population, now, errors)
            if distance is not None:
                distance = dataclasses.replace(distance, is_young=_is_young(norm, population, now, errors))
            if distance is not None and distance.size >= 1:
                distances[f"{norm.path}.{population.owner}".rstrip(".")] = distance

    stale = {path: distance for path, distance in distances.items() if distance.z >= _LEAST_Z}
    noisy = {path: distance for path, distance in distances.items() if distance.z < _LEAST_Z}
    old = {path: distance for path, distance in stale.items() if not distance.is_young}
    if stale:
        yield _judge(facts, old or stale, number, is_noise=False)
    elif noisy:
        yield _judge(facts, noisy, number, is_noise=True)


def _find_repeated(facts: Facts) -> set[str]:
    """Norms of several mini-batches in a forward, whose moving average is mostly that of the last: another fault."""
    repeated = set()
    for forward in facts.forwards:
        repeated |= {path for path, calls in forward.calls.items() if sum(not call.is_joint for call in calls) > 1}
    return repeated


def _measure(norm: NormFacts, population: Population, now: Moments, errors: StandardErrors) -> _Distance | None:
    var = now.var + norm.record.eps
    mean = (population.mean - now.mean) / var.sqrt()
    log_ratio = ((population.var + norm.record.eps) / var).log()
    if not bool(torch.isfinite(mean).all() and torch.isfinite(log_ratio).all()):
        return None

    of_mean, of_ratio = float(mean.abs().mean()), float(log_ratio.abs().mean())
    share = _find_share(norm, population)
    # A standard error e of n mini-batches says that one of them has e * sqrt(n).
    noise = math.sqrt(errors.num_batches * share + 1)
    z = max(of_mean / max(errors.mean * noise, 1e-12), of_ratio / max(errors.var * noise, 1e-12))
    return _Distance(of_mean, of_ratio, z)


def _is_young(norm: NormFacts, population: Population, now: Moments, errors: StandardErrors) -> bool:
    """Whether the values that it began with, or weights that have just begun to change, explain a distance."""
    if not is_young(norm, population):
        return False
    here, rest = (_measure(norm, one, now, errors) for one in (population, drop_initial(norm, population)))
    if weigh_initial(norm, population) >= _MOSTLY or here is None or rest is None:
        return True
    has_begun_so = rest.size <= 1.1 * here.size  # else a re-estimation has counted, too
    return not rest.is_wrong and (has_begun_so or here.size < _MILD)


def _find_share(norm: NormFacts, population: Population) -> float:
    """Variance of the moving average, in that of one mini-batch."""
    momentum = norm.record.momentum
    if momentum is None:
        return 1 / max(population.num_updates or 1, 1)
    return momentum / (2 - momentum)


def _judge(facts: Facts, distances: dict[str, _Distance], number: int, *, is_noise: bool) -> Evidence:
    farthest = max(distances.values(), key=lambda distance: distance.size)
    text = (
        f"{len(distances)} of {number} sets of running statistics are not those of the training images: their means "
        f"differ by up to {max(one.mean for one in distances.values()):.2g} standard deviations (mean over channels), "
        f"their variances by a factor of up to {_factor(distances):.2g}. "
    )
    if is_noise:
        text += f"That is no more than the noise of the moving average, {farthest.z:.1f} times it at most."
    else:
        largest = max(one.z for one in distances.values())
        text += f"The noise of mini-batches in a moving average explains {1 / largest:.0%} of it."
        text += _explain_youth(facts, distances)

    gap = find_gap(facts.evaluation, "precise")
    is_wrong = gap is not None and gap.is_wrong
    is_wrong |= any(one.is_wrong for one in distances.values())
    severity: Severity = "error" if is_wrong else "warning"
    is_young = all(one.is_young for one in distances.values()) and not (gap is not None and gap.is_seen)
    numbers = {"sets": float(len(distances)), "mean": farthest.mean, "ratio": _factor(distances), "z": farthest.z}
    if is_noise or is_young:
        severity = "note"  # every training begins so; an evaluation that is worse for it is no note
    return Evidence(severity, tuple(distances), text, _advise(facts, is_noise), numbers)


def _explain_youth(facts: Facts, distances: dict[str, _Distance]) -> str:
    """A sentence where moving averages have taken in too little yet; else ""."""
    numbers: dict[int, float] = {}
    for norm in facts.batch_norms:
        for population in norm.populations:
            path = f"{norm.path}.{population.owner}".rstrip(".")
            if path in distances and population.num_updates:
                numbers[population.num_updates] = weigh_initial(norm, population)
    share = numbers[min(numbers)] if numbers else 0.0
    if share < _LEAST_SHARE and not all(one.is_young for one in distances.values()):
        return ""
    return f" After {min(numbers)} mini-batches the values that they began with count for {share:.2g} of them."


def _factor(distances: dict[str, _Distance]) -> float:
    return math.exp(max(one.log_ratio for one in distances.values()))


def _advise(facts: Facts, is_noise: bool) -> Remedy:
    text = "Re-estimate the statistics on training images before the evaluation; no weight is trained."
    if is_noise and facts.origin.kind == "config":
        text += " TEST.PRECISE_BN.ENABLED does it in every training."
    return advise_precise_statistics(facts, text)


CHECK = Check(
    code="BN014",
    name="stale-statistics",
    title="running statistics are not those of the training images",
    explanation=(
        "Running statistics are a moving average over the last mini-batches of a training. Whatever changes weights or "
        "features afterwards (averaged weights, a conversion, a resume without buffers, other images) leaves them "
        "behind; while weights still change fast, or with small mini-batches, the average itself is a bad estimate. "
        "The distance is measured against the noise that a moving average of such mini-batches must have."
    ),
    cost="52.8 instead of 39.4 % error (ResNet-50 on ImageNet, batch 8192, epoch 30 of 100; at the end 0.3 points)",
    source="Wu and Johnson 2021, section 3",
    depth="full",
    examine=_examine,
    points=0.3,
)
