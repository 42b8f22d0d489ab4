"""BN002: population statistics of other features than those that were normalized together in training."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from bnext.diagnostics.facts import Facts, NormFacts, Population
from bnext.diagnostics.findings import Check, Evidence, Remedy, Severity
from bnext.diagnostics.measures.initial_state import find_unwritten
from bnext.layers.sources import is_per_domain, is_per_level

__all__ = ["CHECK"]

_ALIKE = 0.2  # standard deviations, or logarithm of their ratio, below which one population is as good as several
_POINTS = {"per_level": 37.0, "shared": 5.0}  # by what is stored: Table 5, rows 2 and 3


def _examine(facts: Facts) -> Iterator[Evidence]:
    trained = {} if facts.weights is None else facts.weights.statistics
    groups: dict[tuple[str, str, str], list[NormFacts]] = {}

    for norm in facts.batch_norms:
        record = norm.record
        if record.population == "none" or record.inference != "population" or record.training != "mini_batch":
            continue
        statistics = trained.get(norm.path, record.statistics)
        is_repeated = record.statistics != "shared" and record.population == "shared"  # which BN001 knows
        if statistics != record.population and not is_repeated:
            groups.setdefault((norm.place, statistics, record.population), []).append(norm)

    for (place, statistics, population), norms in groups.items():
        yield _judge(facts, place, statistics, population, norms)


def _judge(facts: Facts, place: str, statistics: str, population: str, norms: Sequence[NormFacts]) -> Evidence:
    distances = [_measure(norm) for norm in norms]
    measured = [distance for distance in distances if distance is not None]
    distance = max(measured) if len(measured) == len(norms) else None

    number = max(len(norm.record.domains) for norm in norms)
    features = {"per_level": "levels", "per_domain": "domains", "per_level_and_domain": "pairs of level and domain"}
    words = {"shared": "one for all", **{name: f"those of {number} {text}" for name, text in features.items()}}
    text = f"{len(norms)} norms normalize in training by mini-batch statistics that are {statistics.replace('_', ' ')}"
    text += ", as the file says," if _is_said(facts, norms) else ""
    text += f" and at inference by population statistics that are {population.replace('_', ' ')}: {words[population]}."

    numbers = {"norms": float(len(norms))}
    if distance is not None:
        text += f" They are up to {distance:.2g} standard deviations apart."
        numbers["distance"] = distance

    severity: Severity = "error"
    is_adapted = is_per_domain(population) and is_per_level(population) == is_per_level(statistics)
    if is_adapted or (distance is not None and distance < _ALIKE):
        severity = "note"  # statistics of each domain are what adaptation to it is
    points = _POINTS.get(population) if severity == "error" else 0.0
    return Evidence(
        severity, tuple(norm.path for norm in norms), text, _advise(facts, place, statistics, norms), numbers, points
    )


def _is_said(facts: Facts, norms: Sequence[NormFacts]) -> bool:
    return facts.weights is not None and any(norm.path in facts.weights.statistics for norm in norms)


def _measure(norm: NormFacts) -> float | None:
    """Largest distance between populations of a norm; None: there are no two that were written."""
    unwritten = find_unwritten(norm)
    written = [population for population in norm.populations if population not in unwritten]
    if len(written) < 2:
        return None
    return max(_compare(one, other) for one, other in itertools.combinations(written, 2))


def _compare(one: Population, other: Population) -> float:
    """Mean over channels of the distance of the means, in standard deviations, and of the ratio of the deviations."""
    tiny = 1e-12
    scale = ((one.var + other.var) / 2).sqrt().clamp(min=tiny)
    of_means = float(((one.mean - other.mean).abs() / scale).mean())
    of_scales = float((one.var.clamp(min=tiny) / other.var.clamp(min=tiny)).log().abs().mean()) / 2
    return max(of_means, of_scales)


def _advise(facts: Facts, place: str, trained: str, norms: Sequence[NormFacts]) -> Remedy:
    text = "Keep the population statistics that training had, and estimate them: no weight is trained."
    lines = f'bnext.convert_norm(model, population="{trained}")\nbnext.recompute_population_statistics(model, data)'
    if facts.origin.kind == "model":
        return Remedy(text, call=lines)

    keys: dict[str, object] = {f"MODEL.BNEXT.{place}.POPULATION": trained} if place else {}
    pairs: tuple[str, ...] = ()
    if place and any(norm.record.statistics != trained for norm in norms):
        pairs = (f"MODEL.BNEXT.{place}.STATISTICS", trained)  # else the output would say that it was trained otherwise
        keys[pairs[0]] = trained
    if facts.origin.kind == "config" and (facts.weights is None or not facts.weights.is_loaded):
        return Remedy("Train with the population statistics of the mini-batches.", keys=keys)

    options = ("--population", trained, "--output", "repaired.pth")
    command = facts.origin.write_command("reestimate", *options, pairs=pairs)
    return Remedy(f"{text} To load the output, set the keys.", keys=keys, command=command)


CHECK = Check(
    code="BN002",
    name="stored-otherwise",
    title="population statistics are of other features than the mini-batches of training",
    explanation=(
        "Normalization at inference must be by the statistics of the same features as in training. A head that was "
        "trained with one mini-batch of all levels needs one population for all: with one for each level every level "
        "gets mean 0 and variance 1, which no layer behind it has ever seen. One population for each data set is what "
        "adaptation does on purpose; compare both on images of each set."
    ),
    cost="2.1 (shared, stored per level) or 34.1 (per level, stored shared) instead of 39.1 AP (RetinaNet on COCO, 3x)",
    source="Wu and Johnson 2021, Table 5, rows 2 and 3",
    depth="static",
    examine=_examine,
    points=37.0,
)
