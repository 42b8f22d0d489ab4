"""BN022: workers whose running statistics are apart, so that each evaluates another model."""

from __future__ import annotations

from collections.abc import Iterator

from bnext.diagnostics.facts import Facts
from bnext.diagnostics.findings import Check, Evidence, Remedy, Severity

__all__ = ["CHECK"]

# Standard deviations between the means of two workers. From 0.2 on one moving average cannot stand for both, as between
# the calls of a norm. A moving average with momentum 0.1 that is one mini-batch of a few images behind is 0.03 apart,
# which a training that makes buffers equal before every step has, too. Below 0.001 it is rounding.
_APART, _MORE_THAN_A_STEP, _ALIKE = 0.2, 0.05, 0.001


def _examine(facts: Facts) -> Iterator[Evidence]:
    distances = facts.worker_differences or {}
    apart = {path: distance for path, distance in distances.items() if distance > _ALIKE}
    if not apart:
        return

    worst = max(apart.values())
    severity: Severity = "error" if worst > _APART else "note"
    if _MORE_THAN_A_STEP < worst <= _APART:
        severity = "warning"

    amount = f"up to {worst:.2g} standard deviations (mean over channels)" if worst < float("inf") else "without limit"
    text = (
        f"The running means of {len(apart)} of {len(distances)} batch norms differ by {amount} between workers. Each "
        "evaluates with its own, and those of worker 0 are saved."
    )
    remedy = Remedy(
        "Make them equal before an evaluation and before saving; with SyncBN they stay so.",
        call="from bnext.distributed.equal_buffers import equalize_buffers\nequalize_buffers(model)  # on every worker",
    )
    paths = tuple(sorted(apart, key=lambda path: -apart[path]))
    yield Evidence(severity, paths, text, remedy, {"distance": worst, "norms": float(len(apart))})


CHECK = Check(
    code="BN022",
    name="workers-differ",
    title="running statistics differ between workers",
    explanation=(
        "A BN of one worker follows that worker's images. DistributedDataParallel gives all workers those of worker 0 "
        "before each forward, unless broadcast_buffers is False, as it is in detectron2; statistics that every worker "
        "re-estimates alone differ, too. The metric of a run is then a mixture of several models, and none of them but "
        "the one of worker 0 is in the checkpoint."
    ),
    cost="",
    source="detectron2#5398, detectron2#1297, mmdetection#2539",
    depth="static",
    examine=_examine,
)
