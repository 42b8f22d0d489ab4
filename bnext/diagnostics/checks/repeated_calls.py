"""BN001: a norm that is called on several features in one forward, with one set of running statistics for all."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import torch

from bnext.diagnostics.batch_remedies import name_architecture
from bnext.diagnostics.facts import Call, Facts, NormFacts
from bnext.diagnostics.findings import Check, Evidence, Remedy, Severity
from bnext.diagnostics.measures.batch_sizes import divide_calls
from bnext.functional import Moments, merge_moments
from bnext.layers.sources import is_per_level

__all__ = ["CHECK"]

_LEAST_UNSEEN = 3  # features, where nobody saw how far apart they are: two may be views of one image
_ALIKE = 0.2  # standard deviations between calls from which on one moving average cannot stand for both


def _examine(facts: Facts) -> Iterator[Evidence]:
    by_place: dict[str, dict[str, tuple[int, float | None]]] = {}
    usual = _find_usual_updates(facts)
    for norm in facts.batch_norms:
        if not norm.is_by_mini_batch or norm.record.population != "shared":
            continue
        number, distance = _look(facts, norm, usual)
        if number > 1:
            by_place.setdefault(norm.place, {})[norm.path] = number, distance

    for place, seen in by_place.items():
        yield _judge(facts, place, seen)


def _judge(facts: Facts, place: str, seen: dict[str, tuple[int, float | None]]) -> Evidence:
    """One place of a detector, whose norms are mended together."""
    number = max(calls for calls, _ in seen.values())
    measured = [distance for _, distance in seen.values() if distance is not None]
    distance = max(measured, default=None)

    deed = "1 norm normalizes" if len(seen) == 1 else f"{len(seen)} norms normalize"
    words = f"{deed} {number} features of a forward each by its own statistics, with one moving average for all of "
    words += "them, which normalizes at inference."
    numbers = {"norms": float(len(seen)), "calls": float(number)}
    if distance is not None:
        words += f" Their means are up to {distance:.2g} standard deviations apart."
        numbers["distance"] = distance

    severity: Severity = "note" if distance is not None and distance < _ALIKE else "error"
    return Evidence(severity, tuple(seen), words, _advise(facts, place, seen), numbers)


def _advise(facts: Facts, place: str, paths: Iterable[str]) -> Remedy:
    selected = f", layers=lambda path, norm: path in {list(paths)!r}" if _has_one_size(facts, paths) else ""
    call = f"bnext.repair(model, data{selected})  # before an evaluation; statistics for each of them"
    if facts.origin.kind == "model":
        return Remedy("Give each its own population statistics; no weight is trained.", call=call)

    weights = facts.weights
    keys = _choose_keys(facts, place)
    if keys is not None and weights is not None and all(weights.populations.get(path) == "per_level" for path in paths):
        keys[f"MODEL.BNEXT.{place}.POPULATION"] = "per_level"
        return Remedy("The file has statistics for each level, which this config makes one: keep them.", keys=keys)
    is_shared = weights is not None and all(weights.statistics.get(path) == "shared" for path in paths)  # in training
    if weights is not None and weights.is_loaded and not is_shared:
        command = facts.origin.write_command("reestimate", "--population", "per_level", "--output", "repaired.pth")
        return Remedy("Re-estimate the statistics for each level; no weight is trained.", command=command, call=call)
    if keys is None:
        return Remedy("Give each its own population statistics; no weight is trained.", call=call)
    keys[f"MODEL.BNEXT.{place}.STATISTICS"] = "shared"
    text = "Train with one mini-batch of all levels, or with a population for each (POPULATION per_level)."
    return Remedy(text, keys=keys, call=call)


def _choose_keys(facts: Facts, place: str) -> dict[str, object] | None:
    """Keys that make an architecture heed MODEL.BNEXT; None: none reaches these norms, as in one of the user's own."""
    keys = name_architecture(facts)
    is_heeded = bool(keys) or str(facts.get_config("MODEL.META_ARCHITECTURE")).startswith("BNext")
    return keys if place and is_heeded else None


def _has_one_size(facts: Facts, paths: Iterable[str]) -> bool:
    """Whether some norm got features of the same size in all its calls of a forward."""
    every = [forward.calls[path] for forward in facts.forwards for path in paths if path in forward.calls]
    return any(len(calls) > 1 and len({call.size for call in calls}) == 1 for calls in every)


def _look(facts: Facts, norm: NormFacts, usual: int | None) -> tuple[int, float | None]:
    """The features that a norm normalizes apart in one forward, and how far apart they are, where that was seen."""
    is_apart = is_per_level(norm.record.statistics)
    number, distances = 0, []
    for forward in facts.forwards:
        groups = list(divide_calls(norm, forward))
        number = max(number, len(groups))
        if len(groups) > 1 and not forward.is_noise:
            distances.append(_measure(groups))

    if number == 0 and (is_apart or not norm.record.domains):
        number = len(norm.levels) or _count_in_steps(facts, norm) or _count_by_updates(facts, norm, usual)
    return number, max(distances, default=None)


def _count_in_steps(facts: Facts, norm: NormFacts) -> int:
    """The features of a forward of a running training. 0: not known."""
    number = facts.steps.calls.get(norm.path, 0) if facts.steps is not None else 0
    return number if number >= _LEAST_UNSEEN else 0


def _find_usual_updates(facts: Facts) -> int | None:
    """The number of updates that most populations have counted."""
    counts = Counter(population.num_updates for norm in facts.batch_norms for population in norm.populations)
    return max(set(counts), key=counts.__getitem__, default=None)


def _count_by_updates(facts: Facts, norm: NormFacts, usual: int | None) -> int:
    """The features of a forward by the updates that a file has counted, for one of those that most norms have.

    Twice as many are not taken for two features: a recomputation counts them, too. 0: not known.
    """
    updates = norm.populations[0].num_updates if norm.populations else None
    if not usual or not updates or facts.steps is not None:
        return 0

    number, rest = divmod(updates, usual)
    return number if not rest and number >= _LEAST_UNSEEN else 0


def _measure(groups: Sequence[Sequence[Call]]) -> float:
    """Largest distance between two mini-batches: the mean over channels, in the standard deviations of both."""
    moments = []
    for calls in groups:
        parts = Moments(*(torch.cat(fields) for fields in zip(*(call.samples for call in calls), strict=True)))
        moments.append(merge_moments(parts))

    distances = []
    for one, other in itertools.combinations(moments, 2):
        scale = ((one.var + other.var) / 2).sqrt().clamp(min=1e-12)
        distances.append(float(((one.mean - other.mean).abs() / scale).mean()))
    return max(distances)


CHECK = Check(
    code="BN001",
    name="repeated-calls",
    title="one norm is called on several features of a forward, with one moving average for all",
    explanation=(
        "In training each call is normalized by its own mini-batch, at inference all of them by one moving average "
        "that none of them has. A head that all levels of a pyramid share does that with a plain BN. Calls on features "
        "that are alike, as two views of one image, lose nothing."
    ),
    cost="34.1 instead of 39.1 AP (RetinaNet R50-FPN on COCO, 3x)",
    source="Wu and Johnson 2021, Table 5, row 3",
    depth="static",
    examine=_examine,
    points=5.0,
)
