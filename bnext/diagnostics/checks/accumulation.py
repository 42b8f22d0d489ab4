"""BN009: gradients of micro-batches that are added up, while each micro-batch is normalized alone."""

from __future__ import annotations

from collections.abc import Iterator

from bnext.diagnostics.batch_remedies import NO_MORE, choose_larger_batch
from bnext.diagnostics.facts import Facts
from bnext.diagnostics.findings import Check, Evidence, Severity
from bnext.diagnostics.measures.batch_sizes import count_together

__all__ = ["CHECK"]

_ENOUGH = 16  # samples from which on nothing is lost (Wu and Johnson 2021, section 4)


def _examine(facts: Facts) -> Iterator[Evidence]:
    training = facts.training
    if training is None or training.accumulation <= 1:
        return

    numbers = {norm: count_together(facts, norm) for norm in facts.batch_norms}
    small = {norm: number for norm, number in numbers.items() if number is not None and number < _ENOUGH}
    if not small:
        return

    least = min(small.values())
    per_step = (training.images_per_worker or 1) * (training.num_workers or 1) * training.accumulation
    text = (
        f"An SGD step adds up {training.accumulation} micro-batches, {per_step} images in all, but {len(small)} batch "
        f"norms see one micro-batch at a time and normalize {least} samples together."
    )
    severity: Severity = "warning" if least <= NO_MORE else "note"
    paths = tuple(norm.path for norm in small)
    values = {"accumulation": float(training.accumulation), "samples": float(least), "images_per_step": float(per_step)}
    yield Evidence(severity, paths, text, choose_larger_batch(facts, list(small)), values)


CHECK = Check(
    code="BN009",
    name="accumulation",
    title="accumulated gradients leave the normalization batch small",
    explanation=(
        "Accumulation makes the batch of an SGD step large, not that of a norm: each micro-batch is normalized by its "
        "own statistics, as in a Ghost BN of its size. From 16 samples on that loses nothing. Below, more of them "
        "do not help; SyncBN over several workers, GroupNorm or frozen statistics do."
    ),
    cost="8 % of a metric, in a training whose author was warned, and got no advice",
    source="mmcv#1869, mmcv#2074",
    depth="static",
    examine=_examine,
)
