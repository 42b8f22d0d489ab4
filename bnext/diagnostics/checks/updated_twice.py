"""BN015: running statistics that take in every mini-batch twice, as under activation checkpointing."""

from __future__ import annotations

from collections.abc import Iterator

from bnext.diagnostics.facts import Facts, StepFacts
from bnext.diagnostics.findings import Check, Evidence, Remedy, Severity
from bnext.diagnostics.measures.counted_updates import expect_updates, find_live_norms

__all__ = ["CHECK"]

_LEAST = 1.5  # updates a call: whoever runs a layer again does so in every step, which gives 2 or more
_OF_A_FILE = (2, 3)  # updates an iteration
_EXACT = 0.02  # counters of a file are those of its iterations to the digit, but for a mini-batch that was left out
_FEW = 100  # iterations, in which a file's counters may be anything by chance
_LISTED = 8  # norms that a remedy names one by one


def _examine(facts: Facts) -> Iterator[Evidence]:
    if facts.steps is not None and facts.steps.num_forwards:
        yield from _look_at_steps(facts, facts.steps)
    elif facts.weights is not None and facts.weights.is_loaded and facts.weights.iteration is not None:
        yield from _look_at_file(facts, facts.weights.iteration + 1)


def _look_at_steps(facts: Facts, steps: StepFacts) -> Iterator[Evidence]:
    ratios = {}
    for norm in find_live_norms(facts):
        expected = expect_updates(facts, norm)
        if expected is not None and norm.path in steps.updates:
            ratios[norm.path] = steps.updates[norm.path] / (steps.num_forwards * expected)

    twice = {path: ratio for path, ratio in ratios.items() if ratio >= _LEAST}
    if twice:
        times = max(twice.values())
        words = f"{len(twice)} of {len(ratios)} batch norms took in {times:.3g} mini-batches in each of their calls, "
        words += f"in {steps.num_forwards} forwards of {steps.num_steps} steps."
        yield _tell(facts, "warning", tuple(twice), words, times)


def _look_at_file(facts: Facts, num_steps: int) -> Iterator[Evidence]:
    """Counters that are a multiple of the iterations, beside others that are not."""
    accumulation = facts.training.accumulation if facts.training is not None else 1
    ratios, unknown = {}, set()
    for norm in find_live_norms(facts):
        counters = [population.num_updates for population in norm.populations if population.num_updates]
        expected = expect_updates(facts, norm)
        if counters:
            ratios[norm.path] = max(counters) / (num_steps * accumulation * (expected or 1))
        if expected is None:
            unknown.add(norm.path)

    twice = {path: ratio for path, ratio in ratios.items() if any(abs(ratio / n - 1) < _EXACT for n in _OF_A_FILE)}
    if not twice or num_steps < _FEW:
        return

    times = max(twice.values())
    words = f"{len(twice)} of {len(ratios)} batch norms have counted {times:.3g} mini-batches for each of the "
    words += f"{num_steps} iterations of the file."
    is_certain = len(twice) < len(ratios) and not unknown & set(twice)
    if not is_certain:
        words += " They may be called as often in one forward, or have begun with counters of another training."
    yield _tell(facts, "warning" if is_certain else "note", tuple(twice), words, times)


def _tell(facts: Facts, severity: Severity, paths: tuple[str, ...], words: str, times: float) -> Evidence:
    momenta = [norm.record.momentum for norm in facts.norms if norm.path in paths and norm.record.momentum]
    if momenta:
        effective = 1 - (1 - momenta[0]) ** round(times)
        words += f" A momentum of {momenta[0]:.3g} then works as one of {effective:.3g}."

    is_shared = any(norm.record.workers == "all" for norm in facts.norms if norm.path in paths)
    spec = "bnext.NormSpec(workers='all')" if is_shared else "bnext.NormSpec()"
    patterns = paths if len(paths) <= _LISTED else ("",)
    call = f"bnext.convert_norm(model, dict.fromkeys({patterns!r}, {spec}))  # before the optimizer is built"
    text = "Make them norms of bnext, which know a recomputation and do not take it in again."
    return Evidence(severity, paths, words, Remedy(text, call=call), {"norms": len(paths), "updates": times})


CHECK = Check(
    code="BN015",
    name="updated-twice",
    title="running statistics take in every mini-batch twice",
    explanation=(
        "Activation checkpointing runs a layer again in the backward, and a batch norm of torch then updates its "
        "statistics once more: the moving average forgets about twice as fast as its momentum says, and the counter no "
        "longer counts steps. A norm that is called on several features in one forward is another thing: BN001."
    ),
    cost="",
    source="pytorch#96136",
    depth="training",
    examine=_examine,
)
