"""BN008: few samples that are normalized together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bnext.diagnostics.batch_remedies import NO_MORE, choose_larger_batch
from bnext.diagnostics.facts import Facts, NormFacts
from bnext.diagnostics.findings import Check, Evidence, Severity
from bnext.diagnostics.measures.batch_sizes import count_together, has_many_samples

__all__ = ["CHECK"]

_FEW = 4  # up to here even mini-batches at inference, which are a makeshift, win over population statistics
# Points of validation error by population statistics, over those of 32 samples: Wu and Johnson 2021, section 4.
_POINTS = {8: 0.9, 4: 3.0, 2: 9.1, 1: 9.1}  # of a single sample nothing was published; it is no better than two


def _examine(facts: Facts) -> Iterator[Evidence]:
    if facts.training is not None and facts.training.accumulation > 1:
        return  # BN009 says it

    by_number: dict[int, list[NormFacts]] = {}
    for norm in facts.batch_norms:
        number = count_together(facts, norm)
        if number is not None and number <= NO_MORE and not has_many_samples(facts, norm):
            by_number.setdefault(number, []).append(norm)

    for number, norms in sorted(by_number.items()):
        yield _judge(facts, number, norms)


def _judge(facts: Facts, number: int, norms: Sequence[NormFacts]) -> Evidence:
    severity: Severity = "error" if number == 1 else "note"
    if 1 < number <= _FEW:
        severity = "warning"

    total = sum(norm.is_by_mini_batch for norm in facts.batch_norms)
    samples = "a single sample" if number == 1 else f"{number} samples"
    text = (
        f"{len(norms)} of {total} batch norms normalize {samples} at a time in training, by statistics that change "
        "from batch to batch; at inference the steady ones of the population do."
    )
    points = next(value for size, value in sorted(_POINTS.items()) if size >= number)
    paths = tuple(norm.path for norm in norms)
    numbers = {"samples": float(number), "norms": float(len(norms))}
    return Evidence(severity, paths, text, choose_larger_batch(facts, norms), numbers, points)


CHECK = Check(
    code="BN008",
    name="small-normalization-batch",
    title="few samples are normalized together",
    explanation=(
        "The fewer samples a mini-batch has, the further its statistics are from those of the population, which "
        "normalize at inference. What counts is the number of samples that are normalized together, not that of an SGD "
        "step: that of one worker with BN, of all with SyncBN, of a group with Ghost BN. From 16 on nothing is lost; "
        "up to 8 frozen statistics of a good training win. Norms that see many samples of each image, as RoI heads, "
        "have other troubles (correlated-mini-batches). An inference-only model has no mini-batches."
    ),
    cost="validation error 24.3 % with 8, 26.4 % with 4, 32.5 % with 2 samples, 23.4 % with 32 (ResNet-50, ImageNet)",
    source="Wu and Johnson 2021, section 4",
    depth="static",
    examine=_examine,
    points=9.1,
)
