"""BN016: running statistics that a training has hardly moved, because their layer is seldom reached."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from bnext.diagnostics.facts import Facts, NormFacts
from bnext.diagnostics.findings import Check, Evidence, Remedy, Severity
from bnext.diagnostics.measures.counted_updates import find_live_norms

__all__ = ["CHECK"]

_WATCHED = 20  # forwards after which a layer that none of them reached is none that is just seldom
_FORGOTTEN = 0.05  # weight of the initial values in a moving average, from which on they do no longer matter
_RATIO = 10  # times that other norms of the model were updated more often
_FEW = 10  # updates; fewer are no re-estimation either, which counts its batches


def _examine(facts: Facts) -> Iterator[Evidence]:
    if facts.steps is not None and facts.steps.num_forwards >= _WATCHED:
        steps = facts.steps
        live = [norm for norm in find_live_norms(facts) if norm.path in steps.updates]
        unreached = tuple(norm.path for norm in live if steps.updates[norm.path] == 0)
        if unreached and len(unreached) < len(live):
            words = f"{len(unreached)} of {len(live)} batch norms took in no mini-batch in {steps.num_forwards} "
            words += "forwards of the training, while the others did."
            yield Evidence("warning", unreached, words, _advise(facts), {"norms": len(unreached), "updates": 0})

    yield from _look_at_counters(facts)


def _look_at_counters(facts: Facts) -> Iterator[Evidence]:
    """Averages in which the values before the training still have weight, beside others that have forgotten them."""
    live = find_live_norms(facts)
    counters = {norm.path: _count_least(norm) for norm in live}
    counted = [number for number in counters.values() if number]
    usual = statistics.median(counted) if counted else 0

    few = {}
    for norm in live:
        number, momentum = counters[norm.path], norm.record.momentum
        if not number or not momentum or number * _RATIO > usual:
            continue
        if (1 - momentum) ** number > _FORGOTTEN > (1 - momentum) ** usual:
            few[norm.path] = number
    if not few:
        return

    least = min(few, key=few.__getitem__)
    momentum = next(norm.record.momentum for norm in live if norm.path == least) or 0.0
    weight = (1 - momentum) ** few[least]
    words = f"{len(few)} of {len(live)} batch norms have counted {few[least]} mini-batches where others have "
    words += f"{usual:.0f}: {100 * weight:.0f} % of their running statistics are still the values from before."
    severity: Severity = "warning" if few[least] < _FEW else "note"
    numbers = {"norms": len(few), "updates": few[least], "usual": usual, "initial_weight": weight}
    yield Evidence(severity, tuple(few), words, _advise(facts), numbers)


def _count_least(norm: NormFacts) -> int | None:
    """Mini-batches of the level or domain that has the fewest; None where one is not counted."""
    counters = [population.num_updates for population in norm.populations]
    known = [number for number in counters if number is not None]
    return min(known) if known and len(known) == len(counters) else None


def _advise(facts: Facts) -> Remedy:
    text = "Let the training reach the layer as inference does, or re-estimate the statistics of its final weights."
    call = "bnext.recompute_population_statistics(model, data)"
    if facts.origin.kind == "config" and facts.weights is not None and facts.weights.is_loaded:
        return Remedy(text, command=facts.origin.write_command("reestimate", "--output", "repaired.pth"), call=call)
    keys = {"TEST.PRECISE_BN.ENABLED": True} if facts.origin.kind == "config" else {}
    return Remedy(text, keys=keys, call=call)


CHECK = Check(
    code="BN016",
    name="rarely-updated",
    title="running statistics are hardly updated by the training",
    explanation=(
        "A moving average needs about 3 / momentum mini-batches to forget the values that it began with. A head that "
        "few images reach, a level or domain that is rare, or a branch that the training skips and inference does not, "
        "is normalized at inference by values from before."
    ),
    cost="",
    source="",
    depth="training",
    examine=_examine,
)
