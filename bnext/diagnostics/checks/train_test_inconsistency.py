"""BN021: a model that is worse with its population statistics than with others that it could have at inference."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

from bnext.diagnostics.facts import Facts
from bnext.diagnostics.findings import Check, Evidence, Remedy, Severity

__all__ = ["CHECK"]

# Of a score, in points and relative to the better one. All kinds see the same images, so that repeating moves COCO's
# AP by less than half a point; weights near convergence gain 0.2 points by precise statistics.
_LEAST_POINTS, _LEAST_SHARE = 1.0, 0.03
_LEAST_LOSS = 0.1  # of a loss, relative to the better one; the same images again
_WRONG = 0.2  # of the better one, from which on it is no loss of accuracy but a fault
_WORDS = {"population": "as they are", "mini_batch": "of the mini-batch", "precise": "re-estimated"}


@dataclasses.dataclass(frozen=True)
class _Gap:
    """By how much population statistics are worse than another kind, relative to it; negative: better.

    Args:
        share: of the other's loss or score.
        points: of the score; None: it is one of losses.
        is_seen: whether it is more than chance.
    """

    share: float
    points: float | None
    is_seen: bool


def _examine(facts: Facts) -> Iterator[Evidence]:
    evaluation = facts.evaluation
    if evaluation is None:
        return

    by_score = "population" in evaluation.ap and max(evaluation.ap.values()) >= _LEAST_POINTS
    values = evaluation.ap if by_score else evaluation.losses
    to_precise, to_mini_batch = (_find_gap(values, kind, is_score=by_score) for kind in ("precise", "mini_batch"))

    if to_precise is not None and to_precise.is_seen:
        yield _judge(facts, to_precise, is_mended=True)
    elif to_mini_batch is not None and to_mini_batch.is_seen:
        yield _judge(facts, to_mini_batch, is_mended=False)


def _find_gap(values: Mapping[str, float], kind: str, *, is_score: bool) -> _Gap | None:
    if kind not in values or "population" not in values:
        return None
    here, there = values["population"], values[kind]
    if is_score:
        points = there - here
        share = points / max(there, 1e-12)
        return _Gap(share, points, points >= _LEAST_POINTS and share >= _LEAST_SHARE)
    share = (here - there) / max(abs(there), 1e-12)
    return _Gap(share, None, not share < _LEAST_LOSS)  # a loss that is no number counts


def _judge(facts: Facts, gap: _Gap, *, is_mended: bool) -> Evidence:
    severity: Severity = "warning" if gap.share < _WRONG else "error"
    where = f" on {facts.evaluation.dataset}" if facts.evaluation is not None and facts.evaluation.dataset else ""
    text = f"With one set of weights and three kinds of statistics{where}: {_describe(facts)}. "
    if is_mended:
        text += "The running statistics are wrong, the weights are not."
    else:
        text += (
            "Re-estimated statistics are no better: one population does not describe what the norms see, as of several "
            "levels or domains, of correlated samples, or of mini-batches of very few."
        )

    layers = _find_layers(facts) if is_mended else ()
    numbers = {"share": gap.share} | ({} if gap.points is None else {"points": gap.points})
    remedy = _advise_estimate(facts) if is_mended else _advise_consistency(facts)
    return Evidence(severity, layers, text, remedy, numbers)


def _describe(facts: Facts) -> str:
    assert facts.evaluation is not None
    parts = []
    for name, values in {"AP or accuracy": facts.evaluation.ap, "loss": facts.evaluation.losses}.items():
        if values:
            of_kinds = (f"{values[kind]:.4g} {words}" for kind, words in _WORDS.items() if kind in values)
            parts.append(f"{name} {', '.join(of_kinds)}")
    return "; ".join(parts)


def _find_layers(facts: Facts) -> tuple[str, ...]:
    """Norms whose statistics were re-estimated."""
    return tuple(dict.fromkeys(path for path, _ in facts.population))


def _advise_estimate(facts: Facts) -> Remedy:
    text = "Re-estimate the statistics on training images; no weight is trained."
    call = "from bnext.statistics import recompute_population_statistics\nrecompute_population_statistics(model, data)"
    if facts.origin.kind != "config":
        return Remedy(text, call=call)
    command = ""
    if facts.weights is not None and facts.weights.is_loaded:
        command = facts.origin.write_command("reestimate", "--output", "reestimated.pth")
    return Remedy(text, {"TEST.PRECISE_BN.ENABLED": True}, command, call)


def _advise_consistency(facts: Facts) -> Remedy:
    text = (
        "Let inference normalize as training does: statistics for each level or domain; normalization over all workers "
        "(SyncBN) or RoIs of many images; with very few samples, frozen statistics for the last part of the training, "
        "or mini-batch statistics at inference."
    )
    if facts.origin.kind != "config" or facts.weights is None or not facts.weights.is_loaded:
        return Remedy(text)
    return Remedy(text, command=facts.origin.write_command("compare", "--output", "comparison"))


CHECK = Check(
    code="BN021",
    name="train-test-inconsistency",
    title="the model is worse with its population statistics than with others",
    explanation=(
        "One set of weights, evaluated on the same images with three kinds of statistics: those of the file, those of "
        "the mini-batch as in training, and re-estimated ones. If re-estimated ones are better, those of the file are "
        "wrong. If only the mini-batch is better, training and inference normalize differently in a way that no single "
        "population mends. A model that is worse by mini-batches is healthy: they add noise."
    ),
    cost="32.5 instead of 26.0 % error (ResNet-50 on ImageNet, normalization batch size 2)",
    source="Wu and Johnson 2021, section 4",
    depth="full",
    examine=_examine,  # without points: it is a symptom, and comes after its cause where that is found, too
)
