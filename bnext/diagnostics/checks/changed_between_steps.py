"""BN025: running statistics that change between the steps of a training."""

from __future__ import annotations

from collections.abc import Iterator

from bnext.diagnostics.facts import Facts
from bnext.diagnostics.findings import Check, Evidence, Remedy

__all__ = ["CHECK"]


def _examine(facts: Facts) -> Iterator[Evidence]:
    if facts.steps is None or not facts.steps.changed_between:
        return

    changed = facts.steps.changed_between
    first = min(changed.values())
    when = "before the first step" if first < 0 else f"between two steps, first after iteration {first}"
    words = f"The running statistics of {len(changed)} norms took in something {when}: a forward in training mode that "
    words += "trains nothing, such as a validation loss or a warm-up."

    text = "Put that forward into evaluation mode, or keep the statistics from it."
    keys: dict[str, object] = {}
    if facts.origin.kind == "config":
        text += " bnext's own validation loss changes nothing of the model."
        keys["TEST.BNEXT.VALIDATION_LOSS.PERIOD"] = 1000
    remedy = Remedy(text, keys=keys, call="with bnext.frozen_statistics(model):\n    model(batch)")
    yield Evidence("warning", tuple(changed), words, remedy, {"norms": len(changed), "iteration": first})


CHECK = Check(
    code="BN025",
    name="changed-between-steps",
    title="a forward that is no training changes running statistics",
    explanation=(
        "The losses of detectors exist in training mode alone, so people validate in it: the running statistics then "
        "take in validation images, and what is measured is no longer independent of them. A dummy forward of zeros or "
        "noise moves them, too. `torch.no_grad()` does not help; a re-estimation is no such forward, and is told by "
        "`TrainingWatch.accept`."
    ),
    cost="",
    source="detectron2#810, detectron2#1857, ultralytics PR#18149",
    depth="training",
    examine=_examine,
)
