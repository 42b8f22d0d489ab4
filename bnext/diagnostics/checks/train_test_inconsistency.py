"""BN021: a model that is worse with its population statistics than with others that it could have at inference."""

from __future__ import annotations

from collections.abc import Iterator

from bnext.diagnostics.facts import EvaluationFacts, Facts
from bnext.diagnostics.findings import Check, Evidence, Remedy, Severity
from bnext.diagnostics.measures.gaps import Gap, find_gap
from bnext.diagnostics.re_estimation import advise_precise_statistics

__all__ = ["CHECK"]

_WORDS = {"population": "as they are", "mini_batch": "of the mini-batch", "precise": "re-estimated"}


def _examine(facts: Facts) -> Iterator[Evidence]:
    to_precise, to_mini_batch = (find_gap(facts.evaluation, kind) for kind in ("precise", "mini_batch"))

    if to_precise is not None and to_precise.is_seen:
        yield _judge(facts, to_precise, is_mended=True)
    elif to_mini_batch is not None and to_mini_batch.is_seen:
        yield _judge(facts, to_mini_batch, is_mended=False)


def _judge(facts: Facts, gap: Gap, *, is_mended: bool) -> Evidence:
    severity: Severity = "error" if gap.is_wrong else "warning"
    where = f" on {facts.evaluation.dataset}" if facts.evaluation is not None and facts.evaluation.dataset else ""
    text = f"With one set of weights and three kinds of statistics{where}: {_describe(facts)}. "
    if is_mended:
        text += "The running statistics are wrong, the weights are not."
    else:
        text += (
            "Re-estimated statistics are hardly better: one population does not describe what the norms see, as of "
            "several levels or domains, of correlated samples, or of mini-batches of very few."
        )

    layers = _find_layers(facts) if is_mended else ()
    numbers = {"share": gap.share} | ({} if gap.points is None else {"points": gap.points})
    remedy = _advise_estimate(facts) if is_mended else _advise_consistency(facts)
    return Evidence(severity, layers, text, remedy, numbers)


def _describe(facts: Facts) -> str:
    evaluation = facts.evaluation or EvaluationFacts()
    parts = []
    for name, values in {"AP or accuracy": evaluation.ap, "loss": evaluation.losses}.items():
        if values:
            of_kinds = (f"{values[kind]:.4g} {words}" for kind, words in _WORDS.items() if kind in values)
            parts.append(f"{name} {', '.join(of_kinds)}")
    return "; ".join(parts)


def _find_layers(facts: Facts) -> tuple[str, ...]:
    """Norms whose statistics were re-estimated."""
    return tuple(dict.fromkeys(path for path, _ in facts.population))


def _advise_estimate(facts: Facts) -> Remedy:
    return advise_precise_statistics(facts, "Re-estimate the statistics on training images; no weight is trained.")


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
